"""Networks: functions of (x, t, conditioning), independent of any diffusion process."""

from minidiff.nn.autoencoder import AutoencoderKL
from minidiff.nn.blocks.patch import SpaceToDepth
from minidiff.nn.controlnet import ControlNet
from minidiff.nn.mlp import MLP
from minidiff.nn.text import TextEncoder
from minidiff.nn.unet import UNet

__all__ = ["MLP", "AutoencoderKL", "ControlNet", "SpaceToDepth", "TextEncoder", "UNet"]
