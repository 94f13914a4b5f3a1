"""Figures: grids of images.

Files are written atomically. `minidiff.lab.plot` has figures for notebooks.
"""

from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image
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


def save(image: Image.Image, path: str | Path) -> None:
    """Write a PNG. Raises CheckpointError if it cannot be written."""
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG", optimize=True)
