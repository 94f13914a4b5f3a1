"""Editing an image by inversion: to the noise that generates it, and back under another prompt.

DDIM without noise is Euler's method for an ordinary differential equation, which can be integrated
in either direction. `invert` goes from an image, under the prompt that describes it, to the noise
from which DDIM would generate it. The same noise under another prompt keeps what the prompts share.

    noise = invert(pipe, photo, "a cat")
    reconstruct(pipe, photo, "a cat")          photo, but for the error of the steps
    swap(pipe, photo, "a cat", "a dog")        the dog in its place

The way back misses the image by the change of ε̂ within a step, which is of first order in the step
size. Guidance makes ε̂ change faster, so invert without it (Mokady et al. 2022, arXiv:2211.09794,
section 3).

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
from minidiff.pipeline import Pipeline, PipelineOutput
from minidiff.pipeline.request import Request
from minidiff.sample import trajectory
from minidiff.schedulers import DDIMInverseScheduler, DDIMScheduler, Scheduler

Conditioning = str | int | Sequence[str] | Sequence[int] | Tensor | None


def ddim_of(scheduler: Scheduler) -> DDIMScheduler:
    """Return DDIM without clipping on the noise schedule of a scheduler.

    Raises:
        InvalidArgument: the scheduler has no schedule of β (a flow, or EDM's levels).
    """
    if "beta_schedule" not in scheduler.config or scheduler.config.get("use_flow_sigmas"):
        raise InvalidArgument(
            f"scheduler must have a schedule of β for DDIM to invert, got {scheduler!r}"
        )
    return DDIMScheduler.from_config(
        scheduler.config, clip_sample=False, thresholding=False, timestep_spacing="trailing"
    )


def climb(denoise: Denoiser, scheduler: Scheduler, x0: Tensor, num_inference_steps: int) -> Tensor:
    """Return the noise from which DDIM generates x0.

    Args:
        denoise: (x_t, t) → network output, of the scheduler's prediction type.
        scheduler: scheduler with the noise schedule, see `ddim_of`.
        x0: clean samples, (B, C, *space), in the network's space.
        num_inference_steps: number of steps.
    Raises:
        InvalidArgument: see `ddim_of`, and `Scheduler.set_timesteps`.
    """
    up = DDIMInverseScheduler.from_config(ddim_of(scheduler).config)
    up.set_timesteps(num_inference_steps, device=x0.device)
    *_, last = trajectory(denoise, up, x0)
    return last.next_x


@torch.no_grad()
def invert(
    pipe: Pipeline,
    image: Any,
    prompt: Conditioning = None,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Return the noise latents that DDIM turns into an image, for `pipe(…, latents=…)`.

    Args:
        pipe: pipeline whose scheduler has the noise schedule; the steps are DDIM's.
        image: one or several images, see `images.pixels.as_pixels`.
        prompt: text or class that describes the image, one or one per image; None for an
            unconditional network.
        num_inference_steps: steps of the inversion; generate with as many. By default the
            pipeline's.
        guidance_scale: scale of guidance during the inversion.
    Returns:
        (N, C, h, w) in the network's space.
    Raises:
        InvalidArgument: names the argument, before a network runs.
    """
    if image is None:
        raise InvalidArgument("image must be given")
    if prompt is None and pipe.class_names:
        raise InvalidArgument("prompt must be given: the class that the image shows")
    steps = pipe.num_inference_steps if num_inference_steps is None else num_inference_steps
    request = Request.of(
        with_ddim(pipe), prompt, image=image, strength=1.0, num_inference_steps=steps,
        guidance_scale=guidance_scale,
    )  # fmt: skip
    size = pipe.space.image_size(request.shape)
    denoise = pipe.denoiser(request.conditioning, request.guidance.scale, size=size)
    x0 = pipe.space.mode(request.original.pixels.to(pipe.device))
    return climb(denoise, pipe.scheduler, x0, steps)


def with_ddim(pipe: Pipeline) -> Pipeline:
    """Return the same pipeline with DDIM, without autoguidance."""
    other = copy.copy(pipe)
    other.scheduler, other.autoguidance_scale = ddim_of(pipe.scheduler), 1.0
    return other


def swap(
    pipe: Pipeline,
    image: Any,
    prompt: Conditioning,
    other: Conditioning,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float = 1.0,
    **options: Any,
) -> PipelineOutput:
    """Generate an image under another prompt: inverted under its own, generated under the other.

    Args:
        pipe, image, prompt: see `invert`.
        other: prompt or class of the result.
        num_inference_steps: steps in each direction.
        guidance_scale: scale of guidance during generation.
        options: further arguments of the pipeline's call, such as `output_type`.
    Raises:
        InvalidArgument: names the argument.
    """
    noise = invert(pipe, image, prompt, num_inference_steps=num_inference_steps)
    height, width = pipe.space.image_size(noise.shape[1:])
    return with_ddim(pipe)(
        other,
        num_images=len(noise),
        latents=noise,
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        **options,
    )


def reconstruct(
    pipe: Pipeline, image: Any, prompt: Conditioning = None, **options: Any
) -> PipelineOutput:
    """Invert an image and generate it again, to see what inversion keeps; see `swap`."""
    return swap(pipe, image, prompt, prompt, **options)
