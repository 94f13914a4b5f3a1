"""Inpainting with any network: what is kept is put back after every step.

    x_s = (1 − m)·(α_s·x0 + σ_s·ε) + m·x̃_s      m is 1 where the picture is replaced

x̃_s is what the sampler made and x0 the picture that is given. So the network sees, at every level,
its own work surrounded by the picture at that level. But each step is made before its surroundings
are known, and what fits the picture at the seams is not found in one descent. RePaint therefore
goes back up, by the forward process from s to t < s,

    x_t = (α_t/α_s)·x_s + √(σ_t² − (α_t/α_s)²·σ_s²)·z

and walks down again, several times at every level. Reconstruction guidance looks ahead instead:
what the network guesses of the kept part, x̂0, is wrong by (1 − m)·(x0 − x̂0), and a picture whose
guess is less wrong lies along the gradient,

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
from minidiff.images.pixels import blended
from minidiff.noise import Generators, randn
from minidiff.sample import Change, Step, trajectory
from minidiff.schedule import Level, add_noise
from minidiff.schedulers import Scheduler


def keeping(x0: Tensor, mask: Tensor, noise: Callable[[], Tensor], scheduler: Scheduler) -> Change:
    """What `trajectory` does after a step, so that x0 stays where the mask is 0.

    Args:
        x0: what is given, (B, C, *space), in the network's space.
        mask: m in [0, 1], of a shape that broadcasts over x0.
        noise: gives ε, of the shape of x0: the same in every step, as diffusers does, or fresh
            noise each time (RePaint, algorithm 1, line 4).
        scheduler: the one that takes the steps.
    """

    def kept(step: Step) -> Tensor:
        entry = (scheduler.begin_index or 0) + step.index + 1
        if entry == len(scheduler.grid):
            return blended(x0, step.next_x, mask)
        return blended(add_noise(x0, noise(), scheduler.levels[entry]), step.next_x, mask)

    return kept


def reconstructing(
    denoise: Denoiser, x0: Tensor, mask: Tensor, meaning: Reader, scale: float
) -> Denoiser:
    """Led to pictures in which the network's guess of the kept part is what is kept.

    It takes a pass backward through the denoiser at every step.

    Args:
        denoise: differentiable in x_t, (B, C, *space).
        x0, mask: see `keeping`.
        meaning: of the denoiser's output.
        scale: w, at least 0; 0 for none.
    Raises:
        InvalidArgument: when it is asked: the output is not of the shape of x_t, or says nothing
            of x0.

    Source: Ho et al. 2022, arXiv:2204.03458, eq. 7.
    """

    def led(x: Tensor, t: float) -> Tensor:
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

    return led


class Stretch(NamedTuple):
    """Entries of a grid that are walked down in one go: `begin` up to, not including, `end`."""

    begin: int
    end: int


def stretches(begin: int, end: int, jump_length: int = 1, resamples: int = 1) -> list[Stretch]:
    """The walks that make up RePaint's schedule.

    After every `jump_length` steps, counted from the end of the grid, it goes as many steps back
    up and walks them again, until each was walked `resamples` times. The last `jump_length` steps
    follow on the last of these.

    Args:
        begin, end: of the grid.
    """
    walks, here, last = [], begin, end - 1
    for stop in range(last % jump_length, last + 1, jump_length):
        if resamples > 1 and stop - jump_length >= begin:
            walks.append(Stretch(here, stop))
            walks += [Stretch(stop - jump_length, stop)] * (resamples - 1)
            here = stop
    return [*walks, Stretch(here, end)]


def length(walks: list[Stretch]) -> int:
    """How many entries they visit in all."""
    return sum(end - begin for begin, end in walks)


def repaint(
    denoise: Denoiser,
    scheduler: Scheduler,
    x: Tensor,
    generator: Generators,
    walks: list[Stretch],
    restart: Callable[[int], None],
    after: Change,
    **step_options: Any,
) -> Iterator[Step]:
    """`trajectory` with RePaint's way back up between its stretches.

    Args:
        denoise, scheduler, x, generator, after, step_options: see `trajectory`. A method that
            looks back at earlier steps has none to look at after a jump.
        walks: see `stretches`.
        restart: prepares the scheduler for a sampling that begins at this entry of its grid.
    Yields:
        every step; `index` counts them.
    """
    index, here = 0, walks[0].begin
    for begin, end in walks:
        restart(begin)
        if begin < here:
            x = noised_again(x, scheduler.levels[here], scheduler.levels[begin], generator)
        steps = trajectory(denoise, scheduler, x, generator, after, **step_options)
        for step in islice(steps, end - begin):
            x = step.next_x
            yield step._replace(index=index)
            index += 1
        here = end


def noised_again(x: Tensor, now: Level, noisier: Level, generator: Generators = None) -> Tensor:
    """The forward process from a noisy sample x at `now` on to a noisier level (DDPM eq. 2)."""
    scale = noisier.alpha / now.alpha
    std = math.sqrt(max(noisier.sigma**2 - (scale * now.sigma) ** 2, 0.0))
    z = randn(x.shape, generator, x.device, x.dtype)
    return torch.add(scale * x, z, alpha=std)
