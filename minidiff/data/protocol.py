"""The interface of data for training: bytes on the device, points, or files read by workers.

The *position* of an item is its index in the stream of training: with batches of B items, batch k
begins at position k·B. Randomness of an item (an augmentation, the transform of a data set) depends
on a seed and its position alone. So a resumed run gets the same items as an uninterrupted one. So
do several processes that share a batch, each with the position of its part.
"""

import hashlib
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from minidiff.errors import InvalidArgument
from minidiff.nn import AutoencoderKL
from minidiff.runtime.checks import instance
from minidiff.text.conditioning import ClassLabels, Condition, ConditionConfig
from minidiff.text.prompts import Prompts


class Data(Protocol):
    """Items (images or points), all with labels or captions, or all without.

    Attributes:
        name: name of the data in error messages and reports.
        class_names: one name per class, in label order; empty without labels.
        is_stored: True for items in memory, so that any of them costs little.
        labels_per_item: number of labels of an item with classes.
        decoder: autoencoder whose latents the items are; None for images and points.
        fixed_options: options of a training that only have this value for these data.
    """

    name: str
    class_names: tuple[str, ...]
    is_stored: ClassVar[bool] = False
    labels_per_item: ClassVar[int] = 1
    decoder: AutoencoderKL | None = None
    fixed_options: ClassVar[Mapping[str, Any]] = {}

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one item as input of a network: (C, H, W) for images, (D,) for points."""

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)

    def to(self, device: torch.device | str) -> "Data":
        """Return the data with its batches on `device`."""

    def batch(self, index: Tensor, position: int = 0) -> tuple[Tensor, Tensor | None]:
        """Return the items at `index` as inputs of a network.

        Args:
            index: item numbers, int64 (B,), on any device.
            position: position of the first of them in the stream; the others follow it.
        Returns:
            x float32 (B, *shape) and the labels int64 (B,), token numbers (B, L) or None, both on
            the device of the data.
        """

    def condition(self, config: ConditionConfig) -> Condition:
        """Return the module that turns the labels of a batch into inputs of the network.

        Its weights, if it has any, are drawn from torch's global random state.
        """
        return ClassLabels(self.num_classes, hides=config.label_dropout > 0)

    def tokenized(self, prompts: Prompts) -> "Data":
        """Return the data with captions in the token numbers of other prompts, if it can be."""
        return self

    def network(self, config: ConditionConfig) -> nn.Module | None:
        """Return a fresh network for these data; None for the U-Net of images and latents."""
        return None

    def example_prompts(self, n: int) -> list[str] | None:
        """Return n captions, for images during training; None for data without captions."""
        return None

    def captured(self) -> "Data":
        """Return data whose batches are drawn by a CUDA graph, if that is possible."""
        return self

    def digests(self) -> dict[str, str]:
        """Return a digest, or the value, of each part that a resumed run must find unchanged."""
        return {}


def digest(*tensors: Tensor) -> str:
    """Return the SHA-256 of the bytes of tensors, in hexadecimal."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


def is_constant(x: Tensor) -> bool:
    """Return whether all items are alike in each channel, everywhere, (B, C, *space) or (B, D)."""
    channels = x.movedim(1, 0).flatten(1)
    return bool((channels.amin(1) == channels.amax(1)).all())


def check_data(data: object) -> None:
    """Refuse what is not a data set, such as the name of one. Raises InvalidArgument."""
    if callable(getattr(data, "batch", None)) and hasattr(data, "shape"):
        return
    got = repr(data) if isinstance(data, str) else type(data).__name__
    raise InvalidArgument(
        "data must be a data set, such as minidiff.data.load(name) or "
        f"minidiff.data.dataset.from_dataset(items) returns, got {got}"
    )


def check_labels(labels: Tensor | None, count: int, class_names: tuple[str, ...]) -> None:
    """Refuse labels other than int64 (count,) in 0..len(class_names) − 1, or None without names.

    Raises:
        InvalidArgument: labels of another type, shape or range.
    """
    if labels is None:
        if class_names:
            raise InvalidArgument(f"class_names must be () without labels: {class_names}")
        return
    instance(Tensor)("labels", labels)
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
    """The use of random numbers; each has a separate stream."""

    AUGMENTATION = 1
    ITEM = 2
    TOY_TRAIN = 3
    TOY_TEST = 4
    LATENTS = 5


def random_words(seed: int, purpose: Purpose, position: int, count: int) -> np.ndarray:
    """Return four random 64-bit words for each of `count` positions, uint64 (count, 4).

    They come from a counter-based generator, Philox4x64 (Salmon et al. 2011, "Parallel random
    numbers: as easy as 1, 2, 3"), whose key is (seed, purpose) and whose counter is the position:
    there is no state to save, and any position is reached at once.

    Args:
        seed: seed of the numbers, 0 … 2⁶⁴−1.
        purpose: stream of the numbers.
        position: first position, at least 0.
        count: number of positions.
    """
    key = np.array([seed, purpose], dtype=np.uint64)
    return np.random.Philox(key=key, counter=position).random_raw(4 * count).reshape(count, 4)
