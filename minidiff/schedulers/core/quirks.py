"""Diffusers' departures from the papers and the mathematics: each with a name and both readings.

A scheduler has no branch on its reading. Its equations are the exact ones. At the few places where
diffusers (0.42.1) does something else they call a method of `self.reading`. `Exact` is the paper;
`Diffusers` overrides what differs, one method per quirk, with the cause in its docstring.
`compat="exact"` and `compat="diffusers"` choose between the two. Rounding alone is in
`rounding.py`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, one_of
from minidiff.prediction import row, split, weighted
from minidiff.schedule import (
    CLEAN,
    Level,
    NoiseSchedule,
    exponential_sigmas,
    karras_sigmas,
    laplace_alpha_bar,
    shifted_sigmas,
)
from minidiff.schedulers.core import rounding
from minidiff.schedulers.core.rounding import RoundedLevel


class Exact:
    """The paper and the mathematics, in float64."""

    dtype = torch.float64

    def laplace(self, s: float) -> float:
        """Return ᾱ for beta_schedule "laplace" at s = t/T: SNR/(1 + SNR) (Hang et al. 2024)."""
        return laplace_alpha_bar(s)

    def timesteps(self, spacing: str, n: int, last: int, offset: int) -> np.ndarray:
        """Return n distinct training steps in [0, last), from the noisiest down to (near) 0.

        "linspace" and "leading" can contain step 0. "trailing" ends one stride above the data (Lin
        et al. 2023, arXiv:2305.08891, table 2).
        """
        if spacing == "linspace":
            return np.linspace(last - 1, 0, n).round()
        if spacing == "leading":
            return (np.arange(n) * (last // n))[::-1] + offset
        return np.round(last - np.arange(n) * (last / n)) - 1

    def solver_timesteps(
        self, spacing: str, n: int, last: int, offset: int, steps: int
    ) -> np.ndarray:
        """Return n + 1 points as `timesteps` does, but without the last one, step 0.

        A solver's last step ends at the data (or at σ_min) anyway, so an evaluation at step 0 would
        be wasted. `last` is smaller than `steps`, the number of training steps, if low λ are
        clipped.
        """
        if n > last:
            raise InvalidArgument(
                f"num_inference_steps must be at most {last}: lambda_min_clipped leaves no more "
                f"training steps; got {n}"
            )
        if spacing == "trailing":
            return self.timesteps(spacing, n, last, offset)
        return self.timesteps(spacing, min(n + 1, last), last, offset)[:n]

    def real_timesteps(
        self, spacing: str, n: int, last: int, offset: int, *, ends_only: bool
    ) -> np.ndarray:
        """Return `timesteps`, but do not round those of "linspace" (Euler, Heun).

        `ends_only`: a formula for σ uses only the first and the last timestep, and places the
        others itself.
        """
        if spacing == "linspace":
            return np.linspace(last - 1, 0, n)
        return self.timesteps(spacing, n, last, offset)

    def spaced_sigmas(
        self, schedule: NoiseSchedule, t: np.ndarray, interpolation_type: str
    ) -> np.ndarray:
        """Return σ at training steps that need not be whole, interpolated in σ or in ln σ."""
        if interpolation_type == "linear":
            return schedule.sigma_of(t)
        steps = np.arange(len(schedule))
        return np.exp(np.interp(t, steps, np.log(schedule.sigma_of(steps))))

    def table(self, schedule: NoiseSchedule) -> list[Level]:
        """Return the levels of all training steps (DDPM, DDIM)."""
        return schedule.levels()

    def solver_schedule(self, schedule: NoiseSchedule) -> NoiseSchedule:
        """Return the noise schedule for a grid in σ: the same as for all schedulers."""
        return schedule

    def formula_timesteps(self, t: np.ndarray, rounded: bool) -> np.ndarray:
        """Return the network's timesteps where a formula sets σ: the fractional steps that have
        these σ.
        """
        return t

    def lu_sigmas(self, low: float, high: float, n: int) -> np.ndarray:
        """Return n σ with evenly spaced λ = −ln σ (Lu et al. 2022): the exponential grid."""
        return exponential_sigmas(low, high, n)

    def steps_in_reach(self, clipped: int, steps: int) -> int:
        """Return the number of training steps that a formula for σ may use, given
        lambda_min_clipped.
        """
        return clipped

    def flow_end(self, sigmas: np.ndarray, schedule: NoiseSchedule) -> float:
        """Return the σ after the last step of a flow that stops at "sigma_min".

        It is that of one training step, or the last σ of the grid if a shift made that lower.
        """
        return min(1 / len(schedule), sigmas[-1])

    def preserving_levels(self, sigmas: np.ndarray) -> list[Level]:
        """Return the variance-preserving levels of noise-to-signal ratios σ; ∞ is pure noise."""
        norms = np.hypot(1, sigmas).tolist()
        return [
            Level(1 / n, s / n) if n < math.inf else Level(0.0, 1.0)
            for s, n in zip(sigmas.tolist(), norms, strict=True)
        ]

    def exploding_levels(self, sigmas: np.ndarray) -> list[Level]:
        """Return the levels of x = x0 + σ·ε."""
        return [Level(1.0, s) for s in sigmas.tolist()]

    def exploding_start(self, sigma: float, spacing: str) -> float:
        """Return the standard deviation of the initial x, which is x0 + σ·ε, for data of variance
        1.
        """
        return math.hypot(1, sigma)

    def euler_end(self, trained: float, last: float) -> float:
        """Return the σ after the last step of an Euler grid that stops at "sigma_min".

        It is that of training step 0, or the last σ of the grid if that is lower.
        """
        return min(trained, last)

    def churned_sample(
        self, prediction_type: str, x: Tensor, now: Level, raised_x: Tensor, raised: Level
    ) -> tuple[Tensor, Level]:
        """Return the sample and the level with which an output is converted to x̂0 under churn.

        Churn adds noise after the evaluation. These are the sample and level before that noise, at
        which the network was evaluated. So x̂0 is free of the noise, the step keeps the variance,
        and sampling ends at x̂0.
        """
        return x, now

    def ancestral_sigmas(self, sigma: float, to: float) -> tuple[float, float]:
        """Return σ_down and σ_up of an ancestral step.

        Its deterministic part ends at the level σ_down; then noise with the standard deviation σ_up
        is added.
        """
        down = to**2 / sigma
        return down, math.sqrt(to**2 - down**2)

    def check_ancestral(self, prediction_type: str) -> None:
        """Accept every prediction type."""

    def edm_start(self, sigma_max: float) -> float:
        """Return the standard deviation of the initial x: σ_max (Karras et al. 2022, algorithms 1
        and 2, line 2).
        """
        return sigma_max

    def edm_sigmas(
        self, sigma_schedule: str, low: float, high: float, n: int, rho: float, dtype: torch.dtype
    ) -> np.ndarray:
        """Return EDM's grid: n levels from high to low."""
        if sigma_schedule == "exponential":
            return exponential_sigmas(low, high, n)
        return karras_sigmas(low, high, n, rho)

    def edm_end(self, sigmas: np.ndarray, sigma_min: float, algorithm_type: str | None) -> float:
        """Return the σ after the last step of EDM's samplers that stop at "sigma_min"; σ never
        rises.
        """
        return min(sigma_min, sigmas[-1])

    def rounded_karras(self, t: np.ndarray) -> np.ndarray:
        """Return the timesteps at the ends of KDPM2's steps on Karras' grid, not rounded."""
        return t

    def geometric_mean(self, sigmas: np.ndarray, following: np.ndarray) -> np.ndarray:
        """Return √(σ·σ'), the level between two σ at which KDPM2 evaluates the network."""
        return np.sqrt(sigmas * following)

    def lms_sigmas(self, scheduler, now: Level, order: int) -> list[float]:
        """Return the σ of LMS' polynomial: those of up to `order` evaluations, the newest first."""
        return [now.sigma, *(each.level.sigma for each in reversed(scheduler.past))][:order]

    def deis_weights(self, weights: list[float], nxt: Level, levels: Sequence[Level]) -> list:
        """Return the weights of the predictions ε̂, made at `levels`, in DEIS' step to `nxt`."""
        return weights

    def check_edm_sigmas(self, sigmas: object) -> None:
        """Accept custom σ."""

    def check_edm_solver(self, algorithm_type: str, solver_order: int) -> None:
        """Accept every order of both algorithms."""

    def edm_sample(self, x: Tensor) -> Tensor:
        """Return the sample in the dtype that EDM's DPM-Solver computes in, that of
        `solver_sample`.
        """
        return self.solver_sample(x)

    def velocity_level(self, scheduler, timesteps: Tensor, like: Tensor) -> Level:
        """Return the level at which Euler's get_velocity mixes x0 and ε: that of each timestep."""
        return scheduler._batch_level(timesteps, like)

    def flow_levels(self, sigmas: np.ndarray) -> list[Level]:
        """Return the levels of x = (1 − σ)·x0 + σ·ε."""
        return [Level(1 - s, s) for s in sigmas.tolist()]

    def clean(self) -> Level:
        """Return the level of the data: α = 1, σ = 0."""
        return CLEAN

    def ddim_levels(self, scheduler, t: float) -> tuple[Level, Level]:
        """Return the two levels of a DDIM step: those of this entry of the grid and of the next."""
        return scheduler.grid_levels(t)

    def ddim_direction(self, now: Any, nxt: Any, eta: float, std: float) -> float:
        """Return √(σ_s² − s̃²), the weight of ε̂ in DDIM; s̃ is the standard deviation of the new
        noise. With η = 1, rounding can make the difference negative; the weight is then 0.
        """
        return math.sqrt(max(nxt.sigma**2 - std**2, 0.0))

    def posterior(self, weights: tuple[float, float], now: Any, nxt: Any) -> tuple[float, float]:
        """Return the weights of x0 and x in the mean of DDPM's posterior (eq. 7)."""
        return weights

    def adds_noise_at_the_end(self, now: Level, first: Level) -> bool:
        """Return False: z = 0 in the last step (DDPM algorithm 2, line 3)."""
        return False

    def solver_sample(self, x: Tensor) -> Tensor:
        """Return the sample in the dtype that a solver computes in: at least float32."""
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def solver_row(self, prediction_type: str, level: Level) -> tuple:
        """Return (p, q) of the network's output, p·x0 + q·ε, at a solver's level."""
        return row(prediction_type, level)

    def expm1(self, x: float) -> float:
        """Return eˣ − 1 for DPM-Solver, to full precision for small x."""
        return rounding.expm1(x)

    def phi3(self, k: int, h: float, phi2: float) -> float:
        """Return the weight of the second divided difference in third-order DPM-Solver++.

        Integrated by parts, k·∫₀ʰ e^{−k(h−u)} (u/h)² du = 1 − 2·φ₂/(k·h).
        """
        return 1 - 2 * phi2 / (k * h)

    def singlestep_phi3(self, k: int, h: float, phi2: float) -> float:
        """Return the weight of `phi3` for the third-order singlestep solver: it is the same."""
        return self.phi3(k, h, phi2)

    def stage_noise(self, whole, last, carried: Tensor | float, noise) -> Tensor:
        """Return the noise that the SDE adds from the start of a singlestep cycle to the end of a
        stage. `whole` is that interval, and `last` the part of it since the previous stage. The
        noise `carried` by the sample of that stage is part of the noise of the whole interval.
        """
        return last.decay * carried + last.injected * noise()

    def unipc_moments(self, step, n: int) -> np.ndarray:
        """Return the n values φ₂, φ₃, …: B(h)·b, the right-hand side of UniPC's linear system."""
        return np.array(step.moments(n))

    def check_unipc(self, config) -> None:
        """Accept all options of UniPC."""

    def dynamic_shift(self, sigmas: np.ndarray, shift: float) -> np.ndarray:
        """Return the σ of a flow with the shift for one size of images, by the ordinary formula."""
        return shifted_sigmas(sigmas, shift)

    def inversion_grid(self, scheduler, rising: list) -> tuple[list[int], list[Level]]:
        """Return the timesteps of DDIM inversion, and the levels that it goes through.

        Each step evaluates the network at the level of x. No network was trained at the first
        level, that of the data; there it is evaluated at the nearest step, 0.
        """
        return [0, *rising[:-1]], [scheduler.final_level, *map(scheduler.level, rising)]

    def inversion_levels(self, scheduler, t: float) -> tuple[Level, Level]:
        """Return the two levels of a step of DDIM inversion: that of x, and the noisier one."""
        return scheduler.due_levels(t)

    def consistency_end(self, last: Level, shortened: bool) -> Level:
        """Return the level at the end of the last step of LCM.

        `shortened`: some custom timesteps were left out, because strength is below 1.
        """
        return self.clean()

    def pndm_levels(self, scheduler, t: float) -> tuple[Level, Level]:
        """Return the level at which PNDM evaluates the network, and the level that this stage steps
        to.
        """
        levels = scheduler.due_levels(t)
        due = scheduler.grid[scheduler.step_index]
        if t != due:
            raise InvalidArgument(
                f"timestep must be {due}, the next of scheduler.timesteps, got {t:g}: a start in "
                "the middle needs set_begin_index"
            )
        return levels

    def runge_kutta_middle(self, noisier: int, cleaner: int, stride: int) -> int:
        """Return the training step halfway through a Runge-Kutta step; `stride` is T//n."""
        return (noisier + cleaner) // 2

    def average_noise(
        self, evaluations: Sequence, weights: Sequence[float], start, prediction_type: str
    ) -> Tensor:
        """Return PNDM's ε̂ for the step that begins at `start`: Σ w·ε̂, the weighted sum over
        evaluations.
        """
        return weighted([e.eps for e in evaluations], weights)

    def transfer(self, now: Level, nxt: Level) -> tuple[float, float]:
        """Return the weights of x and ε̂ in a step of DDIM: nxt.alpha·x̂0 + nxt.sigma·ε̂."""
        a = nxt.alpha / now.alpha
        return a, nxt.sigma - a * now.sigma

    def flow_line(self, ends: tuple[float, float], n: int, steps: int) -> np.ndarray:
        """Return n evenly spaced σ of a flow before the shift, from 1 to that of one training step.

        `ends` are the first and the last σ of training, which are already shifted.
        """
        return np.linspace(1, 1 / steps, n)

    def flow_sigmas_of(
        self, fraction: np.ndarray, shaped: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Return the σ of given timesteps, t/T, so that the timestep of the network is the level of
        x.
        """
        return fraction

    def flow_path(self, sigmas: np.ndarray, inverted: bool) -> list[Level]:
        """Return the levels of a flow; `inverted`: σ is the fraction of data, not of noise."""
        return self.flow_levels(1 - sigmas if inverted else sigmas)

    def flow_row(self, inverted: bool) -> tuple[float, float]:
        """Return (p, q) of a flow's output dx/dσ: ε − x0, or x0 − ε if σ counts the data."""
        return (1.0, -1.0) if inverted else (-1.0, 1.0)

    def token_output(self, out: Tensor, stochastic: bool) -> Tensor:
        """Return the network's output, read as always if every token has its own timestep."""
        return out


class Diffusers(Exact):
    """The computation of diffusers 0.42.1, number for number."""

    dtype = torch.float32

    def laplace(self, s: float) -> float:
        """Use the paper's α as ᾱ, although α is √ᾱ: at T/2 this gives 0.707 instead of 0.5.

        Add 1e-6 to keep the logarithm finite at both ends.
        """
        log_snr = -0.5 * math.copysign(1, 0.5 - s) * math.log(1 - 2 * abs(0.5 - s) + 1e-6)
        snr = math.exp(log_snr)
        return math.sqrt(snr / (1 + snr))

    def timesteps(self, spacing: str, n: int, last: int, offset: int) -> np.ndarray:
        """Place the steps of "trailing" in floating point.

        For 62 of the 1000 values of n at T = 1000, this gives n + 1 entries, the last of them −1.
        "linspace" with n = 1 starts at step 0 instead of T − 1.
        """
        if spacing == "linspace":
            return np.linspace(0, last - 1, n).round()[::-1]
        if spacing == "trailing":
            return _trailing(n, last, last)
        return Exact.timesteps(self, spacing, n, last, offset)  # not super(): see `departing`

    def solver_timesteps(
        self, spacing: str, n: int, last: int, offset: int, steps: int
    ) -> np.ndarray:
        """Place n + 1 points even when n = T.

        "linspace" then repeats a step and "leading" repeats step 0, and both are refused.
        "trailing" keeps the stride T/n even if `last` is smaller than T, so it yields fewer steps.
        """
        if spacing == "linspace":
            return np.linspace(0, last - 1, n + 1).round()[::-1][:-1]
        if spacing == "leading":
            return (np.arange(n + 1) * (last // (n + 1)))[::-1][:-1] + offset
        return _trailing(n, last, steps)

    def real_timesteps(
        self, spacing: str, n: int, last: int, offset: int, *, ends_only: bool
    ) -> np.ndarray:
        """Start "linspace" with n = 1 at step 0 instead of T − 1.

        Where "trailing" yields n + 1 entries (see `timesteps`), end formulas for σ at the σ of step
        0.
        """
        if spacing == "linspace":
            return np.linspace(0, last - 1, n)[::-1]
        if spacing == "trailing" and ends_only:
            return np.round(np.arange(last, 0, -last / n)) - 1
        return self.timesteps(spacing, n, last, offset)

    def spaced_sigmas(
        self, schedule: NoiseSchedule, t: np.ndarray, interpolation_type: str
    ) -> np.ndarray:
        """Ignore the timesteps for "log_linear", and place n + 1 values of σ at equal distances in
        ln σ over the whole table. So the network is evaluated at a noise level other than that of
        x, and the last of the n steps ends at the σ of training step 0 instead of the requested
        end.
        """
        if interpolation_type == "linear":
            return schedule.sigma_of(t)
        low, high = np.log(schedule.sigma_of(np.array([0, len(schedule) - 1])).astype(np.float32))
        return torch.linspace(high, low, len(t) + 1, dtype=torch.float32).exp().numpy()

    def table(self, schedule: NoiseSchedule) -> list[Level]:
        """Store ᾱ as a float32 table, and compute 1 − ᾱ_t/ᾱ_s in float32."""
        levels: list[Any] = [RoundedLevel(*level) for level in schedule.levels()]
        for level, alpha_bar in zip(levels, schedule.alpha_bar.tolist(), strict=True):
            level.alpha_bar = alpha_bar
        return levels

    def solver_schedule(self, schedule: NoiseSchedule) -> NoiseSchedule:
        """Replace ᾱ = 0 at zero terminal SNR by 2⁻²⁴, which can be larger than the ᾱ of the step
        before.
        """
        return schedule.ending_at(2**-24) if schedule.alpha_bar[-1] == 0 else schedule

    def formula_timesteps(self, t: np.ndarray, rounded: bool) -> np.ndarray:
        """Convert these timesteps to int64, which cuts off fractions.

        This affects exponential and Beta grids, and Karras' grid on the cosine schedule. The
        network is then evaluated at a noise level other than that of x.
        """
        return (t.round() if rounded else t).astype(np.int64)

    def lu_sigmas(self, low: float, high: float, n: int) -> np.ndarray:
        """Round λ at both ends to float32.

        When a timestep is then cut to a whole number, it can become the one before.
        """
        ends = np.log(np.array([high, low], dtype=np.float32)).tolist()
        return np.exp(np.linspace(ends[0], ends[1], n))

    def steps_in_reach(self, clipped: int, steps: int) -> int:
        """Ignore lambda_min_clipped where a formula sets σ."""
        return steps

    def flow_end(self, sigmas: np.ndarray, schedule: NoiseSchedule) -> float:
        """Return a σ/α of the β schedule, which a flow does not use."""
        return schedule.sigma_of(np.zeros(1)).item()

    def preserving_levels(self, sigmas: np.ndarray) -> list[Level]:
        """Compute levels and λ in float32 from σ/α, and round every coefficient to float32."""
        ratio = torch.tensor(sigmas, dtype=torch.float32)
        alpha = 1 / (ratio**2 + 1) ** 0.5
        return rounding.rounded_levels(alpha, ratio * alpha)

    def exploding_levels(self, sigmas: np.ndarray) -> list[Level]:
        """Keep σ and λ = −ln σ in float32, and round every coefficient to float32."""
        sigma = torch.tensor(sigmas, dtype=torch.float32)
        return rounding.rounded_levels(torch.ones_like(sigma), sigma)

    def exploding_start(self, sigma: float, spacing: str) -> float:
        """Return σ alone for "linspace" and "trailing", as if the data had no variance."""
        return math.hypot(1, sigma) if spacing == "leading" else sigma

    def euler_end(self, trained: float, last: float) -> float:
        """Return the σ of training step 0 in any case.

        If `sigma_min` is lower than that, σ rises in the last step.
        """
        return trained

    def churned_sample(
        self, prediction_type: str, x: Tensor, now: Level, raised_x: Tensor, raised: Level
    ) -> tuple[Tensor, Level]:
        """Use the sample and level after the noise was added, at which the network was not
        evaluated. The output's ε̂ is then used as that of the noisier sample. So the added noise
        stays in x̂0 and, after the last step, in the picture. For "v_prediction" the level is still
        that before the noise. For "sample", the implied ε̂ differs from that of the other types.
        """
        return (raised_x, now if prediction_type == "v_prediction" else raised)

    def ancestral_sigmas(self, sigma: float, to: float) -> tuple[float, float]:
        """Compute σ_down as the square root of a float32 difference.

        In a long step, σ_up nearly equals σ', and σ_down has a rounding error of up to 3e-4·σ'.
        Where the difference is below 0, diffusers gets NaN.
        """
        return rounding.ancestral(sigma, to)

    def check_ancestral(self, prediction_type: str) -> None:
        """Refuse "sample", which ancestral Euler and KDPM2 of diffusers do not implement: their
        `step` raises an error.
        """
        if prediction_type == "sample":
            raise InvalidArgument(
                "prediction_type 'sample' is not implemented here by diffusers: use compat='exact'"
            )

    def rounded_karras(self, t: np.ndarray) -> np.ndarray:
        """Round them, so the network is evaluated at a noise level other than that of x.

        The timesteps within steps are not rounded.
        """
        return t.round()

    def geometric_mean(self, sigmas: np.ndarray, following: np.ndarray) -> np.ndarray:
        """Average ln σ in float32, which leaves six correct digits."""
        a, b = torch.tensor(np.array([following, sigmas]), dtype=torch.float32).log()
        return torch.lerp(a, b, 0.5).exp().numpy()

    def lms_sigmas(self, scheduler, now: Level, order: int) -> list[float]:
        """Count evaluations from the start of the grid, even if sampling begins in the middle.

        The first three steps of image-to-image then lack terms. diffusers also integrates a float32
        polynomial with scipy; here the integrals are exact, and differ in the seventh digit.
        """
        i = scheduler.step_index
        return [level.sigma for level in scheduler.levels[max(i + 1 - order, 0) : i + 1]][::-1]

    def deis_weights(self, weights: list[float], nxt: Level, levels: Sequence[Level]) -> list:
        """Subtract antiderivatives in float32, whose digits cancel where steps are short."""
        return rounding.deis(nxt, levels)

    def edm_start(self, sigma_max: float) -> float:
        """Return √(1 + σ_max²), as if the data had variance 1 whatever sigma_data is."""
        return math.hypot(1, sigma_max)

    def edm_sigmas(
        self, sigma_schedule: str, low: float, high: float, n: int, rho: float, dtype: torch.dtype
    ) -> np.ndarray:
        """Compute the exponential grid in float32 from low to high, and then reverse it.

        A grid of one level is therefore σ_min instead of σ_max. Compute Karras' grid in float32 for
        DPM-Solver and in float64 for Euler.
        """
        if sigma_schedule == "exponential":
            ends = math.log(low), math.log(high)
            return torch.linspace(*ends, n, dtype=torch.float32).exp().flip(0).numpy()
        low, high = low ** (1 / rho), high ** (1 / rho)
        sigmas = (high + torch.linspace(0, 1, n, dtype=dtype) * (low - high)) ** rho
        return sigmas.to(torch.float32).numpy()

    def edm_end(self, sigmas: np.ndarray, sigma_min: float, algorithm_type: str | None) -> float:
        """Return the last σ of Euler's grid.

        With one step that is also the first, so nothing happens. For DPM-Solver it is σ_min, and
        rounding puts the end of the grid slightly below or above it. The SDE cannot step to a
        higher σ: it gives NaN in diffusers.
        """
        if algorithm_type == "dpmsolver++":
            return sigma_min
        return sigmas[-1] if algorithm_type is None else min(sigma_min, sigmas[-1])

    def check_edm_sigmas(self, sigmas: object) -> None:
        """Refuse custom σ. diffusers takes them as positions in the formula: 0 is its first σ, 1
        its last.
        """
        raise InvalidArgument(
            "sigmas are taken by diffusers' EDMEulerScheduler for positions between sigma_max and "
            f"sigma_min: give num_inference_steps, or take compat='exact'; got {str(sigmas)[:80]}"
        )

    def check_edm_solver(self, algorithm_type: str, solver_order: int) -> None:
        """Refuse third order for the SDE. diffusers does not implement it, and raises an error in
        the third step.
        """
        if algorithm_type == "sde-dpmsolver++" and solver_order == 3:
            raise InvalidArgument(
                "algorithm_type 'sde-dpmsolver++' with solver_order 3 is not implemented by "
                "diffusers' EDMDPMSolverMultistepScheduler: use another, or compat='exact'"
            )

    def edm_sample(self, x: Tensor) -> Tensor:
        """Keep the sample's dtype, including float64 and half precision."""
        return x

    def velocity_level(self, scheduler, timesteps: Tensor, like: Tensor) -> Level:
        """Use the position of a timestep in the grid as the training step.

        Before `set_timesteps`, the first timestep, pure noise, therefore gets the level of the
        data, and the last one that of noise.
        """
        t = scheduler._host_timesteps(timesteps)
        at = torch.tensor([scheduler._position(each) for each in t], device=like.device)
        return scheduler.schedule.at(at.expand(like.shape[0]) if len(at) == 1 else at, like)

    def flow_levels(self, sigmas: np.ndarray) -> list[Level]:
        """Keep σ, 1 − σ and λ in float32, and round every coefficient to float32."""
        sigma = torch.tensor(sigmas, dtype=torch.float32)
        return rounding.rounded_levels(1 - sigma, sigma)

    def clean(self) -> Level:
        """Return the same level, with ᾱ and λ in float32 like those of the other levels."""
        return rounding.ROUNDED_CLEAN

    def ddim_levels(self, scheduler, t: float) -> tuple[Level, Level]:
        """Step to t − T//n, which is the next entry of the grid only for "leading" spacing, and for
        "trailing" if n divides T.
        """
        nxt = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        now = scheduler.level(t)
        return now, scheduler.level(nxt) if nxt >= 0 else scheduler.final_level

    def ddim_direction(self, now: Any, nxt: Any, eta: float, std: float) -> float:
        """Compute 1 − ᾱ_s − s̃² in float32.

        Near zero SNR with η = 1, the two parts are equal, and the square root of the rounding error
        is 2.4e-4 or more.
        """
        return rounding.direction(now.alpha_bar, nxt.alpha_bar, eta)

    def posterior(self, weights: tuple[float, float], now: Any, nxt: Any) -> tuple[float, float]:
        """Round every operation on ᾱ to float32, which adds up to 1e-5 over a thousand steps."""
        return rounding.posterior(now.alpha_bar, nxt.alpha_bar, nxt.alpha)

    def adds_noise_at_the_end(self, now: Level, first: Level) -> bool:
        """Add noise whenever t > 0, even in the last step.

        A grid that ends above step 0 therefore ends with noise: of variance 1e-20, or of variance β
        for variance_type "fixed_large".
        """
        return now.sigma > first.sigma

    def solver_sample(self, x: Tensor) -> Tensor:
        """Round a float64 sample to float32 in every step of DPM-Solver and Euler."""
        return x if x.dtype == torch.float32 else x.to(torch.float32)

    def solver_row(self, prediction_type: str, level: Level) -> tuple:
        """Convert v by x0 = α·x − σ·v on flow levels too, where it does not hold: α² + σ² is not 1
        there.
        """
        if prediction_type == "v_prediction":
            return -level.sigma, level.alpha
        return row(prediction_type, level)

    def expm1(self, x: float) -> float:
        """Subtract 1 from a float32 eˣ, which leaves five digits for a step of h = 0.01."""
        return rounding.exp(np.float32(x)) - np.float32(1)

    def phi3(self, k: int, h: float, phi2: float) -> float:
        """Omit a factor 2 of the second difference, like the reference code, so that order 3
        converges at order 2. The term of the SDE also has the wrong sign: φ₃/2 − 1. In small steps,
        digits cancel in float32, which matters for the differences of noisy x̂0.
        """
        return rounding.phi3(k, h)

    def singlestep_phi3(self, k: int, h: float, phi2: float) -> float:
        """Include the factor 2 that the multistep solver lacks.

        The SDE's term has the wrong sign here too.
        """
        return 2 * Diffusers.phi3(self, k, h, phi2)

    def stage_noise(self, whole, last, carried: Tensor | float, noise) -> Tensor:
        """Draw the noise of the whole interval again at every stage of a singlestep cycle.

        So the prediction at a stage and the noise of the step are independent.
        """
        return whole.injected * noise()

    def unipc_moments(self, step, n: int) -> np.ndarray:
        """Compute the recurrence in float32 from φ₁/h.

        Every order divides its rounding error by h again: at h = 0.01, φ₄ has no correct digit.
        """
        return rounding.unipc_moments(step.k, step.h, step.phi1, n)

    def check_unipc(self, config) -> None:
        """Refuse "bh1" with a final σ of 0.

        The last step, of first order, multiplies B(h), which is infinite there, by an empty sum.
        """
        if config.solver_type == "bh1" and config.final_sigmas_type == "zero":
            raise InvalidArgument(
                "solver_type 'bh1' with final_sigmas_type 'zero' gives NaN in diffusers: use "
                "solver_type 'bh2', final_sigmas_type 'sigma_min', or compat='exact'"
            )

    def dynamic_shift(self, sigmas: np.ndarray, shift: float) -> np.ndarray:
        """Write the formula in another form, which rounds differently.

        That matters where a timestep is cut to a whole number.
        """
        return shift / (shift + (1 / sigmas - 1))

    def inversion_grid(self, scheduler, rising: list) -> tuple[list[int], list[Level]]:
        """Evaluate the network at the level at which a step of DDIM inversion ends, not at that of
        x. For samples of the data, x deviates about twice as far from the flow on the whole, but
        less in the tails.
        """
        stride = scheduler.config.num_train_timesteps // len(rising)
        start = _level_or_end(scheduler, rising[0] - stride)
        return rising, [start, *map(scheduler.level, rising)]

    def inversion_levels(self, scheduler, t: float) -> tuple[Level, Level]:
        """Assume that x is at t − T//n, which is not the previous step for "trailing" spacing if n
        does not divide T.
        """
        stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        return _level_or_end(scheduler, t - stride), scheduler.level(t)

    def consistency_end(self, last: Level, shortened: bool) -> Level:
        """Compare the step with the number of timesteps before some were left out.

        So a strength below 1 with custom timesteps leaves the noise of the last level in the
        result.
        """
        return last if shortened else self.clean()

    def pndm_levels(self, scheduler, t: float) -> tuple[Level, Level]:
        """Count PNDM's calls from wherever sampling starts, and pair t with t − T//n.

        The second call repeats the first step, whatever its timestep. Image-to-image, which starts
        in the middle, loses an interval there, and x stays noisier than the network's timestep.
        """
        evaluated = scheduler.level(t)
        stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        if scheduler.step_index is None:
            scheduler._step_index = 0
        i = scheduler._advance_to(t)
        if not scheduler.config.skip_prk_steps and i < 12:
            now = evaluated if i % 4 else scheduler.level(scheduler.grid[i])
            return now, evaluated if i % 2 else _level_or_end(scheduler, t - stride // 2)
        if i == 1:
            scheduler.stages[0] = scheduler.stages[0]._replace(level=scheduler.level(t + stride))
            return evaluated, evaluated
        return evaluated, _level_or_end(scheduler, t - stride)

    def runge_kutta_middle(self, noisier: int, cleaner: int, stride: int) -> int:
        """Return half of T//n above the end, even if the step is not T//n long.

        The first of the four stages goes to half of T//n below the start, which is another level if
        T//n is odd.
        """
        return cleaner + stride // 2

    def average_noise(
        self, evaluations: Sequence, weights: Sequence[float], start, prediction_type: str
    ) -> Tensor:
        """Average v over different levels, and convert the average to noise with the x at the start
        of the step. This loses the second order.
        """
        if prediction_type != "v_prediction":
            return Exact.average_noise(self, evaluations, weights, start, prediction_type)
        v = weighted([e.out for e in evaluations], weights)
        return split(v, start.x, start.level, prediction_type)[1]

    def transfer(self, now: RoundedLevel, nxt: RoundedLevel) -> tuple[float, float]:
        """Compute DDIM's step with ᾱ_s − ᾱ_t, in float32."""
        return rounding.transfer(now.alpha_bar, nxt.alpha_bar)

    def flow_line(self, ends: tuple[float, float], n: int, steps: int) -> np.ndarray:
        """Begin and end at the shifted `ends`, so that the last σ is shifted twice.

        At shift 3, sampling stops at three times the right σ
        (github.com/huggingface/diffusers/issues/13243).
        """
        return np.linspace(ends[0] * steps, ends[1] * steps, n) / steps

    def flow_sigmas_of(
        self, fraction: np.ndarray, shaped: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Shift the σ of given timesteps, but not the timesteps of the network."""
        return shaped(fraction)

    def flow_path(self, sigmas: np.ndarray, inverted: bool) -> list[Level]:
        """Change only σ for invert_sigmas.

        So scale_noise adds noise where σ means data, and stochastic_sampling uses ε̂ as x̂0.
        """
        return self.flow_levels(sigmas)

    def flow_row(self, inverted: bool) -> tuple[float, float]:
        """Ignore invert_sigmas, as `flow_path` does.

        Together, the two leave a deterministic step correct.
        """
        return (-1.0, 1.0)

    def token_output(self, out: Tensor, stochastic: bool) -> Tensor:
        """Step with the wrong sign for per_token_timesteps, so that callers (LTX-Video) pass minus
        the output. With stochastic_sampling the sign is right.
        """
        return out if stochastic else -out


def _trailing(n: int, last: int, steps: int) -> np.ndarray:
    grid = np.round(np.arange(last, 0, -steps / n)) - 1
    if grid[-1] < 0:
        raise InvalidArgument(
            f"num_inference_steps={n} with timestep_spacing='trailing' gives {len(grid)} "
            f"timesteps ending in {grid[-1]:.0f} in diffusers; use another number of steps, "
            "another spacing, or compat='exact'"
        )
    return grid


def _level_or_end(scheduler, t: float) -> Level:
    return scheduler.level(t) if t >= 0 else scheduler.final_level


def departing(*names: str) -> Exact:
    """Return the exact reading with some of diffusers' departures.

    Raises:
        InvalidArgument: a name is not one of a departure.
    """
    for name in names:
        one_of("departure", name, departures())
    return type("Departing", (Exact,), {name: vars(Diffusers)[name] for name in names})()


def departures() -> list[str]:
    """Return the names that `Diffusers` overrides: its methods, and the dtype of its tables."""
    return [name for name in vars(Diffusers) if hasattr(Exact, name) and not name.startswith("_")]


READINGS: dict[str, Exact] = {"exact": Exact(), "diffusers": Diffusers()}

_ROUNDED = ("dtype", "table", "clean")
NEEDS: dict[str, tuple[str, ...]] = {
    "table": ("dtype", "clean"),
    "posterior": _ROUNDED,
    "ddim_direction": _ROUNDED,
    "transfer": _ROUNDED,
    "deis_weights": ("preserving_levels",),
}
"""Departures without which another one's arithmetic has no meaning: those on float32 tables."""
