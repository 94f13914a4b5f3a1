"""Figures: grids of images, and scatter plots.

Files are written atomically. `minidiff.lab.plot` has figures for notebooks.
"""

from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from minidiff.errors import InvalidArgument, whole_number
from minidiff.images.pixels import to_uint8
from minidiff.runtime.files import atomic_file


def as_array(images: Tensor) -> np.ndarray:
    """Return float images (N, C, H, W) in [−1, 1] as uint8 (N, H, W, C)."""
    return rearrange(to_uint8(images), "n c h w -> n h w c").cpu().numpy()


def grid(images: np.ndarray, columns: int = 10, scale: int = 2, gap: int = 1) -> Image.Image:
    """Arrange images in a grid, row by row; `minidiff.lab.plot.grid` adds labels.

    Args:
        images: uint8 (N, H, W, C) with C = 1 or 3.
        columns: images per row; the last row may be shorter.
        scale: side of a pixel in the result.
        gap: grey pixels between images, before scaling.
    Raises:
        InvalidArgument: another kind of array.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise InvalidArgument(
            f"images must be uint8 (N, H, W, 1 or 3), got {images.dtype} {images.shape}"
        )
    missing = -len(images) % whole_number("columns", columns, 1)
    margin = ((0, missing), (0, gap), (0, gap), (0, 0))
    padded = np.pad(images, margin, constant_values=96)
    sheet = rearrange(padded, "(r c) h w ch -> (r h) (c w) ch", c=columns)[: -gap or None]
    sheet = sheet[:, : sheet.shape[1] - gap]
    sheet = sheet.repeat(scale, axis=0).repeat(scale, axis=1)
    return Image.fromarray(sheet.squeeze(-1) if sheet.shape[-1] == 1 else sheet)


def scatter(points: np.ndarray, labels: Any = None, scale: int = 2) -> Image.Image:
    """Draw points in a square around the origin: of the first two coordinates, with equal axes.

    Args:
        points: (N, D), D ≥ 1; points of a line lie on the horizontal axis.
        labels: integers (N,), array or tensor, that decide the colour; or None.
        scale: size of the picture, in units of 240 pixels.
    Raises:
        InvalidArgument: another kind of array.
    """
    if points.ndim != 2 or not points.size or points.dtype.kind != "f":
        raise InvalidArgument(f"points must be float (N, D), got {points.dtype} {points.shape}")
    plane = np.pad(np.nan_to_num(points[:, :2]), ((0, 0), (0, 2 - min(2, points.shape[1]))))
    extent = max(2.2, 1.05 * float(np.quantile(np.abs(plane), 0.999)))  # a few may lie far outside
    side, radius = 480 * scale, 1.5 * scale  # twice the size, for smooth edges
    sheet = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(sheet)
    centres = (plane * (1, -1) / extent + 1) * side / 2
    chosen = np.zeros(len(plane), int) if labels is None else np.maximum(np.asarray(labels), 0)
    for (x, y), label in zip(centres.tolist(), chosen.tolist(), strict=True):
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, f"hsl({137 * label % 360}, 70%, 42%)")  # neighbours differ
    return sheet.resize((side // 2, side // 2), Image.Resampling.BOX)


def picture(samples: np.ndarray, columns: int, scale: int = 2, labels: Any = None) -> Image.Image:
    """Return a grid of images (N, H, W, C), or a scatter plot of points (N, D) and their labels."""
    return scatter(samples, labels, scale) if samples.ndim == 2 else grid(samples, columns, scale)


def save(image: Image.Image, path: str | Path) -> None:
    """Write a PNG. Raises CheckpointError if it cannot be written."""
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG", optimize=True)
