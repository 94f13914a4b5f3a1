"""Opening and sampling a model, for the commands that do so."""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from PIL import Image

from minidiff import engines, shipped
from minidiff.cli.control_options import control_of, with_controlnets
from minidiff.errors import InvalidArgument, suggestion
from minidiff.images.pixels import MODES, read_image
from minidiff.images.watermark import Watermark, message_of
from minidiff.modalities.extra_channels import is_upscaler, upscale
from minidiff.pipeline import Pipeline
from minidiff.runs.folder import open_pipeline
from minidiff.runtime import files
from minidiff.runtime.device import pick_device, pick_dtype
from minidiff.schedulers.core.names import sampler

SUFFIXES = {"strip": ".png"}  # of flags that are not named after theirs


def open_model(options: argparse.Namespace, dtype: str) -> Pipeline:
    """Return the model of the run or of --model on its device, with the sampler of --sampler."""
    device = pick_device(options.device)
    pipe = open_pipeline(model_folder(options), device)
    for text in getattr(options, "adapter", None) or ():
        pipe.load_adapter(*adapter_of(text))
    if device.type == "cpu":
        for network in pipe.unets:
            network.to(memory_format=torch.channels_last)
    pipe.to(dtype=pick_dtype(dtype, device))
    if options.sampler is not None:
        pipe.scheduler = sampler(options.sampler, pipe.scheduler)
    engines.use(pipe, model_folder(options), getattr(options, "engine", None))
    return with_controlnets(pipe, options)


def adapter_of(text: str) -> tuple[str, float]:
    """Return path and scale of "PATH" or "PATH:SCALE". Raises InvalidArgument."""
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return os.path.expanduser(text), 1.0
    try:
        return os.path.expanduser(path), float(scale)
    except ValueError:
        raise InvalidArgument(
            f"--adapter must be PATH or PATH:SCALE, with a number for SCALE, got {text!r}"
        ) from None


def model_folder(options: argparse.Namespace) -> str | Path:
    """Return the folder of the run, which may be the name of a model that ships, or of --model.

    Raises:
        InvalidArgument: neither is given, or both.
    """
    if options.model is None and options.run is None:
        raise InvalidArgument("give a run or --model")
    if options.model is None:
        is_name = options.run in shipped.MODELS and not Path(options.run).exists()
        return shipped.folder(options.run) if is_name else options.run
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
    call = pipe
    if is_upscaler(pipe):
        if (small := more.get("image")) is None:
            raise InvalidArgument("--image must be given: this model enlarges an image")
        call, more = partial(upscale, pipe, small), {k: v for k, v in more.items() if k != "image"}
    result = call(
        **more,
        **control_of(pipe, options),
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
    if black := [names for names in result.flagged or () if names]:
        found = ", ".join(sorted({name for names in black for name in names}))
        print(f"{len(black)} of {n} images are black, as the model's filter found: {found}")
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


def check_files(options: argparse.Namespace, *flags: str) -> None:
    """Refuse output files before work starts. Raises InvalidArgument, or OSError."""
    paths = [(flag, path) for flag in flags if (path := getattr(options, flag)) is not None]
    for (one, path), (other, same) in combinations(paths, 2):
        if path == same:
            raise InvalidArgument(f"--{one} and --{other} must be two files, got {path} twice")
    for flag, path in paths:
        suffix = SUFFIXES.get(flag, f".{flag}")
        if Path(path).suffix.lower() != suffix:
            raise InvalidArgument(f"--{flag} must be a {suffix} file, got {path}")
        files.ensure_writable(path)


def class_of(pipe: Pipeline, given: str | None) -> str | int | None:
    """Return the class that --class names, and print its name if it is given by number.

    Raises:
        InvalidArgument: neither a name nor a number of a class; or a number where names are
            numerals.
    """
    if given is None or given in pipe.class_names:
        return given
    if not pipe.class_names:
        raise InvalidArgument(
            f"--class is for models with classes, this one has none; got {given!r}"
        )
    names = ", ".join(pipe.class_names)
    numerals = any(name.isdecimal() for name in pipe.class_names)
    number = int(given) if given.isdecimal() and len(given) < 10 else -1
    if numerals or not 0 <= number < len(pipe.class_names):
        hint = suggestion(given, pipe.class_names)
        raise InvalidArgument(f"--class must be one of {names}; got {given!r}{hint}")
    print(f"class {number}: {pipe.class_names[number]}")
    return number


def text_of(pipe: Pipeline, given: str | None) -> str | None:
    """Return the prompt, "" without one for a model with captions.

    Raises:
        InvalidArgument: a text for a model without captions.
    """
    if pipe.prompts is not None:
        return given or ""
    if given is not None:
        instead = f"--class {quote(pipe.class_names[0])}" if pipe.class_names else "no text"
        raise InvalidArgument(
            f"a text is for models with captions, such as --model digits-text; this one takes "
            f"{instead}; got {given!r}"
        )
    return None


def starting_image(pipe: Pipeline, path: str) -> Image.Image:
    """Read --image, of the size that the network was trained on if minidiff trained it.

    Raises:
        DataError: see `read_image`.
        InvalidArgument: an image of another size.
    """
    image = read_image(path, MODES.get(pipe.space.image_channels, ("RGB",))[0])
    _, height, width = pipe.image_shape
    if pipe.is_guided_below_one and image.size != (width, height) and not is_upscaler(pipe):
        raise InvalidArgument(
            f"--image must have {width}×{height} pixels, as the model was trained on, got "
            f"{image.width}×{image.height}: resize it"
        )
    return image


def marking(message: str, shape: Sequence[int]) -> Watermark:
    """Return the finisher for --watermark. Raises InvalidArgument if no image can carry it."""
    mark = Watermark(message_of(message))
    mark(torch.zeros(1, *shape))
    return mark
