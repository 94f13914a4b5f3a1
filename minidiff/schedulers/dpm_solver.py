"""DPM-Solver and DPM-Solver++ (multistep): exponential integrators in log-SNR.

With λ = ln(α/σ) as the variable, the probability-flow ODE has the exact solutions

    x_t = (σ_t/σ_s)·x_s + α_t·∫₀ʰ e^{−(h−u)}·x̂0(λ_s + u) du,      h = λ_t − λ_s
    x_t = (α_t/α_s)·x_s − σ_t·∫₀ʰ e^{+(h−u)}·ε̂(λ_s + u) du

(DPM-Solver++ eq. 8; DPM-Solver eq. 3.4). Only the prediction m along the way, x̂0 or ε̂, is
unknown: it is extrapolated from earlier evaluations by a polynomial in λ of degree 0, 1 or 2, and
each monomial is integrated exactly,

    φ₁ = k·∫₀ʰ e^{−k(h−u)} du,  φ₂ = k·∫₀ʰ e^{−k(h−u)} (u/h) du,  φ₃ = k·∫₀ʰ e^{−k(h−u)} (u/h)² du.

k = 1 is the ODE in x̂0 ("dpmsolver++"), k = −1 the ODE in ε̂ ("dpmsolver"). The reverse SDE has
k = 2 in x̂0 ("sde-dpmsolver++"): the same integral with twice the decay, plus the noise that it
injects. In ε̂ ("sde-dpmsolver") it keeps k = −1 and doubles the drift.

Sources: Lu et al. 2022, "DPM-Solver", arXiv:2206.00927, and "DPM-Solver++", arXiv:2211.01095.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.noise import Generators
from minidiff.prediction import combine, split
from minidiff.runtime.files import Config
from minidiff.schedule import Level
from minidiff.schedulers.base import Evaluation, Noise, SchedulerOutput, split_variance
from minidiff.schedulers.core.quirks import Exact
from minidiff.schedulers.core.rounding import exp, sqrt
from minidiff.schedulers.core.sigmas import SigmaScheduler, SolverSigmas


class Algorithm(NamedTuple):
    """The exact solution that is integrated; see the head of this file."""

    k: int
    drift: int
    stochastic: bool


ALGORITHMS = {
    "dpmsolver++": Algorithm(k=1, drift=1, stochastic=False),
    "dpmsolver": Algorithm(k=-1, drift=1, stochastic=False),
    "sde-dpmsolver++": Algorithm(k=2, drift=1, stochastic=True),
    "sde-dpmsolver": Algorithm(k=-1, drift=2, stochastic=True),
}


class Interval:
    """The exact solution over one step from level s to level t, m(λ) being a polynomial.

    Attributes:
        h: its length in λ, ∞ when t is clean.
        decay, gain: weights of x at s, and of a constant m, in x at t.
        scale: factor of φ₁, φ₂ and φ₃ in x at t.
        phi1, phi2, phi3: weights of m, of its slope times h and of half its curvature times h².
    """

    def __init__(
        self,
        algorithm_type: str,
        s: Level,
        t: Level,
        reading: Exact,
        expm1: Callable[[float], float] | None = None,
    ) -> None:
        self.k, drift, self.stochastic = ALGORITHMS[algorithm_type]
        self.reading, expm1 = reading, expm1 or reading.expm1
        self.s, self.t, self.h = s, t, (h := t.lam - s.lam)
        self.phi1 = -expm1(-self.k * h)
        if self.k < 0:  # m = ε̂
            self.decay, self.scale = t.alpha / s.alpha, drift * t.sigma
        else:  # m = x̂0
            self.decay, self.scale = t.sigma / s.sigma, t.alpha
            if self.k == 2:
                self.decay *= exp(-h)
        self.gain = self.scale * self.phi1

    @classmethod
    def between(cls, algorithm_type: str, s: Level, t: Level, *how: Any) -> "Interval":
        """Return the interval, made once for all trajectories on a grid."""
        return cls._between(algorithm_type, s, t, *how, lams=(s.lam, t.lam))

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def _between(cls, *args: Any, lams: tuple[float, float]) -> "Interval":
        return cls(*args)  # equal levels can have λ that were rounded apart

    def position(self, level: Level) -> float:
        """Return r, the position of a level in λ: 0 at s, 1 at t, below 0 before s."""
        return (level.lam - self.s.lam) / self.h

    @functools.cached_property
    def injected(self) -> float:
        """Standard deviation of the noise that the SDE adds."""
        expm1 = self.reading.expm1
        variance = expm1(2 * self.h) if self.k < 0 else -expm1(-2 * self.h)
        return self.t.sigma * sqrt(variance)

    @functools.cached_property
    def phi2(self) -> float:
        return 1 - self.phi1 / (self.k * self.h)

    @functools.cached_property
    def phi3(self) -> float:
        return self.reading.phi3(self.k, self.h, self.phi2)

    def advance(self, x: Tensor, m: Tensor, correction: Tensor | None, noise: Noise) -> Tensor:
        """Return x at t from x at s: m held constant, plus a correction for its change."""
        new = self.mean(x, m, correction)
        return torch.add(new, noise(), alpha=self.injected) if self.stochastic else new

    def mean(self, x: Tensor, m: Tensor, correction: Tensor | None) -> Tensor:
        """Return `advance` without the noise that the SDE injects."""
        new = combine(self.decay, x, self.gain, m)
        return new if correction is None else new + self.scale * correction

    def moments(self, n: int) -> list[float]:
        """Return φ₂, φ₃, … (n of them), weights of (u/h)ʲ: φ_{j+1} = 1 − j·φ_j/(k·h), by parts."""
        found = [self.phi1]
        for j in range(1, n + 1):
            found.append(1 - j * found[-1] / (self.k * self.h))
        return found[1:]


class DPMSolver(SolverSigmas):
    """Base of the multistep and the singlestep solver."""

    translated: ClassVar = {
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
    }

    def _configure(self, options: dict[str, Any]) -> None:
        super()._configure(options)
        check_algorithm(self.config)

    def without_variance(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """Return the prediction alone where the output also holds a learned variance."""
        if self.config.variance_type is None or model_output.shape == sample.shape:
            return model_output  # some pipelines have cut the variance off already
        return split_variance(model_output, sample)[0]

    def _intervals(self, n: int) -> Iterator[tuple[int, int]]:
        """Yield the entries of a grid of n timesteps that each step goes from and to."""
        return pairwise(range(n + 1))

    def _check_levels(self, levels: list[Level]) -> None:
        super()._check_levels(levels)
        if ALGORITHMS[self.config.algorithm_type].k < 0:
            check_noise_start(f"algorithm_type {self.config.algorithm_type!r}", levels[0])
        back = any(levels[i].lam > levels[j].lam for i, j in self._intervals(len(levels) - 1))
        if back and ALGORITHMS[self.config.algorithm_type].stochastic:
            raise InvalidArgument(
                "in diffusers the first step with rescale_betas_zero_snr and the last one to the "
                "sigma_min of a flow can go back towards noise, and algorithm_type "
                f"{self.config.algorithm_type!r} cannot: take fewer steps, another algorithm, or "
                "compat='exact'"
            )

    def _evaluate(self, out, x, now, noise) -> Evaluation:
        if ALGORITHMS[self.config.algorithm_type].k > 0 or not self.config.thresholding:
            return super()._evaluate(out, x, now, noise)
        _, eps = self._split(out, x, now)  # ε̂ is integrated: the ε̂ that the clipped x̂0 implies
        x0 = self._clip(split(eps, x, now, "epsilon")[0])
        return Evaluation(now, x, *split(x0, x, now, "sample"))


class DPMSolverMultistepScheduler(DPMSolver):
    """Order 1, 2 or 3 with one network evaluation per step; good pictures in 10 to 20 steps.

    Args are diffusers' (same names, same defaults). `solver_type` chooses the weight of the slope
    in order 2: "midpoint" φ₁/2, "heun" φ₂. `lambda_min_clipped` drops training steps whose λ is
    lower (the cosine schedule starts at λ ≈ −10). With `variance_type` "learned" or "learned_range"
    the network has 2·C channels, and the half that is a variance is ignored. Where a formula places
    σ, `timestep_spacing` and `steps_offset` have no effect. `compat` is "diffusers" or "exact", see
    `quirks.py`.
    """

    history = 2  # with the present evaluation: order 3
    choices: ClassVar = {
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

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step, see `Scheduler.step`; a learned variance has 2·C channels of output."""
        model_output = self.without_variance(model_output, sample)
        return self._step(
            model_output, timestep, sample, generator, variance_noise, return_dict=return_dict
        )

    def update(self, x, x0, eps, now, nxt, noise) -> Tensor:
        x = self.reading.solver_sample(x)
        return multistep(self, Evaluation(now, x, x0, eps), nxt, noise)

    def _noise_dtype(self, model_output: Tensor) -> torch.dtype:
        return self.reading.solver_sample(model_output).dtype

    def _rounds(self, formula: str) -> bool:
        return super()._rounds(formula) and self.config.beta_schedule != "squaredcos_cap_v2"


def multistep(scheduler: SigmaScheduler, here: Evaluation, nxt: Level, noise: Noise) -> Tensor:
    """Return the sample at `nxt` from the evaluation here and those in `scheduler.past`.

    Args:
        scheduler: scheduler with the options of DPM-Solver, in the middle of sampling.
        here: present evaluation, its x in the dtype of the arithmetic.
        nxt: next level.
        noise: function that returns standard normal noise, for an SDE.
    """
    c, past = scheduler.config, scheduler.past
    step = Interval.between(c.algorithm_type, here.level, nxt, scheduler.reading)
    x, m = here.x, here.x0 if step.k > 0 else here.eps
    if step.h == 0:  # the grid ends where final_sigmas_type "sigma_min" does
        return x
    index: Any = scheduler.step_index  # known within a step
    order = multistep_order(c, index, len(scheduler.grid), len(past) + 1)
    if order == 1:
        return step.advance(x, m, None, noise)
    history = [earlier.x0 if step.k > 0 else earlier.eps for earlier in past]
    h0 = here.level.lam - past[-1].level.lam
    slope0 = (m - history[-1]) * (step.h / h0)
    if order == 2:
        weight = step.phi1 / 2 if c.solver_type == "midpoint" else step.phi2
        return step.advance(x, m, weight * slope0, noise)
    h1 = past[-1].level.lam - past[-2].level.lam
    slope1 = (history[-1] - history[-2]) * (step.h / h1)
    change = (slope0 - slope1) / (h0 + h1)  # divided differences, times powers of h
    d1, d2 = slope0 + h0 * change, step.h * change
    return step.advance(x, m, step.phi2 * d1 + step.phi3 * d2, noise)


def multistep_order(config: Config, index: int, n: int, evaluations: int) -> int:
    """Return the order of step `index` of n: as many evaluations as there are, fewer at the end."""
    left = n - index
    short = config.lower_order_final and n < 15
    if left == 1 and (short or config.euler_at_final or config.final_sigmas_type == "zero"):
        return 1
    if left == 2 and short:
        return min(2, config.solver_order, evaluations)
    return min(config.solver_order, evaluations)


def check_noise_start(option: str, first: Level) -> None:
    """Refuse an option that integrates ε̂ if x starts as pure noise. Raises InvalidArgument."""
    if first.alpha == 0:
        raise InvalidArgument(
            f"{option} cannot start at zero terminal SNR, where its integral diverges: set "
            "rescale_betas_zero_snr=False, or integrate x0"
        )


def check_algorithm(config: Config) -> None:
    """Refuse combinations of options that no DPM-Solver supports. Raises InvalidArgument."""
    algorithm = config.algorithm_type
    if algorithm == "sde-dpmsolver" and config.solver_order == 3:
        raise InvalidArgument("algorithm_type 'sde-dpmsolver' has solver_order 1 and 2, not 3")
    if ALGORITHMS[algorithm].k < 0 and config.final_sigmas_type == "zero":
        raise InvalidArgument(
            f"algorithm_type {algorithm!r} cannot step to sigma 0, where its integral diverges: "
            "use final_sigmas_type 'sigma_min'"
        )
