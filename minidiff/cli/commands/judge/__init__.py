"""Commands that score, check and list what is there."""
