"""Training of diffusion models and autoencoders."""
