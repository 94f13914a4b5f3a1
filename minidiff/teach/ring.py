"""Sampling from eight Gaussians on a ring with a perfect network, and judging the result.

No training error hides an error of the sampler here, or stands in for one. A scheduler class with
one method, `update`, is enough.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.data import toys
from minidiff.sample import trajectory
from minidiff.schedule import Level
from minidiff.schedulers import Scheduler

OPTIONS: dict[str, Any] = {
    "beta_schedule": "squaredcos_cap_v2",
    "timestep_spacing": "trailing",
    "prediction_type": "sample",
}
TRUTH = toys.mixture("ring")


class Verdict(NamedTuple):
    """How samples compare with eight Gaussians of standard deviation 0.1.

    Attributes:
        near: fraction of samples within three standard deviations of a mode; 98.9 % of the data.
        modes: modes that hold at least 2 % of the samples, of 8.
        radius: root mean square distance from the centre; 1.41 for the data.
        spread: standard deviation within a mode; 0.10 for the data.
    """

    near: float
    modes: int
    radius: float
    spread: float

    def __str__(self) -> str:
        return (
            f"{self.near:.1%} near a mode, {self.modes} of 8 modes, radius {self.radius:.2f}, "
            f"spread {self.spread:.3f}"
        )


def perfect(scheduler: Scheduler, levels: dict[float, Level] | None = None) -> Callable:
    """Return the perfect network for the ring as a denoiser, in the scheduler's prediction type.

    Args:
        scheduler: scheduler after `set_timesteps`.
        levels: levels by timestep; None for those of the scheduler's grid.
    """
    known = levels or dict(zip(scheduler.grid, scheduler.levels, strict=False))

    def denoise(x: Tensor, t: float) -> Tensor:
        at = known[t]
        return scheduler.target(TRUTH.denoise(x, at), TRUTH.noise(x, at), at)

    return denoise


def sampled(scheduler: Scheduler, n: int = 50, points: int = 2000, seed: int = 0) -> Tensor:
    """Return points (N, 2) float64 drawn with a perfect network in n steps."""
    scheduler.set_timesteps(n)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(points, 2, generator=generator, dtype=torch.float64)
    for step in trajectory(perfect(scheduler), scheduler, x, generator):
        x = step.next_x
    return x


def judge(x: Tensor) -> Verdict:
    """Judge samples (N, 2) by their distances to the eight means."""
    to_mode, mode = torch.cdist(x.double(), TRUTH.means).min(dim=1)
    near = to_mode < 3 * TRUTH.stds[0]
    counts = torch.bincount(mode[near], minlength=8)
    spread = (to_mode[near].square().mean() / 2).sqrt() if near.any() else torch.zeros(())
    return Verdict(
        near.double().mean().item(),
        int((counts >= 0.02 * len(x)).sum()),
        x.double().square().sum(1).mean().sqrt().item(),
        spread.item(),
    )
