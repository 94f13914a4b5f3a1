"""The batches of a run: images in the order of their stream, with levels, noise and hidden labels.

Which images a batch holds depends on (seed, epoch); everything drawn for them depends on (seed,
step). The number of a step is therefore the state of all random numbers, and an interrupted run
draws on as if it had not been.
"""

from collections.abc import Callable, Iterator, Sequence
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
STEPS_PER_REFERENCE = 8  # drawing a reference batch takes longer than comparing with it


class LossInputs(NamedTuple):
    """Inputs of the loss, on the device.

    Attributes:
        x0, eps: clean images and noise as the objective uses them, (B, C, *space).
        levels: levels after `Levels.on`.
        labels: labels (B,) or token numbers (B, L), some hidden; None without.
    """

    x0: Tensor
    eps: Tensor
    levels: Levels
    labels: Tensor | None

    def flat(self) -> list[Tensor]:
        """Return the tensors alone, as a CUDA graph takes them."""
        return [self.x0, self.eps, *self.levels, *([] if self.labels is None else [self.labels])]

    @classmethod
    def unflat(cls, tensors: Sequence[Tensor]) -> "LossInputs":
        """Return the inputs whose `flat` these tensors are."""
        x0, eps, alpha, sigma, t, weight, *labels = tensors
        return cls(x0, eps, Levels(alpha, sigma, t, weight), labels[0] if labels else None)


class Batch(NamedTuple):
    """This process' part of the batch of a step; `parts` cuts it up for accumulation.

    Attributes:
        size: number of images of the whole batch, on all processes.
        z: clean images in the network's space, (B, C, *space), channels last.
        labels: labels (B,) or token numbers (B, L), some hidden; None without.
        eps: standard normal noise of the shape of z.
        levels: levels on the host.
        hidden: True where the label of an image is hidden, bool (B,) on the host.
        reference: images that may explain the noisy ones, in the network's space; or None.
    """

    size: int
    z: Tensor
    labels: Tensor | None
    eps: Tensor
    levels: Levels
    hidden: Tensor
    reference: Reference | None

    def parts(self, n: int) -> Iterator["Batch"]:
        """Yield n parts of nearly the same size."""
        ends = [len(self.z) * i // n for i in range(n + 1)]
        for start, end in pairwise(ends):
            images = slice(start, end)
            yield self._replace(
                z=self.z[images],
                labels=None if self.labels is None else self.labels[images],
                eps=self.eps[images],
                levels=self.levels.part(images),
                hidden=self.hidden[images],
            )

    def loss_inputs(self) -> LossInputs:
        """Return the inputs of the loss, on the device."""
        levels = self.levels.on(self.z)
        return LossInputs(*self.pair(levels), levels, self.labels)

    def pair(self, levels: Levels) -> tuple[Tensor, Tensor]:
        """Return the clean images and the noise for the objective, each of the shape of z.

        Args:
            levels: levels of the batch, after `Levels.on`.
        """
        if self.reference is None:
            return self.z, self.eps
        allowed, labels = None, self.reference.labels
        if labels is not None:
            hidden = self.hidden.to(labels.device, non_blocking=True)
            allowed = hidden[:, None] | (self.labels[:, None] == labels)
        return stable_pair(self.z, self.eps, levels.level, allowed, self.reference)


class Batches:
    """The batch of every step: the images by (seed, epoch), all else by (seed, step) alone.

    Args:
        config: batch sizes, seed and fraction of hidden labels.
        data: images or latents.
        learner: hides labels.
        objective: distributes the levels.
        encode: function from the data's images (B, C, H, W) to the network's space.
        part: function from a number of images to this process' part of them.
        device: device of the noise.
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
        self.reference_number, self.reference = -1, None

    def take(self, step: int, size: int) -> Batch:
        """Return the next `size` images, with the levels and the noise of this step.

        Every process draws for the whole batch, so an image's noise does not depend on the number
        of processes.
        """
        self.host.manual_seed(stream_seed(self.config.seed, LEVELS, step))
        self.noise.manual_seed(stream_seed(self.config.seed, NOISE, step))
        own, position = self.part(size), self.stream.position
        images, labels = self.data.batch(self.stream.take(size)[own], position + own.start)
        z = self.encode(images)
        memory = torch.channels_last if z.ndim == 4 else torch.contiguous_format
        z = z.to(memory_format=memory)
        hidden = torch.rand(size, generator=self.host) < self.config.label_dropout
        levels = self.objective.levels(quantiles(size, self.host)[own])
        eps = torch.empty((size, *z.shape[1:]), device=z.device, memory_format=memory)
        eps = eps.normal_(generator=self.noise)[own]
        labels = self.learner.hide(labels, hidden[own])
        return Batch(size, z, labels, eps, levels, hidden[own], self._reference(step))

    def _reference(self, step: int) -> Reference | None:
        """Return the reference batch of a step, the same on every process."""
        if not (count := self.config.stable_target):
            return None
        if (number := step // STEPS_PER_REFERENCE) != self.reference_number:
            self.host.manual_seed(stream_seed(self.config.seed, REFERENCE, number))
            index = torch.randint(len(self.data), (count,), generator=self.host)
            images, labels = self.data.batch(index, number * count)  # augmented by their number
            self.reference_number = number
            self.reference = Reference(self.encode(images), labels)
        return self.reference
