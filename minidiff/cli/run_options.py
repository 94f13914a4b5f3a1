"""What commands share that begin a run, go on with one, or look at one."""

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
from minidiff.runtime.device import DTYPES, describe, pick_device, pick_dtype
from minidiff.runtime.distributed import own_device
from minidiff.runtime.files import read_options
from minidiff.training.config import Kind, LoopConfig, merged


def want_a_folder(options: argparse.Namespace) -> None:
    """Raises InvalidArgument where a run that begins has no --out."""
    if options.out is None:
        raise InvalidArgument("give --out FOLDER, or --resume RUN")


def config_of(
    kind: type[Kind],
    options: argparse.Namespace,
    device: torch.device,
    *layers: Mapping[str, Any],
) -> Kind:
    """The config that flags, --config and the layers below these make."""
    file = read_options(options.config) if options.config else {}
    names = {option.name for option in fields(kind)}
    flags = {name: value for name, value in vars(options).items() if name in names}
    layers = [*layers, file, flags]
    dtype = ChainMap(*layers[::-1]).get("dtype", "auto")
    return merged(*layers, {"dtype": dtype_name(dtype, device)}, kind=kind)


def saving_of(options: argparse.Namespace) -> Saving:
    """What --save-every and --keep-last say. Raises InvalidArgument."""
    return Saving(options.save_every, 2 if options.keep_last is None else options.keep_last)


def under_way(device: torch.device, config: LoopConfig, data: Data) -> str:
    """What is said when a run begins."""
    where = describe(device, DTYPES[config.dtype])
    return f"device: {where}; data: {len(data)} images of {data.name}"


def source_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `load`, the same whatever the working directory and the environment."""
    folder = options.data_dir
    if name in PUBLISHED:
        folder = folder or os.environ.get(DATA_VARIABLE)
    elif Path(name).is_dir():
        name = str(Path(name).absolute())
    place = folder and str(Path(folder).absolute())
    return {"name": name, "data_dir": place, "image_size": options.image_size}


def data_from(
    source: Mapping[str, Any], device: torch.device, seed: int, download: bool = False
) -> Data:
    """What `load` gives, or the latents that an autoencoder makes of it on the device."""
    others = {"download": download, **source}
    vae = others.pop("vae", None)
    data = load(**others)
    if vae is None:
        return data
    device = own_device(device)
    return LatentData(open_vae(vae).to(device), data.to(device), seed)


def dtype_name(name: str, device: torch.device) -> str:
    """The dtype that --dtype means on this device. Raises InvalidArgument."""
    return str(pick_dtype(name, device)).removeprefix("torch.")


def to_go_on(
    options: argparse.Namespace, command: str, known: Mapping[str, Field], otherwise: str
) -> tuple[Settings, torch.device]:
    """What the run of --resume was told, and where it goes on; nothing else may be given."""
    beside = ("command", "resume", "device", "debug")
    for name, value in vars(options).items():
        if name not in beside and value is not None and value is not False:
            raise InvalidArgument(
                f"--resume goes on with what {options.resume}/{CONFIG} says; leave out "
                f"{flag_of(name, known.get(name))}"
            )
    settings = told_all(options.resume, command, otherwise)
    return settings, pick_device(settings.device if options.device == "auto" else options.device)


def told_all(folder: str, command: str, otherwise: str) -> Settings:
    """What a run was told, its data included. Raises CheckpointError."""
    settings = read_settings(folder, command)
    if not settings.data:
        raise CheckpointError(
            f"{folder}: was trained from Python on data that only its program knows; use "
            f"{otherwise}"
        )
    return settings
