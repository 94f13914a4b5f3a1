"""The exercises and planted bugs, one file per topic."""
