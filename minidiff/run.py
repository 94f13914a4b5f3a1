"""A run is a folder.

RUN/config.json     the data and every option of the training
RUN/log.jsonl       one row about every second: step, seconds, images, loss, learning_rate
RUN/samples-N.png   pictures along the way, N the step
RUN/model/          the pipeline with the averaged weights, replaced as a whole
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np
from torch import device as Device
from tqdm.auto import tqdm

from minidiff import checkpoint, plot
from minidiff.data import ImageData
from minidiff.errors import CheckpointError, TrainingError
from minidiff.pipeline import Pipeline
from minidiff.pipeline_folder import INDEX
from minidiff.train import Progress, TrainConfig, check, train

MODEL = "model"
CONFIG = "config.json"
LOG = "log.jsonl"


def create(out: str | Path, config: TrainConfig, data: ImageData) -> Path:
    """Make the run's folder and write its `config.json`, before any work starts.

    Raises:
        CheckpointError: the folder is not empty or cannot be written.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists and is not an empty folder; choose another --out")
    write_config(out, config, data)
    return out


def write_config(out: Path, config: TrainConfig, data: ImageData) -> None:
    """Write `config.json`. Raises CheckpointError where that cannot be done."""
    shape = dict(zip(("channels", "height", "width"), data.images.shape[1:], strict=True))
    about = {"name": data.name, "images": len(data), **shape}
    checkpoint.write_json(out / CONFIG, {"data": about, "train": asdict(config)})


def train_into(
    out: str | Path, config: TrainConfig, data: ImageData, device: Device | str = "cpu"
) -> Pipeline:
    """Train with a progress bar and keep everything in the folder `out`, see the module.

    Raises:
        InvalidArgument: config and data do not fit together; nothing is written then.
        CheckpointError: the folder is not empty or cannot be written.
        TrainingError: the loss is not finite. The log and the last pictures stay.
    """
    check(config, data)
    out = create(out, config, data)

    def picture(pipe: Pipeline, step: int) -> None:
        write_samples(pipe, out / f"samples-{step:06d}.png")

    with (out / LOG).open("w", encoding="utf-8") as log:
        pipe = train_with_bar(config, data, device, lambda row: _append(log, row), picture)
    pipe.save_pretrained(out / MODEL)
    if config.pictures:
        write_samples(pipe, out / "samples.png")
    return pipe


def train_with_bar(
    config: TrainConfig,
    data: ImageData,
    device: Device | str = "cpu",
    report: Callable[[Progress], None] = lambda row: None,
    picture: Callable[[Pipeline, int], None] = lambda pipe, step: None,
) -> Pipeline:
    """`minidiff.train.train` with a progress bar of its budget, the loss and the time left."""
    in_steps = config.steps is not None
    bar = tqdm(
        total=config.steps if in_steps else max(1, round(60 * config.minutes)),
        desc="training",
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left{postfix}",
    )

    def report_and_show(row: Progress) -> None:
        report(row)
        bar.n = min(row.step if in_steps else int(row.seconds), bar.total)
        bar.set_postfix_str(f"step {row.step}, loss {row.loss:.4f}")

    with bar:
        return train(config, data, device, report_and_show, picture)


def _append(log: IO[str], row: Progress) -> None:
    try:
        log.write(json.dumps(row._asdict()) + "\n")
        log.flush()
    except OSError as error:
        raise TrainingError(f"{log.name}: cannot be written ({error.strerror})") from error


def write_samples(pipe: Pipeline, path: Path, rows: int = 10, seed: int = 0) -> np.ndarray:
    """Write a grid of `rows` rows, one column a class (ten without classes); return the images."""
    columns = len(pipe.class_names) or 10
    images = pipe(num_images=rows * columns, seed=seed, output_type="np").images
    plot.save(plot.grid(images, columns), path)
    return images


def open_pipeline(path: str | Path, device: Device | str = "cpu") -> Pipeline:
    """Read the pipeline of a run, or a pipeline folder itself.

    Raises:
        CheckpointError: it is neither, or it is damaged.
    """
    path = Path(path)
    for folder in (path / MODEL, path):
        if (folder / INDEX).is_file():
            return Pipeline.from_pretrained(folder).to(device)
    raise CheckpointError(f"{path}: neither a run (no {MODEL}/{INDEX}) nor a model (no {INDEX})")


def data_of(path: str | Path) -> str:
    """The name of the data that a run was trained on, from its `config.json`.

    Raises:
        CheckpointError: the run has no readable `config.json`.
    """
    if not (Path(path) / CONFIG).is_file():
        raise CheckpointError(f"{path}: no {CONFIG} says what it was trained on; name it: --data")
    config = checkpoint.read_json(Path(path) / CONFIG)
    about = config.get("data")
    if not isinstance(about, dict) or not isinstance(about.get("name"), str):
        raise CheckpointError(f"{Path(path) / CONFIG}: names no data")
    return about["name"]
