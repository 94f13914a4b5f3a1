"""One file a command: `add_to` is its grammar, and a function of its name what it does."""
