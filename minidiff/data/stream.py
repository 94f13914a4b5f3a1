"""The order in which training sees its images: a function of (seed, epoch), and a position."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import whole_number

MEASURED_IMAGES = 10_000  # are looked at where mean and spread of all are wanted


class Stream:
    """Image numbers for ever: permutation after permutation, taken in batches of any size.

    Epoch e is a permutation of 0..n−1 that depends on (seed, e) alone. Batches run on across the
    end of an epoch, so none is short and every image is seen equally often.

    Args:
        n: number of images, at least 1.
        seed: 0 or more.
        position: how many images to pass over, so that an interrupted run resumes its stream.
    Raises:
        InvalidArgument: an argument is out of range.
    """

    def __init__(self, n: int, seed: int, position: int = 0) -> None:
        self.n, self.seed = whole_number("n", n, 1), whole_number("seed", seed, 0)
        self.position = whole_number("position", position, 0)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def take(self, count: int) -> Tensor:
        """The next `count` image numbers, int64 (count,) on the CPU; more than n is allowed."""
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


def evenly_spaced(n: int, most: int) -> Tensor:
    """Numbers of at most `most` images spread evenly over all n, which a measurement looks at."""
    return torch.linspace(0, n - 1, min(n, most)).round().long()


def batches(n: int, batch_size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Yield the image numbers of equal batches for ever, see `Stream`.

    Args:
        batch_size: length of every batch; may exceed n.
        start: number of batches to pass over.
    Raises:
        InvalidArgument: an argument is out of range.
    """
    batch_size = whole_number("batch_size", batch_size, 1)
    stream = Stream(n, seed, whole_number("start", start, 0) * batch_size)
    return (stream.take(batch_size) for _ in itertools.count())
