"""Render the embedded digits from the fonts that matplotlib ships.

    python tests/data/render_digits.py --out FILE --seed S

Each image draws a font and a stroke weight, then warps the glyph: pixel p of the output is the
glyph at

    A⁻¹·(p − t) + d(p),    A = rotation · shear · scale,  t a shift,  d a smooth random field,

sampled at 4×4 points per pixel and averaged for antialiasing. Image i of a split depends on
(seed, split, i) alone, so any of them can be rendered again without the rest.
"""

import argparse
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.data.digits import COUNTS, LEVELS, SIDE
from minidiff.runtime.files import atomic_file

if TYPE_CHECKING:
    from PIL import ImageFont

# Fonts whose digits share one baseline and one shape: no old-style figures, and no zero with a dot
# or a stroke, which at 16×16 is an eight.
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmr10",
    "cmb10",
    "cmss10",
    "cmti10",
    "cmtt10",
)
WEIGHTS = (0, 1, 2, 3)  # stroke added around the outline, in pixels of the large canvas
CANVAS = 128  # side of a glyph's canvas
HEIGHT = 96  # height of an 8 on the canvas: 12 of the 16 pixels of the output
OVERSAMPLING = 4
SPLIT_KEYS = {"train": 0, "test": 1}  # part of the seeds, so that the splits are independent


@lru_cache(maxsize=1)
def glyphs() -> Tensor:
    """Return all digits in all fonts and weights, float32 (fonts, weights, 10, CANVAS, CANVAS)."""
    shape = (len(FONTS), len(WEIGHTS), 10, CANVAS, CANVAS)
    masks = [
        _glyph(name, weight, str(digit))
        for name in FONTS
        for weight in WEIGHTS
        for digit in range(10)
    ]
    return torch.from_numpy(np.stack(masks)).float().div_(255).reshape(shape)


def _glyph(name: str, weight: int, digit: str) -> np.ndarray:
    """Draw one digit, white on black, with its ink centred on the canvas."""
    from PIL import Image, ImageDraw

    font = _font(name)
    left, top, right, bottom = font.getbbox(digit, stroke_width=weight)
    image = Image.new("L", (CANVAS, CANVAS))
    corner = ((CANVAS - left - right) / 2, (CANVAS - top - bottom) / 2)
    ImageDraw.Draw(image).text(corner, digit, fill=255, font=font, stroke_width=weight)
    return np.asarray(image)


@lru_cache
def _font(name: str) -> "ImageFont.FreeTypeFont":
    """Return a font at the size where its 8 is HEIGHT pixels high, the same for all fonts."""
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    _, top, _, bottom = ImageFont.truetype(path, 200).getbbox("8")
    return ImageFont.truetype(path, round(200 * HEIGHT / (bottom - top)))


def render(indices: Sequence[int], seed: int, split: str) -> np.ndarray:
    """Render the images with these indices; image i is of digit i mod 10.

    Returns:
        Grey levels, uint8 (len(indices), 16, 16) in 0..15.
    """
    draws = [_draw(np.random.default_rng((seed, SPLIT_KEYS[split], i))) for i in indices]
    font, weight, inverse, shift, field = (np.stack(column) for column in zip(*draws, strict=True))
    masks = glyphs()[font, weight, np.asarray(indices) % 10].unsqueeze(1)
    grid = _grid(*(torch.from_numpy(array).float() for array in (inverse, shift, field)))
    fine = F.grid_sample(masks, grid, mode="bilinear", align_corners=False)
    mean = F.avg_pool2d(fine, OVERSAMPLING).squeeze(1)
    return mean.mul(LEVELS - 1).round().to(torch.uint8).numpy()


def _draw(rng: np.random.Generator) -> tuple:
    """Draw the choices of one image: font, weight, A⁻¹ (2, 2), t (2,), d coarse (2, 4, 4)."""
    font, weight = rng.integers(len(FONTS)), rng.integers(len(WEIGHTS))
    angle = math.radians(rng.uniform(-12, 12))
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    shear = np.array([[1, rng.uniform(-0.2, 0.2)], [0, 1]])
    scale = np.diag(rng.uniform(0.85, 1.08, size=2))
    shift = rng.uniform(-1, 1, size=2) * (2 / SIDE)  # up to one pixel; the frame spans −1..1
    field = rng.normal(0, 0.05, size=(2, 4, 4))
    return font, weight, np.linalg.inv(rotation @ shear @ scale), shift, field


def _grid(inverse: Tensor, shift: Tensor, field: Tensor) -> Tensor:
    """Return the point of the glyph's canvas for each fine output pixel, (B, H, W, 2)."""
    fine = SIDE * OVERSAMPLING
    axis = (torch.arange(fine) + 0.5) * (2 / fine) - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    centred = torch.stack([x, y], dim=-1) - shift[:, None, None]
    bend = F.interpolate(field, size=(fine, fine), mode="bicubic", align_corners=True)
    return centred @ inverse.transpose(1, 2)[:, None] + bend.permute(0, 2, 3, 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Render both splits and write them as one compressed .npz."""
    parser = argparse.ArgumentParser(description="Render the embedded digits.")
    parser.add_argument("--out", required=True, help="the npz file to write")
    parser.add_argument("--seed", type=int, default=0, help="0 made the file in the package")
    given = parser.parse_args(arguments)
    splits = {
        split: np.concatenate(  # in chunks: a thousand large canvases are 64 MiB
            [render(range(i, min(i + 1000, n)), given.seed, split) for i in range(0, n, 1000)]
        )
        for split, n in COUNTS.items()
    }
    with atomic_file(given.out) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **splits)


if __name__ == "__main__":
    main()
