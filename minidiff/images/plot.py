"""Figures: grids of images, the forward process, and a GIF of denoising.

Files are written atomically, from uint8 arrays (N, H, W, C). Only figures with text import
matplotlib.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.images.pixels import to_uint8
from minidiff.noise import randn
from minidiff.runtime.files import atomic_file
from minidiff.schedule import NoiseSchedule, add_noise


def as_array(images: Tensor) -> np.ndarray:
    """Return float images (N, C, H, W) in [−1, 1] as uint8 (N, H, W, C)."""
    return rearrange(to_uint8(images), "n c h w -> n h w c").cpu().numpy()


def grid(images: np.ndarray, columns: int, scale: int = 2, gap: int = 1) -> Image.Image:
    """Arrange images in a grid, row by row.

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
    missing = -len(images) % columns
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


def forward_figure(
    x0: Tensor, schedule: NoiseSchedule, path: str | Path, columns: int = 9, seed: int = 0
) -> None:
    """Draw the forward process: each image from clean to noise, with α and σ above.

    Args:
        x0: clean images (N, C, H, W) in [−1, 1], one row each.
        schedule: noise schedule.
        path: PNG file to write.
        columns: number of training steps drawn after the clean image, evenly spaced.
        seed: seed of the noise.
    """
    from matplotlib.figure import Figure

    steps = torch.linspace(0, len(schedule) - 1, columns, dtype=torch.float32).round().long()
    eps = randn(x0.shape, torch.Generator().manual_seed(seed))
    figure = Figure(figsize=(1.1 * (columns + 1), 1.15 * len(x0) + 0.7), layout="constrained")
    axes = figure.subplots(len(x0), columns + 1, squeeze=False)
    for column in range(columns + 1):
        if column == 0:
            title, x = "clean\nx₀", x0
        else:
            t = int(steps[column - 1])
            level = schedule[t]
            title = f"t = {t}\nα {level.alpha:.2f}  σ {level.sigma:.2f}"
            x = add_noise(x0, eps, level)
        axes[0, column].set_title(title, fontsize=7)
        for row, picture in enumerate(as_array(x)):
            axes[row, column].imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255)
            axes[row, column].axis("off")
    figure.suptitle("Forward process: x_t = α·x₀ + σ·ε", fontsize=10)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
