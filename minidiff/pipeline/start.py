"""What a batch starts from: noise, pictures that are given, or the two around a hole."""

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, whole_number
from minidiff.guidance import Denoiser
from minidiff.images.pixels import Original
from minidiff.noise import MAX_SEED, Generators, image_generators, randn
from minidiff.pipeline.inpaint import keeping, reconstructing
from minidiff.pipeline.space import Space
from minidiff.sample import Change, meaning_of
from minidiff.schedule import add_noise
from minidiff.schedulers import Scheduler


class Start(NamedTuple):
    """How a batch begins, what is done to it after every step, and at the end.

    Attributes:
        x: the sample to begin with, (B, C, h, w).
        after: of `trajectory`.
        lead: what becomes of the denoiser.
        finish: what becomes of the decoded pictures.
        shown: what the network is shown beside x, (B, C', h, w), or None.
    """

    x: Tensor
    after: Change = attrgetter("next_x")
    lead: Callable[[Denoiser], Denoiser] = lambda denoise: denoise
    finish: Callable[[Tensor], Tensor] = lambda made: made
    shown: Tensor | None = None


def start_of(
    original: Original | None,
    space: Space,
    scheduler: Scheduler,
    begin: int,
    noise: Callable[[], Tensor],
    source: Generators,
    *,
    fresh: bool = False,
    reconstruction: float = 0.0,
) -> Start:
    """The start of text-to-image, image-to-image or inpainting.

    Args:
        original: the pictures of this batch, on the network's device; None for none.
        space: of the network.
        scheduler: after `set_timesteps`.
        begin: the entry of its grid where sampling begins.
        noise: gives the standard normal noise to start from, (B, C, h, w).
        source: of other noise; an autoencoder draws before `noise`, as in diffusers.
        fresh: whether what is kept gets new noise in every step (RePaint).
        reconstruction: w of `inpaint.reconstructing`, 0 for none.
    """
    spread = scheduler.init_noise_sigma
    if original is None:
        return Start(noise() * spread)
    from_noise = original.mask is not None and begin == 0  # as in diffusers
    if from_noise and space.is_told_mask:
        z, x = None, noise() * spread
    else:
        z, eps = space.encode(original.pixels, source), noise()
        x = eps * spread if from_noise else add_noise(z, eps, scheduler.levels[begin])
    if original.mask is None:
        return Start(x)
    if space.is_told_mask:
        shown = space.with_hole(original.pixels, original.mask, source)
        return Start(x, finish=original.put_back, shown=shown)
    again = partial(randn, z.shape, source, z.device) if fresh else lambda: eps
    mask = space.shrink(original.mask)
    start = Start(x, keeping(z, mask, again, scheduler), finish=original.put_back)
    if not reconstruction:
        return start
    meaning = meaning_of(scheduler)
    return start._replace(lead=lambda f: reconstructing(f, z, mask, meaning, reconstruction))


def starts(
    latents: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> Callable[[slice, Generators], Tensor]:
    """A function from a part of the images, and its source of noise, to the standard normal noise
    that they start from.

    Args:
        latents: the noise itself, (N, C, h, w), or None to draw it.
        shape: (N, C, h, w).
    Raises:
        InvalidArgument: latents of another shape, or of whole numbers.
    """
    if latents is None:
        return lambda part, source: randn((part.stop - part.start, *shape[1:]), source, device)
    if not isinstance(latents, Tensor) or latents.shape != shape:
        got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise InvalidArgument(f"latents must be a tensor of shape {shape}, got {got}")
    if not latents.is_floating_point():
        raise InvalidArgument(f"latents must be floating point, got {latents.dtype}")
    return lambda part, source: latents[part].to(device)


def sources(
    n: int, seed: int | None, generator: Generators, first: int
) -> Callable[[slice], Generators]:
    """A function from a part of the n images to the source of its noise.

    Generators are made a batch at a time: torch's takes 5 kB, which 10,000 images would feel.

    Raises InvalidArgument: both are given, or a value is outside its range.
    """
    if seed is not None and generator is not None:
        raise InvalidArgument("give either seed or generator, not both")
    if generator is not None:
        if isinstance(generator, torch.Generator):
            return lambda part: generator
        listed = list(generator) if isinstance(generator, Sequence) else [generator]
        if not all(isinstance(one, torch.Generator) for one in listed):
            raise InvalidArgument(f"generator must be a torch.Generator or a list, got {generator}")
        if len(listed) != n:
            raise InvalidArgument(f"generator must list {n} generators, got {len(listed)}")
        return lambda part: listed[part]
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    # Plain ints, also where NumPy's were given: those overflow in the seed's mixing.
    seed = whole_number("seed", seed, 0, MAX_SEED)
    first = whole_number("first_index", first, 0, MAX_SEED + 1 - n)
    return lambda part: image_generators(seed, range(first + part.start, first + part.stop))
