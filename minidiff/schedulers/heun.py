"""Heun's method and the midpoint rule in noise level: two evaluations per step, second order.

    d  = (x − x̂0)/σ            at σ
    y  = x + (τ − σ)·d          Euler's step to τ, where the network is evaluated again
    d' = (y − ŷ0)/τ            at τ

    Heun      τ = σ'            x' = x + (σ' − σ)·(d + d')/2
    KDPM2     τ = √(σ·σ')       x' = x + (σ' − σ)·d'

A pipeline evaluates the network once per call of `step`: a call with an even index returns y, the
odd one after it x'. The last step ends at σ' = 0, where d' does not exist, and is Euler's.

Sources: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
arXiv:2206.00364, algorithm 1; KDPM2 as in k-diffusion, https://github.com/crowsonkb/k-diffusion.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, whole_number
from minidiff.schedule import Level
from minidiff.schedulers.base import Evaluation, SchedulerOutput
from minidiff.schedulers.euler import ExplodingSigmas, euler_step


class TwoStages(ExplodingSigmas):
    """n steps of two stages each, but for the last: 2n − 1 evaluations of the network."""

    order = 2
    history = 1  # the first stage of a step

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        num_train_timesteps: int | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Choose the grid, and forget any sampling under way.

        Args:
            num_inference_steps: number of steps n, spaced by `timestep_spacing` or a formula for σ.
            device: device of `self.timesteps`.
            num_train_timesteps: number of training steps over which the grid is spaced, up to T.
            timesteps: strictly falling real steps in [0, T−1], instead of a number.
        Raises:
            InvalidArgument: neither or both are given, or a value is outside its range.
        """
        if num_train_timesteps is not None:
            whole_number("num_train_timesteps", num_train_timesteps, 1, len(self.schedule))
        self._place_spaced(num_inference_steps, device, timesteps, num_train_timesteps)

    def _prepare(self) -> None:
        super()._prepare()
        steps = np.array(self.grid)
        self._place_sigmas(steps, self.schedule.sigma_of(steps), 0.0)
        self.num_inference_steps = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this entry of the grid, an even one: an odd entry is a step's second stage."""
        if whole_number("begin_index", begin_index, 0) % 2:
            raise InvalidArgument(f"begin_index must be even, where a step begins: {begin_index}")
        super().set_begin_index(begin_index)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Take one stage, see `Scheduler.step`; x after the first is the network's next input.

        `pred_original_sample` is x̂0 at that stage.
        """
        return self._step(model_output, timestep, sample, None, None, return_dict=return_dict)

    def _evaluate(self, out, x, now, noise) -> Evaluation:
        here = super()._evaluate(out, x, now, noise)
        # d comes from the clipped x̂0; the second stage amplifies its rounding by σ/σ'.
        return here._replace(eps=(x - here.x0) / now.sigma)

    def update(self, x, x0, eps, now, nxt, noise) -> Tensor:
        if self._step_index % 2 == 0:
            descent = nxt.sigma - now.sigma
            return euler_step(x, x0, eps, now.sigma, descent)  # algorithm 1, lines 4 and 5
        return self.second_stage(self.past[-1], eps, now, nxt)

    def second_stage(self, first: Evaluation, eps: Tensor, now: Level, nxt: Level) -> Tensor:
        """Return x' from the first stage of a step, and the second one's ε̂ at `now`."""
        raise NotImplementedError  # every method is a subclass

    def _place_sigmas(self, grid, sigmas, end, device=None, *, steps=None, dtype=None) -> None:
        between, taus = self._second_grid(grid, sigmas)
        visited = np.insert(sigmas, range(1, len(sigmas)), taus)  # σ0 τ0 σ1 τ1 …
        grid = np.insert(grid, range(1, len(grid)), between)
        super()._place_sigmas(grid, visited, end, device, steps=steps, dtype=dtype)

    def _second_grid(self, grid: np.ndarray, sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the timesteps and the σ of the second stages."""
        return grid[1:], sigmas[1:]


class HeunDiscreteScheduler(TwoStages):
    """Heun's method: n steps of order 2 for 2n − 1 evaluations of the network.

    Args are diffusers' (same names, same defaults). `compat` is "diffusers" or "exact", see
    `quirks.py`.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        compat: str = "diffusers",
    ) -> None:
        self._configure(locals())

    def second_stage(self, first, eps, now, nxt) -> Tensor:
        half = (now.sigma - first.level.sigma) / 2
        return torch.add(first.x, first.eps + eps, alpha=half)  # algorithm 1, lines 7 and 8


class KDPM2DiscreteScheduler(TwoStages):
    """The midpoint rule in ln σ: n steps of order 2 for 2n − 1 evaluations of the network.

    Args are diffusers' (same names, same defaults). `compat` is "diffusers" or "exact", see
    `quirks.py`.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        compat: str = "diffusers",
    ) -> None:
        self._configure(locals())

    def _configure(self, options: dict[str, Any]) -> None:
        super()._configure(options)
        self.reading.check_ancestral(self.config.prediction_type)

    def second_stage(self, first, eps, now, nxt) -> Tensor:
        return torch.add(first.x, eps, alpha=nxt.sigma - first.level.sigma)

    def _place_sigmas(self, grid, sigmas, end, device=None, *, steps=None, dtype=None) -> None:
        dtype = torch.float64 if self._formula() else self.reading.dtype
        super()._place_sigmas(grid, sigmas, end, device, steps=steps, dtype=dtype)

    def _network_timesteps(self, t: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
        return self.reading.rounded_karras(t) if self.config.use_karras_sigmas else t

    def _second_grid(self, grid: np.ndarray, sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        taus = self.reading.geometric_mean(sigmas[:-1], sigmas[1:])
        return self.schedule.timestep_of(taus), taus
