"""LMS and DEIS: Adams–Bashforth methods, which integrate a polynomial through earlier ε̂ exactly.

Both solve the probability-flow ODE in the noise-to-signal ratio ρ = σ/α, where it is
d(x/α) = ε̂·dρ. Over one step the unknown ε̂ is replaced by the polynomial through this evaluation
and earlier ones,

    x'/α' = x/α + Σ_k C_k·ε̂_k,      C_k = ∫_ρ^ρ' L_k dρ,      L_k(ρ_j) = 1 if j = k, else 0.

LMS takes polynomials in ρ itself, up to four evaluations. DEIS takes polynomials in ln ρ, which
suit the levels of a network better; it is DPM-Solver's multistep method for ε̂ with the weights of
"heun".

Sources: the linear multistep sampler of k-diffusion, https://github.com/crowsonkb/k-diffusion;
Zhang & Chen 2022, "Fast Sampling of Diffusion Models with Exponential Integrator",
arXiv:2204.13902.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from torch import Tensor

from minidiff.errors import whole_number
from minidiff.prediction import split, weighted
from minidiff.schedule import Level
from minidiff.schedulers.base import Evaluation, SchedulerOutput
from minidiff.schedulers.core.sigmas import SolverSigmas
from minidiff.schedulers.dpm_solver import Interval, check_noise_start
from minidiff.schedulers.euler import ExplodingSigmas


def lagrange_weights(positions: Sequence[float], moments: Sequence[float]) -> np.ndarray:
    """Return ∫ L_k for every k, the integral of uʲ being the moment j.

    Args:
        positions: n different u, at most 0, so that the coefficients of L_k do not cancel.
        moments: n integrals.
    """
    weights = []
    for k, at in enumerate(positions):
        others = np.delete(np.array(positions, dtype=float), k)
        rising = np.atleast_1d(np.poly(others))[::-1]
        weights.append(rising @ moments / np.prod(at - others))
    return np.array(weights)


class LMSDiscreteScheduler(ExplodingSigmas):
    """Order 1 to 4 with one network evaluation per step, by a polynomial in σ; x = x0 + σ·ε.

    Args are diffusers' (same names, same defaults). `compat` is "diffusers" or "exact", see
    `quirks.py`.
    """

    history = 3

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
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

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        order: int = 4,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step, see `Scheduler.step`.

        Args:
            order: largest number of evaluations in a step, 1 to 4.
            others: see `Scheduler.step`.
        """
        order = whole_number("order", order, 1, 4)
        return self._step(
            model_output, timestep, sample, None, None, return_dict=return_dict, order=order
        )

    def _evaluate(self, out, x, now, noise, *, order) -> Evaluation:
        here = super()._evaluate(out, x, now, noise)
        return here._replace(eps=(x - here.x0) / now.sigma)

    def update(self, x, x0, eps, now, nxt, noise, *, order) -> Tensor:
        slopes = [eps, *(earlier.eps for earlier in reversed(self.past))][:order]
        sigmas = [float(sigma) for sigma in self.reading.lms_sigmas(self, now, order)]
        h = float(nxt.sigma) - sigmas[0]
        positions = [(sigma - sigmas[0]) / h for sigma in sigmas]
        moments = [1 / (j + 1) for j in range(len(sigmas))]
        weights = (h * lagrange_weights(positions, moments)).tolist()
        return weighted([x, *slopes], [1.0, *weights[: len(slopes)]])


class DEISMultistepScheduler(SolverSigmas):
    """Order 1, 2 or 3 with one network evaluation per step, by a polynomial in ln ρ.

    Args are diffusers' (same names, same defaults). The last step ends at the level of training
    step 0, or of the last σ of a formula: at σ = 0 ln ρ has no end. `compat` is "diffusers" or
    "exact", see `quirks.py`.
    """

    history = 2
    choices: ClassVar = {
        "algorithm_type": ("deis",),
        "solver_type": ("logrho",),
        "time_shift_type": ("exponential",),
    }
    translated: ClassVar = {
        "algorithm_type": {"dpmsolver": "deis", "dpmsolver++": "deis"},
        "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
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
        algorithm_type: str = "deis",
        solver_type: str = "logrho",
        lower_order_final: bool = True,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        compat: str = "diffusers",
    ) -> None:
        self._configure(locals())

    def _evaluate(self, out, x, now, noise) -> Evaluation:
        _, x, x0, _ = super()._evaluate(out, x, now, noise)
        return Evaluation(now, x, *split(x0, x, now, "sample"))  # ε̂ of the x̂0 after thresholding

    def update(self, x, x0, eps, now, nxt, noise) -> Tensor:
        step = Interval.between("dpmsolver", now, nxt, self.reading)
        if step.h == 0:  # a formula ends where its last σ is
            return x
        left = len(self.grid) - self._step_index
        short = self.config.lower_order_final and len(self.grid) < 15
        visited = [Evaluation(now, x, x0, eps), *reversed(self.past)]
        visited = visited[: min(self.config.solver_order, left if short else 3)]
        if len(visited) == 1:
            return step.advance(x, eps, None, noise)
        levels = [each.level for each in visited]
        moments = [step.phi1, *step.moments(len(levels) - 1)]
        weights = nxt.sigma / nxt.alpha * lagrange_weights([*map(step.position, levels)], moments)
        weights = self.reading.deis_weights(weights.tolist(), nxt, levels)
        slopes = [each.eps for each in visited]
        return nxt.alpha * weighted([x / now.alpha, *slopes], [1.0, *weights])

    def _end(self, sigmas: np.ndarray) -> float:
        if self._formula() is not None:
            return sigmas[-1]
        return min(self.schedule.sigma_of(np.zeros(1)).item(), sigmas[-1])

    def _check_levels(self, levels: list[Level]) -> None:
        super()._check_levels(levels)
        check_noise_start("DEISMultistepScheduler", levels[0])
