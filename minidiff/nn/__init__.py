"""Networks: they know (x, t, conditioning) and no diffusion."""

from minidiff.nn.autoencoder import AutoencoderKL
from minidiff.nn.blocks.patch import SpaceToDepth
from minidiff.nn.mlp import MLP
from minidiff.nn.text import TextEncoder
from minidiff.nn.unet import UNet

__all__ = ["MLP", "AutoencoderKL", "SpaceToDepth", "TextEncoder", "UNet"]
