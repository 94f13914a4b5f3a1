"""What keeps a run safe while it trains: its log, its snapshots, and signals that end it."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minidiff.errors import CheckpointError, Stopped, TrainingError, whole_number
from minidiff.runs import snapshot
from minidiff.runtime.distributed import launched
from minidiff.training.loop import Loop
from minidiff.training.progress import Progress

SAVE_SECONDS = 300.0  # between snapshots, where save_every does not say otherwise


@dataclass(frozen=True)
class Saving:
    """How often a run is saved, and how much of it is kept. Raises InvalidArgument.

    Attributes:
        save_every: steps between snapshots; None for one every five minutes. The last step and
            one at which the run is stopped are saved in any case.
        keep_last: how many of the last snapshots are kept, beside the best: the one with the
            lowest running average of the training loss.
    """

    save_every: int | None = None
    keep_last: int = 2

    def __post_init__(self) -> None:
        if self.save_every is not None:
            whole_number("save_every", self.save_every, 1)
        whole_number("keep_last", self.keep_last, 1)


class Log:
    """The rows of a run, one JSON object a line; can be cut back to where a snapshot was made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._naming():
            self._file = path.open("ab")

    def append(self, row: Progress) -> None:
        """Write a row. Raises TrainingError where that cannot be done."""
        with self._naming():
            self._file.write(json.dumps(row._asdict()).encode() + b"\n")
            self._file.flush()

    def sync(self) -> int:
        """Make sure that all rows are on the disk; returns the length in bytes."""
        with self._naming():
            os.fsync(self._file.fileno())
            return self._file.tell()

    def cut(self, length: int) -> None:
        """Keep the first `length` bytes."""
        with self._naming():
            if self._file.seek(0, os.SEEK_END) > length:
                self._file.truncate(length)
                self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        with self._naming():
            self._file.close()

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(f"{self.path}: cannot be written ({error.strerror})") from error


class Signals:
    """The first SIGINT or SIGTERM is only noted, the second one does what it always does."""

    def __init__(self) -> None:
        self.caught: int | None = None

    @contextmanager
    def watch(self) -> Iterator["Signals"]:
        """Note signals inside the block; only the main thread of a program can."""
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
        if launched():  # torchrun passes on what the terminal has sent already, and kills in time
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Keeper:
    """Puts a run where its newest snapshot is, saves it along the way, and ends it when asked to.

    Args:
        run: the run's folder.
        command: of minidiff, that goes on with it.
        log: None for a process that does not lead: it writes nothing.
        say: told which snapshots were passed over, and where the run goes on.
    """

    def __init__(
        self,
        run: Path,
        command: str,
        saving: Saving,
        log: Log | None,
        signals: Signals,
        say: Callable[[str], None],
    ) -> None:
        self.run, self.command, self.saving = run, command, saving
        self.log, self.signals, self.say = log, signals, say
        self.leads = log is not None
        self.saved_at = 0.0

    def begin(self, training: Loop) -> None:
        """Go on from the newest snapshot that verifies, or begin. Raises CheckpointError."""
        training.asks = lambda: self.signals.caught or 0
        folder = snapshot.newest(self.run, self.say)
        length = 0 if folder is None else snapshot.restore(folder, training)
        self.saved_at, step = training.budget.elapsed, training.budget.step
        if training.world.largest(step, -step) != [step, -step]:
            raise CheckpointError(f"{self.run}: the processes find different snapshots in it")
        if self.leads:
            snapshot.clear_leftovers(self.run)
            self.log.cut(length)
        if folder is not None:
            self.say(f"going on from step {step}")

    def after(self, training: Loop) -> None:
        """Save where it is due. Raises Stopped where a signal asked for it before the end."""
        budget, every = training.budget, self.saving.save_every
        done, asked = budget.progress >= 1, training.asked
        due = budget.step % every == 0 if every else budget.elapsed - self.saved_at >= SAVE_SECONDS
        if due or asked or done:
            self.save(training)
        if asked and not done:
            training.world.largest(0)  # no process leaves before the snapshot is there
            raise Stopped(
                f"stopped by {signal.Signals(asked).name} and saved at step {budget.step}; go on "
                f"with: minidiff {self.command} --resume {self.run}",
                asked,
            )

    def save(self, training: Loop) -> None:
        """Write a snapshot and delete those that are not kept. Raises CheckpointError."""
        content = snapshot.content(training)
        if not self.leads:
            return
        try:
            snapshot.write(self.run, content, self.log.sync())
        except CheckpointError as error:
            held = snapshot.snapshots(self.run)
            left = f"{held[-1].name} is intact" if held else "there is no earlier one"
            raise CheckpointError(f"{error}; of the run's snapshots {left}") from error
        snapshot.prune(self.run, self.saving.keep_last)
        self.saved_at = training.budget.elapsed
