"""A training under way: its state, and the loop over its steps.

`DiffusionTraining` and `AutoencoderTraining` compute gradients. What follows from the gradients is
here, and so is everything that a snapshot keeps, so that both resume as if never interrupted.
"""

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from minidiff.data import Stream
from minidiff.runtime.checks import callback
from minidiff.runtime.distributed import World
from minidiff.training.config import LoopConfig
from minidiff.training.optim import EMA
from minidiff.training.progress import Budget, Guard, Meter, Progress, learning_rate

CALLBACKS = {"on_log_row": callback, "resume": callback, "after_step": callback}


class Extra(Protocol):
    """A network that is kept beside the learner from some time of a run on.

    Attributes:
        name: its name in `TrainingState.extras`; a snapshot keeps it as NAME.safetensors.
    """

    name: str

    def is_due(self, fraction_done: float) -> bool:
        """Return whether the network is to be kept by now."""

    def make(self) -> nn.Module:
        """Return the network as it is now; a snapshot's weights are also read into it."""

    def attach(self, network: nn.Module) -> None:
        """Use the network, fresh or restored."""


class TrainingState:
    """Everything of a training that changes from step to step. A subclass adds the step.

    Args:
        config: budget and optimizer.
        learner: all trained parts as one module, with the raw weights.
        average: average of the weights of `averaged`.
        optimizer: its groups' learning rates rise and fall as the config's does.
        device: device of the training.
        world: processes that train together.
        planned: networks that may be kept as well.
    Attributes:
        stream: order of the images, and the position in it; a subclass has it.
        budget, meter: further state that a snapshot keeps.
        extras: networks that are kept as well, by name, such as a guidance network.
        stop_requested: returns the number of a signal that this process received, or 0.
        agreed_stop: that number after all processes agreed on it at the end of a step.
    """

    stream: Stream

    def __init__(
        self,
        config: LoopConfig,
        learner: nn.Module,
        average: EMA,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        world: World,
        planned: tuple[Extra, ...] = (),
    ) -> None:
        self.config, self.device, self.world = config, device, world
        self.learner, self.average, self.optimizer = learner, average, optimizer
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.stop_requested: Callable[[], int] = lambda: 0
        self.agreed_stop = 0
        self.budget, self.guard = Budget(config), Guard(config, device)
        self.meter = Meter(config, self.guard)
        self.planned, self.extras = planned, dict[str, nn.Module]()

    @property
    def averaged(self) -> nn.Module:
        """Part of the learner that is averaged."""
        return self.learner

    def step(self) -> None:
        """Compute the gradients of a batch, then call `update`. Raises TrainingError."""
        raise NotImplementedError  # a subclass is what is trained

    def update(self, total: Tensor, norm: Tensor, loss: Tensor) -> None:
        """Take the optimizer's step if it is finite, and count the step. Raises TrainingError.

        Args:
            total: value whose gradients were computed.
            norm: norm of the gradients.
            loss: value for the log.
        """
        if self.guard.passes(self.budget.step, total, norm):
            self.set_learning_rates()
            self.optimizer.step()
            self.average.update(self.averaged)
            self.meter.add(loss)
        self.optimizer.zero_grad(set_to_none=True)
        now, stop = self.world.largest(self.budget.now(), self.stop_requested())
        self.budget.tick(now)
        self.agreed_stop = int(stop)
        for extra in self.missing_extras():
            self.keep(extra, extra.make())

    def set_learning_rates(self) -> None:
        """Set the learning rates of the optimizer's groups for this step."""
        rate = learning_rate(self.config, self.budget.fraction_done)
        fraction = rate / (self.config.learning_rate or 1)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * fraction

    def missing_extras(self) -> list[Extra]:
        """Return the planned networks that should be kept by now and are not."""
        done = self.budget.fraction_done
        return [e for e in self.planned if e.name not in self.extras and e.is_due(done)]

    def keep(self, extra: Extra, network: nn.Module) -> None:
        """Keep a network from now on."""
        self.extras[extra.name] = network
        extra.attach(network)

    def row(self, last: bool = False) -> Progress | None:
        """Return a row for the log, where one is due."""
        return self.meter.row(self.budget, self.stream.position, last)


AnyState = TypeVar("AnyState", bound=TrainingState)


def steps(
    training: AnyState,
    on_log_row: Callable[[Progress], None],
    after_step: Callable[[AnyState], None],
) -> Iterator[bool]:
    """Take steps until the budget is spent, yielding after each whether it is the last.

    Args:
        training: the training.
        on_log_row: called with every row for the log.
        after_step: called at the very end of a step; what it raises ends the run.
    """
    training.budget.start()
    while training.budget.fraction_done < 1:
        training.step()
        last = training.budget.fraction_done >= 1
        if row := training.row(last):
            on_log_row(row)
        yield last
        after_step(training)
