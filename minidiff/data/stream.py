"""The order of images in training: a function of (seed, epoch), and a position in it."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import whole_number

MEASURED_IMAGES = 10_000  # for estimates of mean and standard deviation of all


class Stream:
    """An endless stream of image numbers: one permutation after another, in batches of any size.

    Epoch e is a permutation of 0..n−1 that depends on (seed, e) alone. Batches continue across the
    end of an epoch, so none is short and every image occurs equally often.

    Args:
        n: number of images, at least 1.
        seed: seed of the order, at least 0.
        position: number of images to skip, with which an interrupted run resumes its stream.
    Raises:
        InvalidArgument: an argument is out of range.
    """

    def __init__(self, n: int, seed: int, position: int = 0) -> None:
        self.n, self.seed = whole_number("n", n, 1), whole_number("seed", seed, 0)
        self.position = whole_number("position", position, 0)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def take(self, count: int) -> Tensor:
        """Return the next `count` image numbers, int64 (count,) on the CPU; count may exceed n."""
        parts, missing = [], whole_number("count", count, 1)
        while missing:
            epoch, offset = divmod(self.position, self.n)
            part = self._permutation(epoch)[offset : offset + missing]
            parts.append(part)
            self.position, missing = self.position + len(part), missing - len(part)
        return torch.cat(parts)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            # NumPy hashes the pair into one stream; seed + epoch would let (0, 1) and (1, 0)
            # collide.
            order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
            self._epoch, self._order = epoch, torch.from_numpy(order)
        return self._order


def evenly_spaced(n: int, max_count: int) -> Tensor:
    """Return the numbers of at most `max_count` images, spread evenly over all n."""
    return torch.linspace(0, n - 1, min(n, max_count), dtype=torch.float32).round().long()


def batches(n: int, batch_size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Return an endless iterator over the image numbers of equal batches, see `Stream`.

    Args:
        n: number of images.
        batch_size: length of every batch; may exceed n.
        seed: seed of the order.
        start: number of batches to skip.
    Raises:
        InvalidArgument: an argument is out of range.
    """
    batch_size = whole_number("batch_size", batch_size, 1)
    stream = Stream(n, seed, whole_number("start", start, 0) * batch_size)
    return (stream.take(batch_size) for _ in itertools.count())
