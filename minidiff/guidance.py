"""Guidance: denoiser in, denoiser out.

A denoiser is a function (x_t, t) → output. Guidance combines what a network says under two
conditions into another denoiser, so the sampling loop never knows of it.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, real_number

Denoiser = Callable[[Tensor, int], Tensor]
Network = Callable[..., Tensor]  # (x, t, class_labels=labels) → output


def conditional(network: Network, class_labels: Tensor | None) -> Denoiser:
    """The network under one condition, as a denoiser; no labels for an unconditional network."""
    return lambda x, t: network(x, t, class_labels=class_labels)


def classifier_free(
    network: Network, class_labels: Tensor, null_labels: Tensor, scale: float
) -> Denoiser:
    """Classifier-free guidance: u + w·(c − u), c and u from one batch of twice the size.

    Args:
        network: called as network(x, t, class_labels=…).
        class_labels, null_labels: (B,) labels of the wanted class, and of no class.
        scale: w in diffusers' convention: 1 is the conditional network itself (and costs one
            evaluation an image, not two), 0 the unconditional one. Ho & Salimans 2022,
            arXiv:2207.12598, eq. 6 has w − 1 in its place.
    Raises:
        InvalidArgument: a scale that is not finite, or labels of different shapes.
    """
    scale = real_number("guidance_scale", scale, -math.inf)
    if class_labels.shape != null_labels.shape:
        raise InvalidArgument(
            f"null_labels must have the shape of class_labels, {tuple(class_labels.shape)}, "
            f"got {tuple(null_labels.shape)}"
        )
    if scale == 1:
        return conditional(network, class_labels)
    both = torch.cat([class_labels, null_labels])

    def denoise(x: Tensor, t: int) -> Tensor:
        c, u = network(torch.cat([x, x]), t, class_labels=both).chunk(2)
        return u + scale * (c - u)

    return denoise


def autocast(denoise: Denoiser, dtype: torch.dtype) -> Denoiser:
    """The same denoiser with the network's matrix work in `dtype`; its output is float32 again.

    Only the network runs in low precision. The sampler's arithmetic stays in float32, where the
    differences between steps would otherwise drown.
    """

    def narrow(x: Tensor, t: int) -> Tensor:
        with torch.autocast(x.device.type, dtype):
            return denoise(x, t).float()

    return narrow
