"""minidiff train-vae"""

import argparse
from typing import Any

from minidiff.cli.arguments import add_command, add_files, add_keeping, add_options
from minidiff.cli.run_options import (
    config_of,
    saving_of,
    source_of,
    to_go_on,
    under_way,
    want_a_folder,
)
from minidiff.data import SPLITS, ImageData, load
from minidiff.errors import InvalidArgument
from minidiff.runs import autoencoder
from minidiff.runtime.device import pick_device
from minidiff.training.config import VAE_OPTIONS, VAEConfig


def add_to(commands: Any) -> None:
    """The grammar of minidiff train-vae."""
    command = add_command(
        commands,
        "train-vae",
        train_vae,
        "train an autoencoder, for a model that works on its latents",
        "Trains an autoencoder within a budget of minutes or steps, and measures it on held-out "
        "images. What it writes is for train --vae.",
        seed=argparse.SUPPRESS,
        dtype=argparse.SUPPRESS,
    )
    add = command.add_argument
    add("--data", help="digits, mnist, cifar10, or a folder of images")
    add_files(command)
    add_keeping(command)
    add("--config", metavar="FILE", help=".json or .toml with options as below, by the names of "
        "VAEConfig; or a run's config.json")  # fmt: skip
    add_options(command, VAE_OPTIONS)


def train_vae(options: argparse.Namespace) -> None:
    """minidiff train-vae"""
    if options.resume is not None:
        return _resume_vae(options)
    want_a_folder(options)
    if options.data is None:
        raise InvalidArgument("give --data")
    device = pick_device(options.device)
    config, saving = config_of(VAEConfig, options, device), saving_of(options)
    source = source_of(options.data, options)
    data, held_out = (load(**source, split=split, download=options.download) for split in SPLITS)
    print(under_way(device, config, data))
    _, quality = autoencoder.train_vae_into(
        options.out, config, data, held_out, device, saving=saving, load=source
    )
    _measured(options.out, options.data, held_out, quality)


def _resume_vae(options: argparse.Namespace) -> None:
    """minidiff train-vae --resume"""
    settings, device = to_go_on(
        options, autoencoder.COMMAND, VAE_OPTIONS, "minidiff.runs.autoencoder.resume"
    )
    data, held_out = (load(**settings.data | {"split": split}) for split in SPLITS)
    _, quality = autoencoder.resume(options.resume, data, held_out, device)
    _measured(options.resume, settings.data["name"], held_out, quality)


def _measured(out: str, name: str, held_out: ImageData, quality: autoencoder.Quality) -> None:
    print(f"{len(held_out)} held-out images\n{quality}")
    print(
        f"wrote {out}, look at {out}/{autoencoder.PICTURE}. Next: minidiff train --vae {out} "
        f"--data {name} --minutes 5 --out RUN"
    )
