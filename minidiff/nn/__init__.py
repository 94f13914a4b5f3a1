"""Networks: they know (x, t, conditioning) and no diffusion."""

from minidiff.nn.unet import UNet

__all__ = ["UNet"]
