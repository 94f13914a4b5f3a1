"""minidiff train-classifier"""

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from minidiff.cli.arguments import add_command
from minidiff.errors import InvalidArgument, one_of
from minidiff.names import DATA_NAMES
from minidiff.training.presets import RECIPES, Recipe

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}  # of --dtype
FLAGS = [field for field in fields(Recipe) if field.name not in ("seed", "precision")]


def add_to(commands: Any) -> None:
    """Add the grammar of minidiff train-classifier."""
    command = add_command(
        commands,
        train_classifier,
        "train a classifier for the metrics",
        "Trains a classifier on the training images of a data set and writes its weights, with "
        "its accuracy on the test images, into one file, which evaluate --classifier reads.",
        seed=None,
    )
    add = command.adder("data")
    add("--data", required=True, help=f"{', '.join(DATA_NAMES)}, or a folder of images")
    add("--data-dir", help="folder with the files of MNIST or CIFAR-10")
    add = command.adder("run")
    add("--out", required=True, type=Path, metavar="FILE", help="safetensors file to write")
    add = command.adder("optimisation")
    for field in FLAGS:
        defaults = ", ".join(f"{name} {getattr(r, field.name)}" for name, r in RECIPES.items())
        flag, help = f"--{field.name.replace('_', '-')}", field.metadata["help"]
        add(flag, type=type(field.default),
            help=f"{help} (default: {defaults}, folders {field.default})")  # fmt: skip


def train_classifier(options: argparse.Namespace) -> None:
    """Train a classifier and write it."""
    from minidiff.metrics.train_classifier import train_into
    from minidiff.runtime.device import pick_device

    if options.out.suffix != ".safetensors":
        raise InvalidArgument(f"--out must be a .safetensors file, got {options.out}")
    chosen = {name: getattr(options, name) for name in ("seed", *(field.name for field in FLAGS))}
    if options.dtype != "auto":  # the recipe's own
        one_of("dtype", options.dtype, PRECISIONS)
        chosen["precision"] = PRECISIONS[options.dtype]
    given = {name: value for name, value in chosen.items() if value is not None}
    recipe = replace(RECIPES.get(options.data, Recipe()), **given)
    device = pick_device(options.device)
    accuracy = train_into(options.out, options.data, recipe, device, options.data_dir)
    size = options.out.stat().st_size
    print(f"{options.out}: test accuracy {accuracy:.2%}, {size} bytes")
