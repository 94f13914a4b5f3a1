"""minidiff train-vae"""

import argparse
from typing import Any

from minidiff import run_vae
from minidiff.cli.arguments import add_command, add_files, add_keeping, add_options
from minidiff.cli.runs import config_of, saving_of, source_of, to_go_on, under_way, want_a_folder
from minidiff.data import SPLITS, ImageData, load
from minidiff.device import pick_device
from minidiff.errors import InvalidArgument
from minidiff.train_config import VAE_OPTIONS, VAEConfig


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
    _, quality = run_vae.train_vae_into(
        options.out, config, data, held_out, device, saving=saving, load=source
    )
    _measured(options.out, options.data, held_out, quality)


def _resume_vae(options: argparse.Namespace) -> None:
    """minidiff train-vae --resume"""
    settings, device = to_go_on(options, run_vae.COMMAND, VAE_OPTIONS, "minidiff.run_vae.resume")
    data, held_out = (load(**settings.data | {"split": split}) for split in SPLITS)
    _, quality = run_vae.resume(options.resume, data, held_out, device)
    _measured(options.resume, settings.data["name"], held_out, quality)


def _measured(out: str, name: str, held_out: ImageData, quality: run_vae.Quality) -> None:
    print(f"{len(held_out)} held-out images\n{quality}")
    print(
        f"wrote {out}, look at {out}/{run_vae.PICTURE}. Next: minidiff train --vae {out} "
        f"--data {name} --minutes 5 --out RUN"
    )
