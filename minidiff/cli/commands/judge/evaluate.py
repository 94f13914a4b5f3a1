"""minidiff evaluate"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidiff import shipped
from minidiff.cli.arguments import add_command, add_model, add_sampling, listed_names
from minidiff.errors import InvalidArgument, whole_number
from minidiff.names import DATA_VARIABLE, PARTS, SPLITS, TOYS

if TYPE_CHECKING:
    import torch

    from minidiff.data import ImageData
    from minidiff.nn.classifier import Classifier
    from minidiff.pipeline import Pipeline


def add_to(commands: Any) -> None:
    """Add the grammar of minidiff evaluate."""
    command = add_command(
        commands,
        evaluate,
        "measure how good a trained model is",
        "Prints the evaluation table by the protocol of minidiff/EVALUATION.md: accuracy, Fréchet "
        "distance (‰ of the real spread, on minidiff's features; not FID), kernel distance, "
        "density, coverage, accuracy of a classifier trained on samples, distance to the nearest "
        "training images, and bits per dimension. Each has its spread over seeds; real images are "
        "measured too, for comparison. For points, prints the fraction near a mode, the modes "
        "covered and an energy distance, each also for new points of the true density.",
    )
    add_model(command)
    add = command.adder("data")
    add("--data", help="name or folder of the data (default: those of the training)")
    add("--data-dir", help=f"folder with the published files of the data (or set {DATA_VARIABLE})")
    add = command.adder("measurement")
    add("--quick", action="store_true", help="10,000 samples per seed, less of all else")
    add("--num", type=int, help="samples per seed (default: the number of training images, at "
        "most 50,000; captions 1,000; points 10,000)")  # fmt: skip
    add("--seeds", type=int, help="number of seeds, from --seed upwards (default: 3; captions: 1)")
    add("--parts", type=listed_names, help=f"some of {','.join(PARTS)} (default: all)")
    add(
        "--classifier",
        help="file of minidiff train-classifier, for data without a classifier that ships with "
        "minidiff",
    )
    add_sampling(command)
    add = command.adder("output")
    add("--json", help="file for every figure, seed and setting")
    add("--png", help="file for a grid of the first hundred samples")


def evaluate(options: argparse.Namespace) -> None:
    """Run minidiff evaluate."""
    from minidiff.cli.model_options import check_files, open_model, setting
    from minidiff.images import plot
    from minidiff.metrics import protocol
    from minidiff.runs.folder import data_of
    from minidiff.runtime import files

    check_files(options, "png", "json")
    pipe = open_model(options, options.dtype)
    name = options.data or shipped.MODELS.get(options.model) or data_of(options.run)
    if name == "captions":
        return _evaluate_captions(pipe, options)
    if name in TOYS:
        return _evaluate_points(pipe, name, options)
    train_images, test_images = _splits(name, options, pipe)
    plan = protocol.plan_for(
        train_images, options.num, quick=options.quick, seed=options.seed,
        seeds=3 if options.seeds is None else options.seeds,
    )  # fmt: skip
    plan = replace(
        plan,
        parts=options.parts or PARTS,
        **{
            name: getattr(options, name)
            for name in ("steps", "guidance", "autoguidance", "eta", "batch_size")
        },
    )
    samples: list[torch.Tensor] = []
    table = protocol.evaluate(
        pipe, train_images, test_images, _classifier(options, train_images, pipe.device), plan,
        first_samples=samples, progress=True,
    )  # fmt: skip
    if options.png and samples:
        plot.save(plot.grid(samples[0].permute(0, 2, 3, 1).numpy(), 10), options.png)
    if options.json:
        files.write_json(options.json, table.as_json())
    seeds = ", ".join(map(str, plan.seeds))
    print(f"{plan.samples} samples per seed, seeds {seeds}, {setting(pipe, options)}")
    print(table)


def _evaluate_captions(pipe: "Pipeline", options: argparse.Namespace) -> None:
    """Run minidiff evaluate for a model of captions."""
    import torch

    from minidiff.cli.model_options import draw, setting
    from minidiff.images import plot
    from minidiff.metrics import SceneEvaluator
    from minidiff.runtime.device import pick_device

    _refuse(options, "captions", "quick", "parts", "classifier", "json", "seeds")
    evaluator = SceneEvaluator(pick_device(options.device))
    n = 1000 if options.num is None else whole_number("num", options.num, 1)
    batches = []

    def drawn(prompts: list[str]) -> torch.Tensor:
        """Return samples uint8 (N, C, H, W) of prompts."""
        images, _ = draw(pipe, options, len(prompts), prompt=prompts)
        batches.append(images)
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    print(f"seed {options.seed}, {setting(pipe, options)}")
    for line in evaluator.table(drawn, n):
        print(line, flush=True)
    if options.png:
        plot.save(plot.grid(batches[0][:100], 10), options.png)


def _evaluate_points(pipe: "Pipeline", name: str, options: argparse.Namespace) -> None:
    """Run minidiff evaluate for a model of points."""
    import torch

    from minidiff.cli.model_options import draw, setting
    from minidiff.images import plot
    from minidiff.lab import points
    from minidiff.runtime import files

    _refuse(options, "points", "quick", "parts", "classifier", "data_dir", "seeds")
    if pipe.image_shape != (2,):
        raise InvalidArgument(f"data {name} are points; the model draws {pipe.image_shape}")
    n = 10_000 if options.num is None else whole_number("num", options.num, 2)
    samples, labels = draw(pipe, options, n)
    found = points.compared(torch.from_numpy(samples), name)
    if options.png:
        plot.save(plot.picture(samples, 10, 2, labels), options.png)
    if options.json:
        figures = {column: scores._asdict() for column, scores in found.items()}
        setup = {"data": name, "samples": n, "seed": options.seed}
        files.write_json(options.json, {**setup, "figures": figures})
    print(f"{n} samples, seed {options.seed}, {setting(pipe, options)}")
    print(points.table(found))


def _refuse(options: argparse.Namespace, kind: str, *names: str) -> None:
    """Refuse flags that a kind of model does not have. Raises InvalidArgument."""
    for name in names:
        if getattr(options, name) not in (None, False):
            raise InvalidArgument(f"--{name.replace('_', '-')} must be left out for a model of "
                                  f"{kind}; it is for other models")  # fmt: skip


def _splits(
    name: str, options: argparse.Namespace, pipe: "Pipeline"
) -> "tuple[ImageData, ImageData]":
    """Return training and held-out images of the data, in the size of the model's images."""
    from minidiff.data import NAMES, load

    if len(pipe.image_shape) != 3:
        raise InvalidArgument(f"data must be one of {', '.join(TOYS)} for this model, got {name}")
    if options.data is None and name not in (*NAMES, *TOYS) and not Path(name).is_dir():
        raise InvalidArgument(f"the model was trained on {name}: give its folder, --data FOLDER")
    _, height, width = pipe.image_shape
    size = height if name not in (*NAMES, *TOYS) and height == width else None
    splits = tuple(load(name, split, options.data_dir, size) for split in SPLITS)
    if not all(split.is_stored for split in splits):
        raise InvalidArgument(f"data must be sets of images, but {name} is not")
    return splits


def _classifier(
    options: argparse.Namespace, data: "ImageData", device: "torch.device"
) -> "Classifier | None":
    """Return the classifier of --classifier, or the shipped one; None where there is none."""
    from minidiff import metrics

    if options.classifier:
        return metrics.read_classifier(options.classifier).to(device)
    if data.name in metrics.shipped():
        return metrics.load_classifier(data.name).to(device)
    return None
