"""Augmentations: small shifts, and horizontal flips for photographs.

    augmented(data, shift=2, flip=True, seed=0)      data with the same interface

The augmentation of an image depends on (seed, its position in the stream) alone, see
`minidiff.data.protocol`. It differs between passes, but is the same after an interruption or in a
batch that several processes share. All images of a batch move by one gather on the device.

Digits are never flipped: 2, 3, 4, 5, 6, 7 and 9 become signs that do not exist.
"""

import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.data.protocol import Data, Purpose, random_words
from minidiff.errors import InvalidArgument, one_of, true_or_false, whole_number
from minidiff.noise import MAX_SEED
from minidiff.text.conditioning import Condition, ConditionConfig

PADDINGS = ("background", "reflect")
_DIGITS = {"digits", "mnist"}
_BLACK = -1.0  # the background of digits


def augmented(
    data: Data, *, shift: int = 0, flip: bool = False, seed: int = 0, padding: str | None = None
) -> Data:
    """Return data whose images are shifted and flipped at random.

    Args:
        data: images; returned unchanged without shift and flip.
        shift: maximum shift along each axis in pixels; all 2·shift + 1 offsets are equally likely.
        flip: flip an image left to right with probability ½; not for digits.
        seed: seed of the random numbers, 0 … 2³²−1.
        padding: content of the border: "background" for black, or "reflect" for the image
            reflected at the border. By default black for digits, and reflected for others.
    Raises:
        InvalidArgument: data without images, an argument out of range, or digits to be flipped.
    """
    if len(data.shape) != 3:
        raise InvalidArgument(f"data must be images, {data.name} has items of shape {data.shape}")
    shift = whole_number("shift", shift, 0, min(data.shape[1:]) - 1)
    seed = whole_number("seed", seed, 0, MAX_SEED)
    digits = bool(_DIGITS & set(re.split(r"\W+", data.name.lower())))
    if true_or_false("flip", flip) and digits:
        raise InvalidArgument(f"flip must be False for {data.name}: a digit has no mirror image")
    if padding is None:
        padding = "background" if digits else "reflect"
    one_of("padding", padding, PADDINGS)
    return Augmented(data, shift, flip, seed, padding) if shift or flip else data


class Augmented(Data):
    """Data whose images are shifted and flipped; for the arguments see `augmented`."""

    def __init__(self, data: Data, shift: int, flip: bool, seed: int, padding: str) -> None:
        self.data, self.name, self.class_names = data, data.name, data.class_names
        self.shift, self.flip, self.seed, self.padding = shift, flip, seed, padding

    def __len__(self) -> int:
        return len(self.data)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image: (C, H, W)."""
        return self.data.shape

    def condition(self, config: ConditionConfig) -> Condition:
        return self.data.condition(config)

    def example_prompts(self, n: int) -> list[str] | None:
        return self.data.example_prompts(n)

    def to(self, device: torch.device | str) -> "Augmented":
        """Return the data with its batches on `device`."""
        return Augmented(self.data.to(device), self.shift, self.flip, self.seed, self.padding)

    def batch(self, index: Tensor, position: int = 0) -> tuple[Tensor, Tensor | None]:
        """Return the images at `index`, augmented by their positions; see `Data.batch`."""
        x, labels = self.data.batch(index, position)
        words = random_words(self.seed, Purpose.AUGMENTATION, position, len(x))
        flipped, down, right = (torch.from_numpy(number).to(x.device, non_blocking=True)
                                 for number in self._choices(words))  # fmt: skip
        if self.shift:
            mode = "reflect" if self.padding == "reflect" else "constant"
            value = None if mode == "reflect" else _BLACK
            x = F.pad(x, (self.shift,) * 4, mode, value)
        height, width = self.shape[1:]
        rows = down[:, None] + torch.arange(height, device=x.device)
        columns = torch.arange(width, device=x.device)
        columns = right[:, None] + torch.where(flipped[:, None], width - 1 - columns, columns)
        image = torch.arange(len(x), device=x.device)[:, None, None]
        moved = x[image, :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
        return moved.permute(0, 3, 1, 2), labels

    def _choices(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return from random words (B, 4) whether to flip, and the offsets from 0 to 2·shift."""
        high = words >> 32
        flipped = self.flip & (high[:, 0] >= 1 << 31)
        offsets = (high[:, 1:3] * (2 * self.shift + 1) >> 32).astype(np.int64)
        return flipped, offsets[:, 0].copy(), offsets[:, 1].copy()
