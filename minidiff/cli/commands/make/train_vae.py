"""minidiff train-vae"""

import argparse
from shlex import quote
from typing import TYPE_CHECKING, Any

from minidiff.cli.arguments import add_command, add_data_files, add_options, add_run_folder
from minidiff.names import SPLITS
from minidiff.training.config import VAE_OPTIONS, VAEConfig

if TYPE_CHECKING:
    from minidiff.data import ImageData
    from minidiff.runs.autoencoder import Quality


def add_to(commands: Any) -> None:
    """Add the grammar of minidiff train-vae."""
    command = add_command(
        commands,
        train_vae,
        "train an autoencoder for models in its latent space",
        "Trains an autoencoder within a budget of minutes or steps, and measures it on held-out "
        "images. The folder that it writes is the input of train --vae.",
        seed=argparse.SUPPRESS,
        dtype=argparse.SUPPRESS,
    )
    command.adder("data")("--data", help="digits, mnist, cifar10, or a folder of images")
    add_data_files(command)
    add_run_folder(command)
    command.adder("run")(
        "--config",
        metavar="FILE",
        help=".json or .toml file of options by the names of VAEConfig, or a run's config.json",
    )
    add_options(command, VAE_OPTIONS)


def train_vae(options: argparse.Namespace) -> None:
    """Run minidiff train-vae."""
    from minidiff.cli import run_options
    from minidiff.data import load
    from minidiff.runs import autoencoder
    from minidiff.runtime.device import pick_device

    if options.resume is not None:
        return _resume_vae(options)
    budget = vars(options).keys() & {"minutes", "steps"} or options.config
    run_options.require(options, options.data, *([] if budget else ["--minutes or --steps"]))
    device = pick_device(options.device)
    config, saving = (
        run_options.config_of(VAEConfig, options, device),
        run_options.saving_of(options),
    )
    source = run_options.data_source(options.data, options)
    data, held_out = (load(**source, split=split, download=options.download) for split in SPLITS)
    print(run_options.start_line(device, config, data))
    _, quality = autoencoder.train_vae_into(
        options.out, config, data, held_out, device, saving=saving, load=source
    )
    _print_quality(options.out, options.data, held_out, quality)


def _resume_vae(options: argparse.Namespace) -> None:
    """Run minidiff train-vae --resume."""
    from minidiff.cli import run_options
    from minidiff.data import load
    from minidiff.runs import autoencoder

    settings, device, changes = run_options.resumed_settings(
        options, autoencoder.COMMAND, VAE_OPTIONS, "minidiff.runs.autoencoder.resume"
    )
    data, held_out = (load(**settings.data | {"split": split}) for split in SPLITS)
    _, quality = autoencoder.resume(options.resume, data, held_out, device, **changes)
    _print_quality(options.resume, settings.data["name"], held_out, quality)


def _print_quality(out: str, name: str, held_out: "ImageData", quality: "Quality") -> None:
    """Print the quality on held-out images, and the next command."""
    from minidiff.runs.autoencoder import PICTURE

    print(f"{len(held_out)} held-out images\n{quality}")
    print(
        f"wrote {out}, see {out}/{PICTURE}. Next: minidiff train "
        f"--vae {quote(str(out))} --data {quote(name)} --minutes 5 --out RUN"
    )
