"""A run in its folder, whatever it trains: begun or resumed, and kept while it is under way.

A run that is resumed equals one that was never interrupted, bit for bit on the CPU with as many
threads, in everything but the column "seconds" of its log.

A run can be lengthened. From then on it follows the learning rate of the longer budget: after 1000
of 2000 steps that is half way down from the peak, whatever it was at the end of 1000.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minidiff.data.protocol import Data
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.pipeline import Pipeline
from minidiff.runs import snapshot
from minidiff.runs.autosave import Autosave, Log, PrintLine, Saving, Signals
from minidiff.runs.folder import LOG, Settings, about, changes, create, loading, read_settings
from minidiff.runs.tensorboard import TensorBoardLog, check_installed
from minidiff.runtime import files
from minidiff.runtime.checks import callback, check_all, instance, optional
from minidiff.runtime.distributed import rank
from minidiff.runtime.files import user_path
from minidiff.training.config import Kind, LoopConfig
from minidiff.training.progress import learning_rate, training_bar

Amount = float | str  # a text such as "+10" is added to the budget


class Run:
    """A run: its folder and its settings.

    Args:
        out: folder of the run, which holds its `config.json`.
        settings: content of that file.
        print_line: called with the snapshots that are skipped and where the run continues.
    Attributes:
        leads: this process is the only one or has rank 0; only that one writes and prints.
    """

    def __init__(self, out: str | Path, settings: Settings, print_line: PrintLine) -> None:
        self.out, self.settings, self.leads = user_path(out), settings, rank() == 0
        self.print_line = print_line if self.leads else _ignore
        check_installed(settings.saving.log)
        self.changed: Settings | None = None  # with a longer budget, or data that lie elsewhere

    @classmethod
    def begin(
        cls,
        out: str | Path,
        command: str,
        config: LoopConfig,
        data: Data,
        device: torch.device,
        *,
        saving: Saving | None = None,
        load: Mapping[str, Any] | None = None,
        shard: bool = False,
        start: Pipeline | None = None,
    ) -> "Run":
        """Make a new run's folder and write its `config.json`, before any work starts.

        Args:
            out: folder of the run; new or empty.
            command: command of minidiff that resumes the run.
            config, data, device: what is trained, on which data and where.
            saving: how often to save; by default every five minutes.
            load: arguments of `minidiff.data.load` that gave the data.
            shard: the processes shard the weights.
            start: pipeline that the training starts from.
        Raises:
            CheckpointError: the folder is not empty or cannot be written.
        """
        optional(instance(Saving))("saving", saving)
        known, load = about(data, start), loading(load or {}, command)
        settings = Settings(command, config, load, known, device.type, saving or Saving(), shard)
        run = cls(out, settings, print)
        if run.leads:
            create(out, settings)
        return run

    @classmethod
    def reopen(
        cls,
        out: str | Path,
        command: str,
        data: Data,
        print_line: PrintLine,
        *,
        start: Pipeline | None = None,
        load: Mapping[str, Any] | None = None,
        minutes: Amount | None = None,
        steps: Amount | None = None,
    ) -> "Run":
        """Return a run that is to be resumed.

        Args:
            out, command, data, start: arguments of `begin`.
            print_line: called with the snapshots that are skipped and where the run continues.
            load: arguments of `minidiff.data.load`, where the data lie elsewhere now.
            minutes, steps: longer budget, or a text such as "+10" for what is added to it.
        Raises:
            CheckpointError: the folder is no run of the command, the data are not those of the
                run, or it started from a pipeline that is not given, or the other way round.
            InvalidArgument: a budget in the other unit, or one that is spent.
        """
        check_all(locals(), {"start": optional(instance(Pipeline)), "print_line": callback})
        settings = stored = read_settings(out, command)
        if bool(settings.about.get("start")) != (start is not None):
            how = "a start, which must be given again" if start is None else "fresh weights"
            raise CheckpointError(f"{out}: was trained from {how}")
        now = about(data, start)
        if load is not None:
            if not settings.about.get("digests"):
                raise CheckpointError(
                    f"{out}: is of an older version, which kept no digest to know moved data by"
                )
            known = {**stored.about, "name": now["name"]}  # a folder may have another name now
            settings = stored._replace(data=loading(load, command), about=known)
        if changed := changes(settings.about, now):
            raise CheckpointError(f"{out}: {changed}")
        run = cls(out, settings, print_line)
        if minutes is not None or steps is not None:
            run._lengthen({"minutes": minutes, "steps": steps})
        if run.settings != stored:
            run.changed = run.settings
        return run

    def _lengthen(self, given: Mapping[str, Amount | None]) -> None:
        """Change the budget, and say where the learning rate goes on. Raises InvalidArgument."""
        step, seconds = self._spent()
        before = self.settings.config
        config = longer(before, {"minutes": seconds / 60, "steps": step}, given)
        unit = "steps" if config.minutes is None else "minutes"
        was, now = getattr(before, unit), getattr(config, unit)
        change = {"at_step": step, unit: was}
        self.settings = self.settings._replace(
            config=config, lengthened=(*self.settings.lengthened, change)
        )
        rate = learning_rate(config, (step if unit == "steps" else seconds / 60) / now)
        self.print_line(
            f"from {was:g} to {now:g} {unit}; the learning rate is {rate:.2g} at step {step}, as "
            "in a run of this length, and falls to zero at its end"
        )

    @contextmanager
    def kept(self) -> Iterator[Autosave]:
        """Lock the folder and yield the callbacks of a training; a signal then ends no step.

        Of several processes only that of rank 0 writes.
        """
        signals, config = Signals(), self.settings.config
        with (
            files.locked(self.out, wait=False) if self.leads else nullcontext(),
            closing(self._open_log()) if self.leads else nullcontext() as log,
            training_bar(config, log.append if log else _ignore, self.leads) as on_log_row,
            signals.watch(),
        ):
            if self.leads and self.changed:
                self.changed.write(self.out)
            yield Autosave(self, log, on_log_row, signals)

    def _spent(self) -> tuple[int, float]:
        """Return the steps and seconds that the run has taken."""
        newest = snapshot.newest(self.out, _ignore)
        return (0, 0.0) if newest is None else snapshot.spent(newest)

    def finished_at(self) -> int | None:
        """Return the step at which the budget was spent; None while some of it is left."""
        (step, seconds), config = self._spent(), self.settings.config
        left = config.steps - step if config.steps else 60 * config.minutes - seconds
        return step if left <= 0 else None

    def _open_log(self) -> Log:
        """Open the log, and clear what a killed process left; the folder is locked."""
        files.clear_temporaries(self.out)
        return (TensorBoardLog if self.settings.saving.log else Log)(self.out / LOG)


def longer(config: Kind, spent: Mapping[str, float], given: Mapping[str, Amount | None]) -> Kind:
    """Return a config with another budget.

    Args:
        config: options of the run.
        spent: minutes and steps that the run has taken.
        given: new minutes or steps, or a text such as "+10" for what is added.
    Raises:
        InvalidArgument: a budget in the other unit, one that is spent, or none.
    """
    unit, other = ("minutes", "steps") if config.steps is None else ("steps", "minutes")
    budget, value = getattr(config, unit), given[unit]
    if value is None or given[other] is not None:
        raise InvalidArgument(f"{other} must be left out: the budget of the run is {budget:g} "
                              f"{unit}; got {given[other]}")  # fmt: skip
    if isinstance(value, str):
        try:
            more = float(value) if unit == "minutes" else int(value)
        except ValueError:
            more = 0
        if not (value.startswith("+") and more > 0):
            raise InvalidArgument(f"{unit} must be a number, or a text such as '+10' for what is "
                                  f"added to the {budget:g} of the run; got {value!r}")  # fmt: skip
        value = budget + more
    config = replace(config, **{unit: value})
    if value <= spent[unit]:
        raise InvalidArgument(
            f"{unit} must be more than the {spent[unit]:g} that the run has taken, got {value:g}"
        )
    return config


def _ignore(_: object) -> None:
    """Do nothing, where a process neither writes nor prints."""
