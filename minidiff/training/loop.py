"""A training under way, whatever is trained: what changes from step to step, and the way on.

`Training` and `VAETraining` say how a loss comes about. What follows from its gradients is here,
and so is all that a snapshot keeps, so that either goes on as if it had never stopped.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from minidiff.data import Stream
from minidiff.runtime.distributed import World
from minidiff.training.config import LoopConfig
from minidiff.training.optim import EMA
from minidiff.training.progress import Budget, Guard, Meter, Progress, learning_rate


class Loop:
    """All of a training that changes from step to step. A subclass adds the step.

    Args:
        config: budget and optimizer.
        learner: all that is trained, with the raw weights.
        average: of the weights that are sampled from later, see `averaged`.
        optimizer: the learning rate of its groups rises and falls as the config's does.
        device: where the training is.
        world: the processes that train together.
    Attributes:
        stream: the order of the images, and the position in it; a subclass has it.
        budget, meter: what else a snapshot keeps.
        asks: says which signal asks this process to stop, 0 for none.
        asked: the same, as all processes agree on it at the end of a step.
        weaker: a network of an earlier time that is kept as well; None for none.
    """

    stream: Stream
    weaker: nn.Module | None = None
    weaker_is_due = False  # whether one should be kept by now and is not

    def __init__(
        self,
        config: LoopConfig,
        learner: nn.Module,
        average: EMA,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        world: World,
    ) -> None:
        self.config, self.device, self.world = config, device, world
        self.learner, self.average, self.optimizer = learner, average, optimizer
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.asks: Callable[[], int] = lambda: 0
        self.asked = 0
        self.budget, self.guard = Budget(config), Guard(config, device)
        self.meter = Meter(config, self.guard)

    @property
    def averaged(self) -> nn.Module:
        """What of the learner the average is of."""
        return self.learner

    def step(self) -> None:
        """Everything between a batch and its gradients, then `update`. Raises TrainingError."""
        raise NotImplementedError  # a subclass is what is trained

    def update(self, total: Tensor, norm: Tensor, loss: Tensor) -> None:
        """Take the step that the gradients ask for, if it is finite. Raises TrainingError.

        Args:
            total: of which they are the gradients.
            norm: of the gradients.
            loss: for the log.
        """
        if self.guard.passes(self.budget.step, total, norm):
            rate = learning_rate(self.config, self.budget.progress)
            share = rate / (self.config.learning_rate or 1)
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * share
            self.optimizer.step()
            self.average.update(self.averaged)
            self.meter.add(loss)
        self.optimizer.zero_grad(set_to_none=True)
        now, asked = self.world.largest(self.budget.now(), self.asks())
        self.budget.tick(now)
        self.asked = int(asked)

    def row(self, last: bool = False) -> Progress | None:
        """A row for the log, where one is due."""
        return self.meter.row(self.budget, self.stream.position, last)


AnyLoop = TypeVar("AnyLoop", bound=Loop)


def steps(
    loop: AnyLoop, report: Callable[[Progress], None], after: Callable[[AnyLoop], None]
) -> Iterator[bool]:
    """Take steps until the budget is spent; yields after each whether it is the last.

    Args:
        report: called with every row for the log.
        after: called when all else of a step is done; what it raises ends the run.
    """
    loop.budget.start()
    while loop.budget.progress < 1:
        loop.step()
        last = loop.budget.progress >= 1
        if row := loop.row(last):
            report(row)
        yield last
        after(loop)
