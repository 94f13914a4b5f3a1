"""Networks: functions of (x, t, conditioning), independent of any diffusion process."""

from minidiff.nn.autoencoder import AutoencoderKL
from minidiff.nn.blocks.patch import SpaceToDepth
from minidiff.nn.controlnet import ControlNet
from minidiff.nn.dit import DiT
from minidiff.nn.mlp import MLP
from minidiff.nn.mmdit import MMDiT
from minidiff.nn.model import DenoisingNetwork
from minidiff.nn.t5 import T5Encoder
from minidiff.nn.text import TextEncoder
from minidiff.nn.unet import UNet

__all__ = [
    "MLP", "AutoencoderKL", "ControlNet", "DenoisingNetwork", "DiT", "MMDiT", "SpaceToDepth",
    "T5Encoder", "TextEncoder", "UNet",
]  # fmt: skip
