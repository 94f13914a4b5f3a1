"""The options of networks, checked and resolved before a network is built."""
