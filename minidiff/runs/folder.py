"""The folder of a run: its files, and its settings.

RUN/config.json     command, data and every option of the training
RUN/log.jsonl       a row per second, or per hundredth of the steps: step, seconds, images, loss, …
RUN/checkpoints/    snapshots from which the run can be resumed, see `minidiff.runs.snapshot`
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import device as Device

from minidiff.data import SPLITS
from minidiff.data.protocol import Data, check_data, digest
from minidiff.errors import CheckpointError, listed, one_of, true_or_false
from minidiff.pipeline import Pipeline
from minidiff.pipeline.card import OPTIONS as OPTIONS_FILE
from minidiff.pipeline.card import Facts
from minidiff.pipeline.folder import INDEX
from minidiff.runs.autosave import Saving
from minidiff.runtime import files
from minidiff.runtime.checks import check_all, choice, flag, instance, optional, text, whole
from minidiff.training.config import LoopConfig, TrainConfig, VAEConfig, merged, options_of

CONFIG = "config.json"
LOG = "log.jsonl"
MODEL, SAMPLES = "model", "samples"  # further results of train
ADAPTER = "adapter"  # instead of a model, where only a part is trained
VAE, RECONSTRUCTIONS = "vae", "reconstructions"  # of train-vae
LOADING = {
    "name": text, "split": choice(*SPLITS), "data_dir": optional(text),
    "image_size": optional(whole(1)), "download": flag, "vae": optional(text),
    "init": optional(text), "caption": optional(text), "learn": optional(instance(Mapping)),
    "task": optional(text),
}  # fmt: skip
KINDS = {
    "train": TrainConfig,
    "train-vae": VAEConfig,
    "demo": TrainConfig,
}  # the config of each command; `minidiff.adapters` adds to them
BEGIN = ("train", "distill")  # commands that may begin with a model
LATER = ("class_names", "digests")  # entries of `about` that older runs lack
_TYPES = {"train": dict, "load": dict, "data": dict, "device": str, "saving": dict}


class Settings(NamedTuple):
    """The settings of a run: its `config.json`.

    Attributes:
        command: a key of `KINDS`; the folder of a demo cannot be resumed.
        config: options of the training.
        data: arguments of `minidiff.data.load`, the path of a vae, the model that the run began
            with and what of it is learned; empty where not known.
        about: name, number, shape, classes and digests of the images, see `about`.
        device: type of the device.
        saving: how often the run is saved.
        shard: the processes shard the weights.
        threads: threads of the CPU that the run started with, on which its last bits depend; None
            for a run of an older version.
        lengthened: for every change of the budget, the step at which it was made and the budget
            until then.
    """

    command: str
    config: LoopConfig
    data: dict[str, Any]
    about: dict[str, Any]
    device: str
    saving: Saving = Saving()
    shard: bool = False
    threads: int | None = None
    lengthened: tuple[dict[str, float], ...] = ()

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
            "threads": self.threads or torch.get_num_threads(),
        }
        if self.lengthened:
            content["lengthened"] = self.lengthened
        files.write_json(out / CONFIG, content)


def card_facts(settings: Settings, picture: Path | None = None, scores: str = "") -> Facts:
    """Return what a run adds to the card of its model; no path of this machine is among it.

    Args:
        settings: settings of a run that trained a pipeline.
        picture: PNG file of samples.
        scores: lines of a table.
    """
    config = options_of(settings.config) | {"dtype": settings.config.dtype}
    return Facts(settings.about, config, _command(settings), scores, picture)


def _command(settings: Settings) -> str:
    """Return the command line of a run; "" where it was not one that a single line repeats."""
    load = settings.data
    if settings.command not in BEGIN or not load or settings.lengthened or load.get("split"):
        return ""
    words = ["torchrun --nproc_per_node K -m"] * settings.shard + [f"minidiff {settings.command}"]
    for name in ("name", "data_dir", "image_size", "vae", "init"):
        if (value := load.get(name)) is not None:
            flag = "--" + ("data" if name == "name" else name.replace("_", "-"))
            value = flag[2:].upper() if Path(str(value)).is_absolute() else value
            bare = (settings.command, name) == ("distill", "init")
            words.append(value if bare else f"{flag} {value}")
    words += ["--shard"] * settings.shard
    return " ".join([*words, f"--config {OPTIONS_FILE} --out RUN"])


def about(data: Data, start: Pipeline | None = None) -> dict[str, Any]:
    """Return what is kept to know the data again, and the pipeline that a run began with."""
    check_data(data)
    # Points on a plane have no height and width; they are refused elsewhere.
    shape = dict(zip(("channels", "height", "width"), data.shape, strict=False))
    known = {"class_names": list(data.class_names), "digests": data.digests()}
    if start is not None:
        networks = (start.unet, *(start.prompts.encoders if start.prompts else ()))
        known["start"] = digest(*(w for net in networks for w in net.state_dict().values()))
    return {"name": data.name, "images": len(data), **shape, **known}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe what of data and start differs from those of the run; "" for nothing.

    Args:
        before, now: results of `about`. An older run knows neither class names nor digests, and
            of a start only that there is one.
    """
    apart = ("digests", "start")
    old, new = ({name: x[name] for name in x if name not in apart} for x in (before, now))
    names = [n for n in old | new if old.get(n) != new.get(n) and (n in old or n not in LATER)]
    found = []
    if names:
        was, are = ({name: x.get(name) for name in names} for x in (old, new))
        found.append(f"was trained on {was}, the data are {are}")
    sums = before.get("digests", {}).items()
    if parts := [name for name, value in sums if now["digests"].get(name) != value]:
        found.append(f"the {' and '.join(parts)} of its data have changed since it began")
    if isinstance(start := before.get("start"), str) and start != now.get("start"):
        found.append("the weights of its start have changed since it began")
    return "; ".join(found)


def create(out: str | Path, settings: Settings) -> Path:
    """Make the run's folder and write its `config.json`, before any work starts.

    Raises:
        CheckpointError: the folder is not empty or cannot be written.
    """
    out = files.user_path(out)
    _refuse_unless_empty(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror})") from error
    with files.locked(out, wait=False):
        _refuse_unless_empty(out)  # now that no other process can begin here
        files.clear_temporaries(out)  # of a run that was killed before it wrote config.json
        settings.write(out)
    return out


def _refuse_unless_empty(out: Path) -> None:
    """Refuse a file, and a folder that holds more than temporary names of minidiff."""
    if out.exists() and not (out.is_dir() and all(map(files.is_temporary, out.iterdir()))):
        raise CheckpointError(f"{out}: exists and is not an empty folder; choose another --out")


def read_settings(out: str | Path, *commands: str) -> Settings:
    """Read the settings of a run.

    Args:
        out: folder of the run.
        commands: commands that the run may be of, keys of `KINDS`.
    Raises:
        CheckpointError: the folder is no run, or one of another command.
    """
    path = files.user_path(out) / CONFIG
    if not path.parent.exists():
        raise CheckpointError(files.no_folder(path.parent))
    content = files.read_json(path)
    command = content.get("command", commands[0])
    if command not in commands:
        raise CheckpointError(
            f"{out}: is a run of minidiff {command}, not of minidiff {commands[0]}"
        )
    try:
        for name, kind in _TYPES.items():
            instance(kind)(name, content[name])
        instance(dict)("digests", content["data"].get("digests", {}))
        train, load = content["train"], loading(content["load"], command)
        saving, threads = Saving(**content["saving"]), content.get("threads")
        optional(whole(1))("threads", threads)
        lengthened = listed("lengthened", content.get("lengthened", []))
        return Settings(
            command, merged(train, kind=KINDS[command]), load, content["data"],
            content["device"], saving, true_or_false("shard", content["shard"]),
            threads, lengthened,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:  # InvalidArgument among them
        raise CheckpointError(f"{path}: not the config of a run ({error})") from error


def loading(arguments: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Return the arguments of `load`, checked. Raises InvalidArgument.

    A file never orders a download: whoever began the run has the files.
    """
    instance(Mapping)("load", arguments)
    of_start = () if command in BEGIN else ("vae", "init", "caption", "learn", "task")
    known = [name for name in LOADING if name not in of_start]
    for name in arguments:
        one_of("load", name, known)
    check_all(arguments, LOADING)
    arguments = {name: value for name, value in arguments.items() if name != "download"}
    return arguments and {"name": text("name of load", arguments.get("name")), **arguments}


def data_of(path: str | Path) -> str:
    """Return the name of the data that a run was trained on, from its `config.json`.

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
    path = files.existing_folder(path)
    for folder in (path / MODEL, path):
        if (folder / INDEX).is_file():
            return Pipeline.from_pretrained(folder).to(device)
    if (path / ADAPTER).is_dir():
        raise CheckpointError(f"{path}: holds an adapter; sample its model with --adapter {path}")
    if (path / LOG).is_file():  # the model is written at the end
        raise CheckpointError(
            f"{path}: the run has no {MODEL}/{INDEX}; if it was interrupted, continue it: --resume"
        )
    raise CheckpointError(f"{path}: neither a run (no {MODEL}/{INDEX}) nor a model (no {INDEX})")
