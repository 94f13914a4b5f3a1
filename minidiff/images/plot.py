"""Figures: grids of images, with labels or without, and GIFs of denoising.

Files are written atomically. `minidiff.lab.plot` has figures for notebooks.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minidiff.errors import InvalidArgument, whole_number
from minidiff.images.pixels import to_uint8
from minidiff.runtime.files import atomic_file


def as_array(images: Tensor) -> np.ndarray:
    """Return float images (N, C, H, W) in [−1, 1] as uint8 (N, H, W, C)."""
    return rearrange(to_uint8(images), "n c h w -> n h w c").cpu().numpy()


def grid(
    images: np.ndarray | Sequence[Any] | Tensor,
    columns: int | Sequence[str] = 10,
    scale: int = 2,
    gap: int = 1,
    *,
    rows: Sequence[str] = (),
) -> Image.Image:
    """Arrange images in a grid, row by row.

    Args:
        images: uint8 (N, H, W, C) with C = 1 or 3; or PIL images of one size; or float images
            (N, C, H, W) in [−1, 1].
        columns: images per row, or a label above each column; the last row may be shorter.
        scale: side of a pixel in the result.
        gap: grey pixels between images, before scaling.
        rows: a label beside each row; none by default.
    Raises:
        InvalidArgument: another kind of images, or another number of labels than rows.
    """
    if isinstance(images, Tensor):
        images = as_array(images)
    elif isinstance(images, list | tuple):
        images = np.stack([np.atleast_3d(np.asarray(image)) for image in images])
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise InvalidArgument(
            f"images must be uint8 (N, H, W, 1 or 3), got {images.dtype} {images.shape}"
        )
    above: Sequence[str] = () if isinstance(columns, int) else columns
    width = whole_number("columns", columns if isinstance(columns, int) else len(above), 1)
    count = -(-len(images) // width)
    if rows and len(rows) != count:
        raise InvalidArgument(f"rows must have a label for each of {count} rows, got {len(rows)}")
    missing = -len(images) % width
    margin = ((0, missing), (0, gap), (0, gap), (0, 0))
    padded = np.pad(images, margin, constant_values=96)
    sheet = rearrange(padded, "(r c) h w ch -> (r h) (c w) ch", c=width)[: -gap or None]
    sheet = sheet[:, : sheet.shape[1] - gap]
    sheet = sheet.repeat(scale, axis=0).repeat(scale, axis=1)
    picture = Image.fromarray(sheet.squeeze(-1) if sheet.shape[-1] == 1 else sheet)
    cell = tuple(scale * side for side in padded.shape[2:0:-1])
    return _labelled(picture, cell, above, rows) if above or rows else picture


def _labelled(
    sheet: Image.Image, cell: tuple[int, ...], above: Sequence[str], beside: Sequence[str]
) -> Image.Image:
    """Put labels in a white margin above the columns and beside the rows of a sheet."""
    import matplotlib

    face = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # has Greek letters
    font = ImageFont.truetype(str(face), 11)

    def lines(label: str) -> str:
        """Return a label broken between words where it is wider than its column."""
        done = ""
        for word in label.split():
            longer = f"{done} {word}" if done else word
            fits = font.getlength(longer.rpartition("\n")[2]) <= cell[0] - 2
            done = longer if fits or not done else f"{done}\n{word}"
        return done

    texts = [lines(label) for label in above]
    left = 8 + max((int(font.getlength(label)) for label in beside), default=-8)
    top = 4 + 14 * max((text.count("\n") + 1 for text in texts), default=0)
    picture = Image.new(sheet.mode, (left + sheet.width, top + sheet.height), "white")
    picture.paste(sheet, (left, top))
    pen = ImageDraw.Draw(picture)
    for i, text in enumerate(texts):
        x = left + i * cell[0] + cell[0] // 2
        pen.multiline_text((x, top - 4), text, "black", font, anchor="md", align="center")
    for i, label in enumerate(beside):
        pen.text((left - 5, top + i * cell[1] + cell[1] // 2), label, "black", font, anchor="rm")
    return picture


def save(image: Image.Image, path: str | Path) -> None:
    """Write a PNG. Raises CheckpointError if it cannot be written."""
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG", optimize=True)


def save_gif(frames: Sequence[Image.Image], path: str | Path, seconds: float = 3.0) -> None:
    """Write a looping GIF that plays `frames` in `seconds` and then holds the last one.

    Noise does not compress well, so only 16 colours are kept, which is not visible in motion.
    """
    each = 1000 * seconds / len(frames)
    durations = [each] * (len(frames) - 1) + [1500]
    frames = [frame.quantize(16, dither=Image.Dither.NONE) for frame in frames]
    with atomic_file(path) as temporary:
        frames[0].save(
            temporary, format="GIF", save_all=True, append_images=list(frames[1:]),
            duration=durations, loop=0, optimize=True,
        )  # fmt: skip
