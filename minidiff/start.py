"""What a batch starts from: noise, pictures that are given, or the two around a hole."""

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import NamedTuple

from torch import Tensor

from minidiff.guidance import Denoiser
from minidiff.inpaint import keeping, reconstructing
from minidiff.noise import Generators, randn
from minidiff.pictures import Original
from minidiff.sample import Change, meaning_of
from minidiff.schedule import add_noise
from minidiff.schedulers import Scheduler
from minidiff.space import Space


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
