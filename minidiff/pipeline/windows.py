"""Wide images from a network for small ones: overlapping windows, and their mean.

At every step the network is evaluated on windows of the canvas, each of the size that it was
trained on. Outputs are averaged where windows overlap, so that neighbours agree there:

    out(x)[p] = mean of  network(x[W])[p]  over the windows W that contain the pixel p

(Bar-Tal et al. 2023, "MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation",
arXiv:2302.08113, eq. 5. There the samples of the next step are averaged; as a step is linear in
the output, at equal x that is the same.)
"""

import copy
from functools import partial

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
    """Return a denoiser of a wide canvas, made of one for a window.

    Args:
        denoise: denoiser of (B, C, *window), evaluated on one window after another.
        window: height and width of a window, in the network's space.
        stride: distance from one window to the next, down and across; at most the window. The
            last window of a row or column is moved back to end at the border.
        circular: whether the right border joins the left one, as in a 360° panorama.
    Raises:
        InvalidArgument: a number is out of range; or, when evaluated, the canvas is smaller than
            a window.
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
    """Return where windows begin along one side."""
    if size < window:
        raise InvalidArgument(f"{name} of the canvas must be at least {window}, got {size}")
    if circular:
        return list(range(0, size, stride))
    return [*range(0, size - window, stride), size - window]


def panorama(
    pipe: Pipeline, stride: int | tuple[int, int] | None = None, *, circular: bool = False
) -> Pipeline:
    """Return the same pipeline for images larger than its network was trained on.

        panorama(pipe)("a long beach", width=2048).images

    A window has the size that the network was trained on.

    Args:
        pipe: pipeline whose networks are used; it stays as it is.
        stride, circular: see `windowed`; the default stride is half a window.
    Raises:
        InvalidArgument: the stride is out of range, or the network takes a mask beside x.
    """
    if pipe.space.takes_mask:
        raise InvalidArgument("pipe must not have an inpainting network: it takes its mask whole")
    _, *window = pipe.space.shape()
    if stride is None:
        stride = [max(1, side // 2) for side in window]
    wrap = partial(windowed, window=window, stride=stride, circular=circular)
    wrap(pipe.unet)  # refuses a bad stride before anything else happens
    wide = copy.copy(pipe)
    wide.wraps = [*pipe.wraps, wrap]
    return wide
