"""Captioned digits: scenes, the images of them, and captions."""
