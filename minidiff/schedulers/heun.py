"""Heun's method in noise level: two evaluations per step, second order.

    d  = (x − x̂0)/σ            at σ
    y  = x + (σ' − σ)·d          Euler's step, where the network is evaluated again
    d' = (y − ŷ0)/σ'           at σ'
    x' = x + (σ' − σ)·(d + d')/2

A pipeline evaluates the network once per call of `step`, so each σ but the first appears twice in
the grid: a call with an even index returns y, the odd one after it x'. The last step ends at σ' =
0, where d' does not exist, and is Euler's.

Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
arXiv:2206.00364, algorithm 1.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, whole_number
from minidiff.schedulers.base import Evaluation, SchedulerOutput
from minidiff.schedulers.euler import ExplodingSigmas, euler_step


class HeunDiscreteScheduler(ExplodingSigmas):
    """Heun's method: n steps of order 2 for 2n − 1 evaluations of the network.

    Args are diffusers' (same names, same defaults). `compat` is "diffusers" or "exact", see
    `quirks.py`.
    """

    order = 2
    history = 1  # the first stage of a step

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
        first = self.past[-1]
        half = (now.sigma - first.level.sigma) / 2
        return torch.add(first.x, first.eps + eps, alpha=half)  # lines 7 and 8

    def _place_sigmas(self, grid, sigmas, end, device=None, *, steps=None, dtype=None) -> None:
        twice = np.repeat(np.arange(len(grid)), 2)[1:]  # 0 1 1 2 2 …
        super()._place_sigmas(grid[twice], sigmas[twice], end, device, steps=steps, dtype=dtype)
