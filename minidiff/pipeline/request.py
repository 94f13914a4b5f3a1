"""What one call of a pipeline is for: every argument checked, and resolved to what the loop needs.

`Request.of(pipe, **arguments)` runs before any network does. It sets the scheduler's grid, so that
the timesteps are known, and nothing else of the pipeline changes.
"""

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, one_of, real_number, whole_number
from minidiff.guidance import METHODS, Network, extrapolated, interval_of, rescaled
from minidiff.images.pixels import Original
from minidiff.noise import MAX_SEED, Generators
from minidiff.pipeline.denoiser import Guidance, Method
from minidiff.pipeline.inpaint import Stretch, stretches
from minidiff.pipeline.parts import check_autoguidance_scale, check_guidance_scale
from minidiff.pipeline.start import initial_noise, noise_sources
from minidiff.pipeline.walk import StepEnd, step_ends
from minidiff.runtime.checks import callback, flag, optional
from minidiff.sample import Step, meaning_of
from minidiff.schedulers import DDIMScheduler, Scheduler
from minidiff.text.phrase import Phrase

if TYPE_CHECKING:
    from minidiff.pipeline.pipeline import Pipeline

MAX_IMAGES = 1_000_000  # they are held in memory; more than this is a typing error
STRENGTH = 0.8  # default of image-to-image, as in diffusers


@dataclass(frozen=True)
class Request:
    """One call of a pipeline, checked and resolved.

    Attributes:
        conditioning: class labels (N,), N prompts, or None for an unconditional network.
        negative: N negative prompts, or None for the empty text.
        guidance: scale and method of guidance.
        shape: (C, h, w) of one sample in the network's space, (D,) of a point.
        original: N given images on the host, with their masks; None for none.
        first_step: entry of the scheduler's grid where sampling begins.
        passes: RePaint's passes over the grid; empty for one pass from `first_step` to the end.
        reconstruction: scale of reconstruction guidance, 0 for none.
        batches: which of the N images go through the network together.
        source_of: from a batch to the generators of its noise.
        noise_of: from a batch and its generators to standard normal noise (B, C, h, w).
        step_options: further arguments of `scheduler.step`.
        output_type, callback, progress: as given to the pipeline.
        on_step_end: function that returns diffusers' callback for one batch.
        watching: from a batch and its callback to the wrapper of the network, which adds the
            residuals of ControlNets, see `minidiff.adapters.control`.
        evaluations: steps taken for every batch.
    """

    conditioning: Tensor | list[str] | None
    negative: list[str] | None
    guidance: Guidance
    shape: tuple[int, ...]
    original: Original | None
    first_step: int
    passes: list[Stretch]
    reconstruction: float
    batches: list[slice]
    source_of: Callable[[slice], Generators]
    noise_of: Callable[[slice, Generators], Tensor]
    step_options: dict[str, Any]
    output_type: str
    callback: Callable[[Step], None] | None
    on_step_end: Callable[[], StepEnd]
    watching: Callable[[slice, StepEnd], Callable[[Network], Network]]
    progress: bool | None
    evaluations: int

    @classmethod
    def of(cls, pipe: "Pipeline", *given: Any, **named: Any) -> "Request":
        """Check and resolve the arguments of `Pipeline.__call__`, and set the scheduler's grid.

        Args:
            pipe: the pipeline.
            given, named: arguments of its call, whose defaults are those of that call.
        Raises:
            InvalidArgument: names the argument, what was given and what is allowed.
        """
        bound = inspect.signature(type(pipe).__call__).bind(pipe, *given, **named)
        bound.apply_defaults()
        call = SimpleNamespace(**bound.arguments)
        space, scheduler = pipe.space, pipe.scheduler
        space.check_output(call.output_type)
        optional(flag)("progress", call.progress)
        optional(callback)("callback", call.callback)
        original = space.original(call.image, call.mask_image)
        copies = call.num_images_per_prompt
        number = number_of_images(call.num_images, copies, original)
        conditioning, n = resolve_conditioning(
            pipe, call.prompt, call.class_labels, number, copies, call.first_index
        )
        guidance = resolve_guidance(
            pipe,
            call.guidance_scale,
            call.guidance_rescale,
            call.guidance_interval,
            call.autoguidance_scale,
            call.guide,
        )
        negative = negative_prompts(pipe, call.negative_prompt, n, copies, guidance.scale)
        conditioning = phrases(pipe, conditioning, copies, call, "", call.clip_skip)
        negative = phrases(pipe, negative, copies, call, "negative_")
        options = step_options(scheduler, call.eta)
        shape = space.shape(*image_size(call.height, call.width, original))
        set_grid(pipe, call.num_inference_steps, call.timesteps, call.sigmas)
        first = first_step(scheduler, call.strength, original, pipe.prompts)
        passes = timestep_schedule(scheduler, first, call.resamples, call.jump_length, original)
        return cls(
            conditioning=conditioning, negative=negative, guidance=guidance, shape=shape,
            reconstruction=reconstruction_scale(
                call.reconstruction_guidance, original, takes_mask=space.takes_mask
            ),
            batches=slices(n, call.batch_size),
            source_of=noise_sources(n, call.seed, call.generator, call.first_index),
            noise_of=initial_noise(call.latents, (n, *shape), pipe.device),
            original=None if original is None else original.repeat(n),
            first_step=first, passes=passes, step_options=options,
            output_type=call.output_type, callback=call.callback, progress=call.progress,
            on_step_end=step_ends(
                pipe, call.callback_on_step_end, call.callback_on_step_end_tensor_inputs, guidance
            ),
            watching=pipe.watching(call, n, space.image_size(shape), first),
            evaluations=sum(end - begin for begin, end in passes) or len(scheduler.grid) - first,
        )  # fmt: skip


# --- how many, and of what -------------------------------------------------------------------


def number_of_images(num_images: int | None, copies: int, original: Original | None) -> int | None:
    """Return how many prompts, labels or images a call has; None if the prompts decide.

    Raises:
        InvalidArgument: num_images or num_images_per_prompt is out of range, or both are given.
    """
    whole_number("num_images_per_prompt", copies, 1, MAX_IMAGES)
    if num_images is not None:
        whole_number("num_images", num_images, 1, MAX_IMAGES)
        if copies != 1:
            raise InvalidArgument("give either num_images or num_images_per_prompt, not both")
        return num_images
    several = original is not None and len(original.pixels) > 1
    return len(original.pixels) if several else None


def resolve_conditioning(
    pipe: "Pipeline", prompt: Any, class_labels: Any, number: int | None, copies: int, first: int
) -> tuple[Tensor | list[str] | None, int]:
    """Return the conditioning of every image, labels (N,), N prompts or None; and N.

    Args:
        pipe: pipeline of the call.
        prompt, class_labels: arguments of the call.
        number: number of prompts or labels, see `number_of_images`.
        copies: images per prompt or label.
        first: number of the first image.
    Raises:
        InvalidArgument: a prompt or label is missing, of the wrong type, or for another model.
    """
    whole_number("first_index", first, 0, MAX_SEED)
    for name, given, allowed in (
        ("prompt", prompt, pipe.prompts is not None or bool(pipe.class_names)),
        ("class_labels", class_labels, bool(pipe.class_names)),
    ):
        if given is not None and not allowed:
            raise InvalidArgument(f"{name} must be None: this model takes none, got {given!r}")
    if pipe.prompts is not None:
        if prompt is None:
            raise InvalidArgument("prompt must be given: this model is conditioned on text")
        texts = list_of_texts("prompt", prompt, number)
        return [text for text in texts for _ in range(copies)], len(texts) * copies
    if not pipe.class_names:
        return None, (number or 1) * copies
    if None not in (prompt, class_labels):
        raise InvalidArgument("give either prompt or class_labels, not both")
    given = class_labels if prompt is None else prompt
    labels = list_of_labels(given, number, first, pipe.class_names).repeat_interleave(copies)
    return labels, len(labels)


def list_of_texts(name: str, given: str | Sequence[str], n: int | None) -> list[str]:
    """Return one text per image.

    Args:
        name: argument to name in errors.
        given: one text for all images, or one per image.
        n: number of images; None for as many as there are texts.
    Raises:
        InvalidArgument: not texts, or another number of them.
    """
    texts = [given] * (n or 1) if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise InvalidArgument(f"{name} must be a text or a list of texts, got {given!r}")
    if not texts or n not in (None, len(texts)):
        raise InvalidArgument(
            f"{name} must be one text, or {n or 'at least 1'} of them; got {len(texts)}"
        )
    return list(texts)


def phrases(
    pipe: "Pipeline",
    texts: Any,
    copies: int,
    call: SimpleNamespace,
    prefix: str,
    clip_skip: int | None = None,
) -> Any:
    """Return prompts with the texts for further encoders and a number of skipped layers.

    Args:
        pipe: pipeline of the call.
        texts: N prompts, labels, or None.
        copies: images per prompt.
        call: arguments of the call.
        prefix: what stands before "prompt_2" in the names of these texts.
        clip_skip: argument of the call.
    Raises:
        InvalidArgument: an argument for a model that has no use for it, or out of range.
    """
    names = [f"{prefix}prompt_2", f"{prefix}prompt_3"]
    given = {name: getattr(call, name) for name in names} | {"clip_skip": clip_skip}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return texts
    encoders = () if pipe.prompts is None else pipe.prompts.encoders
    for name, least, what in (
        (names[0], 2, "second text encoder"), (names[1], 3, "third text encoder"),
        ("clip_skip", 1, "text encoder"),
    ):  # fmt: skip
        if name in given and len(encoders) < least:
            raise InvalidArgument(
                f"{name} must be None: this model has no {what}, got {given[name]!r}"
            )
    if not isinstance(texts, list):
        name = next(iter(given))
        raise InvalidArgument(f"{name} must be None without {prefix}prompt and guidance")
    if clip_skip is not None:
        clip = encoders[:2]  # the third one is T5
        layers = min(encoder.config.num_hidden_layers for encoder in clip)
        whole_number("clip_skip", clip_skip, 0, layers - len(clip))
    others = [
        list_of_texts(name, given[name], len(texts) // copies) if name in given else [None]
        for name in names
    ]
    return [
        Phrase.of(text).with_options(*(o[i // copies % len(o)] for o in others), clip_skip)
        for i, text in enumerate(texts)
    ]


def list_of_labels(
    given: int | str | Sequence[int | str] | Tensor | np.ndarray | None,
    n: int | None,
    first: int,
    names: Sequence[str],
) -> Tensor:
    """Return one class label per image, int64 (N,).

    Args:
        given: one class for all images, one per image, or None for every class in turn; a class
            is its number or its name.
        n: number of images; None for as many as there are classes given, or one.
        first: number of the first image.
        names: names of the classes.
    Raises:
        InvalidArgument: a number or name that is not a class, or another number of labels.
    """
    if given is None:
        return (torch.arange(n or 1) + first) % len(names)
    if isinstance(given, Tensor | np.ndarray):
        given = given.tolist()
    if not isinstance(given, Sequence) or isinstance(given, str):
        given = [given] * (n or 1)
    labels = [_label(label, names) for label in given]
    if not labels or n not in (None, len(labels)):
        raise InvalidArgument(
            f"class_labels must name one class, or {n or 'at least 1'} of them; got {len(labels)}"
        )
    return torch.tensor(labels)


def _label(given: Any, names: Sequence[str]) -> int:
    if isinstance(given, str):
        one_of("class_labels", given, names)
        if len(same := [i for i, name in enumerate(names) if name == given]) > 1:
            raise InvalidArgument(f"class_labels {given!r} names several classes: one of {same}")
        return same[0]
    return whole_number("class_labels", given, 0, len(names) - 1)


def negative_prompts(
    pipe: "Pipeline", given: str | Sequence[str] | None, n: int, copies: int, scale: float
) -> list[str] | None:
    """Return the text that each of n images is guided away from; None for the empty text.

    Warns where guidance is off, because a negative prompt has no effect then.

    Raises:
        InvalidArgument: not texts, another number of them, or a model that can have none.
    """
    if given is None:
        return None
    if pipe.prompts is None or pipe.takes_guidance_scale:
        why = "takes no prompts" if pipe.prompts is None else "is distilled and needs no guidance"
        raise InvalidArgument(f"negative_prompt must be None: this model {why}, got {given!r}")
    texts = list_of_texts("negative_prompt", given, n // copies)
    if scale == 1:
        warnings.warn(
            f"negative_prompt has no effect without guidance, got {given!r}", stacklevel=5
        )
        return None
    return [text for text in texts for _ in range(copies)]


# --- guidance --------------------------------------------------------------------------------


def resolve_guidance(
    pipe: "Pipeline",
    scale: float | None,
    rescale: float,
    interval: Sequence[float] | None,
    autoguidance: float | None,
    guide: Method | str | None,
) -> Guidance:
    """Return scale and method of guidance, the pipeline's own where the call gives none.

    Raises:
        InvalidArgument: an argument is out of range, two exclude each other, or one is given for
            a model that cannot be guided.
    """
    scale = check_guidance_scale(pipe.guidance_scale if scale is None else scale, pipe.is_guidable)
    autoguidance = check_autoguidance_scale(
        pipe.autoguidance_scale if autoguidance is None else autoguidance, pipe.guidance_network
    )
    interval = pipe.guidance_interval if interval is None else interval
    rescale = real_number("guidance_rescale", rescale, 0, 1)
    if guide is None and scale <= 1 and not pipe.is_guided_below_one:
        scale, rescale = 1.0, 0.0  # as in diffusers, where models of text are not guided then
    elif guide is None and scale == 0 and pipe.is_guidable and not pipe.takes_guidance_scale:
        warnings.warn(
            "guidance_scale 0 samples the unconditional network: prompt and class have no effect",
            stacklevel=5,
        )
    for name, given in (
        ("guidance_rescale", rescale != 0),
        ("guide", guide is not None),
        ("guidance_interval", interval is not None and pipe.guidance_network is None),
    ):
        if given and (not pipe.is_guidable or pipe.takes_guidance_scale):
            raise InvalidArgument(f"{name} needs guidance, which this model cannot have")
    interval = interval_of(interval)
    if guide is not None and rescale:
        raise InvalidArgument("give either guide or guidance_rescale, not both")
    guide = pipe.guide if guide is None else guide
    if callable(guide):
        return Guidance(scale, guide, interval, autoguidance)
    one_of("guide", guide, METHODS)
    if rescale:
        method = partial(rescaled, share=rescale)
    elif scale == 1:
        method = extrapolated
    else:
        method = partial(METHODS[guide], meaning=meaning_of(pipe.scheduler))
    return Guidance(scale, method, interval, autoguidance)


# --- sizes, steps, batches -------------------------------------------------------------------


def image_size(
    height: int | None, width: int | None, original: Original | None
) -> tuple[int | None, int | None]:
    """Return height and width of the images in pixels, None for the network's own.

    Raises:
        InvalidArgument: another size than that of the given image.
    """
    if original is None:
        return height, width
    size = tuple(original.pixels.shape[-2:])
    for name, given, has in zip(("height", "width"), (height, width), size, strict=True):
        if given not in (None, has):
            raise InvalidArgument(f"{name} must be that of image, {has}, got {given}: resize it")
    return size


def step_options(scheduler: Scheduler, eta: float | None) -> dict[str, float]:
    """Return further arguments of `scheduler.step`.

    Raises:
        InvalidArgument: eta is out of range, or given to another scheduler than DDIM.
    """
    if eta is None:
        return {}
    if not isinstance(scheduler, DDIMScheduler):
        raise InvalidArgument(f"eta must be None for {type(scheduler).__name__}, got {eta!r}")
    return {"eta": real_number("eta", eta, 0, 1)}


def set_grid(
    pipe: "Pipeline",
    steps: int | None,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
) -> None:
    """Set the scheduler's grid by a number of steps, the pipeline's own if there is none, or by
    the steps themselves.

    Raises:
        InvalidArgument: several are given, one is out of range, or the scheduler does not take it.
    """
    given = {"num_inference_steps": steps, "timesteps": timesteps, "sigmas": sigmas}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise InvalidArgument(f"give one of {', '.join(given)}, not several")
    scheduler = pipe.scheduler
    takes = inspect.signature(scheduler.set_timesteps).parameters
    for name in given.keys() - takes - {"num_inference_steps"}:
        raise InvalidArgument(f"{name} must be None: {type(scheduler).__name__} takes none")
    given = given or {"num_inference_steps": pipe.num_inference_steps}
    scheduler.set_timesteps(device=pipe.device, **given)


def first_step(
    scheduler: Scheduler, strength: float | None, original: Original | None, prompts: Any = None
) -> int:
    """Return the entry of the grid where sampling begins: ⌊strength · steps⌋ steps are taken.

    With the prompts of Stable Diffusion 3 these are ⌈strength · steps⌉, as in diffusers.

    Raises:
        InvalidArgument: strength is out of range, given without an image, or too small for a
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
    if prompts is not None and prompts.takes_begun_step:
        taken = steps - int(steps - steps * strength)
    if strength and not taken:
        raise InvalidArgument(
            f"strength must be 0, or at least {1 / steps:g} for one of "
            f"{steps} steps to be taken; got {strength:g}"
        )
    return (steps - taken) * scheduler.order if taken else len(scheduler.grid)


def timestep_schedule(
    scheduler: Scheduler, first: int, resamples: int, jump_length: int, original: Original | None
) -> list[Stretch]:
    """Return RePaint's passes over the grid from an entry on; none for a single pass.

    Raises:
        InvalidArgument: resamples or jump_length is out of range, given without a mask, or for a
            sampler that evaluates the network more than once per step.
    """
    end = len(scheduler.grid)
    whole_number("resamples", resamples, 1, 1000)
    whole_number("jump_length", jump_length, 1, max(1, end - first - 1))
    if resamples == 1 and jump_length != 1:
        raise InvalidArgument(f"jump_length needs resamples above 1, got {jump_length}")
    if resamples == 1 or first == end:
        return []
    if original is None or original.mask is None:
        raise InvalidArgument(f"resamples needs a mask_image to fit in, got {resamples}")
    if end != scheduler.num_inference_steps:
        raise InvalidArgument(
            f"resamples must be 1 for {type(scheduler).__name__}, whose steps have several stages"
        )
    return stretches(first, end, jump_length, resamples)


def reconstruction_scale(scale: object, original: Original | None, *, takes_mask: bool) -> float:
    """Return the scale w of reconstruction guidance.

    Raises:
        InvalidArgument: w is below 0, or given without a mask or to a network that takes one.
    """
    scale = real_number("reconstruction_guidance", scale, 0)
    if scale and (original is None or original.mask is None):
        raise InvalidArgument(f"reconstruction_guidance needs a mask_image, got {scale:g}")
    if scale and takes_mask:
        raise InvalidArgument(
            "reconstruction_guidance must be 0 for an inpainting network, whose input already "
            f"holds the kept pixels; got {scale:g}"
        )
    return scale


def slices(n: int, batch_size: int) -> list[slice]:
    """Return n images in batches. Raises InvalidArgument for a batch size below 1."""
    size = whole_number("batch_size", batch_size, 1)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]
