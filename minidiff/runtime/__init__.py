"""What is not about diffusion: files, tensors in them, devices, processes."""
