"""The folder of a run, whatever it trains, and what keeps it while the run is under way.

RUN/config.json     the command, the data and every option of the training
RUN/log.jsonl       a row a second, or a hundredth of the steps: step, seconds, images, loss, …
RUN/checkpoints/    snapshots that the run can go on from, see `minidiff.runs.snapshot`

A run that is continued equals one that was never interrupted, bit for bit on the CPU with as many
threads, in everything but the column "seconds" of its log.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import device as Device
from tqdm import tqdm

from minidiff.data.protocol import Data
from minidiff.errors import CheckpointError, one_of, true_or_false
from minidiff.pipeline import Pipeline
from minidiff.pipeline.folder import INDEX
from minidiff.runs.autosave import Keeper, Log, Saving, Signals
from minidiff.runtime import files
from minidiff.runtime.distributed import rank
from minidiff.training.config import LoopConfig, TrainConfig, VAEConfig, merged
from minidiff.training.progress import Progress

CONFIG = "config.json"
LOG = "log.jsonl"
MODEL, SAMPLES = "model", "samples"  # what train writes beside
VAE, RECONSTRUCTIONS = "vae", "reconstructions"  # what train-vae does
LOADING = ("name", "split", "data_dir", "image_size", "download", "vae")
KINDS = {"train": TrainConfig, "train-vae": VAEConfig}  # the config of each command

Say = Callable[[str], None]
Report = Callable[[Progress], None]


class Settings(NamedTuple):
    """What a run was told: its `config.json`.

    Attributes:
        command: of `KINDS`, or "demo", whose folder cannot be continued.
        data: the arguments of `minidiff.data.load`, and the path of a vae; empty where the run was
            not told them.
        about: name, number and shape of the images, see `about`.
    """

    command: str
    config: LoopConfig
    data: dict[str, Any]
    about: dict[str, Any]
    device: str
    saving: Saving = Saving()
    shard: bool = False

    def write(self, out: Path) -> None:
        """Write `config.json`. Raises CheckpointError where that cannot be done."""
        content = {
            "command": self.command,
            "data": self.about,
            "train": asdict(self.config),
            "load": self.data,
            "device": self.device,
            "saving": asdict(self.saving),
            "shard": self.shard,
        }
        files.write_json(out / CONFIG, content)


def about(data: Data, *, started: bool = False) -> dict[str, Any]:
    """Return what is kept of the data to know them again, and that a run began from a pipeline."""
    # Points on a plane have no height and width; they are refused elsewhere.
    shape = dict(zip(("channels", "height", "width"), data.shape, strict=False))
    return {"name": data.name, "images": len(data), **shape} | ({"start": True} if started else {})


def create(out: str | Path, settings: Settings) -> Path:
    """Make the run's folder and write its `config.json`, before any work starts.

    Raises:
        CheckpointError: the folder is not empty or cannot be written.
    """
    out = Path(out)
    _refuse_unless_empty(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror})") from error
    with files.locked(out, wait=False):
        _refuse_unless_empty(out)  # now that nobody else can begin here
        files.clear_temporaries(out)  # of a run that was killed before it had a config.json
        settings.write(out)
    return out


def _refuse_unless_empty(out: Path) -> None:
    """Refuse what is no folder, or holds anything but temporary names of minidiff."""
    if out.exists() and not (out.is_dir() and all(map(files.is_temporary, out.iterdir()))):
        raise CheckpointError(f"{out}: exists and is not an empty folder; choose another --out")


def read_settings(out: str | Path, command: str) -> Settings:
    """What a run was told.

    Args:
        command: the one that the run must be of, see `KINDS`.
    Raises:
        CheckpointError: the folder is no run, or one of another command.
    """
    path = Path(out) / CONFIG
    content = files.read_json(path)
    if (found := content.get("command", command)) != command:
        raise CheckpointError(f"{out}: is a run of minidiff {found}, not of minidiff {command}")
    try:
        train, load = dict(content["train"]), _loading(content["load"])
        saving = Saving(**content["saving"])
        return Settings(
            command, merged(train, kind=KINDS[command]), load, content["data"],
            str(content["device"]), saving, true_or_false("shard", content["shard"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:  # InvalidArgument among them
        raise CheckpointError(f"{path}: not the config of a run ({error})") from error


def _loading(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the data were loaded with. Raises KeyError, TypeError and ValueError."""
    arguments = dict(arguments)
    for name in arguments:
        one_of("load", name, LOADING)
    return arguments and {"name": arguments["name"], **arguments}


def resumed(out: str | Path, command: str, data: Data, *, started: bool = False) -> Settings:
    """Return the settings of a run that is to go on.

    Args:
        started: a pipeline is given as its start.
    Raises:
        CheckpointError: as `read_settings`, the data are not those of the run, or it has a start
            that is not given.
    """
    settings = read_settings(out, command)
    if settings.about.get("start", False) != started:
        how = "a start, which must be given again" if not started else "fresh weights, not a start"
        raise CheckpointError(f"{out}: was trained from {how}")
    if (now := about(data, started=started)) != settings.about:
        raise CheckpointError(f"{out}: was trained on {settings.about}, the data are {now}")
    return settings


@contextmanager
def kept(out: Path, settings: Settings, say: Say) -> Iterator[tuple[Report, Keeper]]:
    """Inside the block a training goes on in its folder and a signal does not end it at once.

    Args:
        say: told what the keeper has to say.
    Yields:
        where rows go, to the log and to a bar, and what belongs before the first step and after
        every one. Of several processes only that of rank 0 writes.
    """
    leads, signals = rank() == 0, Signals()
    with (
        files.locked(out, wait=False) if leads else nullcontext(),
        closing(_begun_log(out)) if leads else nullcontext() as log,
        progress_bar(settings.config, log.append if leads else _nothing) as report,
        signals.watch(),
    ):
        yield (
            report,
            Keeper(
                out, settings.command, settings.saving, log, signals, say if leads else _nothing
            ),
        )


def _begun_log(out: Path) -> Log:
    """Open the log of a run, whose folder is locked, and clear what a kill left there."""
    files.clear_temporaries(out)
    return Log(out / LOG)


def _nothing(_: object) -> None:
    """What a process that does not lead says and writes."""


@contextmanager
def progress_bar(config: LoopConfig, report: Report) -> Iterator[Report]:
    """A bar of a budget, the loss and the time left; yields `report`, which then moves it too."""
    in_steps = config.steps is not None
    bar = tqdm(
        total=config.steps if in_steps else max(1, round(60 * config.minutes)),
        desc="training",
        disable=rank() != 0,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left{postfix}",
    )

    def report_and_show(row: Progress) -> None:
        report(row)
        bar.n = min(row.step if in_steps else int(row.seconds), bar.total)
        bar.set_postfix_str(f"step {row.step}, loss {row.loss:.4f}")

    with bar:
        yield report_and_show


def data_of(path: str | Path) -> str:
    """The name of the data that a run was trained on, from its `config.json`.

    Raises:
        CheckpointError: the run has no readable `config.json`.
    """
    if not (Path(path) / CONFIG).is_file():
        raise CheckpointError(f"{path}: no {CONFIG} says what it was trained on; name it: --data")
    config = files.read_json(Path(path) / CONFIG)
    data = config.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        raise CheckpointError(f"{Path(path) / CONFIG}: names no data")
    return data["name"]


def open_pipeline(path: str | Path, device: Device | str = "cpu") -> Pipeline:
    """Read the pipeline of a run, or a pipeline folder itself.

    Raises:
        CheckpointError: it is neither, or it is damaged.
    """
    path = Path(path)
    for folder in (path / MODEL, path):
        if (folder / INDEX).is_file():
            return Pipeline.from_pretrained(folder).to(device)
    raise CheckpointError(f"{path}: neither a run (no {MODEL}/{INDEX}) nor a model (no {INDEX})")
