"""Sampling of the exact mixture, for tests of identities between schedulers."""

from typing import Any

import torch
from torch import Tensor

from minidiff.lab.order import MIXTURE
from minidiff.prediction import target
from minidiff.schedulers import Scheduler


def run(
    scheduler: Scheduler, kind: str, grid: dict[str, Any], seed: int = 0, **step_options: Any
) -> list[Tensor]:
    """Return x after every step on the mixture, the network predicting `kind`."""
    scheduler.set_timesteps(**grid)
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
    states = []
    for i, t in enumerate(scheduler.grid):
        level = scheduler.levels[i]
        out = target(MIXTURE.denoise(x, level), MIXTURE.noise(x, level), level, kind)
        x = scheduler.step(out, t, x, generator=generator, **step_options).prev_sample
        states.append(x)
    return states


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    """Check that two trajectories are equal up to rounding."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
