"""Progress of a run, and what follows from it: learning rate, batch size, rows of the log.

With a budget in steps everything is a function of the step. A budget in minutes counts seconds of
wall-clock time, including those before an interruption.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.errors import TrainingError
from minidiff.runtime.progress import progress_bar
from minidiff.training.config import LoopConfig


class Budget:
    """The budget of a run, in steps or in wall-clock minutes, and how much of it is spent.

    Args:
        config: minutes or steps.
    Attributes:
        step: number of steps taken.
        elapsed: seconds of the run at the last `tick`, including those before an interruption.
    """

    def __init__(self, config: LoopConfig) -> None:
        self.steps, self.seconds = config.steps, 60 * (config.minutes or 0)
        self.step, self.elapsed = 0, 0.0
        self.start()

    def start(self) -> None:
        """Start the clock, with `elapsed` seconds already spent."""
        self._started = time.monotonic() - self.elapsed

    def now(self) -> float:
        """Return the seconds of the run by this process' clock."""
        return time.monotonic() - self._started

    def tick(self, now: float) -> None:
        """Count a step that ended at this time."""
        self.step, self.elapsed = self.step + 1, now

    @property
    def fraction_done(self) -> float:
        """Fraction of the budget that is spent, from 0 to 1 and slightly beyond."""
        return self.step / self.steps if self.steps else self.elapsed / self.seconds


class Progress(NamedTuple):
    """A row of log.jsonl, which `train` passes to `on_log_row`.

    Attributes:
        step: number of steps taken.
        seconds: seconds of the run.
        images: number of images seen.
        loss: mean loss since the last row.
        learning_rate: learning rate of the next step.
        skipped: numbers of the steps that were skipped since the last row.
    """

    step: int
    seconds: float
    images: int
    loss: float
    learning_rate: float
    skipped: list[int]


@contextmanager
def training_bar(
    config: LoopConfig, on_log_row: Callable[[Progress], None], progress: bool | None = None
) -> Iterator[Callable[[Progress], None]]:
    """Show a bar of the budget, the loss and the time left.

    Yields a function that passes a row on to `on_log_row` and moves the bar.
    """
    total = config.steps or max(1, round(60 * config.minutes))
    style = "{desc} {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left{postfix}"
    with progress_bar(total, progress, desc="training", bar_format=style) as bar:

        def log_and_show(row: Progress) -> None:
            on_log_row(row)
            bar.set_postfix_str(f"step {row.step}, loss {row.loss:.4f}", refresh=False)
            done = row.step if config.steps else int(row.seconds)
            bar.update(min(done, total) - bar.n)

        yield log_and_show


def learning_rate(config: LoopConfig, fraction_done: float) -> float:
    """Return the learning rate: linear rise in the warm-up, then linear decay to zero."""
    rise = fraction_done / config.warmup if config.warmup else 1.0
    fall = (1 - fraction_done) / (1 - config.warmup)
    return config.learning_rate * max(0.0, min(rise, fall, 1.0))


def batch_size(config: LoopConfig, fraction_done: float) -> int:
    """Return the number of images in a batch after this fraction of the budget."""
    sizes = config.batch_sizes()
    return sizes[min(int(fraction_done * len(sizes)), len(sizes) - 1)]


class Guard:
    """Stops a run whose loss or gradient is not finite, or lets it skip a few such steps.

    On the CPU, and where steps may be skipped, every step is checked before its update. On a GPU
    that would make the host wait. There the first bad step is only recorded on the device, and
    `check` reads it before every row of the log and before anything is saved.

    Args:
        config: number of steps that may be skipped.
        device: device of the training.
    """

    def __init__(self, config: LoopConfig, device: torch.device) -> None:
        self.config = config
        self.checks_every_step = device.type == "cpu" or config.skip_nonfinite > 0
        self.first = torch.full((), -1, device=device)
        self.skipped: list[int] = []

    def passes(self, step: int, loss: Tensor, norm: Tensor) -> bool:
        """Return whether the step may be taken. Raises TrainingError.

        Args:
            step: number of the step.
            loss, norm: loss and norm of its gradient.
        """
        if not self.checks_every_step:
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
        """Raise TrainingError if a step since the last check was bad. Waits for the device."""
        if not self.checks_every_step and (step := int(self.first)) >= 0:
            raise TrainingError(self._message(step, "the loss or the gradient"))

    def _message(self, step: int, what: str) -> str:
        skipped = f" after {len(self.skipped)} steps were skipped" if self.skipped else ""
        return (
            f"{what} is not finite at step {step}{skipped}. Likely: a learning rate that is too "
            f"high (now {self.config.learning_rate:g}), bfloat16 (try float32), or images that "
            "are not finite"
        )


class Meter:
    """Averages the loss between rows of the log, so that reading it does not sync every step.

    With a budget in steps a row follows every hundredth of them, at most a hundred steps apart, so
    an interrupted run writes the rows of one that was not. With one in minutes a row follows every
    second.

    Args:
        config: the budget.
        guard: checks the loss before a row.
    Attributes:
        running: slower average of the loss, over about ten rows; None before the first.
    """

    def __init__(self, config: LoopConfig, guard: Guard) -> None:
        self.config, self.guard = config, guard
        self.every = None if config.steps is None else min(max(config.steps // 100, 1), 100)
        self.sum: float | Tensor = 0.0
        self.count, self.reported_at, self.skips_told = 0, 0.0, 0
        self.running: float | None = None

    def add(self, loss: Tensor) -> None:
        """Add the loss of a step that was taken."""
        self.sum, self.count = self.sum + loss, self.count + 1

    def row(self, budget: Budget, images: int, last: bool = False) -> Progress | None:
        """Return a row, where one is due. Raises TrainingError, see `Guard.check`.

        Args:
            budget: time and step.
            images: number of images seen.
            last: the run is at its end, where a row is always due.
        """
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
        """Return what a snapshot keeps of the meter and of the guard."""
        names = ("count", "reported_at", "skips_told", "running")
        kept = {name: getattr(self, name) for name in names}
        return kept | {"sum": float(self.sum), "skipped": list(self.guard.skipped)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        for name in ("sum", "count", "reported_at", "skips_told", "running"):
            setattr(self, name, state[name])
        self.guard.skipped = list(state["skipped"])
