"""What sampling starts from: noise, a given image with noise, or the surroundings of a mask."""

from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, whole_number
from minidiff.guidance import Denoiser
from minidiff.images.pixels import Original
from minidiff.noise import MAX_SEED, Generators, check_generators, image_generators, randn
from minidiff.pipeline.inpaint import keeping, reconstructing, repaint
from minidiff.pipeline.space import LatentSpace
from minidiff.runtime.shapes import check_finite
from minidiff.sample import Change, Step, meaning_of, trajectory
from minidiff.schedule import add_noise
from minidiff.schedulers import Scheduler

if TYPE_CHECKING:
    from minidiff.pipeline.request import Request


class InitialState(NamedTuple):
    """Where a batch starts, and how a given image takes part in its sampling.

    Attributes:
        x: first sample, (B, C, h, w).
        after_step: see `trajectory`.
        wrap: from the denoiser to the one that sampling uses.
        finish: from decoded images to the final ones.
        extra_channels: further input channels of an inpainting network, (B, C', h, w), or None.
        walk: `trajectory`, or RePaint's passes over the grid.
    """

    x: Tensor
    after_step: Change = attrgetter("next_x")
    wrap: Callable[[Denoiser], Denoiser] = lambda denoise: denoise
    finish: Callable[[Tensor], Tensor] = lambda images: images
    extra_channels: Tensor | None = None
    walk: Callable[..., Iterator[Step]] = trajectory


def initial_state(
    request: "Request",
    batch: slice,
    space: LatentSpace,
    scheduler: Scheduler,
    source: Generators,
    device: torch.device,
) -> InitialState:
    """Return the start of text-to-image, image-to-image or inpainting for one batch.

    Args:
        request: the call, checked and resolved.
        batch: which of the request's images.
        space: space of the network.
        scheduler: after `set_timesteps`; it is restarted at the request's first step.
        source: generators of the batch's noise. An autoencoder draws before the start does, as
            in diffusers.
        device: where the network is.
    """
    scheduler.restart(request.first_step)
    noise = partial(request.noise_of, batch, source)
    if request.original is None:
        return InitialState(noise() * scheduler.init_noise_sigma)
    original = request.original.part(batch, device)
    if original.mask is None:
        z = space.encode(original.pixels, source)
        return InitialState(add_noise(z, noise(), scheduler.levels[request.first_step]))
    return _inpainting(request, original, space, scheduler, noise, source)


def _inpainting(
    request: "Request",
    original: Original,
    space: LatentSpace,
    scheduler: Scheduler,
    noise: Callable[[], Tensor],
    source: Generators,
) -> InitialState:
    """Return the start of inpainting, by a network that takes the mask or by any other."""
    from_noise = request.first_step == 0  # as in diffusers
    if from_noise and space.takes_mask:
        z, eps = None, noise()
    else:
        z, eps = space.encode(original.pixels, source), noise()
    x = (
        eps * scheduler.init_noise_sigma
        if from_noise
        else add_noise(z, eps, scheduler.levels[request.first_step])
    )
    walk = partial(repaint, passes=request.passes) if request.passes else trajectory
    if space.takes_mask:
        extra = space.masked_conditioning(original.pixels, original.mask, source)
        return InitialState(x, finish=original.put_back, extra_channels=extra, walk=walk)
    fresh = partial(randn, z.shape, source, z.device)  # RePaint, algorithm 1, line 4
    mask = space.shrink(original.mask)
    keep = keeping(z, mask, fresh if request.passes else lambda: eps, scheduler)
    state = InitialState(x, keep, finish=original.put_back, walk=walk)
    if not request.reconstruction:
        return state
    meaning, scale = meaning_of(scheduler), request.reconstruction
    return state._replace(wrap=lambda f: reconstructing(f, z, mask, meaning, scale))


def initial_noise(
    latents: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> Callable[[slice, Generators], Tensor]:
    """Return a function from a batch and its generators to the noise that it starts from.

    Args:
        latents: the noise itself, (N, C, h, w), or None to draw it.
        shape: (N, C, h, w).
        device: device of the network.
    Raises:
        InvalidArgument: latents have another shape, or are not floating point.
    """
    if latents is None:
        return lambda batch, source: randn((batch.stop - batch.start, *shape[1:]), source, device)
    if not isinstance(latents, Tensor) or latents.shape != shape:
        got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise InvalidArgument(f"latents must be a tensor of shape {shape}, got {got}")
    if not latents.is_floating_point():
        raise InvalidArgument(f"latents must be floating point, got {latents.dtype}")
    check_finite("latents", latents)
    return lambda batch, source: latents[batch].to(device)


def noise_sources(
    n: int, seed: int | None, generator: Generators, first: int
) -> Callable[[slice], Generators]:
    """Return a function from a batch of the n images to the generators of its noise.

    Generators are made one batch at a time: each takes 5 kB, which 10,000 images would feel.

    Args:
        n: number of images.
        seed, generator, first: seed, generator and first_index of the pipeline's call.
    Raises:
        InvalidArgument: both seed and generator are given, or a value is out of range.
    """
    if seed is not None and generator is not None:
        raise InvalidArgument("give either seed or generator, not both")
    if generator is not None:
        check_generators(generator, n)
        one = isinstance(generator, torch.Generator)
        return lambda batch: generator if one else generator[batch]
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    # Plain ints, also where NumPy's were given: those overflow in the seed's mixing.
    seed = whole_number("seed", seed, 0, MAX_SEED)
    first = whole_number("first_index", first, 0, MAX_SEED + 1 - n)
    return lambda batch: image_generators(seed, range(first + batch.start, first + batch.stop))
