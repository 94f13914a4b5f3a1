"""What commands share that draw with a model."""

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
    """The model of the run or of --model, with the sampler of --sampler, ready on its device."""
    device = pick_device(options.device)
    pipe = open_pipeline(_folder(options), device)
    if device.type == "cpu":
        for network in filter(None, (pipe.unet, pipe.weaker)):
            network.to(memory_format=torch.channels_last)
    pipe.to(dtype=pick_dtype(dtype, device))
    if options.sampler is not None:
        pipe.scheduler = sampler(options.sampler, pipe.scheduler)
    return pipe


def _folder(options: argparse.Namespace) -> str | Path:
    if options.model is None and options.run is None:
        raise InvalidArgument("give a run or --model")
    if options.model is None:
        return options.run
    if options.run is not None:
        raise InvalidArgument(f"with --model there is no run: got {options.run!r} in its place")
    return shipped.folder(options.model)


def draw(pipe: Pipeline, options: argparse.Namespace, n: int, **more: Any) -> tuple:
    """n pictures and their labels; `more` are further arguments of the pipeline."""
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
    """How the model is sampled, for people."""
    steps = pipe.num_inference_steps if options.steps is None else options.steps
    scale = pipe.guidance_scale if options.guidance is None else options.guidance
    auto = pipe.autoguidance_scale if options.autoguidance is None else options.autoguidance
    name = options.sampler or f"{type(pipe.scheduler).__name__} (the model's own)"
    beside = "" if auto == 1 else f", autoguidance {auto:g}"
    return f"{name}, {steps} steps, guidance {scale:g}{beside}"
