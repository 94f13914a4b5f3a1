"""What training asks of data, be it bytes on the device, points, or files behind workers.

A *position* is how many items the stream of training handed out before: with batches of B items,
batch k begins at position k·B. What is random about an item (an augmentation, a data set's own
transform) depends on a seed and its position alone. So an interrupted run that goes on at a
position sees what an uninterrupted one sees, and so do several processes that share a batch, each
telling the position at which its part begins.
"""

from enum import IntEnum
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from minidiff.data.conditioning import ClassLabels, Condition, ConditionConfig
from minidiff.errors import InvalidArgument
from minidiff.nn import AutoencoderKL


class Data(Protocol):
    """Items (images or points) with a class label each, or none at all.

    Attributes:
        name: name of the data in error messages and reports.
        class_names: one name per class, in label order; empty without labels.
        is_stored: the items are held in memory, so that any of them can be drawn at little cost.
        labels_per_item: number of labels of an item with classes.
        decoder: autoencoder whose latents the items are; None for images and points.
    """

    name: str
    class_names: tuple[str, ...]
    is_stored: ClassVar[bool] = False
    labels_per_item: ClassVar[int] = 1
    decoder: AutoencoderKL | None = None

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one item, as a network sees it: (C, H, W) for images, (D,) for points."""

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)

    def to(self, device: torch.device | str) -> "Data":
        """The same data with its batches on `device`."""

    def batch(self, index: Tensor, position: int = 0) -> tuple[Tensor, Tensor | None]:
        """The items at `index`, as a network sees them.

        Args:
            index: int64 (B,), on any device.
            position: of the first of them in the stream; the others follow it.
        Returns:
            x float32 (B, *shape) and the labels int64 (B,), token numbers (B, L) or None, both on
            the device of the data.
        """

    def condition(self, config: ConditionConfig) -> Condition:
        """Return the module that turns the labels of a batch into inputs of the network.

        Its weights, if it has any, are drawn from torch's global random state.
        """
        return ClassLabels(self.num_classes, hides=config.label_dropout > 0)

    def example_prompts(self, n: int) -> list[str] | None:
        """Return n captions, for pictures along the way; None for data without captions."""
        return None

    def captured(self) -> "Data":
        """Return data whose batches are drawn by a CUDA graph where that is possible."""
        return self


def check_labels(labels: Tensor | None, count: int, class_names: tuple[str, ...]) -> None:
    """Refuse labels that are not int64 (count,) in 0..len(class_names) − 1, or None without names.

    Raises:
        InvalidArgument: says which.
    """
    if labels is None:
        if class_names:
            raise InvalidArgument(f"class_names must be () without labels: {class_names}")
        return
    if labels.dtype != torch.int64 or labels.shape != (count,):
        raise InvalidArgument(
            f"labels must be int64 ({count},), got {labels.dtype} {tuple(labels.shape)}"
        )
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
        raise InvalidArgument(
            f"labels must be in 0..{len(class_names) - 1}, "
            f"got {int(labels.min())}..{int(labels.max())}"
        )


class Purpose(IntEnum):
    """What random numbers are for: each purpose sees numbers of its own."""

    AUGMENTATION = 1
    ITEM = 2
    TOY_TRAIN = 3
    TOY_TEST = 4
    LATENTS = 5


def random_words(seed: int, purpose: Purpose, position: int, count: int) -> np.ndarray:
    """Four random 64-bit words for each of `count` positions, uint64 (count, 4).

    They come from a counter-based generator, Philox4x64 (Salmon et al. 2011, "Parallel random
    numbers: as easy as 1, 2, 3"), whose key is (seed, purpose) and whose counter is the position:
    there is no state to save, and any position is reached at once.

    Args:
        seed: 0 … 2⁶⁴−1.
        purpose: other purposes see other numbers.
        position, count: whole numbers from 0.
    """
    key = np.array([seed, purpose], dtype=np.uint64)
    return np.random.Philox(key=key, counter=position).random_raw(4 * count).reshape(count, 4)
