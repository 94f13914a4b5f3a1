"""Diffusion beyond one picture: cascades, video, audio and volumes."""
