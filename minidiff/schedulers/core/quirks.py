"""Where diffusers departs from the paper or the mathematics: each place named, both readings.

A scheduler never asks which reading it has. Its equations are the exact ones, and at the few
places where diffusers (0.42.1) does something else they call a method of `self.reading`. `Exact`
is the paper; `Diffusers` overrides what differs, one method a quirk, the cause in its docstring.
`compat="exact"` and `compat="diffusers"` choose between the two.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, one_of
from minidiff.prediction import row, split
from minidiff.schedule import (
    CLEAN,
    Level,
    NoiseSchedule,
    exponential_sigmas,
    karras_sigmas,
    laplace_alpha_bar,
    shifted_sigmas,
)


class Exact:
    """The paper and the mathematics, in float64."""

    dtype = torch.float64

    def laplace(self, s: float) -> float:
        """ᾱ of beta_schedule "laplace" at s = t/T is SNR/(1 + SNR) (Hang et al. 2024)."""
        return laplace_alpha_bar(s)

    def timesteps(self, spacing: str, n: int, last: int, offset: int) -> np.ndarray:
        """n distinct training steps in [0, last), from the noisiest down to (near) 0.

        "linspace" and "leading" can hold step 0, "trailing" ends one stride above the data (Lin
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
        """As `timesteps`, but n + 1 points of which the last, step 0, is left to the data.

        A solver ends at the data (or at σ_min) itself; a visit to step 0 would be wasted. `last` is
        below `steps`, the number of training steps, when low λ are clipped.
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
        """As `timesteps`, but "linspace" keeps its fractions (Euler, Heun).

        ends_only: a formula for σ takes the first and the last of them, and places the rest.
        """
        if spacing == "linspace":
            return np.linspace(last - 1, 0, n)
        return self.timesteps(spacing, n, last, offset)

    def spaced_sigmas(
        self, schedule: NoiseSchedule, t: np.ndarray, interpolation_type: str
    ) -> np.ndarray:
        """σ at real training steps, read between the whole ones along σ or along ln σ."""
        if interpolation_type == "linear":
            return schedule.sigma_of(t)
        steps = np.arange(len(schedule))
        return np.exp(np.interp(t, steps, np.log(schedule.sigma_of(steps))))

    def table(self, schedule: NoiseSchedule) -> list[Level]:
        """The level of every training step (DDPM, DDIM)."""
        return schedule.levels()

    def solver_schedule(self, schedule: NoiseSchedule) -> NoiseSchedule:
        """The noise schedule of a grid in σ: the same as everybody's."""
        return schedule

    def formula_timesteps(self, t: np.ndarray, rounded: bool) -> np.ndarray:
        """What the network is asked at the σ of a formula: the step that belongs to it, real."""
        return t

    def lu_sigmas(self, low: float, high: float, n: int) -> np.ndarray:
        """n σ with λ = −ln σ evenly spaced (Lu et al. 2022): the exponential grid."""
        return exponential_sigmas(low, high, n)

    def steps_in_reach(self, clipped: int, steps: int) -> int:
        """How many training steps a formula's range spans: those that lambda_min_clipped leaves."""
        return clipped

    def flow_end(self, sigmas: np.ndarray, schedule: NoiseSchedule) -> float:
        """σ after the last step of a flow that stops at "sigma_min": one training step's, unless a
        shift has taken the grid below that.
        """
        return min(1 / len(schedule), sigmas[-1])

    def preserving_levels(self, sigmas: np.ndarray) -> list[Level]:
        """Variance-preserving levels of noise-to-signal ratios σ; ∞ is pure noise."""
        norms = np.hypot(1, sigmas).tolist()
        return [
            Level(1 / n, s / n) if n < math.inf else Level(0.0, 1.0)
            for s, n in zip(sigmas.tolist(), norms, strict=True)
        ]

    def exploding_levels(self, sigmas: np.ndarray) -> list[Level]:
        """x = x0 + σ·ε."""
        return [Level(1.0, s) for s in sigmas.tolist()]

    def exploding_start(self, sigma: float, spacing: str) -> float:
        """Standard deviation of x0 + σ·ε for data of variance 1."""
        return math.hypot(1, sigma)

    def euler_end(self, trained: float, last: float) -> float:
        """σ after an Euler grid that stops at "sigma_min": training step 0's, if it is lower."""
        return min(trained, last)

    def input_norm(self, sigma: float) -> float:
        """√(1 + σ²), by which x = x0 + σ·ε is divided for a variance-preserving network."""
        return math.hypot(1, sigma)

    def descent(self, sigma: float, to: float) -> float:
        """σ' − σ, the length of a step of Euler or Heun."""
        return to - sigma

    def churned_sample(
        self, prediction_type: str, x: Tensor, now: Level, raised_x: Tensor, raised: Level
    ) -> tuple[Tensor, Level]:
        """The sample and level at which an output is read when noise was added after it: those
        that the network was asked about.

        Its x̂0 is then free of that noise: the step keeps the variance, and the end is x̂0.
        """
        return x, now

    def ancestral_sigmas(self, sigma: float, to: float) -> tuple[float, float]:
        """σ_down, to which an ancestral step from σ to σ' goes, and σ_up, the noise it adds."""
        down = to**2 / sigma
        return down, math.sqrt(to**2 - down**2)

    def check_ancestral(self, prediction_type: str) -> None:
        """Every prediction type will do."""

    def edm_start(self, sigma_max: float) -> float:
        """Standard deviation of the start (Karras et al. 2022, algorithms 1 and 2, line 2)."""
        return sigma_max

    def edm_sigmas(
        self, sigma_schedule: str, low: float, high: float, n: int, rho: float, dtype: torch.dtype
    ) -> np.ndarray:
        """EDM's grid: n levels from high to low."""
        if sigma_schedule == "exponential":
            return exponential_sigmas(low, high, n)
        return karras_sigmas(low, high, n, rho)

    def edm_end(self, sigmas: np.ndarray, sigma_min: float, algorithm_type: str | None) -> float:
        """σ after the last step of EDM's samplers that stop at "sigma_min": it never rises."""
        return min(sigma_min, sigmas[-1])

    def check_edm_sigmas(self, sigmas: object) -> None:
        """One's own σ are σ."""

    def check_edm_solver(self, algorithm_type: str, solver_order: int) -> None:
        """Every order of both algorithms will do."""

    def edm_sample(self, x: Tensor) -> Tensor:
        """As `solver_sample`, for EDM's DPM-Solver."""
        return self.solver_sample(x)

    def velocity_level(self, scheduler, timesteps: Tensor, like: Tensor) -> Level:
        """The level at which Euler's get_velocity mixes x0 and ε: that of each timestep."""
        return scheduler._batch_level(timesteps, like)

    def flow_levels(self, sigmas: np.ndarray) -> list[Level]:
        """x = (1 − σ)·x0 + σ·ε."""
        return [Level(1 - s, s) for s in sigmas.tolist()]

    def clean(self) -> Level:
        """The level of the data: α = 1, σ = 0."""
        return CLEAN

    def ddim_levels(self, scheduler, t: int) -> tuple[Level, Level]:
        """The levels that DDIM steps between: this entry of the grid and the next."""
        return scheduler.grid_levels(t)

    def ddim_direction(self, now: Level, nxt: Level, eta: float, std: float) -> float:
        """√(σ_s² − s̃²), the weight of ε̂ in DDIM; at η = 1 rounding can take it below 0."""
        return math.sqrt(max(nxt.sigma**2 - std**2, 0.0))

    def posterior(
        self, weights: tuple[float, float], now: Level, nxt: Level
    ) -> tuple[float, float]:
        """The weights of x0 and x in the mean of DDPM's posterior, as eq. 7 gives them."""
        return weights

    def adds_noise_at_the_end(self, now: Level, first: Level) -> bool:
        """DDPM algorithm 1, line 3: z = 0 in the last step."""
        return False

    def solver_sample(self, x: Tensor) -> Tensor:
        """The dtype in which a solver does its arithmetic: float32, or the sample's if wider."""
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def solver_row(self, prediction_type: str, level: Level) -> tuple:
        """(p, q) of the network's output at a solver's level."""
        return row(prediction_type, level)

    def exp(self, x: float) -> float:
        """eˣ."""
        return math.exp(x)

    def expm1(self, x: float) -> float:
        """eˣ − 1, to full precision for small x."""
        return math.expm1(x)

    def phi3(self, k: int, h: float, phi2: float) -> float:
        """The weight of the second divided difference in third-order DPM-Solver++.

        k·∫₀ʰ e^{−k(h−u)} (u/h)² du = 1 − 2·φ₂/(k·h), by parts.
        """
        return 1 - 2 * phi2 / (k * h)

    def singlestep_phi3(self, k: int, h: float, phi2: float) -> float:
        """The same weight in the third-order singlestep solver."""
        return self.phi3(k, h, phi2)

    def stage_noise(self, whole, last, carried: Tensor | float, noise) -> Tensor:
        """What the SDE injects from the start of a singlestep cycle to the end of a stage.

        `whole` is that interval and `last` its part since the stage before, whose sample already
        carries noise: this is a part of the whole's.
        """
        return last.decay * carried + last.injected * noise()

    def scalar(self, x: float) -> float:
        """A coefficient as it multiplies a tensor."""
        return x

    def unipc_expm1(self, x: float) -> float:
        """eˣ − 1 in UniPC."""
        return math.expm1(x)

    def unipc_moments(self, step, n: int) -> np.ndarray:
        """φ₂, φ₃, … (n of them): B(h)·b on the right of UniPC's linear system."""
        return np.array(step.moments(n))

    def check_unipc(self, config) -> None:
        """Refuse options of UniPC that cannot work."""

    def dynamic_shift(self, sigmas: np.ndarray, shift: float) -> np.ndarray:
        """The shift of a flow for one size of images: the same as for all."""
        return shifted_sigmas(sigmas, shift)

    def inversion_grid(self, scheduler, rising: list[int]) -> tuple[list[int], list[Level]]:
        """Where DDIM inversion asks the network, and the levels it climbs through.

        Each step starts where x is. The first is a clean x, at which no network was trained: it is
        asked at the nearest step, 0.
        """
        return [0, *rising[:-1]], [scheduler.final_level, *map(scheduler.level, rising)]

    def inversion_levels(self, scheduler, t: int) -> tuple[Level, Level]:
        """The levels that DDIM inversion steps between: where x is, and the next noisier one."""
        return scheduler.due_levels(t)

    def consistency_weights(self, scaled: float, sigma_data: float) -> tuple[float, float]:
        """c_skip and c_out of an LCM at the timestep t·timestep_scaling."""
        norm = math.hypot(scaled, sigma_data)
        return (sigma_data / norm) ** 2, scaled / norm

    def consistency_end(self, last: Level, shortened: bool) -> Level:
        """Where the last step of an LCM ends; `shortened`: strength cut timesteps of one's own."""
        return self.clean()

    def pndm_levels(self, scheduler, t: int) -> tuple[Level, Level]:
        """The level at which PNDM's network was asked, and the one that this stage steps to."""
        levels = scheduler.due_levels(t)
        due = scheduler.grid[scheduler.step_index]
        if t != due:
            raise InvalidArgument(
                f"timestep must be {due}, the next of scheduler.timesteps, got {t:g}: a start in "
                "the middle wants set_begin_index"
            )
        return levels

    def runge_kutta_middle(self, noisier: int, cleaner: int, stride: int) -> int:
        """The training step halfway through a Runge-Kutta step; stride is T//n."""
        return (noisier + cleaner) // 2

    def average_noise(
        self, evaluations: Sequence, weights: Sequence[float], start, prediction_type: str
    ) -> Tensor:
        """PNDM's ε̂ for the step that begins at `start`: Σ w·ε̂ over evaluations of the network."""
        return _weighted([e.eps for e in evaluations], weights)

    def transfer(self, now: Level, nxt: Level) -> tuple[float, float]:
        """The weights of x and ε̂ in a step of DDIM: nxt.alpha·x̂0 + nxt.sigma·ε̂."""
        a = nxt.alpha / now.alpha
        return a, nxt.sigma - a * now.sigma

    def flow_line(self, ends: tuple[float, float], n: int, steps: int) -> np.ndarray:
        """n evenly spaced σ of a flow, from 1 to one training step's, before they are shifted.

        `ends` are the first and last σ of training, shifted already.
        """
        return np.linspace(1, 1 / steps, n)

    def flow_sigmas_of(
        self, share: np.ndarray, shaped: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """The σ of given timesteps, t/T: what the network is asked is what x has."""
        return share

    def flow_path(self, sigmas: np.ndarray, inverted: bool) -> list[Level]:
        """The levels of a flow; `inverted`: σ is the share of the data, not of the noise."""
        return self.flow_levels(1 - sigmas if inverted else sigmas)

    def flow_row(self, inverted: bool) -> tuple[float, float]:
        """(p, q) of a flow's output, dx/dσ: x0 − ε instead of ε − x0 where σ is the data's."""
        return (1.0, -1.0) if inverted else (-1.0, 1.0)

    def token_output(self, out: Tensor, stochastic: bool) -> Tensor:
        """The network's output where every token has its own timestep: read as everywhere."""
        return out


class RoundedLevel(Level):
    """A level whose derived quantities are rounded as diffusers' float32 tensors are."""

    lam = math.nan  # set for every instance by _rounded
    alpha_bar = math.nan  # set for every instance by Diffusers.table

    def variance_since(self, cleaner: "RoundedLevel") -> float:
        """1 − ᾱ_t/ᾱ_s in float32, which keeps three digits of a β of 1e-4."""
        ratio = np.float32(self.alpha_bar) / np.float32(cleaner.alpha_bar)
        return float(np.float32(1) - ratio)


class Diffusers(Exact):
    """What diffusers 0.42.1 computes, number for number."""

    dtype = torch.float32

    def laplace(self, s: float) -> float:
        """The paper's α, which is √ᾱ, is taken for ᾱ: 0.707 instead of 0.5 at T/2. A 1e-6 keeps the
        logarithm finite at both ends.
        """
        log_snr = -0.5 * math.copysign(1, 0.5 - s) * math.log(1 - 2 * abs(0.5 - s) + 1e-6)
        snr = math.exp(log_snr)
        return math.sqrt(snr / (1 + snr))

    def timesteps(self, spacing: str, n: int, last: int, offset: int) -> np.ndarray:
        """ "trailing" strides in floating point: for 62 of the 1000 n at T = 1000 it yields n + 1
        entries, the last of them −1. "linspace" with n = 1 starts at step 0 instead of T − 1.
        """
        if spacing == "linspace":
            return np.linspace(0, last - 1, n).round()[::-1]
        if spacing == "trailing":
            return _trailing(n, last, last)
        return super().timesteps(spacing, n, last, offset)

    def solver_timesteps(
        self, spacing: str, n: int, last: int, offset: int, steps: int
    ) -> np.ndarray:
        """n + 1 points even when n = T: "linspace" then repeats a step, "leading" repeats 0, and
        both are refused. "trailing" keeps the stride T/n below `last`, so it yields fewer steps.
        """
        if spacing == "linspace":
            return np.linspace(0, last - 1, n + 1).round()[::-1][:-1]
        if spacing == "leading":
            return (np.arange(n + 1) * (last // (n + 1)))[::-1][:-1] + offset
        return _trailing(n, last, steps)

    def real_timesteps(
        self, spacing: str, n: int, last: int, offset: int, *, ends_only: bool
    ) -> np.ndarray:
        """ "linspace" with n = 1 starts at step 0 instead of T − 1. Where "trailing" yields n + 1
        entries (`timesteps`), formulas end at the σ of step 0.
        """
        if spacing == "linspace":
            return np.linspace(0, last - 1, n)[::-1]
        if spacing == "trailing" and ends_only:
            return np.round(np.arange(last, 0, -last / n)) - 1
        return self.timesteps(spacing, n, last, offset)

    def spaced_sigmas(
        self, schedule: NoiseSchedule, t: np.ndarray, interpolation_type: str
    ) -> np.ndarray:
        """ "log_linear" forgets the timesteps: n + 1 σ's at equal distances in ln σ over the whole
        table, so the network is asked at a noise that x does not have, and the last of the n steps
        ends at σ_0 instead of the end asked for.
        """
        if interpolation_type == "linear":
            return schedule.sigma_of(t)
        low, high = np.log(schedule.sigma_of(np.array([0, len(schedule) - 1])).astype(np.float32))
        return torch.linspace(high, low, len(t) + 1).exp().numpy()

    def table(self, schedule: NoiseSchedule) -> list[Level]:
        """ᾱ is a float32 table, and 1 − ᾱ_t/ᾱ_s is taken in float32."""
        levels = [RoundedLevel(*level) for level in schedule.levels()]
        for level, alpha_bar in zip(levels, schedule.alpha_bar.tolist(), strict=True):
            level.alpha_bar = alpha_bar
        return levels

    def solver_schedule(self, schedule: NoiseSchedule) -> NoiseSchedule:
        """Zero terminal SNR is replaced by ᾱ = 2⁻²⁴, which can exceed the ᾱ before it."""
        return schedule.ending_at(2**-24) if schedule.alpha_bar[-1] == 0 else schedule

    def formula_timesteps(self, t: np.ndarray, rounded: bool) -> np.ndarray:
        """Cast to int64: of exponential and Beta grids, and of Karras' on the cosine schedule, the
        fraction is cut off, so the network is asked at a noise that x does not have.
        """
        return (t.round() if rounded else t).astype(np.int64)

    def lu_sigmas(self, low: float, high: float, n: int) -> np.ndarray:
        """λ of both ends is a float32, by which a timestep can be cut to the one before."""
        ends = np.log(np.array([high, low], dtype=np.float32)).tolist()
        return np.exp(np.linspace(*ends, n))

    def steps_in_reach(self, clipped: int, steps: int) -> int:
        """Formulas ignore lambda_min_clipped."""
        return steps

    def flow_end(self, sigmas: np.ndarray, schedule: NoiseSchedule) -> float:
        """The σ/α of the β schedule, which has no part in a flow."""
        return schedule.sigma_of(np.zeros(1)).item()

    def preserving_levels(self, sigmas: np.ndarray) -> list[Level]:
        """Levels and λ are computed in float32 from σ/α."""
        ratio = torch.tensor(sigmas, dtype=torch.float32)
        alpha = 1 / (ratio**2 + 1) ** 0.5
        return _rounded(alpha, ratio * alpha)

    def exploding_levels(self, sigmas: np.ndarray) -> list[Level]:
        """σ is a float32, and so is λ = −ln σ."""
        sigma = torch.tensor(sigmas, dtype=torch.float32)
        return _rounded(torch.ones_like(sigma), sigma)

    def exploding_start(self, sigma: float, spacing: str) -> float:
        """σ alone for "linspace" and "trailing", as if the data had no variance."""
        return math.hypot(1, sigma) if spacing == "leading" else sigma

    def euler_end(self, trained: float, last: float) -> float:
        """Training step 0's always: a grid with a lower `sigma_min` rises in its last step."""
        return trained

    def input_norm(self, sigma: float) -> float:
        """In float32: x̂0 = x − σ·ε̂ makes of its rounding what σ does."""
        return _float32_norm(sigma)

    def descent(self, sigma: float, to: float) -> float:
        """In float32: where a step divides σ by thousands, its rounding stays in x', and Heun
        multiplies it by σ/σ' for the second slope.
        """
        return float(np.float32(to - sigma))

    def churned_sample(
        self, prediction_type: str, x: Tensor, now: Level, raised_x: Tensor, raised: Level
    ) -> tuple[Tensor, Level]:
        """Where noise has been added since, and the network was not asked: the ε of x is taken for
        the ε of x̂, so the noise stays in x̂0, and after the last step in the picture. "v" is read
        with the σ before besides, and "sample" implies another ε than the others.
        """
        return (raised_x, now if prediction_type == "v_prediction" else raised)

    def ancestral_sigmas(self, sigma: float, to: float) -> tuple[float, float]:
        """σ_down is the root of a float32 difference: where a step is long σ_up nearly equals σ',
        and what rounding leaves of σ_down is off by up to 3e-4·σ' (below 0 it is NaN in diffusers).
        """
        return _rounded_ancestral(sigma, to)

    def check_ancestral(self, prediction_type: str) -> None:
        """Ancestral Euler lacks one line for "sample", and raises in its first step."""
        if prediction_type == "sample":
            raise InvalidArgument(
                "prediction_type 'sample' is not implemented by diffusers' "
                "EulerAncestralDiscreteScheduler: use another, or compat='exact'"
            )

    def edm_start(self, sigma_max: float) -> float:
        """As if EDM's data had variance 1, whatever sigma_data is."""
        return math.hypot(1, sigma_max)

    def edm_sigmas(
        self, sigma_schedule: str, low: float, high: float, n: int, rho: float, dtype: torch.dtype
    ) -> np.ndarray:
        """The exponential grid is float32 and runs upwards before it is turned around, so that of
        one level is σ_min instead of σ_max. Karras' is float32 in DPM-Solver, float64 in Euler.
        """
        if sigma_schedule == "exponential":
            return torch.linspace(math.log(low), math.log(high), n).exp().flip(0).numpy()
        low, high = low ** (1 / rho), high ** (1 / rho)
        sigmas = (high + torch.linspace(0, 1, n, dtype=dtype) * (low - high)) ** rho
        return sigmas.to(torch.float32).numpy()

    def edm_end(self, sigmas: np.ndarray, sigma_min: float, algorithm_type: str | None) -> float:
        """Euler's is the last σ of the grid, which for one step is the first: nothing happens.
        DPM-Solver's is σ_min, and rounding puts the grid's end below it or above. The SDE cannot
        rise, and gives NaN in diffusers.
        """
        if algorithm_type == "dpmsolver++":
            return sigma_min
        return sigmas[-1] if algorithm_type is None else min(sigma_min, sigmas[-1])

    def check_edm_sigmas(self, sigmas: object) -> None:
        """set_timesteps takes them for positions in the formula, 0 its first σ and 1 its last."""
        raise InvalidArgument(
            "sigmas are taken by diffusers' EDMEulerScheduler for positions between sigma_max and "
            f"sigma_min: give num_inference_steps, or take compat='exact'; got {str(sigmas)[:80]}"
        )

    def check_edm_solver(self, algorithm_type: str, solver_order: int) -> None:
        """Third order has no branch for the SDE, and raises in its third step."""
        if algorithm_type == "sde-dpmsolver++" and solver_order == 3:
            raise InvalidArgument(
                "algorithm_type 'sde-dpmsolver++' with solver_order 3 is not implemented by "
                "diffusers' EDMDPMSolverMultistepScheduler: use another, or compat='exact'"
            )

    def edm_sample(self, x: Tensor) -> Tensor:
        """Left in its dtype: float64 is kept here, and so is half precision."""
        return x

    def velocity_level(self, scheduler, timesteps: Tensor, like: Tensor) -> Level:
        """A timestep's index in the grid is taken for the training step: before `set_timesteps`
        the first, which is pure noise, gets the level of the data, and the last that of noise.
        """
        t = torch.as_tensor(timesteps).flatten().tolist()
        at = torch.tensor([scheduler._position(each) for each in t], device=like.device)
        return scheduler.schedule.at(at.expand(like.shape[0]) if len(at) == 1 else at, like)

    def flow_levels(self, sigmas: np.ndarray) -> list[Level]:
        """σ is a float32, and so are 1 − σ and λ."""
        sigma = torch.tensor(sigmas, dtype=torch.float32)
        return _rounded(1 - sigma, sigma)

    def clean(self) -> Level:
        """The same level, with the float32 ᾱ and λ that its neighbours have."""
        return _ROUNDED_CLEAN

    def ddim_levels(self, scheduler, t: int) -> tuple[Level, Level]:
        """DDIM steps to t − T//n, which is the grid's next entry only for "leading" spacing, and
        for "trailing" when n divides T.
        """
        nxt = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        now = scheduler.level(t)
        return now, scheduler.level(nxt) if nxt >= 0 else scheduler.final_level

    def ddim_direction(self, now: Level, nxt: Level, eta: float, std: float) -> float:
        """1 − ᾱ_s − s̃² is taken in float32: near zero SNR with η = 1 both terms are equal, and the
        root of what rounding leaves is 2.4e-4 or more.
        """
        return _rounded_direction(now.alpha_bar, nxt.alpha_bar, eta)

    def posterior(
        self, weights: tuple[float, float], now: Level, nxt: Level
    ) -> tuple[float, float]:
        """Every operation on ᾱ is rounded to float32, which a thousand steps add up to 1e-5."""
        return _rounded_posterior(now.alpha_bar, nxt.alpha_bar, nxt.alpha)

    def adds_noise_at_the_end(self, now: Level, first: Level) -> bool:
        """DDPM asks whether t > 0, not whether the step is the last: a grid that ends above step 0
        ends with noise (of variance 1e-20, or β for variance_type "fixed_large").
        """
        return now.sigma > first.sigma

    def solver_sample(self, x: Tensor) -> Tensor:
        """DPM-Solver and Euler round a float64 sample to float32 in every step."""
        return x if x.dtype == torch.float32 else x.to(torch.float32)

    def solver_row(self, prediction_type: str, level: Level) -> tuple:
        """v is read as x0 = α·x − σ·v on flow levels too, where α² + σ² is not 1."""
        if prediction_type == "v_prediction":
            return -level.sigma, level.alpha
        return row(prediction_type, level)

    def exp(self, x: float) -> float:
        """In float32."""
        return _float32_exp(x)

    def expm1(self, x: float) -> float:
        """Float32 e^x, then minus 1: a step of h = 0.01 keeps five digits."""
        return float(np.float32(_float32_exp(x)) - np.float32(1))

    def phi3(self, k: int, h: float, phi2: float) -> float:
        """The second difference lacks a factor 2, in the reference code too, so order 3 converges
        at order 2; the SDE's term has the wrong sign besides: φ₃/2 − 1. Taken in float32, where
        small steps cancel, which the differences of noisy x̂0 do feel.
        """
        one, kh = np.float32(1), k * np.float32(h)
        decay = np.float32(_float32_exp(float(-kh)))
        left = (one - decay - kh) / kh**2
        return float(left - np.float32(0.5) if k == 2 else left + np.float32(0.5))

    def singlestep_phi3(self, k: int, h: float, phi2: float) -> float:
        """The singlestep solver has the factor 2 that the multistep solver lacks; the sign of the
        SDE's term is wrong there too.
        """
        return 2 * Diffusers.phi3(self, k, h, phi2)

    def stage_noise(self, whole, last, carried: Tensor | float, noise) -> Tensor:
        """Every stage of a singlestep cycle draws the noise of the whole interval anew, so that the
        prediction at a stage and the noise of the step are independent.
        """
        return whole.injected * noise()

    def scalar(self, x: float) -> float:
        """Every coefficient is a float32. From almost no signal, α = 1e-6, two terms of 1e5 cancel
        and leave its rounding.
        """
        return float(np.float32(x))

    def unipc_expm1(self, x: float) -> float:
        """UniPC has the function that DPM-Solver lacks, in float32."""
        return torch.expm1(torch.tensor(x, dtype=torch.float32)).item()

    def unipc_moments(self, step, n: int) -> np.ndarray:
        """The recurrence in float32 from φ₁/h, whose rounding every order divides by h again: at
        h = 0.01 φ₄ keeps no digit.
        """
        hh = np.float32(-step.k * step.h)
        phi = np.float32(-step.phi1) / hh - np.float32(1)
        moments, factorial = [], 1
        for j in range(1, n + 1):
            moments.append(-phi * np.float32(factorial))
            factorial *= j + 1
            phi = phi / hh - np.float32(1 / factorial)
        return np.array(moments)

    def check_unipc(self, config) -> None:
        """The last, first-order step multiplies B(h) by an empty sum; "bh1" is ∞ there."""
        if config.solver_type == "bh1" and config.final_sigmas_type == "zero":
            raise InvalidArgument(
                "solver_type 'bh1' with final_sigmas_type 'zero' gives NaN in diffusers: use "
                "solver_type 'bh2', final_sigmas_type 'sigma_min', or compat='exact'"
            )

    def dynamic_shift(self, sigmas: np.ndarray, shift: float) -> np.ndarray:
        """Written another way, which rounds differently where a timestep is cut to a whole one."""
        return shift / (shift + (1 / sigmas - 1))

    def inversion_grid(self, scheduler, rising: list[int]) -> tuple[list[int], list[Level]]:
        """The network is asked at the level that a step of DDIM inversion ends at, not where x is:
        over samples of the data x strays from the flow about twice as far, in their tails less.
        """
        stride = scheduler.config.num_train_timesteps // len(rising)
        start = _level_or_end(scheduler, rising[0] - stride)
        return rising, [start, *map(scheduler.level, rising)]

    def inversion_levels(self, scheduler, t: int) -> tuple[Level, Level]:
        """DDIM inversion takes x to be at t − T//n, which misses the step before for "trailing"
        spacing where n does not divide T.
        """
        stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        return _level_or_end(scheduler, t - stride), scheduler.level(t)

    def consistency_weights(self, scaled: float, sigma_data: float) -> tuple[float, float]:
        """In float32, as the timestep that pipelines pass is a tensor."""
        return _rounded_consistency_weights(scaled, sigma_data)

    def consistency_end(self, last: Level, shortened: bool) -> Level:
        """LCM compares its step with the uncut number of timesteps, so a strength below 1 with
        timesteps of one's own leaves noise of the last level in the result.
        """
        return last if shortened else self.clean()

    def pndm_levels(self, scheduler, t: int) -> tuple[Level, Level]:
        """PNDM counts its calls, wherever sampling began, and pairs t with t − T//n. The second
        call redoes the first step, whatever its timestep: image-to-image, which starts in the
        middle, loses an interval there, and x stays noisier than the network is told.
        """
        asked = scheduler.level(t)
        stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        if scheduler.step_index is None:
            scheduler._step_index = 0
        i = scheduler._advance_to(t)
        if not scheduler.config.skip_prk_steps and i < 12:
            now = asked if i % 4 else scheduler.level(scheduler.grid[i])
            return now, asked if i % 2 else _level_or_end(scheduler, t - stride // 2)
        if i == 1:
            scheduler.stages[0] = scheduler.stages[0]._replace(level=scheduler.level(t + stride))
            return asked, asked
        return asked, _level_or_end(scheduler, t - stride)

    def runge_kutta_middle(self, noisier: int, cleaner: int, stride: int) -> int:
        """Half of T//n above the end, also where the step is not T//n long; the first of the four
        stages goes to half of it below the start, which is another level for an odd T//n.
        """
        return cleaner + stride // 2

    def average_noise(
        self, evaluations: Sequence, weights: Sequence[float], start, prediction_type: str
    ) -> Tensor:
        """PNDM averages v over different levels and turns the average into noise with x at the
        start of the step, which costs the second order.
        """
        if prediction_type != "v_prediction":
            return Exact.average_noise(self, evaluations, weights, start, prediction_type)
        v = _weighted([e.out for e in evaluations], weights)
        return split(v, start.x, start.level, prediction_type)[1]

    def transfer(self, now: "RoundedLevel", nxt: "RoundedLevel") -> tuple[float, float]:
        """DDIM's step is written with ᾱ_s − ᾱ_t, in float32."""
        return _rounded_transfer(now.alpha_bar, nxt.alpha_bar)

    def flow_line(self, ends: tuple[float, float], n: int, steps: int) -> np.ndarray:
        """The ends are shifted already, so that the last σ is shifted twice: at shift 3 sampling
        stops at three times the σ it should (github.com/huggingface/diffusers/issues/13243).
        """
        return np.linspace(ends[0] * steps, ends[1] * steps, n) / steps

    def flow_sigmas_of(
        self, share: np.ndarray, shaped: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Given timesteps are what the network is asked, but x has the shifted σ."""
        return shaped(share)

    def flow_path(self, sigmas: np.ndarray, inverted: bool) -> list[Level]:
        """invert_sigmas changes σ and nothing else: scale_noise adds noise where σ says data, and
        stochastic_sampling takes ε̂ for x̂0.
        """
        return self.flow_levels(sigmas)

    def flow_row(self, inverted: bool) -> tuple[float, float]:
        """As for `flow_path`; together the two leave a deterministic step as it should be."""
        return (-1.0, 1.0)

    def token_output(self, out: Tensor, stochastic: bool) -> Tensor:
        """With per_token_timesteps the step has the wrong sign, so that callers (LTX-Video) pass
        minus the output; with stochastic_sampling besides it has the right one.
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


@functools.lru_cache(maxsize=4096)
def _rounded_posterior(now: float, nxt: float, alpha: float) -> tuple[float, float]:
    one, a, b = np.float32(1), np.float32(now), np.float32(nxt)
    ratio = a / b
    root = (torch.tensor(ratio) ** 0.5).item()  # torch's root is not always the nearest float32
    weight_x0 = np.float32(alpha) * (one - ratio) / (one - a)
    return float(weight_x0), float(np.float32(root) * (one - b) / (one - a))


@functools.lru_cache(maxsize=4096)
def _rounded_direction(now: float, nxt: float, eta: float) -> float:
    a, b = torch.tensor([now, nxt])
    rounded = eta * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
    return (1 - b - rounded**2).clamp(min=0).sqrt().item()


@functools.lru_cache(maxsize=4096)
def _rounded_ancestral(sigma: float, to: float) -> tuple[float, float]:
    a, b = np.float32(sigma) ** 2, np.float32(to) ** 2
    up = np.sqrt(b * (a - b) / a)
    return float(np.sqrt(max(b - up**2, np.float32(0)))), float(up)


@functools.lru_cache(maxsize=4096)
def _rounded_transfer(now: float, nxt: float) -> tuple[float, float]:
    a, b = torch.tensor([now, nxt])  # not NumPy: the last bit of its float32 root is another
    denominator = a * (1 - b).sqrt() + (a * (1 - a) * b).sqrt()
    return (b / a).sqrt().item(), -(b - a).item() / denominator.item()


@functools.lru_cache(maxsize=4096)
def _rounded_consistency_weights(scaled: float, sigma_data: float) -> tuple[float, float]:
    t = torch.tensor(scaled, dtype=torch.float32)
    norm2 = t**2 + sigma_data**2
    return (sigma_data**2 / norm2).item(), (t / norm2**0.5).item()


def _level_or_end(scheduler, t: int) -> Level:
    return scheduler.level(t) if t >= 0 else scheduler.final_level


def _weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w·tensor, without passes over memory for weights 0 and 1."""
    (first, w), *rest = [(t, w) for t, w in zip(tensors, weights, strict=True) if w]
    total = first if w == 1 else w * first
    for tensor, w in rest:
        total = torch.add(total, tensor, alpha=w)
    return total


@functools.lru_cache(maxsize=4096)
def _float32_exp(x: float) -> float:
    """torch's float32 e^x, whose last bit is neither numpy's nor that of the nearest float32."""
    return torch.exp(torch.tensor(x, dtype=torch.float32)).item()


@functools.lru_cache(maxsize=4096)
def _float32_norm(sigma: float) -> float:
    return ((torch.tensor(sigma, dtype=torch.float32) ** 2 + 1) ** 0.5).item()


def _rounded(alpha: Tensor, sigma: Tensor) -> list[RoundedLevel]:
    lams = (torch.log(alpha) - torch.log(sigma)).tolist()
    levels = [RoundedLevel(*pair) for pair in zip(alpha.tolist(), sigma.tolist(), strict=True)]
    for level, lam in zip(levels, lams, strict=True):
        level.lam = lam
    return levels


_ROUNDED_CLEAN = _rounded(torch.ones(1), torch.zeros(1))[0]
_ROUNDED_CLEAN.alpha_bar = 1.0


def departing(*names: str) -> Exact:
    """The exact reading with some of diffusers' departures: names of methods that both have.

    Raises:
        InvalidArgument: a name that is no departure.
    """
    for name in names:
        one_of("departure", name, departures())
    return type("Departing", (Exact,), {name: vars(Diffusers)[name] for name in names})()


def departures() -> list[str]:
    """What `Diffusers` overrides: its methods, and the dtype of its tables."""
    return [name for name in vars(Diffusers) if hasattr(Exact, name) and not name.startswith("_")]


READINGS: dict[str, Exact] = {"exact": Exact(), "diffusers": Diffusers()}
