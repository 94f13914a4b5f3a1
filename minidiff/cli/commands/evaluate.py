"""minidiff evaluate"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minidiff import metrics, shipped
from minidiff.cli.arguments import add_command, add_sampling
from minidiff.cli.model_options import draw, open_model, setting
from minidiff.data import DATA_VARIABLE, NAMES, SPLITS, TOYS, ImageData, load
from minidiff.errors import InvalidArgument, whole_number
from minidiff.images import plot
from minidiff.metrics import protocol
from minidiff.nn.classifier import Classifier
from minidiff.pipeline import Pipeline
from minidiff.runs.folder import data_of
from minidiff.runtime import files
from minidiff.runtime.device import pick_device


def add_to(commands: Any) -> None:
    """The grammar of minidiff evaluate."""
    command = add_command(
        commands,
        "evaluate",
        evaluate,
        "measure how good a trained model is",
        "Prints one table by the protocol of minidiff/EVALUATION.md: accuracy, Fréchet distance "
        "(‰ of the real spread, on minidiff's own features; not FID), kernel distance, density, "
        "coverage, what a classifier learns from samples, how near they are to training images, "
        "and bits per dimension, each with its spread over seeds and beside what real images "
        "score.",
    )
    add = command.add_argument
    add("run", nargs="?", help="a run folder, or the model folder in it; absent with --model")
    add("--model", choices=list(shipped.MODELS), help="a model that comes with minidiff")
    add("--quick", action="store_true", help="10,000 samples a seed, and less of the rest")
    add("--num", type=int, help="samples a seed; default: 50,000, or as many as there are images")
    add("--seeds", type=int, help="how many seeds, from --seed on; default: 3; captions: one")
    add("--parts", type=_words, help=f"some of {','.join(protocol.PARTS)}; default: all")
    add("--data", help="a name or a folder; default: what the run was trained on")
    add("--data-dir", help=f"where the published files of the data are (or set {DATA_VARIABLE})")
    add(
        "--classifier",
        help="a file of minidiff.metrics.train_classifier, for data without a shipped one",
    )
    add("--json", help="write every figure, seed and setting to this file")
    add("--png", help="write a grid of the first hundred samples to this file")
    add_sampling(command)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def evaluate(options: argparse.Namespace) -> None:
    """minidiff evaluate"""
    if options.png is not None and options.png == options.json:
        raise InvalidArgument(f"--png and --json must be two files, got {options.png} twice")
    for path in filter(None, (options.png, options.json)):
        files.ensure_writable(path)
    pipe = open_model(options, options.dtype)
    name = options.data or shipped.MODELS.get(options.model) or data_of(options.run)
    if name == "captions":
        return _evaluate_captions(pipe, options)
    train_images, test_images = _splits(name, options, pipe)
    plan = protocol.plan_for(
        train_images, options.num, quick=options.quick, seed=options.seed,
        seeds=3 if options.seeds is None else options.seeds,
    )  # fmt: skip
    plan = replace(
        plan,
        parts=options.parts or protocol.PARTS,
        **{
            name: getattr(options, name)
            for name in ("steps", "guidance", "autoguidance", "eta", "batch_size")
        },
    )
    samples: list[torch.Tensor] = []
    report = protocol.evaluate(
        pipe, train_images, test_images, _classifier(options, train_images, pipe.device), plan,
        first_samples=samples, progress=True,
    )  # fmt: skip
    if options.png and samples:
        plot.save(plot.grid(samples[0].permute(0, 2, 3, 1).numpy(), 10), options.png)
    if options.json:
        files.write_json(options.json, report.as_json())
    seeds = ", ".join(map(str, plan.seeds))
    print(f"{plan.samples} samples a seed, seeds {seeds}, {setting(pipe, options)}")
    print(report)


def _evaluate_captions(pipe: Pipeline, options: argparse.Namespace) -> None:
    """minidiff evaluate, for a model that draws what a text says"""
    from minidiff.metrics import SceneEvaluator

    for name in ("quick", "parts", "classifier", "json", "seeds"):
        if getattr(options, name) not in (None, False):
            raise InvalidArgument(
                f"--{name} is for pictures of classes or of nothing, not of texts"
            )
    evaluator = SceneEvaluator(pick_device(options.device))
    n = 1000 if options.num is None else whole_number("num", options.num, 1)
    shown = []

    def drawn(prompts: list[str]) -> torch.Tensor:
        images, _ = draw(pipe, options, len(prompts), prompt=prompts)
        shown.append(images)
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    print(f"seed {options.seed}, {setting(pipe, options)}")
    for line in evaluator.table(drawn, n):
        print(line, flush=True)
    if options.png:
        plot.save(plot.grid(shown[0][:100], 10), options.png)


def _splits(name: str, options: argparse.Namespace, pipe: Pipeline) -> tuple[ImageData, ImageData]:
    """Training and held-out images of what the model was trained on, in its size."""
    if options.data is None and name not in (*NAMES, *TOYS) and not Path(name).is_dir():
        raise InvalidArgument(f"the model was trained on {name}: say where it is, --data FOLDER")
    _, height, width = pipe.image_shape
    size = height if name not in (*NAMES, *TOYS) and height == width else None
    splits = tuple(load(name, split, options.data_dir, size) for split in SPLITS)
    if not all(split.is_stored for split in splits):
        raise InvalidArgument(f"data must be images to be measured by, {name} has none")
    return splits


def _classifier(
    options: argparse.Namespace, data: ImageData, device: torch.device
) -> Classifier | None:
    """The classifier that was named, the shipped one, or None where there is none."""
    if options.classifier:
        return metrics.read_classifier(options.classifier).to(device)
    if data.name in metrics.shipped():
        return metrics.load_classifier(data.name).to(device)
    return None
