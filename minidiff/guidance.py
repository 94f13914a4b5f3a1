"""Guidance: denoiser in, denoiser out.

A denoiser is a function (x_t, t) → output. Guidance combines what a network says under two
conditions into another denoiser, so the sampling loop never knows of it. A condition is what the
network is told besides, by the names of its arguments: `{"class_labels": labels}`, or
`{"encoder_hidden_states": tokens}`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, real_number

Denoiser = Callable[[Tensor, int], Tensor]
Network = Callable[..., Tensor]  # (x, t, **condition) → output
Condition = Mapping[str, Any]  # name → tensor (B, …), or another such mapping


def conditional(network: Network, condition: Condition) -> Denoiser:
    """The network under one condition, as a denoiser; {} for an unconditional network."""
    return lambda x, t: network(x, t, **condition)


def classifier_free(
    network: Network, condition: Condition, null: Condition, scale: float
) -> Denoiser:
    """Classifier-free guidance: u + w·(c − u), c and u from one batch of twice the size.

    Args:
        network: called as network(x, t, **condition).
        condition, null: what is wanted, and its absence (or what is not wanted, a negative
            prompt); of the same names and shapes, one entry an image.
        scale: w in diffusers' convention: 1 is the conditional network itself (and costs one
            evaluation an image, not two), 0 the unconditional one. Ho & Salimans 2022,
            arXiv:2207.12598, eq. 6 has w − 1 in its place.
    Raises:
        InvalidArgument: a scale that is not finite, or conditions of different names or shapes.
    """
    scale = real_number("guidance_scale", scale, -math.inf)
    both = _joined(condition, null)
    if scale == 1:
        return conditional(network, condition)

    def denoise(x: Tensor, t: int) -> Tensor:
        c, u = network(torch.cat([x, x]), t, **both).chunk(2)
        return u + scale * (c - u)

    return denoise


def _joined(condition: Condition, null: Condition) -> dict[str, Any]:
    """Both conditions as one batch of twice the size."""
    if condition.keys() != null.keys():
        raise InvalidArgument(
            f"null must have the names of condition, {sorted(condition)}, got {sorted(null)}"
        )
    both: dict[str, Any] = {}
    for name, value in condition.items():
        other = null[name]
        if isinstance(value, Mapping):
            both[name] = _joined(value, other)
        elif value.shape == other.shape:
            both[name] = torch.cat([value, other])
        else:
            raise InvalidArgument(
                f"{name} must have the same shape in both conditions, got {tuple(value.shape)} "
                f"and {tuple(other.shape)}"
            )
    return both


def each_tensor(condition: Condition, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The condition with every tensor changed, such as moved to a device or cut to a part."""
    return {
        name: each_tensor(value, change) if isinstance(value, Mapping) else change(value)
        for name, value in condition.items()
    }


def autocast(denoise: Denoiser, dtype: torch.dtype) -> Denoiser:
    """The same denoiser with the network's matrix work in `dtype`; its output is float32 again.

    Only the network runs in low precision. The sampler's arithmetic stays in float32, where the
    differences between steps would otherwise drown.
    """

    def narrow(x: Tensor, t: int) -> Tensor:
        with torch.autocast(x.device.type, dtype):
            return denoise(x, t).float()

    return narrow


def in_dtype(denoise: Denoiser, dtype: torch.dtype) -> Denoiser:
    """The same denoiser around a network whose weights are `dtype`; its output is as x again."""
    return lambda x, t: denoise(x.to(dtype), t).to(x.dtype)
