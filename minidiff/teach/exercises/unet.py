"""Exercises on the network (notebook 09)."""

import math

import torch
from torch import nn

from minidiff.nn import SpaceToDepth
from minidiff.nn.blocks.embeddings import SinusoidalTime
from minidiff.teach.exercise import Exercise, Wrong, noise


def _angles(t, channels, less=0):
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half) / (half - less))
    return t[:, None] * frequencies


def time_features(t, channels):
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
    angles = t[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _swapped_axes(t, channels):
    angles = _angles(t, channels).repeat(1, 2)
    angles[::2], angles[1::2] = angles[::2].sin(), angles[1::2].cos()
    return angles


TIME = Exercise(
    "time-features",
    9,
    "Write time_features(t, channels): sin(t·ωᵢ), then cos(t·ωᵢ), ωᵢ = 10000^(−i/half), "
    "half = channels // 2. t is (B,), the result (B, channels).",
    lambda t, channels: SinusoidalTime(channels, flip_sin_to_cos=False, freq_shift=0)(t),
    lambda: [(torch.tensor([0.0, 1.0, 10.0, 999.0]), channels) for channels in (8, 32)],
    time_features,
    "The outer product of t and ω, (B, half); then sines and cosines side by side.",
    (
        Wrong(
            lambda t, channels: torch.cat(
                [_angles(t, channels, 1).sin(), _angles(t, channels, 1).cos()], dim=1
            ),
            "half − 1 is Ho et al.'s variant. Either trains; weights must meet the one they were "
            "trained with.",
            "hojonathanho/diffusion#15",
        ),
        Wrong(
            lambda t, channels: torch.cat(
                [_angles(t, channels).cos(), _angles(t, channels).sin()], dim=1
            ),
            "Cosines came first. Either order trains, but loaded weights expect one: pictures stay "
            "sharp and ignore the prompt.",
            "flashinfer PR 3819",
        ),
        Wrong(
            lambda t, channels: torch.stack(
                [_angles(t, channels).sin(), _angles(t, channels).cos()], dim=2
            ).flatten(1),
            "Sines and cosines alternate, as in the first transformer. It trains as well; the task "
            "has all sines first.",
            "diffusers#3981",
        ),
        Wrong(
            _swapped_axes,
            "The slices cut the batch axis: every second image gets cosines only. Use [:, ::2].",
            "Diffusion_models_from_scratch#10",
        ),
    ),
    close=1e-4,
)


def parameters(channels, width, kernel):
    return channels * width * kernel**2 + width


PARAMETERS = Exercise(
    "parameters",
    9,
    "Write parameters(channels, width, kernel): number of weights of a convolution with bias, "
    "from channels to width, on images.",
    lambda channels, width, kernel: sum(
        weight.numel() for weight in nn.Conv2d(channels, width, kernel).parameters()
    ),
    lambda: [(1, 32, 3), (64, 128, 1), (128, 128, 3)],
    parameters,
    "Every output channel has a kernel × kernel patch for every input channel, and one bias.",
    (
        Wrong(
            lambda channels, width, kernel: channels * width * kernel**2,
            "The biases are missing, one per output channel.",
        ),
        Wrong(
            lambda channels, width, kernel: channels * width * kernel + width,
            "A kernel is a square: kernel².",
        ),
        Wrong(
            lambda channels, width, kernel: width * kernel**2 + width,
            "Each output channel sees all input channels.",
        ),
        Wrong(
            lambda channels, width, kernel: channels * (width * kernel**2 + 1),
            "A bias per output channel, not per input channel.",
        ),
    ),
)


def blocks(x, size):
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // size, size, w // size, size)
    return x.permute(0, 1, 3, 5, 2, 4).reshape(b, c * size**2, h // size, w // size)


BLOCKS = Exercise(
    "space-to-depth",
    9,
    "Write blocks(x, size): each size × size block of pixels becomes size² channels, "
    "(B, C, H, W) → (B, C·size², H/size, W/size), as torch's pixel_unshuffle orders them.",
    lambda x, size: SpaceToDepth(size).to_latents(x),
    lambda: [(noise(2, 1, 4, 6), 2), (noise(1, 3, 6, 6), 3)],
    blocks,
    "Split both sides in two axes each, move the inner ones beside the channels, merge.",
    (
        Wrong(
            lambda x, size: x.reshape(x.shape[0], -1, x.shape[2] // size, x.shape[3] // size),
            "A reshape alone keeps the order in memory: rows are torn apart. Permute in between.",
        ),
        Wrong(
            lambda x, size: nn.functional.avg_pool2d(x, size).repeat(1, size**2, 1, 1),
            "Averaging loses the pixels; nothing may get lost here.",
        ),
        Wrong(
            lambda x, size: blocks(x.transpose(2, 3), size).transpose(2, 3),
            "Within a block the pixels go column by column; row by row is wanted.",
        ),
    ),
)

BUGS = ()
EXERCISES = (TIME, PARAMETERS, BLOCKS)
