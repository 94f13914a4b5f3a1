"""Captioned digits: what is in a picture, and what a caption says of it."""
