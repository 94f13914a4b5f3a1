"""Config, data and settings of runs, for the commands that start, resume or check one."""

import argparse
import os
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import torch

from minidiff.cli.arguments import flag_of
from minidiff.data import DATA_VARIABLE, PUBLISHED, load
from minidiff.data.latents import LatentData
from minidiff.data.protocol import Data
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.runs.autoencoder import open_vae
from minidiff.runs.autosave import Saving
from minidiff.runs.folder import CONFIG, Settings, read_settings
from minidiff.runtime.device import DTYPES, available_cores, describe, pick_device, pick_dtype
from minidiff.runtime.distributed import own_device
from minidiff.runtime.files import read_options
from minidiff.training.config import Kind, LoopConfig, merged


def require_out(options: argparse.Namespace) -> None:
    """Refuse a new run without --out. Raises InvalidArgument."""
    if options.out is None:
        raise InvalidArgument("give --out FOLDER, or --resume RUN")


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
    """Return the schedule of snapshots of --save-every and --keep-last. Raises InvalidArgument."""
    return Saving(options.save_every, 2 if options.keep_last is None else options.keep_last)


def start_line(device: torch.device, config: LoopConfig, data: Data) -> str:
    """Return the line that is printed when a run starts."""
    where = describe(device, DTYPES[config.dtype])
    names = data.class_names
    classes = f", {len(names)} classes: {', '.join(names[:10])}{', …' * (len(names) > 10)}"
    return f"device: {where}; data: {len(data)} images of {data.name}{classes if names else ''}"


def data_source(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `load`, independent of working directory and environment."""
    folder = options.data_dir
    if name in PUBLISHED:
        folder = folder or os.environ.get(DATA_VARIABLE)
    elif Path(name).is_dir():
        name = str(Path(name).absolute())
    place = folder and str(Path(folder).absolute())
    return {"name": name, "data_dir": place, "image_size": options.image_size}


def load_source(
    source: Mapping[str, Any], device: torch.device, seed: int, download: bool = False
) -> Data:
    """Return the data of a source, encoded on the device where the source names an autoencoder."""
    others = {"download": download, **source}
    vae = others.pop("vae", None)
    data = load(**others)
    if vae is None:
        return data
    device = own_device(device)
    return LatentData(open_vae(vae).to(device), data.to(device), seed)


def dtype_name(name: str, device: torch.device) -> str:
    """Return the name of the dtype that --dtype selects on a device. Raises InvalidArgument."""
    return str(pick_dtype(name, device)).removeprefix("torch.")


def resumed_settings(
    options: argparse.Namespace, command: str, known: Mapping[str, Field], python_name: str
) -> tuple[Settings, torch.device]:
    """Return the settings of the run of --resume, and its device; refuse all other options.

    Args:
        options: parsed flags.
        command: command that started the run.
        known: fields of its config, for their flags.
        python_name: function to use for a run that was started from Python.
    """
    allowed = ("command", "resume", "device", "threads", "debug")
    for name, value in vars(options).items():
        if name not in allowed and value is not None and value is not False:
            raise InvalidArgument(
                f"--resume takes all options from {options.resume}/{CONFIG}; leave out "
                f"{flag_of(name, known.get(name))}"
            )
    settings = settings_with_data(options.resume, command, python_name)
    device = pick_device(settings.device if options.device == "auto" else options.device)
    if device.type == "cpu" and options.threads is None and settings.threads is not None:
        _set_threads(settings.threads)
    return settings, device


def _set_threads(number: int) -> None:
    """Set the number of threads that a run started with, if the machine has as many cores."""
    if number > available_cores():
        print(f"the run started with {number} threads, here are {available_cores()} cores: the "
              "last bits may differ")  # fmt: skip
    else:
        torch.set_num_threads(number)


def settings_with_data(folder: str, command: str, python_name: str) -> Settings:
    """Return the settings of a run, refusing one without a data source. Raises CheckpointError."""
    settings = read_settings(folder, command)
    if not settings.data:
        raise CheckpointError(
            f"{folder}: was started from Python, so its data are not known here; use {python_name}"
        )
    return settings
