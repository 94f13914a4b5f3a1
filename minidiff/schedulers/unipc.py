"""UniPC: one formula for predicting a sample and, once its prediction is known, correcting it.

As in DPM-Solver (see `dpm_solver.py`), x at the end of a step of length h in λ is an integral over
the prediction m = x̂0 or ε̂ along the way. m is known at the step's start, m₀, and at some other
points λ_i, where it differs from m₀ by D_i = (m_i − m₀)/r_i, r_i = (λ_i − λ_start)/h. Then

    x = decay·x_start + scale·(φ₁·m₀ + B(h)·Σ ρ_i·D_i),

where ρ integrates a polynomial through all these points exactly: R ρ = b, R_ji = r_i^(j−1),
b_j = φ_{j+1}/B(h), j = 1, 2, …

UniP-p predicts with p − 1 earlier evaluations and has order p. Once the network has been evaluated
at the predicted sample, UniC-p repeats the same step with that evaluation as one more point, r = 1,
and has order p + 1 at no cost. The next step starts from the corrected sample. A single point would
fix ρ to b₁; the paper takes its limit ½ instead. Only there the choice of B matters: h ("bh1") or
φ₁ ("bh2").

Source: Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of
Diffusion Models", arXiv:2302.04867.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, real_number
from minidiff.noise import Generators
from minidiff.runtime.checks import positive
from minidiff.schedule import Level, shifted_sigmas, stretched_sigmas
from minidiff.schedulers.base import Evaluation, SchedulerOutput
from minidiff.schedulers.core.options import at_most_one, falling
from minidiff.schedulers.core.rounding import expm1
from minidiff.schedulers.core.sigmas import FORMULAS, SolverSigmas
from minidiff.schedulers.dpm_solver import Interval, check_noise_start

CLOSEST_TO_NOISE = 1e-6  # a flow starts with this much signal: at none, λ is −∞


class UniPCMultistepScheduler(SolverSigmas):
    """Predictor and corrector of order 1 to 3 with one network evaluation a step.

    Args are diffusers' (same names, same defaults). `predict_x0` chooses whether x̂0 or ε̂ is
    integrated. `disable_corrector` lists the steps, counted from 0, whose result is not corrected.
    `sigma_min` and `sigma_max` replace the ends of a formula's range; where σ is placed by a
    formula, `final_sigmas_type` "sigma_min" ends at the last σ of the grid, so that the last step
    changes nothing. `use_flow_sigmas` can be combined with `use_karras_sigmas`, whose σ are not
    shifted. Where a formula places σ, `timestep_spacing` and `steps_offset` have no effect.
    `compat` is "diffusers" or "exact", see `quirks.py`.
    """

    _start: Tensor  # the sample at which the last step began, corrected

    history = 3  # for the corrector of order 3; the predictor needs one less
    choices: ClassVar = {
        "solver_type": ("bh1", "bh2"),
        "time_shift_type": ("exponential", "linear"),
    }
    unsupported: ClassVar = {"solver_p": None}  # a scheduler inside a scheduler
    translated: ClassVar = {"solver_type": {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}}

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
        predict_x0: bool = True,
        solver_type: str = "bh2",
        lower_order_final: bool = True,
        disable_corrector: list[int] = [],  # noqa: B006 # diffusers' default, copied below
        solver_p: None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: str = "zero",
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        shift_terminal: float | None = None,
        compat: str = "diffusers",
    ) -> None:
        disable_corrector = copy.copy(disable_corrector)
        self._configure(locals())

    def _configure(self, options: dict[str, Any]) -> None:
        super()._configure(options)
        c = self.config
        self.disable_corrector: list[int] = c.disable_corrector
        self.predict_x0: bool = c.predict_x0
        self._algorithm = "dpmsolver++" if c.predict_x0 else "dpmsolver"
        if not c.predict_x0 and c.final_sigmas_type == "zero":
            raise InvalidArgument(
                "predict_x0=False cannot step to sigma 0, where its integral diverges: use "
                "final_sigmas_type 'sigma_min'"
            )
        if not c.predict_x0 and c.thresholding:
            raise InvalidArgument("thresholding acts on x0 and needs predict_x0=True")
        self.reading.check_unipc(c)

    # --- the grid --------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the grid, and forget any sampling under way.

        Args:
            num_inference_steps: number of steps n, spaced by `timestep_spacing` or a formula for σ.
            device: device of `self.timesteps`.
            sigmas: strictly falling σ in (0, 1], shifted like all others, instead of a number; only
                with use_flow_sigmas.
            mu: logarithm of the shift of this grid, or the shift itself if time_shift_type is
                "linear"; only with use_dynamic_shifting.
        Raises:
            InvalidArgument: neither or both are given, or a value is outside its range.
        """
        if sigmas is None:
            super().set_timesteps(num_inference_steps, device, mu)
            return
        if num_inference_steps is not None:
            raise InvalidArgument("give either num_inference_steps or sigmas, not both")
        if self._formula() != "use_flow_sigmas":
            raise InvalidArgument("sigmas need use_flow_sigmas=True")
        given = np.array(falling("sigmas", sigmas, _flow_sigma, np.float32))  # diffusers' type
        grid, shifted = self._on_flow(self._shifted(given, self._flow_shift(mu)))
        self._place_sigmas(grid, shifted, self._end(shifted), device)

    def _formula(self, timesteps: Sequence | None = None) -> str | None:
        c, flow = self.config, "use_flow_sigmas"
        formula = at_most_one(c, *FORMULAS)
        if c.use_flow_sigmas and formula not in (None, "use_karras_sigmas"):
            raise InvalidArgument(f"{formula} and {flow} exclude each other: set one of them")
        for name, default in (("sigma_min", None), ("sigma_max", None)):
            if formula is None and c[name] != default:
                raise InvalidArgument(f"{name}={c[name]!r} needs one of {', '.join(FORMULAS)}")
        for name, default in (("shift_terminal", None), ("use_dynamic_shifting", False)):
            if (not c.use_flow_sigmas or formula) and c[name] != default:
                raise InvalidArgument(f"{name}={c[name]!r} needs {flow}=True and no other formula")
        return formula or (flow if c.use_flow_sigmas else None)

    def _flow_shift(self, mu: float | None) -> float:
        if self.config.use_dynamic_shifting and mu is None:
            raise InvalidArgument("mu must be given with use_dynamic_shifting=True")
        return super()._flow_shift(mu)

    def _by_formula(self, formula: str, n: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
        grid, sigmas = super()._by_formula(formula, n, shift)
        if formula == "use_karras_sigmas" and self.config.use_flow_sigmas:
            return self._on_flow(sigmas / (sigmas + 1))  # the same ratio of noise to signal
        return grid, sigmas

    def _flow_sigmas(self, n: int, shift: float) -> np.ndarray:
        return self._shifted(np.linspace(1, 1 / len(self.schedule), n + 1)[:-1], shift)

    def _shifted(self, sigmas: np.ndarray, shift: float) -> np.ndarray:
        c = self.config
        move = self.reading.dynamic_shift if c.use_dynamic_shifting else shifted_sigmas
        sigmas = move(sigmas, shift)
        if c.shift_terminal is not None:
            sigmas = stretched_sigmas(sigmas, c.shift_terminal)
        if abs(sigmas[0] - 1) < CLOSEST_TO_NOISE:
            sigmas[0] -= CLOSEST_TO_NOISE
        return sigmas

    def _end(self, sigmas: np.ndarray) -> float:
        if self.config.final_sigmas_type == "sigma_min" and self._formula() is not None:
            return sigmas[-1]
        return super()._end(sigmas)

    def _rounds(self, formula: str) -> bool:
        return formula == "use_karras_sigmas"

    def _check_levels(self, levels: list[Level]) -> None:
        super()._check_levels(levels)
        c = self.config
        if not c.predict_x0:
            check_noise_start("predict_x0=False", levels[0])
        extrapolates = c.solver_order > 1 and not c.lower_order_final and len(levels) > 2
        if extrapolates and levels[-1].sigma == 0:
            raise InvalidArgument(
                "lower_order_final=False would extrapolate to sigma 0, infinitely far in log-SNR: "
                "use lower_order_final=True or final_sigmas_type 'sigma_min'"
            )

    # --- the step --------------------------------------------------------------------------

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        generator: Generators = None,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step, see `Scheduler.step`. It draws no noise, so `generator` is not used."""
        return self._step(model_output, timestep, sample, generator, None, return_dict=return_dict)

    def update(self, x, x0, eps, now, nxt, noise) -> Tensor:
        points = [Evaluation(now, x, x0, eps), *reversed(self.past)]  # the newest first
        if self._corrects():
            order = self._order(self._step_index - 1, evaluations=len(self.past))
            x = self._advance(self._start, points[1], [*points[2 : order + 1], points[0]], now)
        self._start = x  # corrected; `self.past` has x as the network's input
        order = self._order(self._step_index, evaluations=len(points))
        return self._advance(x, points[0], points[1:order], nxt)

    def _advance(
        self, x: Tensor, start: Evaluation, others: list[Evaluation], end: Level
    ) -> Tensor:
        """Return x at the level `end` from x at `start`, by the formula at the top."""
        step = Interval.between(self._algorithm, start.level, end, self.reading, expm1)
        if step.h == 0:  # the grid ends where final_sigmas_type "sigma_min" does
            return x
        m0 = self._integrand(start)
        correction = None
        for weight, point in self._weights(step, others):
            term = weight * (self._integrand(point) - m0)
            correction = term if correction is None else correction + term
        return step.mean(x, m0, correction)

    def _weights(
        self, step: Interval, others: list[Evaluation]
    ) -> Iterator[tuple[float, Evaluation]]:
        """Yield the weight B(h)·ρ_i/r_i of each difference m_i − m₀, and its point."""
        r = [step.position(point.level) for point in others]
        near = [i for i, ratio in enumerate(r) if math.isfinite(ratio)]  # not λ = −∞, pure noise
        r = [r[i] for i in near]
        scale = step.phi1 if self.config.solver_type == "bh2" else step.k * step.h
        for i, rho, ratio in zip(near, self._rho(step, r, scale), r, strict=True):
            yield scale * rho / ratio, others[i]

    def _rho(self, step: Interval, r: list[float], scale: float) -> list[float]:
        """Solve R ρ = b, 2×2 or 3×3, on the host (by torch: NumPy's last bit differs)."""
        if len(r) < 2:
            return [0.5] * len(r)
        b = self.reading.unipc_moments(step, len(r)) / scale
        R = np.array([[ratio**j for ratio in r] for j in range(len(r))], dtype=b.dtype)
        return torch.linalg.solve(torch.from_numpy(R), torch.from_numpy(b)).tolist()

    def _corrects(self) -> bool:
        """Return whether the step before this one is corrected."""
        if not self.past or self._step_index - 1 in self.disable_corrector:
            return False
        return self.past[-1].level.alpha > 0  # from pure noise, h = ∞ and every B(h) is as good

    def _order(self, index: int, evaluations: int) -> int:
        """Return the order of the step at this entry of the grid, lower towards both ends."""
        c = self.config
        left = len(self.grid) - index if c.lower_order_final else c.solver_order
        return min(c.solver_order, evaluations, left)

    def _integrand(self, point: Evaluation) -> Tensor:
        return point.x0 if self.predict_x0 else point.eps


def _flow_sigma(name: str, value: float) -> float:
    return positive(name, real_number(name, value, 0, 1))
