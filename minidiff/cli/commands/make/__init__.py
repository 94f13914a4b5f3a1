"""Commands that train, sample and write models."""
