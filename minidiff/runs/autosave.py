"""Autosave: the log of a run, its snapshots, and signals that stop it."""

import json
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minidiff.errors import CheckpointError, Stopped, TrainingError
from minidiff.names import LOGS
from minidiff.runs import snapshot
from minidiff.runtime.checks import check_fields, choice, option, optional, whole
from minidiff.runtime.distributed import launched
from minidiff.training.loop import TrainingState
from minidiff.training.progress import Progress

if TYPE_CHECKING:
    from minidiff.runs.run import Run

SAVE_SECONDS = 300.0  # between snapshots, where save_every is None

OnLogRow = Callable[[Progress], None]
PrintLine = Callable[[str], None]


@dataclass(frozen=True)
class Saving:
    """How often a run is saved, how many snapshots are kept, and what else logs it.

    Attributes:
        save_every: steps between snapshots; None for one every five minutes. The last step, and
            one at which the run is stopped, are saved in any case.
        keep_last: number of the last snapshots that are kept, besides the best: the one with the
            lowest running average of the training loss.
        log: "tensorboard" for event files beside `log.jsonl`, see `minidiff.runs.tensorboard`.
    Raises:
        InvalidArgument: a value is not allowed.
    """

    save_every: int | None = option(None, "steps between snapshots", optional(whole(1)))
    keep_last: int = option(
        2, "number of the last snapshots to keep, besides that of the lowest running loss", whole(1)
    )
    log: str | None = option(None, "log to write beside log.jsonl", choice(None, *LOGS))

    def __post_init__(self) -> None:
        check_fields(self)


class Log:
    """The rows of a run, one JSON object a line; can be cut back to a snapshot."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._naming():
            self._file = path.open("ab")

    def append(self, row: Progress) -> None:
        """Write a row. Raises TrainingError if that fails."""
        with self._naming():
            self._file.write(json.dumps(row._asdict()).encode() + b"\n")
            self._file.flush()

    def resume(self, training: TrainingState) -> None:
        """Note where the training goes on, for a log that needs it."""

    def add_picture(self, path: Path, step: int) -> None:
        """Note that a picture was written at a step, for a log that shows it."""

    def sync(self) -> int:
        """Make sure that all rows are on the disk and return the length in bytes."""
        with self._naming():
            os.fsync(self._file.fileno())
            return self._file.tell()

    def cut(self, length: int) -> int:
        """Keep the first `length` bytes and return the number of those that are missing."""
        with self._naming():
            if (size := self._file.seek(0, os.SEEK_END)) > length:
                self._file.truncate(length)
                self._file.seek(0, os.SEEK_END)
        return max(0, length - size)

    def close(self) -> None:
        """Close the file."""
        with self._naming():
            self._file.close()

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Turn an error of the system into one that names the file."""
        try:
            yield
        except OSError as error:
            raise TrainingError(f"{self.path}: cannot be written ({error.strerror})") from error


class Signals:
    """SIGINT and SIGTERM: the first is only noted, the second has its usual effect."""

    def __init__(self) -> None:
        self.caught: int | None = None

    @contextmanager
    def watch(self) -> Iterator["Signals"]:
        """Note signals inside the block, in the main thread of a program."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for number in before:
                signal.signal(number, self._note)
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.caught = number
        if launched():  # torchrun repeats what the terminal has sent already, and kills in time
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Autosave:
    """Restores a run from its newest snapshot, saves it along the way, and stops it on a signal.

    Its three functions are the callbacks of a training.

    Args:
        run: the run.
        log: log of the run; None for a process other than rank 0, which writes nothing.
        on_log_row: writes a row and shows it.
        signals: signals that were caught.
    """

    def __init__(self, run: "Run", log: Log | None, on_log_row: OnLogRow, signals: Signals) -> None:
        self.run, self.out, self.saving = run, run.out, run.settings.saving
        self.log, self.on_log_row, self.signals = log, on_log_row, signals
        self.saved_at = 0.0

    def resume(self, training: TrainingState) -> None:
        """Restore the newest snapshot that verifies, if there is any. Raises CheckpointError."""
        training.stop_requested = lambda: self.signals.caught or 0
        folder = snapshot.newest(self.out, self.run.print_line)
        length = 0 if folder is None else snapshot.restore(folder, training)
        self.saved_at, step = training.budget.elapsed, training.budget.step
        if training.world.largest(step, -step) != [step, -step]:
            raise CheckpointError(f"{self.out}: the processes find different snapshots in it")
        if self.log is not None:
            snapshot.clear_leftovers(self.out)
            if missing := self.log.cut(length):
                self.run.print_line(f"{self.log.path}: {missing} of {length} bytes are lost")
            self.log.resume(training)
        if folder is not None:
            self.run.print_line(f"going on from step {step}")

    def after_step(self, training: TrainingState) -> None:
        """Save where it is due. Raises Stopped after a signal, except at the end."""
        budget, every = training.budget, self.saving.save_every
        done, stop = budget.fraction_done >= 1, training.agreed_stop
        due = budget.step % every == 0 if every else budget.elapsed - self.saved_at >= SAVE_SECONDS
        if due or stop or done:
            self.save(training)
        if stop and not done:
            training.world.largest(0)  # no process leaves before the snapshot is there
            raise Stopped(
                f"stopped by {signal.Signals(stop).name} and saved at step {budget.step}; continue "
                f"with: minidiff {self.run.settings.command} --resume {shlex.quote(str(self.out))}",
                stop,
            )

    def save(self, training: TrainingState) -> None:
        """Write a snapshot and delete those that are not kept. Raises CheckpointError."""
        content = snapshot.content(training)
        if self.log is None:
            return
        try:
            snapshot.write(self.out, content, self.log.sync())
        except CheckpointError as error:
            held = snapshot.snapshots(self.out)
            left = f"{held[-1].name} is intact" if held else "there is no earlier one"
            raise CheckpointError(f"{error}; of the run's snapshots {left}") from error
        snapshot.prune(self.out, self.saving.keep_last)
        self.saved_at = training.budget.elapsed
