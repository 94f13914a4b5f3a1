"""Config, data and settings of runs, for the commands that start, resume or check one."""

import argparse
import os
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import torch

from minidiff import shipped
from minidiff.adapters import learners
from minidiff.adapters.examples import captioned
from minidiff.cli.arguments import flag_of
from minidiff.data import load
from minidiff.data.latents import LatentData
from minidiff.data.protocol import Data
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.modalities.extra_channels import TaskTraining, with_task
from minidiff.names import DATA_NAMES, DATA_VARIABLE, PUBLISHED
from minidiff.nn import AutoencoderKL
from minidiff.pipeline import Pipeline
from minidiff.runs.autoencoder import open_vae
from minidiff.runs.autosave import Saving
from minidiff.runs.folder import CONFIG, Settings, open_pipeline, read_settings
from minidiff.runs.tensorboard import check_installed
from minidiff.runtime.device import DTYPES, available_cores, describe, pick_device, pick_dtype
from minidiff.runtime.distributed import own_device
from minidiff.runtime.files import read_options
from minidiff.training.config import Kind, LoopConfig, merged
from minidiff.training.learner import Learner
from minidiff.training.start import fixed_options

BUDGET = ("minutes", "steps")
# Flags of files that may have been moved since a run began, and their names in its config.json.
MOVED = {"data": "name", "data_dir": "data_dir", "vae": "vae", "init": "init"}


def require(options: argparse.Namespace, data: str | None, *others: str) -> None:
    """Refuse a new run that lacks something, and name all of it. Raises InvalidArgument.

    Args:
        options: parsed flags.
        data: name or folder of the data; None if it is missing.
        others: further things that are missing.
    """
    missing = list(others)
    if data is None:
        missing.insert(0, f"--data NAME or FOLDER ({', '.join(DATA_NAMES)})")
    elif data in PUBLISHED and not (options.data_dir or os.environ.get(DATA_VARIABLE)):
        missing.append(f"--data-dir FOLDER with its {PUBLISHED[data]} (--download fetches them)")
    if options.out is None:
        missing.append("--out FOLDER (or --resume RUN)")
    if missing:
        raise InvalidArgument(f"give {', '.join(missing)}")


def config_of(
    kind: type[Kind], options: argparse.Namespace, device: torch.device, *layers: Mapping[str, Any]
) -> Kind:
    """Return the config made of layers of options, of --config, and of flags; later ones win.

    Args:
        kind: class of the config.
        options: parsed flags.
        device: device that the dtype "auto" depends on.
        layers: options below --config, such as those of a preset.
    """
    file = read_options(options.config) if options.config else {}
    names = {option.name for option in fields(kind)}
    flags = {name: value for name, value in vars(options).items() if name in names}
    layers = [*layers, file, flags]
    dtype = ChainMap(*layers[::-1]).get("dtype", "auto")
    return merged(*layers, {"dtype": dtype_name(dtype, device)}, kind=kind)


def saving_of(options: argparse.Namespace) -> Saving:
    """Return what --save-every, --keep-last and --log say. Raises InvalidArgument."""
    check_installed(options.log)  # before the data are read
    return Saving(
        options.save_every, 2 if options.keep_last is None else options.keep_last, options.log
    )


def start_line(device: torch.device, config: LoopConfig, data: Data) -> str:
    """Return the line that is printed when a run starts."""
    where = describe(device, DTYPES[config.dtype])
    names = data.class_names
    classes = f", {len(names)} classes: {', '.join(names[:10])}{', …' * (len(names) > 10)}"
    kind = "images" if len(data.shape) == 3 else "points"
    return f"device: {where}; data: {len(data)} {kind} of {data.name}{classes if names else ''}"


def data_source(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `load`, independent of working directory and environment."""
    folder = options.data_dir
    if name in PUBLISHED:
        folder = folder or os.environ.get(DATA_VARIABLE)
    elif Path(name).is_dir():
        name = str(Path(name).absolute())
    place = folder and str(Path(folder).absolute())
    found = {"name": name, "data_dir": place, "image_size": options.image_size}
    caption = getattr(options, "caption", None)
    return found if caption is None else found | {"caption": caption}


def load_source(
    source: Mapping[str, Any], device: torch.device, seed: int, download: bool = False
) -> Data:
    """Return the data of a source, encoded on the device where the source names an autoencoder."""
    others = {"download": download, **source}
    vae = others.pop("vae", None)
    others.pop("init", None), others.pop("learn", None)
    task = others.pop("task", None)
    caption = others.pop("caption", None)
    data = captioned(others["name"], caption, others.get("image_size")) or load(**others)
    if task is not None:
        return with_task(data, task)
    if vae is None:
        return data
    device = own_device(device)
    return LatentData(open_vae(vae).to(device), data.to(device), seed)


def dtype_name(name: str, device: torch.device) -> str:
    """Return the name of the dtype that --dtype selects on a device. Raises InvalidArgument."""
    return str(pick_dtype(name, device)).removeprefix("torch.")


def resumed_settings(
    options: argparse.Namespace, command: str, known: Mapping[str, Field], python_name: str
) -> tuple[Settings, torch.device, dict[str, Any]]:
    """Return the settings of the run of --resume, its device, and arguments of the Python function.

    These are a longer budget, and `load` where flags say that files lie elsewhere now. All other
    options are refused.

    Args:
        options: parsed flags.
        command: command that started the run.
        known: fields of its config, for their flags.
        python_name: function to use for a run that was started from Python.
    """
    allowed = ("command", "resume", "device", "threads", "debug", *BUDGET, *MOVED)
    for name, value in vars(options).items():
        if name not in allowed and value is not None and value is not False:
            raise InvalidArgument(
                f"--resume takes all options from {options.resume}/{CONFIG}; leave out "
                f"{flag_of(name, known.get(name))}"
            )
    settings = settings_with_data(options.resume, python_name, command)
    changes = {name: getattr(options, name, None) for name in BUDGET}
    for name, key in MOVED.items():
        if (place := getattr(options, name, None)) is not None:
            settings.data[key] = _moved(settings.data, key, place, flag_of(name))
            changes["load"] = settings.data
    device = pick_device(settings.device if options.device == "auto" else options.device)
    if device.type == "cpu" and options.threads is None and settings.threads is not None:
        _set_threads(settings.threads)
    return settings, device, changes


def _moved(source: Mapping[str, Any], key: str, place: str, flag: str) -> str:
    """Return where files of a run lie now. Raises InvalidArgument for a run that reads none."""
    if not Path(began := source.get(key) or "").is_absolute():
        how = f"with {began}, which is no folder" if began else "without it"
        raise InvalidArgument(f"leave out {flag}: the run began {how}")
    return placed(place)


def placed(name: str) -> str:
    """Return the absolute path of a folder; the name of a shipped model stays."""
    return name if name in shipped.MODELS else str(Path(name).absolute())


def start_of(
    options: argparse.Namespace,
) -> tuple[dict[str, str], Pipeline | None, dict[str, Any]]:
    """Return the places of --vae and --init, the pipeline of --init, and the options it decides."""
    given = {"vae": options.vae, "init": options.init}
    places = {name: placed(place) for name, place in given.items() if place is not None}
    start = open_start(places.get("init"))
    if start is None:
        return places, None, {}
    if isinstance(start.vae, AutoencoderKL):
        places.setdefault("vae", places["init"])
    return places, start, fixed_options(start)


def learner_of(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Return what --task, or --learn and its options, say for `load_source`, and the learner.

    Raises:
        InvalidArgument: an option of no or another learner, a learner without --init, or --task
            with options of networks that it does not train.
    """
    given = {name: getattr(options, name) for name in learners.flags() if hasattr(options, name)}
    if options.task is not None:
        for name in ("learn", "init", "vae"):
            if getattr(options, name) is not None:
                raise InvalidArgument(f"leave out --{name} beside --task, whose network is fresh")
        return {"task": options.task}, TaskTraining(options.task)
    if options.learn is None:
        for name in given:
            raise InvalidArgument(f"{flag_of(name)} is an option of --learn, which is missing")
        return {}, Learner.of
    if options.init is None:
        raise InvalidArgument(f"--learn {options.learn} needs a model to change: --init MODEL")
    known = {"what": options.learn, **given}
    return {"learn": known}, learners.make(**known)


def open_start(place: str | None) -> Pipeline | None:
    """Return the pipeline of --init, if there is one. Raises CheckpointError."""
    if place is None:
        return None
    return open_pipeline(shipped.folder(place) if place in shipped.MODELS else place)


def _set_threads(number: int) -> None:
    """Set the number of threads that a run started with, if the machine has as many cores."""
    if number > available_cores():
        print(f"the run started with {number} threads, here are {available_cores()} cores: the "
              "last bits may differ")  # fmt: skip
    else:
        torch.set_num_threads(number)


def settings_with_data(folder: str, python_name: str, *commands: str) -> Settings:
    """Return the settings of a run, refusing one without a data source. Raises CheckpointError."""
    settings = read_settings(folder, *commands)
    if not settings.data:
        raise CheckpointError(
            f"{folder}: was started from Python, so its data are not known here; use {python_name}"
        )
    return settings
