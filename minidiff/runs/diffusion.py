"""A run of `minidiff train`, and what it adds to the folder of a run (`minidiff.runs.folder`).

RUN/samples-N.png   pictures along the way, N the step
RUN/samples.png     pictures at the end
RUN/model/          the pipeline with the averaged weights, replaced as a whole
RUN/adapter/        instead of it what a learner of `minidiff.adapters` changes
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import device as Device

from minidiff.data.protocol import Data
from minidiff.errors import InvalidArgument, true_or_false
from minidiff.images import plot
from minidiff.objective import Objective
from minidiff.pipeline import Pipeline
from minidiff.pipeline.folder import check_replaceable
from minidiff.runs.autosave import PrintLine, Saving
from minidiff.runs.folder import (
    ADAPTER,
    CONFIG,
    LOG,
    MODEL,
    SAMPLES,
    card_facts,
    open_pipeline,
)
from minidiff.runs.run import Amount, Run
from minidiff.runtime.checks import callback
from minidiff.runtime.device import pick_device
from minidiff.runtime.distributed import launched, own_device, processes, world
from minidiff.training.build import check, resolve
from minidiff.training.config import TrainConfig
from minidiff.training.diffusion import DiffusionTraining, MakeLearner, check_machine, train
from minidiff.training.learner import Learner
from minidiff.training.start import prepared

__all__ = ["CONFIG", "LOG", "MODEL", "resume", "train_into", "write_samples"]

COMMAND = "train"


class Extension(NamedTuple):
    """What makes a run of another command: its objective, and what belongs to that.

    Attributes:
        command: command that begins and resumes such runs, a key of `minidiff.runs.folder.KINDS`.
        objective: the argument of `train`.
        begin: called with the training and its start before a snapshot is restored; may plan
            further networks.
    """

    command: str
    objective: type[Objective] | None
    begin: Callable[[DiffusionTraining, Pipeline | None], None]


TRAIN = Extension(COMMAND, None, lambda training, start: None)


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
    extension: Extension = TRAIN,
) -> Pipeline:
    """Train with a progress bar and keep everything in the folder `out`.

    Args:
        out: folder of the run; new or empty.
        config: all options of the run.
        data: images or latents.
        device: device of the training.
        saving: how often to save; by default every five minutes.
        load: arguments of `minidiff.data.load` that gave the data, so that `minidiff train
            --resume` finds them.
        shard: the processes that torchrun started shard the weights (FSDP2).
        start: pipeline to continue from; None for a fresh network.
        learner: function from the pipeline to what of it is trained and saved, such as
            `minidiff.adapters.LoRA()`.
        extension: loss of another command, which owns further networks.
    Raises:
        InvalidArgument: config and data do not fit together; nothing is written then.
        CheckpointError: the folder is not empty or cannot be written.
        TrainingError: the loss is not finite. The log and the last pictures stay.
        Stopped: by SIGINT or SIGTERM, after the step under way, with everything saved.
    """
    callback("learner", learner)
    device = own_device(pick_device(device))
    if true_or_false("shard", shard) and not launched():
        raise InvalidArgument("shard is for several processes: torchrun --nproc_per_node K …")
    if shard and hasattr(learner, "save"):
        raise InvalidArgument("shard must be False where only an adapter is trained")
    _, seen = prepared(learner, data, start)
    check(config, seen, start)
    check_machine(config, device, processes(), shard)
    run = Run.begin(
        out, extension.command, resolve(config, seen, start), data, device,
        saving=saving, load=load, shard=shard, start=start,
    )  # fmt: skip
    return _train(run, data, device, start, learner, extension)


def resume(
    out: str | Path,
    data: Data,
    device: Device | str | None = None,
    *,
    print_line: PrintLine = print,
    start: Pipeline | None = None,
    learner: MakeLearner = Learner.of,
    extension: Extension = TRAIN,
    load: Mapping[str, Any] | None = None,
    minutes: Amount | None = None,
    steps: Amount | None = None,
) -> Pipeline:
    """Resume a run from its newest snapshot that verifies, or from its beginning.

    With another budget than it began with, the run follows the learning rate of the new one.

    Args:
        out: folder of the run.
        data, start, learner, extension: the arguments of `train_into`.
        device: device of the training; by default that of the run.
        print_line: called with the snapshots that are skipped and where the run continues.
        load: arguments of `minidiff.data.load`, where the data lie elsewhere now.
        minutes, steps: longer budget, or a text such as "+10" for what is added to it.
    Raises:
        CheckpointError: the folder is no run, none of its snapshots verifies, or data or start are
            not those of the run; otherwise as `train_into`.
        InvalidArgument: a budget in the other unit, or one that is spent.
    """
    run = Run.reopen(
        out, extension.command, data, print_line,
        start=start, load=load, minutes=minutes, steps=steps,
    )  # fmt: skip
    adapter = hasattr(learner, "save")
    result = run.out / (ADAPTER if adapter else MODEL)
    if not adapter:
        check_replaceable(result)  # which the end of the run replaces
    device = own_device(pick_device(run.settings.device if device is None else device))
    if run.changed is None and (step := run.finished_at()) and result.is_dir():
        more = "--minutes +10 or the like" if run.settings.config.minutes else f"--steps +{step}"
        run.print_line(f"already finished at step {step}; {more} lengthens it")
        return learner.load(start, result) if adapter else open_pipeline(run.out, device)
    if run.settings.config.cuda_graph and (device.type != "cuda" or launched()):
        print_line("going on without --cuda-graph, which is for one process on a GPU")
        config = replace(run.settings.config, cuda_graph=False)
        run.settings = run.settings._replace(config=config)
    return _train(run, data, device, start, learner, extension)


def _train(
    run: Run,
    data: Data,
    device: Device,
    start: Pipeline | None,
    learner: MakeLearner,
    extension: Extension,
) -> Pipeline:
    """Train on this process, and the others that torchrun started; that of rank 0 writes."""
    config, prompts = run.settings.config, data.example_prompts(100)
    adapter = hasattr(learner, "save")
    if adapter:
        learner = learner.within(run.out)

    def picture(pipe: Pipeline, step: int) -> None:
        if autosave.log is not None:
            path = run.out / f"{SAMPLES}-{step:06d}.png"
            write_samples(pipe, path, prompts=prompts)
            autosave.log.add_picture(path, step)

    def begun(training: DiffusionTraining) -> None:
        extension.begin(training, start)
        autosave.resume(training)

    with world(device, run.settings.shard) as all_of_us:
        with run.kept() as autosave:
            pipe = train(
                config, data, device, autosave.on_log_row, picture,
                resume=begun, after_step=autosave.after_step, world=all_of_us,
                objective=extension.objective, start=start, learner=learner, progress=False,
            )  # fmt: skip
        if run.leads:
            drawn = run.out / f"{SAMPLES}.png" if config.pictures else None
            if drawn is not None:
                write_samples(pipe, drawn, prompts=prompts)
            if adapter:
                learner.save(pipe, run.out / ADAPTER)
            else:
                pipe.save_pretrained(run.out / MODEL, facts=card_facts(run.settings, drawn))
    return pipe


def write_samples(
    pipe: Pipeline, path: Path, rows: int = 10, seed: int = 0, prompts: Sequence[str] | None = None
) -> np.ndarray:
    """Write a grid of samples, one column per class (ten without classes); return the images.

    Of points it writes a scatter plot.

    Args:
        pipe: the pipeline.
        path: PNG file to write.
        rows: rows of the grid.
        seed: seed of the noise.
        prompts: one prompt per image, for a pipeline with prompts.
    """
    columns = len(pipe.class_names) or 10
    count = pipe.space.sheet or rows * columns
    call = {"num_images": count, "seed": seed, "output_type": "np", "progress": False}
    made = pipe(prompts, **call, **pipe.example)
    plot.save(plot.picture(made.images, columns, 2, made.labels), path)
    return made.images
