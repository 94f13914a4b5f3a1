"""The batches of a run: images in the order of their stream, with levels, noise and hidden labels.

Which images a batch holds depends on (seed, epoch), everything drawn for them on (seed, step): the
number of a step is the state of all random numbers, and a run that was interrupted draws on as if
it had not been.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.data import Stream
from minidiff.data.protocol import Data
from minidiff.noise import stream_seed
from minidiff.objective import Levels, Objective, quantiles
from minidiff.training.config import TrainConfig
from minidiff.training.learner import Learner
from minidiff.training.stable_target import Reference, stable_pair

LEVELS, NOISE, DROPOUT, REFERENCE = range(4)  # streams of random numbers, see `noise.stream_seed`
HELD = 8  # steps that have one reference batch: to draw it takes longer than to compare with it


class Batch(NamedTuple):
    """A process' part of the batch of a step; `parts` cuts it up for accumulation.

    Attributes:
        size: of the whole batch, on all processes.
        z: clean images in the network's space, (B, C, *space), channels last.
        told: what the data tell of them, (B, …), some of it hidden; or None.
        eps: standard normal noise like z.
        levels: on the host.
        reference: what may explain what the network sees, in its space; or None.
        hidden: whether nothing is told of an image, bool (B,) on the host.
    """

    size: int
    z: Tensor
    told: Tensor | None
    eps: Tensor
    levels: Levels
    hidden: Tensor
    reference: Reference | None

    def parts(self, n: int) -> Iterator["Batch"]:
        """n parts of nearly the same size."""
        ends = [len(self.z) * i // n for i in range(n + 1)]
        for start, end in pairwise(ends):
            images = slice(start, end)
            told = None if self.told is None else self.told[images]
            yield Batch(
                self.size,
                self.z[images],
                told,
                self.eps[images],
                self.levels.part(images),
                self.hidden[images],
                self.reference,
            )

    def tensors(self) -> list[Tensor]:
        """What the loss is of, on the device: clean images, noise, the levels' four, and `told`."""
        levels = self.levels.on(self.z)
        return [*self.pair(levels), *levels, *([] if self.told is None else [self.told])]

    def pair(self, levels: Levels) -> tuple[Tensor, Tensor]:
        """What an objective is shown as clean images and noise, each like z.

        Args:
            levels: those of the batch, after `Levels.on`.
        """
        if self.reference is None:
            return self.z, self.eps
        allowed, labels = None, self.reference.labels
        if labels is not None:
            hidden = self.hidden.to(labels.device, non_blocking=True)
            allowed = hidden[:, None] | (self.told[:, None] == labels)
        return stable_pair(self.z, self.eps, levels.level, allowed, self.reference)


class Batches:
    """The batch of every step: the images by (seed, epoch), all else by (seed, step) alone.

    Args:
        encode: from what the data give, (B, C, H, W), to the network's space.
        part: this process' part of so many images.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        learner: Learner,
        objective: Objective,
        encode: Callable[[Tensor], Tensor],
        part: Callable[[int], slice],
        device: torch.device,
    ) -> None:
        self.config, self.data, self.learner, self.objective = config, data, learner, objective
        self.encode, self.part = encode, part
        self.stream = Stream(len(data), config.seed)
        self.host, self.noise = torch.Generator(), torch.Generator(device)
        self.held, self.reference = -1, None

    def take(self, step: int, size: int) -> Batch:
        """The next `size` images, with the levels and the noise of this step.

        Every process draws for the whole batch, so that an image's noise is its own whatever the
        number of processes.
        """
        self.host.manual_seed(stream_seed(self.config.seed, LEVELS, step))
        self.noise.manual_seed(stream_seed(self.config.seed, NOISE, step))
        own, position = self.part(size), self.stream.position
        images, told = self.data.batch(self.stream.take(size)[own], position + own.start)
        z = self.encode(images).to(memory_format=torch.channels_last)
        hidden = torch.rand(size, generator=self.host) < self.config.label_dropout
        levels = self.objective.levels(quantiles(size, self.host)[own])
        eps = torch.empty(
            (size, *z.shape[1:]), device=z.device, memory_format=torch.channels_last
        ).normal_(generator=self.noise)[own]
        told = self.learner.hide(told, hidden[own])
        return Batch(size, z, told, eps, levels, hidden[own], self._reference(step))

    def _reference(self, step: int) -> Reference | None:
        """The reference batch of a step, the same on every process; see `stable_target`."""
        if not (count := self.config.stable_target):
            return None
        if (number := step // HELD) != self.held:
            self.host.manual_seed(stream_seed(self.config.seed, REFERENCE, number))
            index = torch.randint(len(self.data), (count,), generator=self.host)
            images, labels = self.data.batch(index, number * count)  # augmented by their number
            self.held, self.reference = number, Reference(self.encode(images), labels)
        return self.reference
