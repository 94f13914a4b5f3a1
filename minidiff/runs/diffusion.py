"""A run of `minidiff train`: what it adds to the folder of any run, see `minidiff.runs.folder`.

RUN/samples-N.png   pictures along the way, N the step
RUN/samples.png     pictures at the end
RUN/model/          the pipeline with the averaged weights, replaced as a whole
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import device as Device

from minidiff.data.protocol import Data
from minidiff.errors import InvalidArgument, true_or_false
from minidiff.images import plot
from minidiff.pipeline import Pipeline
from minidiff.runs.autosave import Saving
from minidiff.runs.folder import (
    CONFIG,
    LOG,
    MODEL,
    SAMPLES,
    Report,
    Say,
    Settings,
    about,
    create,
    kept,
    progress_bar,
    resumed,
)
from minidiff.runtime.device import pick_device
from minidiff.runtime.distributed import launched, own_device, processes, rank, world
from minidiff.training.build import check, resolve
from minidiff.training.config import TrainConfig
from minidiff.training.diffusion import MakeLearner, check_machine, train
from minidiff.training.learner import Learner

__all__ = [
    "CONFIG",
    "LOG",
    "MODEL",
    "resume",
    "train_into",
    "train_with_bar",
    "write_samples",
]

COMMAND = "train"


def train_into(
    out: str | Path,
    config: TrainConfig,
    data: Data,
    device: Device | str = "cpu",
    *,
    saving: Saving | None = None,
    load: Mapping[str, Any] | None = None,
    shard: bool = False,
    start: Pipeline | None = None,
    learner: MakeLearner = Learner.of,
) -> Pipeline:
    """Train with a progress bar and keep everything in the folder `out`, see the module.

    Args:
        load: the arguments of `minidiff.data.load` that gave the data, so that the run can be
            continued without being told them again.
        shard: whether the processes that torchrun started share the weights among them (FSDP2).
        start, learner: see `minidiff.training.diffusion.train`.
    Raises:
        InvalidArgument: config and data do not fit together; nothing is written then.
        CheckpointError: the folder is not empty or cannot be written.
        TrainingError: the loss is not finite. The log and the last pictures stay.
        Stopped: by SIGINT or SIGTERM, after the step under way, with everything saved.
    """
    device = own_device(pick_device(device))
    if true_or_false("shard", shard) and not launched():
        raise InvalidArgument("shard is for several processes: torchrun --nproc_per_node K …")
    check(config, data, start)
    check_machine(config, device, processes(), shard)
    config = resolve(config, data, start)
    settings = Settings(
        COMMAND,
        config,
        dict(load or {}),
        about(data, started=start is not None),
        device.type,
        saving or Saving(),
        shard,
    )
    if rank() == 0:
        create(out, settings)
    return _run(Path(out), settings, data, device, print, start, learner)


def resume(
    out: str | Path,
    data: Data,
    device: Device | str | None = None,
    *,
    say: Say = print,
    start: Pipeline | None = None,
    learner: MakeLearner = Learner.of,
) -> Pipeline:
    """Go on with a run from its newest snapshot that verifies, or from its beginning.

    Args:
        out: the run's folder.
        data: what it was trained on.
        device: where to train; by default where the run was.
        say: told which snapshots were passed over, and where the run goes on.
        start, learner: as they were given to `train_into`.
    Raises:
        CheckpointError: the folder is no run, none of its snapshots verifies, or the data are not
            those of the run; otherwise as `train_into`.
    """
    settings = resumed(out, COMMAND, data, started=start is not None)
    device = own_device(pick_device(settings.device if device is None else device))
    if settings.config.cuda_graph and (device.type != "cuda" or launched()):
        say("going on without --cuda-graph, which is for one process on a GPU")
        settings = settings._replace(config=replace(settings.config, cuda_graph=False))
    return _run(Path(out), settings, data, device, say, start, learner)


def _run(
    out: Path,
    settings: Settings,
    data: Data,
    device: Device,
    say: Say,
    start: Pipeline | None,
    learner: MakeLearner,
) -> Pipeline:
    """Train on this process, and the others that torchrun started; that of rank 0 writes."""
    leads = rank() == 0
    prompts = data.example_prompts(100)

    def picture(pipe: Pipeline, step: int) -> None:
        if leads:
            write_samples(pipe, out / f"{SAMPLES}-{step:06d}.png", prompts=prompts)

    with world(device, settings.shard) as all_of_us:
        with kept(out, settings, say) as (report, keeper):
            pipe = train(
                settings.config, data, device, report, picture,
                begin=keeper.begin, after=keeper.after, world=all_of_us,
                start=start, learner=learner,
            )  # fmt: skip
        if leads:
            pipe.save_pretrained(out / MODEL)
            if settings.config.pictures:
                write_samples(pipe, out / f"{SAMPLES}.png", prompts=prompts)
    return pipe


def train_with_bar(
    config: TrainConfig,
    data: Data,
    device: Device | str = "cpu",
    report: Report = lambda row: None,
) -> Pipeline:
    """`minidiff.training.diffusion.train` with a progress bar, nothing of it kept."""
    with progress_bar(config, report) as report_and_show:
        return train(config, data, device, report_and_show)


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
