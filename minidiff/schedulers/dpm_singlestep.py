"""DPM-Solver and DPM-Solver++ (singlestep): a step is a cycle of stages, as in Runge-Kutta.

The exact solutions are those of `dpm_solver.py`, and so are the weights φ. A cycle of order p
starts from one sample, evaluates the network there and at p − 1 intermediate samples, and forgets
them all. Its stage j goes from the start, s, to the level of the next evaluation with order j.
Stage p reaches the end of the cycle, t. With r_j = (λ_j − λ_s)/(λ_t − λ_s) and the slopes D_j =
(m_j − m_s)/r_j, what is added to a constant m is

    order 2   φ₁/2·D₁ ("midpoint")   or   φ₂·D₁ ("heun")
    order 3   φ₂·D₂   ("midpoint")   or   φ₂·(D₁ − r₁·D₂₁) + φ₃·D₂₁,  D₂₁ = (D₂ − D₁)/(r₂ − r₁)

The network is evaluated at every stage, and every stage is an entry of the grid: n timesteps are n
evaluations, in about n/p cycles.

Sources: Lu et al. 2022, "DPM-Solver", arXiv:2206.00927, and "DPM-Solver++", arXiv:2211.01095. The
stages are theirs if λ is evenly spaced; the singlestep SDE is diffusers' own.
"""

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from minidiff.noise import Generators
from minidiff.schedule import Level
from minidiff.schedulers.base import Evaluation, SchedulerOutput
from minidiff.schedulers.dpm_solver import DPMSolver, Interval


class DPMSolverSinglestepScheduler(DPMSolver):
    """Order 1, 2 or 3 with this many evaluations of the network in a cycle, one at each timestep.

    Args are diffusers' (same names, same defaults). The last step has order 1 if it ends at
    sigma 0, or if `lower_order_final` is set and n is a multiple of `solver_order`. A remainder of
    n/solver_order makes an unfinished cycle, whose stages end where they are. (diffusers sets
    `lower_order_final` in its own config for such an n, and leaves it set; here the config stays.)
    With `variance_type` "learned" or "learned_range" the network has 2·C channels, and the
    half that is a variance is ignored. `compat` is "diffusers" or "exact", see `quirks.py`.

    Attributes:
        order_list: the order of every step, 1, 2, …, solver_order, 1, 2, …
    """

    _mean: Tensor  # the result of the last stage before its noise

    history = 2  # and the present one: order 3
    choices: ClassVar = {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver"),
        "variance_type": (None, "learned", "learned_range"),
        "time_shift_type": ("exponential",),
    }

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -math.inf,
        variance_type: str | None = None,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        compat: str = "diffusers",
    ) -> None:
        self._configure(locals())

    def _set_grid(
        self,
        grid: list[int] | list[float],
        levels: list[Level],
        device: torch.device | str | None,
        dtype: torch.dtype = torch.int64,
    ) -> None:
        super()._set_grid(grid, levels, device, dtype)
        self.order_list = self._orders(len(grid))

    def _orders(self, n: int) -> list[int]:
        c = self.config
        orders = [i % c.solver_order + 1 for i in range(n)]
        if c.final_sigmas_type == "zero" or (c.lower_order_final and n % c.solver_order == 0):
            orders[-1] = 1
        return orders

    def _intervals(self, n: int) -> Iterator[tuple[int, int]]:
        return ((i + 1 - order, i + 1) for i, order in enumerate(self._orders(n)))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Take one stage, see `Scheduler.step`; a learned variance has 2·C channels of output."""
        model_output = self.without_variance(model_output, sample)
        return self._step(model_output, timestep, sample, generator, None, return_dict=return_dict)

    def update(self, x, x0, eps, now, nxt, noise) -> Tensor:
        c, points = self.config, [*self.past, Evaluation(now, x, x0, eps)]
        order = min(self.order_list[self._step_index], len(points))
        start, *stages = points[-order:]  # of this cycle
        step = Interval.between(c.algorithm_type, start.level, nxt, self.reading)
        m, *others = [point.x0 if step.k > 0 else point.eps for point in (start, *stages)]
        r = [step.position(stage.level) for stage in stages]
        slopes = [(other - m) / ratio for other, ratio in zip(others, r, strict=True)]
        mean = step.mean(start.x, m, self._correction(step, r, slopes))
        if not step.stochastic:
            return mean
        carried = x - self._mean if stages else 0.0
        self._mean = mean
        last = Interval.between(c.algorithm_type, now, nxt, self.reading)
        return mean + self.reading.stage_noise(step, last, carried, noise)

    def _correction(self, step: Interval, r: list[float], slopes: list[Tensor]) -> Tensor | None:
        midpoint = self.config.solver_type == "midpoint"
        if len(slopes) == 0:
            return None
        if len(slopes) == 1:
            return (step.phi1 / 2 if midpoint else step.phi2) * slopes[0]
        if midpoint:
            return step.phi2 * slopes[1]
        change = (slopes[1] - slopes[0]) / (r[1] - r[0])
        phi3 = self.reading.singlestep_phi3(step.k, step.h, step.phi2)
        return step.phi2 * (slopes[0] - r[0] * change) + phi3 * change
