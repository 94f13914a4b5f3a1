"""A run is a folder.

RUN/config.json     the data and every option of the training
RUN/log.jsonl       a row a second, or a hundredth of the steps: step, seconds, images, loss, …
RUN/samples-N.png   pictures along the way, N the step
RUN/checkpoints/    snapshots that the run can go on from, see `minidiff.snapshot`
RUN/model/          the pipeline with the averaged weights, replaced as a whole

A run that is continued equals one that was never interrupted, bit for bit on the CPU with as many
threads, in everything but the column "seconds" of its log.
"""

import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import device as Device
from tqdm.auto import tqdm

from minidiff import checkpoint, plot
from minidiff.data.captions import CaptionedDigits
from minidiff.data.protocol import Data
from minidiff.device import pick_device
from minidiff.distributed import World, launched, own_device, rank, world
from minidiff.errors import CheckpointError, InvalidArgument, Stopped, true_or_false
from minidiff.keeper import Keeper, Log, Saving, Signals
from minidiff.pipeline import Pipeline
from minidiff.pipeline_folder import INDEX
from minidiff.train import Progress, TrainConfig, Training, check, resolve, train
from minidiff.train_config import LoopConfig, merged

MODEL = "model"
CONFIG = "config.json"
LOG = "log.jsonl"


class Settings(NamedTuple):
    """What `config.json` says of a run.

    Attributes:
        data: the arguments of `minidiff.data.load`; empty where the run was not told them.
        about: name, number and shape of the images.
    """

    config: TrainConfig
    data: dict[str, Any]
    about: dict[str, Any]
    device: str
    saving: Saving
    shard: bool


def create(out: str | Path, config: LoopConfig, data: Data, **others: Any) -> Path:
    """Make the run's folder and write its `config.json`, before any work starts.

    Raises:
        CheckpointError: the folder is not empty or cannot be written.
    """
    out = Path(out)
    if out.is_dir():
        _clear_leftovers(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists and is not an empty folder; choose another --out")
    write_config(out, config, data, **others)
    return out


def _clear_leftovers(out: Path) -> None:
    """Delete what a kill in the middle of a write left under temporary names."""
    for stem in (CONFIG, MODEL, "samples"):
        for entry in out.glob(f".{stem}*"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def write_config(out: Path, config: LoopConfig, data: Data, **others: Any) -> None:
    """Write `config.json`. Raises CheckpointError where that cannot be done."""
    content = {"data": _about(data), "train": asdict(config), **others}
    checkpoint.write_json(out / CONFIG, content)


def _about(data: Data) -> dict[str, Any]:
    shape = dict(zip(("channels", "height", "width"), data.shape, strict=True))
    return {"name": data.name, "images": len(data), **shape}


def read_settings(out: str | Path) -> Settings:
    """What a run was told. Raises CheckpointError for a folder that is no run."""
    path = Path(out) / CONFIG
    content = checkpoint.read_json(path)
    try:
        train, load = dict(content["train"]), dict(content["load"])
        saving = Saving(**content["saving"])
        return Settings(
            merged(train), load, content["data"], str(content["device"]), saving,
            true_or_false("shard", content["shard"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:  # InvalidArgument among them
        raise CheckpointError(f"{path}: not the config of a run ({error})") from error


def train_into(
    out: str | Path,
    config: TrainConfig,
    data: Data,
    device: Device | str = "cpu",
    *,
    saving: Saving | None = None,
    load: Mapping[str, Any] | None = None,
    shard: bool = False,
) -> Pipeline:
    """Train with a progress bar and keep everything in the folder `out`, see the module.

    Args:
        load: the arguments of `minidiff.data.load` that gave the data, so that the run can be
            continued without being told them again.
        shard: whether the processes that torchrun started share the weights among them (FSDP2).
    Raises:
        InvalidArgument: config and data do not fit together; nothing is written then.
        CheckpointError: the folder is not empty or cannot be written.
        TrainingError: the loss is not finite. The log and the last pictures stay.
        Stopped: by SIGINT or SIGTERM, after the step under way, with everything saved.
    """
    device, saving = own_device(pick_device(device)), saving or Saving()
    if true_or_false("shard", shard) and not launched():
        raise InvalidArgument("shard is for several processes: torchrun --nproc_per_node K …")
    check(config, data)
    config = resolve(config, data)
    if rank() == 0:
        others = {"device": device.type, "saving": asdict(saving), "shard": shard}
        create(out, config, data, load=dict(load or {}), **others)
    return _run(Path(out), config, data, device, saving, shard)


def resume(
    out: str | Path,
    data: Data,
    device: Device | str | None = None,
    *,
    say: Callable[[str], None] = print,
) -> Pipeline:
    """Go on with a run from its newest snapshot that verifies, or from its beginning.

    Args:
        out: the run's folder.
        data: what it was trained on.
        device: where to train; by default where the run was.
        say: told which snapshots were passed over, and where the run goes on.
    Raises:
        CheckpointError: the folder is no run, none of its snapshots verifies, or the data are not
            those of the run; otherwise as `train_into`.
    """
    settings = read_settings(out)
    if (now := _about(data)) != settings.about:
        raise CheckpointError(f"{out}: was trained on {settings.about}, the data are {now}")
    device = own_device(pick_device(settings.device if device is None else device))
    return _run(Path(out), settings.config, data, device, settings.saving, settings.shard, say)


def _run(
    out: Path,
    config: TrainConfig,
    data: Data,
    device: Device,
    saving: Saving,
    shard: bool,
    say: Callable[[str], None] = print,
) -> Pipeline:
    """Train on this process, and the others that torchrun started; that of rank 0 writes."""
    leads = rank() == 0
    if leads:
        _clear_leftovers(out)
    log, signals = Log(out / LOG) if leads else None, Signals()
    keeper = Keeper(out, saving, log, signals, say if leads else _nothing)

    prompts = data.captions(torch.arange(100)) if isinstance(data, CaptionedDigits) else None

    def picture(pipe: Pipeline, step: int) -> None:
        if leads:
            write_samples(pipe, out / f"samples-{step:06d}.png", prompts=prompts)

    with closing(log) if leads else nullcontext(), world(device, shard) as processes:
        with signals.watch():
            pipe = train_with_bar(
                config, data, device, log.append if leads else _nothing, picture,
                begin=keeper.begin, after=keeper.after, world=processes,
            )  # fmt: skip
        if keeper.stopped is not None:
            step, number = keeper.stopped
            raise Stopped(
                f"stopped by {signal.Signals(number).name} and saved at step {step}; go on with: "
                f"minidiff train --resume {out}",
                number,
            )
        if leads:
            pipe.save_pretrained(out / MODEL)
            if config.pictures:
                write_samples(pipe, out / "samples.png", prompts=prompts)
    return pipe


def _nothing(_: object) -> None:
    """What a process that does not lead says and writes."""


def train_with_bar(
    config: TrainConfig,
    data: Data,
    device: Device | str = "cpu",
    report: Callable[[Progress], None] = lambda row: None,
    picture: Callable[[Pipeline, int], None] = lambda pipe, step: None,
    begin: Callable[[Training], None] = lambda training: None,
    after: Callable[[Training], bool] = lambda training: False,
    world: World | None = None,
) -> Pipeline:
    """`minidiff.train.train` with a progress bar."""
    with progress_bar(config, report) as report_and_show:
        return train(config, data, device, report_and_show, picture, begin=begin, after=after,
                     world=world)  # fmt: skip


@contextmanager
def progress_bar(
    config: LoopConfig, report: Callable[[Progress], None]
) -> Iterator[Callable[[Progress], None]]:
    """A bar of a budget, the loss and the time left; yields `report`, which then moves it too."""
    in_steps = config.steps is not None
    bar = tqdm(
        total=config.steps if in_steps else max(1, round(60 * config.minutes)),
        desc="training",
        disable=rank() != 0,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left{postfix}",
    )

    def report_and_show(row: Progress) -> None:
        report(row)
        bar.n = min(row.step if in_steps else int(row.seconds), bar.total)
        bar.set_postfix_str(f"step {row.step}, loss {row.loss:.4f}")

    with bar:
        yield report_and_show


def write_samples(
    pipe: Pipeline,
    path: Path,
    rows: int = 10,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
) -> np.ndarray:
    """Write a grid of `rows` rows, one column a class (ten without classes); return the images.

    Args:
        prompts: one an image, for a pipeline that draws what a text says.
    """
    columns = len(pipe.class_names) or 10
    images = pipe(prompts, num_images=rows * columns, seed=seed, output_type="np").images
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
