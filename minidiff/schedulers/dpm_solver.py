"""DPM-Solver++ (multistep): exponential integrators in log-SNR.

With λ = ln(α/σ) as the variable, the probability-flow ODE has the exact solution

    x_t = (σ_t/σ_s)·x_s + α_t·∫₀ʰ e^{−(h−u)}·x̂0(λ_s + u) du,      h = λ_t − λ_s

(DPM-Solver++ eq. 8). Only x̂0 along the way is unknown: it is extrapolated from earlier
evaluations by a polynomial in λ of degree 0, 1 or 2, and each monomial is integrated exactly,

    φ₁ = k·∫₀ʰ e^{−k(h−u)} du,  φ₂ = k·∫₀ʰ e^{−k(h−u)} (u/h) du,  φ₃ = k·∫₀ʰ e^{−k(h−u)} (u/h)² du.

k = 1 is the ODE. k = 2 is the reverse SDE ("sde-dpmsolver++"): the same integral with twice the
decay, plus the noise that it injects.

Source: Lu et al. 2022, "DPM-Solver++", arXiv:2211.01095.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.schedule import Level, NoiseSchedule
from minidiff.schedulers.base import IndexedScheduler


class DPMSolverMultistepScheduler(IndexedScheduler):
    """Order 1, 2 or 3 with one network evaluation a step; good pictures in 10 to 20 steps.

    Args are diffusers' (same names, same defaults); an option that is not supported yet is
    refused by name unless it is left at its default. `solver_type` picks how order 2 weighs the
    slope: "midpoint" φ₁/2, "heun" φ₂. `lambda_min_clipped` drops training steps whose λ is lower
    (the cosine schedule starts at λ ≈ −10). `compat` is "diffusers" or "exact", see `quirks.py`.
    """

    history = 2
    unsupported: ClassVar = {
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "variance_type": None,
        "use_dynamic_shifting": False,
        "time_shift_type": "exponential",
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
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -math.inf,
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        compat: str = "diffusers",
    ) -> None:
        self._configure(locals())

    def update(self, x, x0, eps, now, nxt, noise) -> Tensor:
        x = self.reading.solver_sample(x)
        k = 2 if self.config.algorithm_type == "sde-dpmsolver++" else 1
        h = nxt.lam - now.lam
        if h == 0:  # the grid ends at step 0, and final_sigmas_type "sigma_min" is that level
            return x
        phi1 = -math.expm1(-k * h)
        decay = nxt.sigma / now.sigma * math.exp(-h) ** (k - 1)  # h is ∞ in the step to σ = 0
        new = decay * x + nxt.alpha * phi1 * x0  # order 1: x̂0 held constant, φ₁
        order = self._order()
        if order >= 2:
            new = new + nxt.alpha * self._correction(x0, now, h, k, phi1, order)
        if k == 2:
            new = new + nxt.sigma * math.sqrt(-math.expm1(-2 * h)) * noise()  # injected by the SDE
        return new

    def _correction(
        self, x0: Tensor, now: Level, h: float, k: int, phi1: float, order: int
    ) -> Tensor:
        """φ₂·D₁ + φ₃·D₂: slope and curvature of x̂0 in λ, from divided differences times h, h²."""
        phi2 = 1 - phi1 / (k * h)
        last = self.past[-1]
        h0 = now.lam - last.level.lam
        slope0 = (x0 - last.x0) * (h / h0)
        if order == 2:
            weight = phi1 / 2 if self.config.solver_type == "midpoint" else phi2
            return weight * slope0
        before = self.past[-2]
        h1 = last.level.lam - before.level.lam
        slope1 = (last.x0 - before.x0) * (h / h1)
        change = (slope0 - slope1) / (h0 + h1)
        d1, d2 = slope0 + h0 * change, h * change
        return phi2 * d1 + self.reading.phi3(k, h, phi2) * d2

    def _order(self) -> int:
        """The order of this step: as many evaluations as there are, fewer towards the end."""
        c, left = self.config, self.num_inference_steps - self._step_index
        short = c.lower_order_final and self.num_inference_steps < 15
        if left == 1 and (short or c.euler_at_final or c.final_sigmas_type == "zero"):
            return 1
        if left == 2 and short:
            return min(2, c.solver_order, len(self.past) + 1)
        return min(c.solver_order, len(self.past) + 1)

    def _check_levels(self) -> None:
        super()._check_levels()
        falls = self.levels[0].lam > self.levels[1].lam  # see Diffusers.solver_schedule
        if falls and self.config.algorithm_type == "sde-dpmsolver++":
            raise InvalidArgument(
                "rescale_betas_zero_snr makes the first step rise in diffusers, and algorithm_type "
                "'sde-dpmsolver++' cannot step back: take fewer steps, 'dpmsolver++', or "
                "compat='exact'"
            )

    def _noise_dtype(self, model_output: Tensor) -> torch.dtype:
        return self.reading.solver_sample(model_output).dtype

    def _spaced(self, n: int) -> np.ndarray:
        c = self.config
        rising = [level.lam for level in reversed(self._every_level)]
        last = len(rising) - int(np.searchsorted(rising, c.lambda_min_clipped))
        return self.reading.solver_timesteps(
            c.timestep_spacing, n, last, c.steps_offset, len(self.schedule)
        )

    def _schedule(self) -> NoiseSchedule:
        return self.reading.solver_schedule(super()._schedule())

    def _table(self) -> list[Level]:
        return self.reading.solver_table(self.schedule)

    @property
    def final_level(self) -> Level:
        if self.config.final_sigmas_type == "zero":
            return self.reading.clean()
        return self.level(0)
