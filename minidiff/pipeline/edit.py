"""Editing a picture by inversion: up to the noise that makes it, and down under another prompt.

DDIM without noise is Euler's method for an ordinary differential equation, which can be walked from
either end. `invert` walks up from a picture, under the prompt that describes it, to the noise that
DDIM would make it of; the same noise under another prompt keeps what the prompts share.

    noise = invert(pipe, photo, "a cat")
    reconstruct(pipe, photo, "a cat")          photo, but for the error of the steps
    swap(pipe, photo, "a cat", "a dog")        the dog in its place

The way back misses the picture by how much ε̂ changes within a step, of first order in the step.
Guidance makes it change faster: invert without (Mokady et al. 2022, arXiv:2211.09794, section 3).

Source: Song, Meng & Ermon 2021, "Denoising Diffusion Implicit Models", arXiv:2010.02502, section
4.3.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.guidance import Denoiser
from minidiff.images.pixels import original_of
from minidiff.pipeline import Pipeline, PipelineOutput
from minidiff.pipeline.parts import scale_of
from minidiff.pipeline.request import sides_of, told_of
from minidiff.sample import trajectory
from minidiff.schedulers import DDIMInverseScheduler, DDIMScheduler, Scheduler

Told = str | int | Sequence[str] | Sequence[int] | Tensor | None


def ddim_of(scheduler: Scheduler) -> DDIMScheduler:
    """DDIM for the noise schedule of a scheduler, with nothing clipped: the way down.

    Raises InvalidArgument: a flow, or EDM's levels: DDIM walks a schedule of β.
    """
    if "beta_schedule" not in scheduler.config or scheduler.config.get("use_flow_sigmas"):
        raise InvalidArgument(
            f"scheduler must have a schedule of β for DDIM to invert, got {scheduler!r}"
        )
    return DDIMScheduler.from_config(
        scheduler.config, clip_sample=False, thresholding=False, timestep_spacing="trailing"
    )


def climb(denoise: Denoiser, scheduler: Scheduler, x0: Tensor, num_inference_steps: int) -> Tensor:
    """The noise that DDIM, in so many steps, would make x0 of.

    Args:
        denoise: (x_t, t) → network output, of the scheduler's prediction type.
        scheduler: whose noise schedule it is, see `ddim_of`.
        x0: clean samples, (B, C, *space), in the network's space.
    Raises:
        InvalidArgument: see `ddim_of`, and `Scheduler.set_timesteps`.
    """
    up = DDIMInverseScheduler.from_config(ddim_of(scheduler).config)
    up.set_timesteps(num_inference_steps, device=x0.device)
    *_, last = trajectory(denoise, up, x0)
    return last.next_x


def descend(
    denoise: Denoiser, scheduler: Scheduler, noise: Tensor, num_inference_steps: int
) -> Tensor:
    """The way back: clean samples from what `climb` gave."""
    down = ddim_of(scheduler)
    down.set_timesteps(num_inference_steps, device=noise.device)
    *_, last = trajectory(denoise, down, noise)
    return last.next_x


@torch.no_grad()
def invert(
    pipe: Pipeline,
    image: Any,
    prompt: Told = None,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """The noise latents that DDIM turns into a picture, for `pipe(…, latents=…)`.

    Args:
        pipe: whose scheduler names the noise schedule; the steps are DDIM's.
        image: see `pictures.pixels_of`; one or several.
        prompt: what it shows: a text or a class, or one each. None for a model that is told
            nothing.
        num_inference_steps: of the way up; take as many down. By default those of the pipeline.
        guidance_scale: of the way up.
    Returns:
        (N, C, h, w) in the network's space.
    Raises:
        InvalidArgument: names the argument, before a network runs.
    """
    space = pipe.space
    original = original_of(image, None, space.image_channels, needs_mask=space.is_told_mask)
    if original is None:
        raise InvalidArgument("image must be given")
    if prompt is None and pipe.class_names:
        raise InvalidArgument("prompt must be given: the class that the image shows")
    several = len(original.pixels) if len(original.pixels) > 1 else None
    told, n = told_of(prompt, None, several, 1, 0, pipe.prompts, pipe.class_names)
    scale = scale_of(guidance_scale, pipe.is_guidable)
    shape = space.shape(*sides_of(None, None, original))
    steps = pipe.num_inference_steps if num_inference_steps is None else num_inference_steps
    ddim_of(pipe.scheduler).set_timesteps(steps)  # refuses what cannot be inverted
    pixels = original.times(n).pixels.to(pipe.device)
    denoise = pipe.denoiser(told, scale, size=space.image_size(shape))
    return climb(denoise, pipe.scheduler, space.mode(pixels), steps)


def swap(
    pipe: Pipeline,
    image: Any,
    prompt: Told,
    other: Told,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float = 1.0,
    **options: Any,
) -> PipelineOutput:
    """A picture under another prompt: inverted under the one that it shows, made under the other.

    Args:
        pipe, image, prompt: see `invert`.
        other: what it is to show.
        num_inference_steps: of each way.
        guidance_scale: of the way down.
        options: of the pipeline's call, such as `output_type`.
    Raises:
        InvalidArgument: names the argument.
    """
    noise = invert(pipe, image, prompt, num_inference_steps=num_inference_steps)
    down = copy.copy(pipe)
    down.scheduler = ddim_of(pipe.scheduler)
    down.autoguidance_scale = 1.0  # as on the way up
    return down(
        other,
        num_images=len(noise),
        latents=noise,
        height=pipe.space.image_size(noise.shape[1:])[0],
        width=pipe.space.image_size(noise.shape[1:])[1],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        **options,
    )


def reconstruct(pipe: Pipeline, image: Any, prompt: Told = None, **options: Any) -> PipelineOutput:
    """A picture up to its noise and down again, to see what inversion keeps; see `swap`."""
    return swap(pipe, image, prompt, prompt, **options)
