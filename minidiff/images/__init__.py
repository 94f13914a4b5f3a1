"""Pictures: from and to files and arrays, and drawn."""
