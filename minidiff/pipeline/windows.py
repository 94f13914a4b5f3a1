"""Wide pictures from a network that knows small ones: windows that overlap, and their mean.

At every step the network is asked about windows of the canvas that it can see whole, and where
windows overlap their outputs are averaged, so that neighbours agree on what they share:

    out(x)[p] = mean of  network(x[W])[p]  over the windows W that hold the pixel p

(Bar-Tal et al. 2023, "MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation",
arXiv:2302.08113, eq. 5. There the samples of the next step are averaged; as a step is linear in
the output, at equal x that is the same.)
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, listed, true_or_false, whole_number
from minidiff.guidance import Denoiser
from minidiff.pipeline import Pipeline


def windowed(
    denoise: Denoiser,
    window: tuple[int, int],
    stride: int | tuple[int, int],
    *,
    circular: bool = False,
) -> Denoiser:
    """A denoiser of a wide canvas, from one of a window.

    Args:
        denoise: asked about (B, C, *window), one window after another.
        window: height and width of a window, in the network's space.
        stride: from one window to the next, down and across; at most the window. The last window
            of a row or column is moved back to end at the border.
        circular: whether the right border joins the left one, as in a panorama all around.
    Raises:
        InvalidArgument: a number that is out of range; when it is asked, a canvas that is smaller
            than a window.
    """
    height, width = (whole_number("window", side, 1) for side in listed("window", window, 2))
    strides = (stride, stride) if not isinstance(stride, list | tuple) else stride
    down, across = (
        whole_number("stride", step, 1, side)
        for step, side in zip(listed("stride", strides, 2), (height, width), strict=True)
    )
    true_or_false("circular", circular)

    def whole(x: Tensor, t: float) -> Tensor:
        rows = _offsets("height", x.shape[-2], height, down)
        columns = _offsets("width", x.shape[-1], width, across, circular)
        total, times = torch.zeros_like(x), x.new_zeros(x.shape[-1])
        heights = x.new_zeros(x.shape[-2], 1)
        for column in columns:
            at = torch.arange(column, column + width, device=x.device) % x.shape[-1]
            times[at] += 1
            strip, outputs = x[..., at], x.new_zeros(*x.shape[:-1], width)
            for row in rows:
                part = slice(row, row + height)
                outputs[..., part, :] += denoise(strip[..., part, :], t)
            total.index_add_(-1, at, outputs)
        for row in rows:
            heights[row : row + height] += 1
        return total / (heights * times)

    return whole


def _offsets(name: str, size: int, window: int, stride: int, circular: bool = False) -> list[int]:
    """Where windows begin."""
    if size < window:
        raise InvalidArgument(f"{name} of the canvas must be at least {window}, got {size}")
    if circular:
        return list(range(0, size, stride))
    return [*range(0, size - window, stride), size - window]


def panorama(
    pipe: Pipeline, stride: int | tuple[int, int] | None = None, *, circular: bool = False
) -> Pipeline:
    """The same pipeline for pictures larger than its network was trained for.

        panorama(pipe)("a long beach", width=2048).images

    A window is what the network was trained for.

    Args:
        stride, circular: see `windowed`; by default half a window.
    Raises:
        InvalidArgument: a stride out of range, or a network that is shown a mask beside x.
    """
    if pipe.space.is_told_mask:
        raise InvalidArgument(
            "pipe must not be of an inpainting network, which sees its mask whole"
        )
    _, *window = pipe.space.shape()
    if stride is None:
        stride = [max(1, side // 2) for side in window]
    window_of = partial(windowed, window=window, stride=stride, circular=circular)
    window_of(pipe.denoiser)  # refuses a bad stride before anything else happens
    wide = copy.copy(pipe)

    def denoiser(*told: Any, **options: Any) -> Denoiser:
        return window_of(pipe.denoiser(*told, **options))

    wide.denoiser = denoiser
    return wide
