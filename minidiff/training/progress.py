"""How far a run is, and what follows from it: learning rate, size of the batch, rows of the log.

A budget in steps makes everything a function of the step. A budget in minutes counts seconds of
wall-clock time, those before an interruption included.
"""

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.errors import TrainingError
from minidiff.training.config import LoopConfig


class Budget:
    """How far a run is: a share of its steps, or of its wall-clock minutes.

    Attributes:
        step: steps that are behind.
        elapsed: seconds of the run at the last `tick`, those before an interruption included.
    """

    def __init__(self, config: LoopConfig) -> None:
        self.steps, self.seconds = config.steps, 60 * (config.minutes or 0)
        self.step, self.elapsed = 0, 0.0
        self.start()

    def start(self) -> None:
        """The clock runs from now on, `elapsed` seconds being behind."""
        self._started = time.monotonic() - self.elapsed

    def now(self) -> float:
        """Seconds of the run by this process' clock."""
        return time.monotonic() - self._started

    def tick(self, now: float) -> None:
        """A step is behind, at this time."""
        self.step, self.elapsed = self.step + 1, now

    @property
    def fraction_done(self) -> float:
        """Fraction of the budget that is spent, from 0 to 1 and slightly beyond."""
        return self.step / self.steps if self.steps else self.elapsed / self.seconds


class Progress(NamedTuple):
    """What `train` reports along the way: a row of log.jsonl."""

    step: int
    seconds: float
    images: int
    loss: float
    learning_rate: float
    skipped: list[int]  # steps that were passed over since the last row


def learning_rate(config: LoopConfig, progress: float) -> float:
    """Linear rise over the warm-up, then linear decay to zero at the end of the budget."""
    rise = progress / config.warmup if config.warmup else 1.0
    fall = (1 - progress) / (1 - config.warmup)
    return config.learning_rate * max(0.0, min(rise, fall, 1.0))


def batch_size(config: LoopConfig, progress: float) -> int:
    """Images in the batch at this share of the budget."""
    sizes = config.batch_sizes()
    return sizes[min(int(progress * len(sizes)), len(sizes) - 1)]


class Guard:
    """Stops a run whose loss or gradient is not finite, or lets it pass over a few such steps.

    On the CPU, and where steps may be passed over, every step is looked at before its update. On
    a GPU that would make the host wait, so there the first bad step is only noted, on the device,
    and `check` reads the note: before every row of the log, and before anything is saved.
    """

    def __init__(self, config: LoopConfig, device: torch.device) -> None:
        self.config = config
        self.looks = device.type == "cpu" or config.skip_nonfinite > 0
        self.first = torch.full((), -1, device=device)
        self.skipped: list[int] = []

    def passes(self, step: int, loss: Tensor, norm: Tensor) -> bool:
        """Whether the step may be taken. Raises TrainingError."""
        if not self.looks:
            bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
            self.first = torch.where(bad & (self.first < 0), step, self.first)
            return True
        if math.isfinite(float(loss)) and math.isfinite(float(norm)):
            return True
        what = f"the loss is {float(loss)}, the gradient's norm {float(norm)}"
        if len(self.skipped) >= self.config.skip_nonfinite:
            raise TrainingError(self._message(step, what))
        self.skipped.append(step)
        return False

    def check(self) -> None:
        """Raises TrainingError if a step since the last check was bad. Waits for the device."""
        if not self.looks and (step := int(self.first)) >= 0:
            raise TrainingError(self._message(step, "the loss or the gradient"))

    def _message(self, step: int, what: str) -> str:
        passed = f" after {len(self.skipped)} steps were passed over" if self.skipped else ""
        return (
            f"{what} is not finite at step {step}{passed}. Likely: a learning rate that is too "
            f"high (now {self.config.learning_rate:g}), bfloat16 (try float32), or images that "
            "are not finite"
        )


class Meter:
    """Averages the loss between rows of the log, so that reading it does not sync every step.

    Under a budget in steps a row comes after every so many, up to a hundred, so that a run that
    was interrupted writes the rows of one that was not; under one in minutes, every second.

    Attributes:
        running: a slower average of the loss, over about ten rows; None before the first.
    """

    def __init__(self, config: LoopConfig, guard: Guard) -> None:
        self.config, self.guard = config, guard
        self.every = None if config.steps is None else min(max(config.steps // 100, 1), 100)
        self.sum: float | Tensor = 0.0
        self.count, self.reported_at, self.skips_told = 0, 0.0, 0
        self.running: float | None = None

    def add(self, loss: Tensor) -> None:
        """The loss of a step that was taken."""
        self.sum, self.count = self.sum + loss, self.count + 1

    def row(self, budget: Budget, images: int, last: bool = False) -> Progress | None:
        """A row, where one is due. Raises TrainingError, see `Guard.check`."""
        due = (
            budget.elapsed - self.reported_at >= 1
            if self.every is None
            else budget.step % self.every == 0
        )
        if not (due or last):
            return None
        self.guard.check()
        if not self.count:
            return None
        mean = float(self.sum) / self.count  # the one sync
        self.running = mean if self.running is None else 0.9 * self.running + 0.1 * mean
        rate = learning_rate(self.config, budget.fraction_done)
        skipped, self.skips_told = self.guard.skipped[self.skips_told :], len(self.guard.skipped)
        self.sum, self.count, self.reported_at = 0.0, 0, budget.elapsed
        return Progress(budget.step, budget.elapsed, images, mean, rate, skipped)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, and of the guard."""
        names = ("count", "reported_at", "skips_told", "running")
        kept = {name: getattr(self, name) for name in names}
        return kept | {"sum": float(self.sum), "skipped": list(self.guard.skipped)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` kept."""
        for name in ("sum", "count", "reported_at", "skips_told", "running"):
            setattr(self, name, state[name])
        self.guard.skipped = list(state["skipped"])
