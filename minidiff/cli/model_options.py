"""Opening and sampling a model, for the commands that do so."""

import argparse
from pathlib import Path
from typing import Any

import torch

from minidiff import shipped
from minidiff.errors import InvalidArgument
from minidiff.pipeline import Pipeline
from minidiff.runs.folder import open_pipeline
from minidiff.runtime.device import pick_device, pick_dtype
from minidiff.schedulers.core.names import sampler


def open_model(options: argparse.Namespace, dtype: str) -> Pipeline:
    """Return the model of the run or of --model on its device, with the sampler of --sampler."""
    device = pick_device(options.device)
    pipe = open_pipeline(_folder(options), device)
    if device.type == "cpu":
        for network in pipe.unets:
            network.to(memory_format=torch.channels_last)
    pipe.to(dtype=pick_dtype(dtype, device))
    if options.sampler is not None:
        pipe.scheduler = sampler(options.sampler, pipe.scheduler)
    return pipe


def _folder(options: argparse.Namespace) -> str | Path:
    """Return the folder of the run or of --model. Raises InvalidArgument unless one is given."""
    if options.model is None and options.run is None:
        raise InvalidArgument("give a run or --model")
    if options.model is None:
        return options.run
    if options.run is not None:
        raise InvalidArgument(f"give a run or --model, not both: got the run {options.run!r}")
    return shipped.folder(options.model)


def draw(pipe: Pipeline, options: argparse.Namespace, n: int, **more: Any) -> tuple:
    """Return n images (N, H, W, C) and their labels (N,), −1 where there are none.

    Args:
        pipe: model to sample.
        options: parsed flags of `add_sampling`.
        n: number of images.
        more: further arguments of the pipeline.
    """
    result = pipe(
        **more,
        num_images=n,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        autoguidance_scale=options.autoguidance,
        eta=options.eta,
        seed=options.seed,
        batch_size=options.batch_size,
        output_type="np",
        progress=True,
    )
    labels = result.labels if result.labels is not None else torch.full((n,), -1)
    return result.images, labels.numpy()


def setting(pipe: Pipeline, options: argparse.Namespace) -> str:
    """Return sampler, steps and guidance as text."""
    steps = pipe.num_inference_steps if options.steps is None else options.steps
    scale = pipe.guidance_scale if options.guidance is None else options.guidance
    auto = pipe.autoguidance_scale if options.autoguidance is None else options.autoguidance
    name = options.sampler or f"{type(pipe.scheduler).__name__} (the model's)"
    suffix = "" if auto == 1 else f", autoguidance {auto:g}"
    return f"{name}, {steps} steps, guidance {scale:g}{suffix}"
