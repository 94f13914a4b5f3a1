"""Samplers as the page holds them: tables of numbers, on samples of variance α² + σ² = 1.

`Scheduler.coefficients` gives a step as x' = Σ A·x + Σ B·out + C·z. Two changes of variables make
the tables of all samplers comparable, whatever the network predicts and however x is scaled:

    out = p·x̂0 + q·ε̂  with  ε̂ = (x − α·x̂0)/σ,        x → x/√(α² + σ²)

so a row of the page is x' = Σ A·x + Σ B·x̂0 + C·z, at levels that their log-SNR λ describes.
"""

import base64
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.lab.plugin import build
from minidiff.schedule import Level
from minidiff.schedulers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, Scheduler
from minidiff.schedulers.core.names import SAMPLERS, sampler

STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 30, 50)
COMPARED = ("ddim", "heun", "dpm++", "dpm++3", "unipc")  # of the plot of errors
NEGLIGIBLE = 1e-13  # a weight that is 0 but for rounding
_EXACT: dict[str, Any] = {"prediction_type": "sample", "compat": "exact"}
Plugins = Mapping[str, type[Scheduler]]


class Table(NamedTuple):
    """A sampler on samples of unit variance: x_{i+1} = Σ A·x_{i−k} + Σ B·x̂0_{i−k} + C·z.

    Attributes:
        timesteps: (n,) training steps of the network's evaluations.
        A, B: (n, k) weights of x and x̂0, the newest first; without columns of zeros.
        C: (n,) weight of the noise.
        lam: (n + 1,) log-SNR λ = ln(α/σ) of the samples, infinite for a clean one.
        start: standard deviation of the first sample, 1 but for rounding.
    """

    timesteps: list[float]
    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    lam: np.ndarray
    start: float

    def packed(self) -> dict[str, Any]:
        """Return the table for the page: numbers in float64, as base64; of a row, its lags."""
        parts = [row[: i + 1] for M in (self.A, self.B) for i, row in enumerate(M)]
        parts += [self.C if self.C.any() else self.C[:0], self.lam]
        return {
            "t": [round(t, 3) for t in self.timesteps],
            "a": self.A.shape[1],
            "b": self.B.shape[1],
            "c": bool(self.C.any()),
            "s": self.start,
            "v": base64.b64encode(np.concatenate(parts).astype("<f8").tobytes()).decode(),
        }


def table_of(scheduler: Scheduler, n: int) -> Table:
    """Return the table of a scheduler with n steps. Raises InvalidArgument if it has none."""
    rows = scheduler.coefficients(n)
    levels = [Level(float(level.alpha), float(level.sigma)) for level in rows.levels]
    size = [math.hypot(*level) for level in levels]
    A, B, C = (part.numpy().copy() for part in (rows.A, rows.B, rows.C))
    for i in range(len(A)):
        for k in range(min(i + 1, A.shape[1])):
            alpha, sigma = levels[i - k]
            p, q = row_of(scheduler, rows.levels[i - k])
            A[i, k] = (A[i, k] + B[i, k] * q / sigma) * size[i - k] / size[i + 1]
            B[i, k] *= (p - q * alpha / sigma) / size[i + 1]
        C[i] /= size[i + 1]
    lam = [_log_snr(level) for level in levels]
    start = float(scheduler.init_noise_sigma) / size[0]
    return Table(list(rows.timesteps), _trimmed(A), _trimmed(B), C, np.array(lam), start)


def row_of(scheduler: Scheduler, level: Level) -> tuple[float, float]:
    """Return p and q of the network's output p·x0 + q·ε at a level."""
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    return float(scheduler.target(one, zero, level)), float(scheduler.target(zero, one, level))


def schedules() -> dict[str, Scheduler]:
    """Return the noise schedules of the page by name, as schedulers that predict x0 or a flow."""
    return {
        "cosine": DDIMScheduler(beta_schedule="squaredcos_cap_v2", **_EXACT),
        "linear": DDIMScheduler(beta_schedule="linear", **_EXACT),
        "flow": FlowMatchEulerDiscreteScheduler(compat="exact"),
    }


def tables(like: Scheduler, plugins: Plugins) -> dict[str, dict[int, Table]]:
    """Return the tables of every sampler that has the levels of a scheduler, by name and steps.

    A number of steps that a sampler refuses is left out.

    Args:
        like: scheduler whose levels and prediction type the samplers take.
        plugins: further classes by name.
    Raises:
        InvalidArgument: a step of a plug-in is not linear in x and the network's outputs.
    """
    found = {}
    for name, cls in [*plugins.items(), *((name, None) for name in SAMPLERS)]:
        try:
            scheduler = sampler(name, like) if cls is None else build(cls, like)
        except InvalidArgument:  # it lacks these levels
            continue
        if cls is not None:
            check_linear(scheduler, name)
        if rows := _each(scheduler):
            found[name] = rows
    return found


def _each(scheduler: Scheduler) -> dict[int, Table]:
    """Return the table of every number of steps that the scheduler accepts."""
    rows = {}
    for n in STEPS:
        try:
            table = table_of(scheduler, n)
        except InvalidArgument:
            continue
        if np.isfinite(np.concatenate([table.A.ravel(), table.B.ravel(), table.C])).all():
            rows[n] = table
    return rows


def check_linear(scheduler: Scheduler, name: str, n: int = 6) -> None:
    """Refuse a scheduler whose table does not give its steps.

    Args:
        scheduler: scheduler.
        name: name in the message.
        n: number of steps compared.
    Raises:
        InvalidArgument: its steps are not linear in x and the network's outputs.
    """
    rows = scheduler.coefficients(n)
    scheduler.set_timesteps(n)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n + len(rows.timesteps), 3, generator=generator, dtype=torch.float64)

    def network(x: Tensor, t: float) -> Tensor:
        return torch.tanh(1.3 * x - 0.2) * (0.5 + t / 2000)

    x = start = noise[-1] * scheduler.init_noise_sigma
    ends: list[Tensor] = []
    for i, t in enumerate(scheduler.grid):
        scheduler.noise_source = lambda like, z=noise[i]: z
        out = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, return_dict=False)[0]
        ends.append(x)
    again = rows.run(network, start, list(noise))
    if not all(
        torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(ends, again, strict=True)
    ):
        raise InvalidArgument(
            f"plugin {name}: its steps are not linear in x and the network's outputs, so it has no "
            "table of coefficients for the page"
        )


def _log_snr(level: Level) -> float:
    if level.sigma == 0:
        return math.inf
    return math.log(level.alpha / level.sigma) if level.alpha else -math.inf


def _trimmed(weights: np.ndarray) -> np.ndarray:
    """Return the weights without rounding errors, and without the last columns if they are 0."""
    weights = np.where(np.abs(weights) < NEGLIGIBLE, 0.0, weights)
    used = np.flatnonzero(weights.any(axis=0))
    return weights[:, : used[-1] + 1 if len(used) else 1]
