"""Commands that show how samplers work."""
