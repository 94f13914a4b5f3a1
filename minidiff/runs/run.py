"""A run in its folder, whatever it trains: begun or resumed, and kept while it is under way.

A run that is resumed equals one that was never interrupted, bit for bit on the CPU with as many
threads, in everything but the column "seconds" of its log.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from minidiff.data.protocol import Data
from minidiff.errors import CheckpointError
from minidiff.runs.autosave import Autosave, Log, PrintLine, Saving, Signals
from minidiff.runs.folder import LOG, Settings, about, changes, create, read_settings
from minidiff.runtime import files
from minidiff.runtime.distributed import rank
from minidiff.runtime.files import user_path
from minidiff.training.config import LoopConfig
from minidiff.training.progress import training_bar


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
        started: bool = False,
    ) -> "Run":
        """Make a new run's folder and write its `config.json`, before any work starts.

        Args:
            out: folder of the run; new or empty.
            command: command of minidiff that resumes the run.
            config, data, device: what is trained, on which data and where.
            saving: how often to save; by default every five minutes.
            load: arguments of `minidiff.data.load` that gave the data.
            shard: the processes shard the weights.
            started: the training starts from a pipeline.
        Raises:
            CheckpointError: the folder is not empty or cannot be written.
        """
        known = about(data, started=started)
        settings = Settings(
            command, config, dict(load or {}), known, device.type, saving or Saving(), shard
        )
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
        started: bool = False,
    ) -> "Run":
        """Return a run that is to be resumed.

        Raises:
            CheckpointError: the folder is no run of the command, the data are not those of the
                run, or it started from a pipeline that is not given, or the other way round.
        """
        settings = read_settings(out, command)
        if settings.about.get("start", False) != started:
            how = "fresh weights, not a start" if started else "a start, which must be given again"
            raise CheckpointError(f"{out}: was trained from {how}")
        if changed := changes(settings.about, about(data, started=started)):
            raise CheckpointError(f"{out}: {changed}")
        return cls(out, settings, print_line)

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
            yield Autosave(self, log, on_log_row, signals)

    def _open_log(self) -> Log:
        """Open the log, and clear what a killed process left; the folder is locked."""
        files.clear_temporaries(self.out)
        return Log(self.out / LOG)


def _ignore(_: object) -> None:
    """Do nothing, where a process neither writes nor prints."""
