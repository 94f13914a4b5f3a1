"""Inpainting with any network: the kept part is put back after every step.

    x_s = (1 − m)·(α_s·x0 + σ_s·ε) + m·x̃_s      m is 1 where the image is replaced

x̃_s is the sampler's result and x0 the given image. At every level the network therefore sees its
own work surrounded by the given image at that level. The surroundings of the next level are not
known when a step is taken, so seams can remain. RePaint goes back up, by the forward process from
s to a noisier level t,

    x_t = (α_t/α_s)·x_s + √(σ_t² − (α_t/α_s)²·σ_s²)·z

and takes the steps again, several times at every level. Reconstruction guidance looks ahead
instead: the network's prediction x̂0 of the kept part is wrong by (1 − m)·(x0 − x̂0), and the
gradient of that error moves the sample to one whose prediction is less wrong,

    x̂0 ← x̂0 − w·(α/2)·∇ₓ ‖(1 − m)·(x0 − x̂0(x))‖²

Sources: Song et al. 2021, arXiv:2011.13456, appendix I.2; Lugmayr et al. 2022, "RePaint: Inpainting
using Denoising Diffusion Probabilistic Models", arXiv:2201.09865, eq. 8 and algorithm 1; Ho et al.
2022, "Video Diffusion Models", arXiv:2204.03458, eq. 7.
"""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.guidance import Denoiser, Reader
from minidiff.images.pixels import blend
from minidiff.noise import Generators, randn
from minidiff.sample import Change, Step, trajectory
from minidiff.schedule import Level, add_noise
from minidiff.schedulers import Scheduler


def keeping(x0: Tensor, mask: Tensor, noise: Callable[[], Tensor], scheduler: Scheduler) -> Change:
    """Return the `after_step` of a trajectory that keeps x0 where the mask is 0.

    Args:
        x0: given sample, (B, C, *space), in the network's space.
        mask: m in [0, 1], broadcast over x0.
        noise: returns ε like x0: the same in every step, as in diffusers, or fresh noise each time
            (RePaint, algorithm 1, line 4).
        scheduler: scheduler that takes the steps.
    """

    def kept(step: Step) -> Tensor:
        entry = (scheduler.begin_index or 0) + step.index + 1
        if entry == len(scheduler.grid):
            return blend(x0, step.next_x, mask)
        return blend(add_noise(x0, noise(), scheduler.levels[entry]), step.next_x, mask)

    return kept


def reconstructing(
    denoise: Denoiser, x0: Tensor, mask: Tensor, meaning: Reader, scale: float
) -> Denoiser:
    """Guide samples so that the network's prediction of the kept part agrees with x0.

    Every step takes one backward pass through the denoiser.

    Args:
        denoise: denoiser that is differentiable in x_t, (B, C, *space).
        x0, mask: see `keeping`.
        meaning: meaning of the denoiser's output, see `minidiff.sample.meaning_of`.
        scale: w, at least 0; 0 disables it.
    Raises:
        InvalidArgument: when evaluated, if the output does not have the shape of x_t, or does not
            determine x0.

    Source: Ho et al. 2022, arXiv:2204.03458, eq. 7.
    """

    def guided(x: Tensor, t: float) -> Tensor:
        at = meaning(t)
        if at.level.alpha == 0 or at.level.sigma == 0:
            return denoise(x, t)  # the guess does not depend on x, or is x
        with torch.enable_grad():
            here = x.detach().requires_grad_()
            out = denoise(here, t)
            guess, _ = at.split(out, here)
            miss = (1 - mask) * (x0 - guess.detach())
            (gradient,) = torch.autograd.grad((miss * guess).sum(), here)
        return at.moved(out.detach(), gradient * (scale * at.level.alpha))

    return guided


class Stretch(NamedTuple):
    """Entries of a grid that one pass visits: `begin` up to, not including, `end`."""

    begin: int
    end: int


def stretches(begin: int, end: int, jump_length: int = 1, resamples: int = 1) -> list[Stretch]:
    """Return the passes that make up RePaint's schedule.

    After every `jump_length` steps, counted from the end of the grid, RePaint goes this many steps
    back up and takes them again, until each was taken `resamples` times. The last `jump_length`
    steps follow without a repetition.

    Args:
        begin, end: first entry of the grid, and its end.
        jump_length: steps back up per jump.
        resamples: how many times every step is taken.
    """
    passes, here, last = [], begin, end - 1
    for stop in range(last % jump_length, last + 1, jump_length):
        if resamples > 1 and stop - jump_length >= begin:
            passes.append(Stretch(here, stop))
            passes += [Stretch(stop - jump_length, stop)] * (resamples - 1)
            here = stop
    return [*passes, Stretch(here, end)]


def repaint(
    denoise: Denoiser,
    scheduler: Scheduler,
    x: Tensor,
    generator: Generators,
    after_step: Change,
    *,
    passes: list[Stretch],
    **step_options: Any,
) -> Iterator[Step]:
    """Walk the grid like `trajectory`, back up and down again as RePaint does.

    Args:
        denoise, scheduler, x, generator, after_step, step_options: see `trajectory`. A multistep
            method starts without a history after every jump.
        passes: see `stretches`.
    Yields:
        Every step; `index` counts them.
    """
    index, here = 0, passes[0].begin
    for begin, end in passes:
        scheduler.restart(begin)
        if begin < here:
            x = noised_again(x, scheduler.levels[here], scheduler.levels[begin], generator)
        steps = trajectory(denoise, scheduler, x, generator, after_step, **step_options)
        for step in islice(steps, end - begin):
            x = step.next_x
            yield step._replace(index=index)
            index += 1
        here = end


def noised_again(x: Tensor, now: Level, noisier: Level, generator: Generators = None) -> Tensor:
    """Continue the forward process from a noisy sample x at `now` to a noisier level.

    Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239, eq. 2.
    """
    scale = noisier.alpha / now.alpha
    std = math.sqrt(max(noisier.sigma**2 - (scale * now.sigma) ** 2, 0.0))
    z = randn(x.shape, generator, x.device, x.dtype)
    return torch.add(scale * x, z, alpha=std)
