"""From a text to what a network is given of it."""
