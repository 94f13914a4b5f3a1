"""From prompts to the conditioning of a network."""
