"""What goes into a pipeline and its call, checked: parts, names, texts, numbers, noise."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, real_number, whole_number
from minidiff.guidance import Denoiser, Pair, extrapolated, interval_of, rescaled
from minidiff.images.pixels import Original
from minidiff.nn import UNet
from minidiff.noise import MAX_SEED
from minidiff.pipeline.inpaint import Stretch, stretches
from minidiff.pipeline.parts import autoguidance_of
from minidiff.sample import Change, Step
from minidiff.schedulers import DDIMScheduler, Scheduler
from minidiff.text.prompts import Prompts, PromptsXL

MAX_IMAGES = 1_000_000  # they are held in memory; more than this is a typing error
STRENGTH = 0.8  # of image-to-image, as in diffusers

Guide = Callable[[Pair, float], Denoiser]  # a way of guidance, at a scale
StepEnd = Callable[[Any, int, Any, dict[str, Tensor]], Mapping[str, Tensor] | None]


class Guidance(NamedTuple):
    """How a pipeline is led.

    Attributes:
        guide: of what is wanted and what is not.
        interval: the σ/α between which it leads; None for all.
        autoguidance: the scale of autoguidance, 1 for none.
    """

    guide: Guide = extrapolated
    interval: tuple[float, float] | None = None
    autoguidance: float = 1.0


EXTRAPOLATED = Guidance()


def texts_of(name: str, given: str | Sequence[str], n: int | None) -> list[str]:
    """One text for all images, or one an image; n images, or as many as there are texts.

    Raises InvalidArgument: no texts, or another number of them.
    """
    texts = [given] * (n or 1) if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise InvalidArgument(f"{name} must be a text or a list of texts, got {given!r}")
    if not texts or n not in (None, len(texts)):
        raise InvalidArgument(
            f"{name} must be one text, or {n or 'at least 1'} of them; got {len(texts)}"
        )
    return list(texts)


def optional_function(name: str, given: Any) -> None:
    """Refuse what is neither a function nor None. Raises InvalidArgument."""
    if given is not None and not callable(given):
        raise InvalidArgument(f"{name} must be a function, or None; got {given!r}")


def labels_of(
    given: int | Sequence[int] | Tensor | None, n: int | None, first: int, classes: int
) -> Tensor:
    """One label an image, (N,): the one that is given, those, or every class in turn.

    Args:
        n: images, or None for as many as there are labels, or one.
        first: number of the first image.
    Raises:
        InvalidArgument: a label that is no class, or another number of them.
    """
    if given is None:
        return (torch.arange(n or 1) + first) % classes
    if isinstance(given, Tensor):
        given = given.tolist()
    if not isinstance(given, Sequence) or isinstance(given, str):
        given = [given] * (n or 1)
    labels = [whole_number("class_labels", label, 0, classes - 1) for label in given]
    if not labels or n not in (None, len(labels)):
        raise InvalidArgument(
            f"class_labels must name one class, or {n or 'at least 1'} of them; got {len(labels)}"
        )
    return torch.tensor(labels)


def told_of(
    prompt: Any,
    class_labels: Any,
    number: int | None,
    copies: int,
    first: int,
    prompts: Prompts | PromptsXL | None,
    class_names: Sequence[str],
) -> tuple[Tensor | list[str] | None, int]:
    """What every image is of, labels (N,), N prompts, or None; and N.

    Args:
        number: see `number_of`.
        copies: how many images of each prompt or label.
        first: number of the first image.
    Raises:
        InvalidArgument: a prompt or label is missing, of the wrong kind, or for another model.
    """
    whole_number("first_index", first, 0, MAX_SEED)
    for name, given, able in (
        ("prompt", prompt, prompts is not None or bool(class_names)),
        ("class_labels", class_labels, bool(class_names)),
    ):
        if given is not None and not able:
            raise InvalidArgument(f"{name} must be None: this model takes none, got {given!r}")
    if prompts is not None:
        if prompt is None:
            raise InvalidArgument("prompt must be given: this model draws what a text says")
        texts = texts_of("prompt", prompt, number)
        return [text for text in texts for _ in range(copies)], len(texts) * copies
    if not class_names:
        return None, (number or 1) * copies
    if None not in (prompt, class_labels):
        raise InvalidArgument("give either prompt or class_labels, not both")
    given = class_labels if prompt is None else prompt
    labels = labels_of(given, number, first, len(class_names)).repeat_interleave(copies)
    return labels, len(labels)


def against_of(
    given: str | Sequence[str] | None,
    n: int,
    copies: int,
    scale: float,
    prompts: Prompts | PromptsXL | None,
    is_told_guidance: bool,
) -> list[str] | None:
    """What guidance leads away from, a text for each of n images; None for no text.

    Without guidance, at scale 1, there is nothing to lead away, of which a warning tells.

    Raises InvalidArgument: no texts, another number of them, or a model that can have none.
    """
    if given is None:
        return None
    if prompts is None or is_told_guidance:
        why = "takes no prompts" if prompts is None else "was distilled, nothing leads it"
        raise InvalidArgument(f"negative_prompt must be None: this model {why}, got {given!r}")
    texts = texts_of("negative_prompt", given, n // copies)
    if scale == 1:
        warnings.warn(
            f"negative_prompt has no effect: guidance_scale is 1, got {given!r}", stacklevel=4
        )
        return None
    return [text for text in texts for _ in range(copies)]


def number_of(num_images: int | None, copies: int, original: Original | None) -> int | None:
    """How many prompts, labels or originals a call is about; None if that is for them to say.

    Raises InvalidArgument: num_images or num_images_per_prompt is out of range, or both are given.
    """
    whole_number("num_images_per_prompt", copies, 1, MAX_IMAGES)
    if num_images is not None:
        whole_number("num_images", num_images, 1, MAX_IMAGES)
        if copies != 1:
            raise InvalidArgument("give either num_images or num_images_per_prompt, not both")
        return num_images
    several = original is not None and len(original.pixels) > 1
    return len(original.pixels) if several else None


def guidance_of(
    rescale: float,
    interval: Sequence[float] | None,
    guide: Guide | None,
    autoguidance: float,
    possible: bool,
    weaker: UNet | None,
) -> Guidance:
    """The way of guidance that a call asks for.

    Args:
        autoguidance: its scale.
        possible: whether there is another condition to lead the network away from.
        weaker: the network that autoguidance leads away from, or None.
    Raises:
        InvalidArgument: an argument is out of range, two exclude each other, or one is given where
            nothing can be led.
    """
    rescale = real_number("guidance_rescale", rescale, 0, 1)
    autoguidance = autoguidance_of(autoguidance, weaker)
    asked = {"guidance_rescale": rescale != 0, "guide": guide is not None,
             "guidance_interval": interval is not None and weaker is None}  # fmt: skip
    if any(asked.values()) and not possible:
        (name, *_) = (name for name, given in asked.items() if given)
        raise InvalidArgument(f"{name} needs guidance, which this model cannot have")
    interval = interval_of(interval)
    optional_function("guide", guide)
    if guide is None:
        guide = partial(rescaled, share=rescale) if rescale else extrapolated
    elif rescale:
        raise InvalidArgument("give either guide or guidance_rescale, not both")
    return Guidance(guide, interval, autoguidance)


def step_options(scheduler: Scheduler, eta: float | None) -> dict[str, float]:
    """Arguments of `scheduler.step`. Raises InvalidArgument: it has no eta, or not this one."""
    if eta is None:
        return {}
    if not isinstance(scheduler, DDIMScheduler):
        raise InvalidArgument(f"eta is DDIM's; {type(scheduler).__name__} has none")
    return {"eta": real_number("eta", eta, 0, 1)}


def sides_of(
    height: int | None, width: int | None, original: Original | None
) -> tuple[int | None, int | None]:
    """Height and width of the pictures, None for the usual ones; those of an original if there is
    one. Raises InvalidArgument: others are asked for.
    """
    if original is None:
        return height, width
    size = tuple(original.pixels.shape[-2:])
    for name, asked, has in zip(("height", "width"), (height, width), size, strict=True):
        if asked not in (None, has):
            raise InvalidArgument(f"{name} must be that of image, {has}, got {asked}: resize it")
    return size


def entry_of(scheduler: Scheduler, strength: float | None, original: Original | None) -> int:
    """Where on the scheduler's grid sampling begins, so that a share of its steps is taken.

    As in diffusers, ⌊strength · steps⌋ steps are.

    Raises InvalidArgument: strength is out of range, given without an image, or too small for a
    single step.
    """
    if original is None:
        if strength is not None:
            raise InvalidArgument(f"strength needs an image to start from, got {strength}")
        return 0
    if strength is None:
        strength = STRENGTH if original.mask is None else 1.0
    strength, steps = real_number("strength", strength, 0, 1), scheduler.num_inference_steps
    taken = min(int(steps * strength), steps)
    if strength and not taken:
        raise InvalidArgument(
            f"strength must be 0, or at least {1 / steps:g} for one of "
            f"{steps} steps to be taken; got {strength:g}"
        )
    return (steps - taken) * scheduler.order if taken else len(scheduler.grid)


def walks_of(
    scheduler: Scheduler, begin: int, resamples: int, jump_length: int, original: Original | None
) -> list[Stretch]:
    """The way down the grid from an entry on: in one go, or in RePaint's stretches.

    Raises InvalidArgument: RePaint's numbers are out of range, or it is asked for without a mask,
    or for a sampler that asks the network more than once a step.
    """
    end = len(scheduler.grid)
    whole_number("resamples", resamples, 1, 1000)
    whole_number("jump_length", jump_length, 1, max(1, end - begin - 1))
    if resamples == 1 and jump_length != 1:
        raise InvalidArgument(f"jump_length needs resamples above 1, got {jump_length}")
    if resamples == 1 or begin == end:
        return [Stretch(begin, end)] if begin < end else []
    if original is None or original.mask is None:
        raise InvalidArgument(f"resamples needs a mask_image to fit in, got {resamples}")
    if end != scheduler.num_inference_steps:
        raise InvalidArgument(
            f"resamples must be 1 for {type(scheduler).__name__}, whose steps have several stages"
        )
    return stretches(begin, end, jump_length, resamples)


def reconstruction_of(scale: object, original: Original | None, is_told_mask: bool) -> float:
    """w of reconstruction guidance. Raises InvalidArgument: below 0, or there is nothing to keep
    to, or the network is shown what is kept."""
    scale = real_number("reconstruction_guidance", scale, 0)
    if scale and (original is None or original.mask is None):
        raise InvalidArgument(f"reconstruction_guidance needs a mask_image, got {scale:g}")
    if scale and is_told_mask:
        raise InvalidArgument(
            f"reconstruction_guidance must be 0: this network is shown what is kept, got {scale:g}"
        )
    return scale


def parts_of(n: int, batch_size: int) -> list[slice]:
    """n images in batches. Raises InvalidArgument: a batch of none."""
    size = whole_number("batch_size", batch_size, 1)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def with_callback(after: Change, on_step_end: StepEnd | None, pipe: Any) -> Change:
    """`after`, and then diffusers' callback, which may return another sample.

    Raises InvalidArgument, when it is called: the callback returns anything but latents of the
    same shape.
    """
    if on_step_end is None:
        return after

    def both(step: Step) -> Tensor:
        x = after(step)
        answer = on_step_end(pipe, step.index, step.t, {"latents": x}) or {}
        latents = answer.get("latents", x)
        if answer.keys() - {"latents"} or latents.shape != x.shape:
            raise InvalidArgument(
                "callback_on_step_end may return {'latents': …} of shape "
                f"{tuple(x.shape)}, got {sorted(answer)} of shape {tuple(latents.shape)}"
            )
        return latents

    return both
