"""minidiff train"""

import argparse
import textwrap
from pathlib import Path
from typing import Any

from minidiff.cli.arguments import Verbatim, add_command, add_files, add_keeping, add_options
from minidiff.cli.run_options import (
    config_of,
    data_from,
    saving_of,
    source_of,
    to_go_on,
    under_way,
    want_a_folder,
)
from minidiff.errors import InvalidArgument
from minidiff.runs import diffusion
from minidiff.runtime.device import pick_device
from minidiff.runtime.distributed import rank
from minidiff.training.config import OPTIONS, TrainConfig, options_of
from minidiff.training.presets import PRESETS, Preset


def add_to(commands: Any) -> None:
    """The grammar of minidiff train."""
    command = add_command(
        commands,
        "train",
        train,
        "train a model on digits, MNIST or a folder of images",
        "Trains a model within a budget of minutes or steps, which decides the whole "
        "learning-rate schedule, and writes a run folder that sample and evaluate read. A file "
        "given with --config overrides the preset, flags override both.",
        seed=argparse.SUPPRESS,
        dtype=argparse.SUPPRESS,
    )
    command.formatter_class = Verbatim
    command.description = textwrap.fill(command.description, 92)
    command.epilog = "presets:\n" + "\n".join(map(_described, PRESETS.items()))
    add = command.add_argument
    add("--data", help="digits, mnist, cifar10, captions, or a folder of images (sub-folders: "
        "classes); default: the preset's")  # fmt: skip
    add_files(command)
    add("--vae", metavar="RUN", help="train on the latents of this autoencoder, a run of train-vae "
        "or a vae folder; --block is 1 then")  # fmt: skip
    add_keeping(command)
    add("--shard", action="store_true", help="under torchrun: the processes share the weights "
        "(FSDP2), for a model that outgrows one GPU")  # fmt: skip
    add("--preset", choices=list(PRESETS), help="a recipe, see below")
    add("--config", metavar="FILE", help=".json or .toml with options as below, by the names of "
        "TrainConfig; or a run's config.json")  # fmt: skip
    add_options(command, OPTIONS)


def _described(preset: tuple[str, Preset]) -> str:
    """A preset as lines of --help."""
    name, recipe = preset
    options = ", ".join(f"{k} {v}" for k, v in options_of(recipe.train).items())
    text = f"{recipe.why}. Data {recipe.data}; {options}"
    return textwrap.fill(text, 92, initial_indent=f"  {name:<9} ", subsequent_indent=" " * 12)


def train(options: argparse.Namespace) -> None:
    """minidiff train"""
    if options.resume is not None:
        return _resume(options)
    want_a_folder(options)
    device = pick_device(options.device)
    preset = PRESETS.get(options.preset)
    config = config_of(
        TrainConfig,
        options,
        device,
        {} if options.vae is None else {"block": 1},
        {} if preset is None else options_of(preset.train),
    )
    saving = saving_of(options)
    name = options.data or (preset and preset.data)
    if name is None:
        raise InvalidArgument("give --data or --preset")
    source = source_of(name, options)
    if options.vae is not None:
        source["vae"] = str(Path(options.vae).absolute())
    data = data_from(source, device, config.seed, options.download)
    _say(under_way(device, config, data))
    diffusion.train_into(
        options.out, config, data, device, saving=saving, load=source, shard=options.shard
    )
    _say(f"wrote {options.out}. Next: minidiff sample {options.out} --png samples.png")


def _resume(options: argparse.Namespace) -> None:
    """minidiff train --resume"""
    settings, device = to_go_on(
        options, diffusion.COMMAND, OPTIONS, "minidiff.runs.diffusion.resume"
    )
    data = data_from(settings.data, device, settings.config.seed)
    diffusion.resume(options.resume, data, device)
    _say(f"wrote {options.resume}. Next: minidiff sample {options.resume} --png samples.png")


def _say(text: str) -> None:
    """Print it, of several processes on that of rank 0."""
    if not rank():
        print(text)
