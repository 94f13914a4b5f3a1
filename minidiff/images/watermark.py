"""An invisible watermark: a message in the low frequencies of an image's luminance.

Quantization index modulation (Chen & Wornell 2001, "Quantization Index Modulation: A Class of
Provably Good Methods for Digital Watermarking and Information Embedding"). Each bit owns a few
coefficients of the image's discrete cosine transform; their signed sum is moved to the nearest
point of one of two interleaved lattices, one for 0 and one for 1. Which coefficients, signs and
offsets a bit has follows from the key.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, real_number, whole_number

BITS = 32
MIN_SIDE = 16  # smaller images have too few coefficients for 32 bits
MATCHES = 30  # chance of as many matches in an image without a watermark: 529 / 2³² = 1.2e-7
BAND = (
    1 / 16,
    0.3,
)  # frequencies used, in half periods per pixel: above the mean, below JPEG's cut
ROUNDS = 30  # clipping and rounding undo a part of each; in saturated images it takes several
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, the one of JPEG


def message_of(text: str) -> int:
    """Return a message of 1 to 8 hexadecimal digits as a whole number. Raises InvalidArgument."""
    try:
        value = int(text, 16)
    except ValueError:
        value = -1
    if not 0 <= value < 2**BITS or not text.isalnum():
        raise InvalidArgument(f"the watermark must be 1 to 8 hexadecimal digits, got {text!r}")
    return value


@dataclass(frozen=True)
class Reading:
    """What was read from one image.

    Attributes:
        message: the 32 bits, as a whole number.
        matches: bits equal to those of the message that was looked for, 0 to 32.
    """

    message: int
    matches: int

    @property
    def found(self) -> bool:
        """Whether at least 30 of the 32 bits agree, which happens by chance once in 8 million."""
        return self.matches >= MATCHES


@dataclass(frozen=True)
class Watermark:
    """A message of 32 bits, as a function from images to marked images.

    Append it to `Pipeline.finishers`, and every image of the pipeline carries it.

    Args:
        message: the message, 0 to 2³² − 1.
        key: who does not know it cannot read the message.
        strength: distance of two lattice points in grey levels, at most 32×32 pixels; above, it
            grows with the side of an image, so that the change per pixel stays the same.
    Raises:
        InvalidArgument: message or key out of range, or strength not in [1, 200].
    """

    message: int
    key: int = 0
    strength: float = 46.0

    def __post_init__(self) -> None:
        whole_number("message", self.message, 0, 2**BITS - 1)
        whole_number("key", self.key, 0, 2**63 - 1)
        real_number("strength", self.strength, 1, 200)

    def __call__(self, images: Tensor) -> Tensor:
        """Return marked images.

        Args:
            images: (B, C, H, W) in [−1, 1], C of 1 or 3.
        Returns:
            Images of this shape, type and device, whose values are those of whole grey levels.
        Raises:
            InvalidArgument: images of another shape, or below 16×16 pixels.
        """
        levels = _levels(images)
        marked = levels.round()
        rows, dither, spacing = _lattices(self.key, self.strength, tuple(images.shape[-2:]))
        bits = torch.tensor([self.message >> i & 1 for i in range(BITS)], dtype=torch.float64)
        offsets = (dither + bits / 2) * spacing
        for _ in range(ROUNDS):
            have = _luminance(marked) @ rows.T - offsets
            error = (have / spacing).round() * spacing - have
            if error.abs().max() < spacing / 8:
                break
            change = (error @ rows).reshape(len(images), 1, *images.shape[-2:])
            levels = (levels + change).clamp(0, 255)  # fractions add up over the rounds
            marked = levels.round()
        return (marked / 127.5 - 1).to(images)

    def read(self, images: Tensor) -> list[Reading]:
        """Return what each image says, and how many bits agree with the message.

        Args:
            images: (B, C, H, W) in [−1, 1], of the size that they were marked at.
        Raises:
            InvalidArgument: images of another shape, or below 16×16 pixels.
        """
        rows, dither, spacing = _lattices(self.key, self.strength, tuple(images.shape[-2:]))
        place = (_luminance(_levels(images)) @ rows.T / spacing - dither) % 1.0
        ones = (place - 0.5).abs() < 0.25  # nearer to the lattice of 1, half a spacing away
        found = []
        for row in ones.tolist():
            message = sum(1 << i for i, one in enumerate(row) if one)
            found.append(Reading(message, BITS - (message ^ self.message).bit_count()))
        return found


def _levels(images: Tensor) -> Tensor:
    """Return images in [−1, 1] as grey levels, 0 to 255, in float64 on the CPU."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise InvalidArgument(
            f"images must be (B, C, H, W) with 1 or 3 channels, got shape {tuple(images.shape)}"
        )
    if min(images.shape[-2:]) < MIN_SIDE:
        height, width = images.shape[-2:]
        raise InvalidArgument(
            f"images must have at least {MIN_SIDE}×{MIN_SIDE} pixels to carry a watermark, got "
            f"{height}×{width}"
        )
    return (images.detach().cpu().double() + 1) * 127.5


def _luminance(levels: Tensor) -> Tensor:
    """Return the luminance (B, H·W) of images (B, C, H, W)."""
    if levels.shape[1] == 1:
        return levels.flatten(1)
    weights = torch.tensor(LUMINANCE, dtype=levels.dtype)
    return torch.einsum("bchw,c->bhw", levels, weights).flatten(1)


@lru_cache(maxsize=8)
def _lattices(key: int, strength: float, size: tuple[int, int]) -> tuple[Tensor, Tensor, float]:
    """Return each bit's direction and dither, and the spacing of its lattices.

    Returns:
        Orthonormal directions (32, H·W) in pixels, dithers (32,) in [0, 1) of a spacing, and the
        spacing in grey levels.
    """
    height, width = size
    v, u = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")
    frequency = np.hypot(u, v)
    above = np.sort(frequency[frequency >= BAND[0]])
    highest = max(BAND[1], above[2 * BITS])  # in small images two coefficients a bit need more
    places = np.argwhere((frequency >= BAND[0]) & (frequency < highest))
    draws = [_draw(key, row, column) for row, column in places.tolist()]
    order = np.argsort([draw[0] for draw in draws], kind="stable")
    count = len(order) // BITS
    parts = np.zeros((BITS, height, width))
    for rank, index in enumerate(order[: count * BITS]):
        parts[rank % BITS][tuple(places[index])] = draws[index][1] / math.sqrt(count)
    rows = _cosines(height).T @ parts @ _cosines(width)
    dither = torch.tensor([_draw(key, bit)[0] for bit in range(BITS)], dtype=torch.float64)
    spacing = strength * max(1.0, math.sqrt(height * width) / 32)
    return torch.from_numpy(rows.reshape(BITS, -1)), dither, spacing


def _draw(*numbers: int) -> tuple[float, int]:
    """Return a number in [0, 1) and a sign that follow from whole numbers on every machine."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48, 1 if digest[6] & 1 else -1


def _cosines(n: int) -> np.ndarray:
    """Return the orthonormal basis (n, n) of the discrete cosine transform, type II."""
    k, x = np.arange(n)[:, None], np.arange(n)[None]
    basis = np.cos(math.pi * k * (2 * x + 1) / (2 * n)) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis
