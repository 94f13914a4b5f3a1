"""Euler's method in noise level, and its ancestral version: samplers on x = x0 + σ·ε.

Where x explodes instead of shrinking, the probability-flow ODE is a straight line for every x̂0,

    dx/dσ = d,      d = (x − x̂0)/σ = ε̂,

so Euler's step is x' = x + (σ' − σ)·ε̂: DDIM's, times √(1 + σ²). The ancestral step goes
further down, to σ_down, and adds noise up to σ',

    σ_up² = σ'²·(σ² − σ'²)/σ²,      σ_down² = σ'² − σ_up² = (σ'²/σ)²,

which is DDPM's posterior. Churn adds noise first, up to σ̂ > σ, and then steps to σ' from there.

Sources: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
arXiv:2206.00364; the ancestral step as in k-diffusion, https://github.com/crowsonkb/k-diffusion.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, real_number, whole_number
from minidiff.noise import Generators
from minidiff.prediction import target
from minidiff.runtime.checks import real
from minidiff.schedule import MAX_TRAIN_TIMESTEPS, Level
from minidiff.schedulers.base import Evaluation, Noise, SchedulerOutput
from minidiff.schedulers.core.inputs import check_pair, model_input
from minidiff.schedulers.core.options import falling, host_numbers, is_falling
from minidiff.schedulers.core.rounding import hypot, sqrt
from minidiff.schedulers.core.sigmas import FORMULAS, SigmaScheduler, TrainedSigmas


class ExplodingSigmas(TrainedSigmas):
    """The grid of Euler and Heun: n real training steps, or n σ's, and the end; x = x0 + σ·ε."""

    has_default_grid = True

    def sigma_levels(self, sigmas: np.ndarray) -> list[Level]:
        return self.reading.exploding_levels(sigmas)

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        """Choose the grid, and forget any sampling under way.

        Args:
            num_inference_steps: number of steps n, spaced by `timestep_spacing` or a formula for σ.
            device: device of `self.timesteps`.
        Raises:
            InvalidArgument: the number is out of range.
        """
        self._place_spaced(num_inference_steps, device)

    @property
    def init_noise_sigma(self) -> Tensor:
        """Standard deviation of the noise that sampling starts from, on the CPU."""
        sigma = max(level.sigma for level in self.levels)
        start = self.reading.exploding_start(sigma, self.config.timestep_spacing)
        return torch.tensor(start, dtype=self.reading.dtype)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """Return x/√(1 + σ²), the variance-preserving sample that the network was trained on.

        Raises:
            InvalidArgument: the first timestep is not on the grid.
        """
        return self.scaled_input(model_input(sample, timestep), self.present_level(timestep))

    def scaled_input(self, sample: Tensor, level: Level) -> Tensor:
        return sample / hypot(1, level.sigma)

    def _prepare(self) -> None:
        super()._prepare()
        steps = np.arange(len(self.schedule) - 1, -1, -1.0)
        sigmas = self.schedule.sigma_of(steps)
        self.timesteps = torch.tensor(
            self._network_timesteps(steps, sigmas), dtype=self.reading.dtype
        )
        self.grid = self.timesteps.tolist()

    def _place_spaced(
        self,
        n: int | None,
        device: torch.device | str | None,
        timesteps: Sequence[float] | None = None,
        train_steps: int | None = None,
    ) -> None:
        """Accept a grid of n steps, or of those given; `train_steps` replaces T."""
        formula = self._formula(timesteps)
        t = self._real_timesteps(n, timesteps, train_steps or len(self.schedule), bool(formula))
        sigmas = self.reading.spaced_sigmas(
            self.schedule, t, self.config.get("interpolation_type", "linear")
        )
        high = self.config.get("sigma_max") or sigmas[0]
        if high == math.inf:
            raise InvalidArgument(
                "rescale_betas_zero_snr starts at zero terminal SNR, where σ is infinite and "
                "x = x0 + σ·ε cannot be represented: DDIMScheduler takes the same steps from there"
            )
        if formula is None:
            self._check_first_timestep(t[0])
        else:
            low = self.config.get("sigma_min") or sigmas[-1]
            count: Any = n  # known where a formula is, see `_formula`
            sigmas = FORMULAS[formula](low if count > 1 else high, high, count)
            t = self.schedule.timestep_of(sigmas)
        self._place_sigmas(
            self._network_timesteps(t, sigmas), sigmas, self._end(sigmas), device, steps=len(t)
        )

    def _real_timesteps(
        self, n: int | None, timesteps: Sequence[float] | None, last: int, ends_only: bool
    ) -> np.ndarray:
        """Return strictly falling training steps: those given, or n of them below `last`."""
        if (n is None) == (timesteps is None):
            raise InvalidArgument("give either num_inference_steps or timesteps, not both or none")
        if timesteps is not None:
            t = np.array(falling("timesteps", timesteps, real(0, len(self.schedule) - 1)))
        else:
            spacing = self.config.timestep_spacing  # whole steps are limited
            most = MAX_TRAIN_TIMESTEPS if spacing == "linspace" else last
            n = whole_number("num_inference_steps", n, 1, most)
            offset = self.config.steps_offset
            t = self.reading.real_timesteps(spacing, n, last, offset, ends_only=ends_only)
        return torch.tensor(t.copy(), dtype=self.reading.dtype).numpy().astype(float)

    def _network_timesteps(self, t: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
        """Return the network's timesteps: the training steps."""
        return t


class EulerDiscreteScheduler(ExplodingSigmas):
    """Euler's method (Karras et al. 2022, algorithm 2 without the second-order correction).

    Args are diffusers' (same names, same defaults). `sigma_min` and `sigma_max` are the ends of
    Karras, exponential and Beta grids; without them those of `timestep_spacing` are. With
    `timestep_type` "continuous" the network is given ¼·ln σ instead of the training step.
    `interpolation_type` is how σ is read between training steps. `compat` is "diffusers" or
    "exact", see `quirks.py`.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        interpolation_type: str = "linear",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "linspace",
        timestep_type: str = "discrete",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        final_sigmas_type: str = "zero",
        compat: str = "diffusers",
    ) -> None:
        self._configure(locals())

    def _configure(self, options: dict[str, Any]) -> None:
        super()._configure(options)
        c = self.config
        self.output_type = c.prediction_type
        if c.timestep_type == "continuous" and c.prediction_type != "v_prediction":
            raise InvalidArgument(
                "timestep_type 'continuous' needs prediction_type 'v_prediction': diffusers "
                f"ignores it with {c.prediction_type!r}"
            )
        for name in ("sigma_min", "sigma_max"):
            if c[name] is not None and self._formula() is None:
                raise InvalidArgument(
                    f"{name}={c[name]} needs use_karras_sigmas, use_exponential_sigmas or "
                    "use_beta_sigmas: other grids have no such end"
                )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the grid, and forget any sampling under way.

        Args:
            num_inference_steps: number of steps n, spaced by `timestep_spacing` or a formula for σ.
            device: device of `self.timesteps`.
            timesteps: strictly falling real steps in [0, T−1], instead of a number.
            sigmas: n strictly falling σ and the end (mostly 0, at most the last of them), instead
                of both; they replace a formula and `final_sigmas_type`.
        Raises:
            InvalidArgument: none or several are given, or a value is outside its range.
        """
        if sigmas is None:
            if timesteps is not None and self.config.timestep_type == "continuous":
                raise InvalidArgument(
                    "timesteps cannot be given with timestep_type 'continuous': give sigmas"
                )
            self._place_spaced(num_inference_steps, device, timesteps)
            return
        if num_inference_steps is not None or timesteps is not None:
            raise InvalidArgument("give one of num_inference_steps, timesteps and sigmas")
        every = host_numbers("sigmas", sigmas, real(0))
        if len(every) < 2:
            raise InvalidArgument(f"sigmas must hold a first and a last σ, got {sigmas}")
        *_, last, end = every  # equal is where final_sigmas_type "sigma_min" ends
        if not is_falling(every[:-1]) or end > last:
            raise InvalidArgument(f"sigmas must be strictly falling, got {sigmas}")
        visited = torch.tensor(every[:-1], dtype=self.reading.dtype).numpy()
        t = self.schedule.timestep_of(visited)
        self._place_sigmas(self._network_timesteps(t, visited), visited, end, device)

    def _network_timesteps(self, t: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
        if self.config.timestep_type == "discrete":
            return t
        return 0.25 * torch.tensor(sigmas, dtype=self.reading.dtype).log().numpy()

    def _end(self, sigmas: np.ndarray) -> float:
        if self.config.final_sigmas_type == "zero":
            return 0.0
        return self.reading.euler_end(self.schedule.sigma_of(np.zeros(1)).item(), sigmas[-1])

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
        variance_noise: Tensor | None = None,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step, see `Scheduler.step`.

        Args:
            s_churn: amount of noise added and removed again over all steps; 0 for none, and then
                the next three options have no effect.
            s_tmin, s_tmax: smallest and largest σ at which it is added.
            s_noise: factor of the noise, in [0, 1e10].
            others: see `Scheduler.step`.
        Raises:
            InvalidArgument: one of them is out of range, s_tmin is above s_tmax, or as
                `Scheduler.step`.
        """
        return self._step(
            model_output, timestep, sample, generator, variance_noise,
            return_dict=return_dict, churn=churn(s_churn, s_tmin, s_tmax, s_noise),
        )  # fmt: skip

    def _evaluate(self, out, x, now, noise, *, churn) -> Evaluation:
        return evaluate_churned(self, out, x, now, noise, churn)

    def update(self, x, x0, eps, now, nxt, noise, *, churn) -> Tensor:
        return euler_step(x, x0, eps, now.sigma, nxt.sigma - now.sigma)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return v = (ε − σ·x0)/√(1 + σ²) at grid entries, the target of "v_prediction"."""
        check_pair("noise", noise, "sample", sample)
        level = self.reading.velocity_level(self, timesteps, sample)
        return target(sample, noise, level, "v_prediction")


class EulerAncestralDiscreteScheduler(ExplodingSigmas):
    """Ancestral sampling in σ: DDPM on any grid, every step as random as the posterior.

    Args are diffusers' (same names, same defaults). `compat` is "diffusers" or "exact", see
    `quirks.py`; diffusers has no prediction_type "sample" here.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        compat: str = "diffusers",
    ) -> None:
        self._configure(locals())

    def _configure(self, options: dict[str, Any]) -> None:
        super()._configure(options)
        self.reading.check_ancestral(self.config.prediction_type)

    def _evaluate(self, out, x, now, noise) -> Evaluation:
        return super()._evaluate(out, self.reading.solver_sample(x), now, noise)

    def update(self, x, x0, eps, now, nxt, noise) -> Tensor:
        down, up = self.reading.ancestral_sigmas(now.sigma, nxt.sigma)
        descent = down - now.sigma
        return torch.add(euler_step(x, x0, eps, now.sigma, descent), noise(), alpha=up)

    def _check_levels(self, levels: list[Level]) -> None:
        super()._check_levels(levels)
        if levels[0].sigma < levels[1].sigma:  # see Diffusers.solver_schedule
            raise InvalidArgument(
                "rescale_betas_zero_snr makes the first step rise in diffusers, and an ancestral "
                "step cannot step back: take fewer steps, or compat='exact'"
            )


def euler_step(x: Tensor, x0: Tensor, eps: Tensor, sigma: float, descent: float) -> Tensor:
    """Return x + (σ' − σ)·d, d = (x − x̂0)/σ = ε̂ (Karras et al. 2022, algorithm 1, lines 4, 5)."""
    if descent == -sigma:
        return x0  # equals x − σ·ε̂ up to rounding
    return torch.add(x, eps, alpha=descent)


class Churn(NamedTuple):
    """S_churn, S_tmin, S_tmax and S_noise of Karras et al. 2022, algorithm 2."""

    s_churn: float
    s_tmin: float
    s_tmax: float
    s_noise: float

    def raised(self, sigma: float, n: int) -> float:
        """Return σ̂ = σ·(1 + γ), from which one of n steps goes down."""
        if not self.s_tmin <= sigma <= self.s_tmax:
            return sigma
        return sigma * (1 + min(self.s_churn / n, math.sqrt(2) - 1))  # algorithm 2, γ_i and line 5


def churn(s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> Churn | None:
    """Check the options of `step`; None for no churn. Raises InvalidArgument."""
    if s_churn == 0 == s_tmin and s_tmax == math.inf and s_noise == 1:
        return None
    real_number("s_churn", s_churn, 0)
    real_number("s_tmin", s_tmin, 0)
    real_number("s_noise", s_noise, 0, 1e10)
    if s_tmax != math.inf:
        real_number("s_tmax", s_tmax, 0)
    if s_tmin > s_tmax:
        raise InvalidArgument(f"s_tmin must be at most s_tmax, got {s_tmin:g} above {s_tmax:g}")
    return Churn(s_churn, s_tmin, s_tmax, s_noise)


def evaluate_churned(
    scheduler: SigmaScheduler, out: Tensor, x: Tensor, now: Level, noise: Noise, churn: Churn | None
) -> Evaluation:
    """Return the sample, raised to σ̂ by churn if there is any, and its x̂0 and ε̂.

    Args:
        scheduler: scheduler whose `split` reads the output, and whose `output_type` it is.
        out, x: network output and its unscaled input, (B, C, *space).
        now: level of x.
        noise: function that returns standard normal noise.
        churn: options of churn; None for no churn.
    """
    reading, x = scheduler.reading, scheduler.reading.solver_sample(x)
    sigma = churn.raised(now.sigma, len(scheduler.levels) - 1) if churn else now.sigma
    if churn is None or sigma == now.sigma:
        return Evaluation(now, x, *scheduler._split(out, x, now))
    std = churn.s_noise * sqrt(sigma**2 - now.sigma**2)
    raised, raised_x = Level(now.alpha, sigma), x + std * noise()  # algorithm 2, line 6
    x, now = reading.churned_sample(scheduler.output_type, x, now, raised_x, raised)
    x0, _ = scheduler.split(out, x, now)
    return Evaluation(raised, raised_x, x0, (raised_x - x0) / sigma)
