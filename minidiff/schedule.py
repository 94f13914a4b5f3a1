"""The one noise schedule: every β and every ᾱ of the project is in this file.

Forward noising mixes a clean sample x0 with Gaussian noise ε,

    x_t = α_t · x0 + σ_t · ε,        α_t = √ᾱ_t,   σ_t = √(1 − ᾱ_t),   ᾱ_t = ∏_{s ≤ t} (1 − β_s)

(Ho et al. 2020, arXiv:2006.11239, eq. 4). The rest of the project uses neither β nor ᾱ, only
a `Level`: the pair (α, σ). Its log-SNR is λ = ln(α/σ) (Kingma et al. 2021, arXiv:2107.00630), the
variable in which DPM-Solver integrates.

The σ-grids at the end of the file are sequences of one number, the noise-to-signal ratio σ/α (or
the σ of a flow); `timestep_of` and `sigma_of` go from it to the training step and back.

Tables are float64. diffusers builds the same tables in float32, so `dtype=torch.float32` is its
reading: the same code, rounded after every operation.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, one_of, real_number, whole_number
from minidiff.names import BETA_SCHEDULES, MAX_TRAIN_TIMESTEPS

# A float of a sampler or a tensor of a training batch: equations hold for both, no type does.
Scale: TypeAlias = Any


class Level(NamedTuple):
    """An amount of signal and of noise: x = alpha · x0 + sigma · ε.

    alpha in [0, 1] and sigma >= 0 (above 1 where x explodes) are Python floats for a sampler, or
    tensors that broadcast over (B, C, *space) for a training batch in which every image has its
    own level.
    """

    alpha: Scale
    sigma: Scale

    @property
    def lam(self) -> float:
        """λ = ln(α/σ), half the log signal-to-noise ratio; +inf when clean, −inf for pure noise."""
        if self.sigma == 0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf

    def variance_since(self, cleaner: "Level") -> float:
        """Return 1 − ᾱ_t/ᾱ_s, the variance that forward noising adds from level s to this one, t.

        From one training step to the next it is β (DDPM eq. 2).
        """
        return 1 - (self.alpha / cleaner.alpha) ** 2


CLEAN = Level(1.0, 0.0)


def add_noise(x0: Tensor, eps: Tensor, level: Level) -> Tensor:
    """Return x = α·x0 + σ·ε, forward noising (DDPM eq. 4).

    Args:
        x0, eps: clean sample and standard normal noise, both (B, C, *space).
        level: α and σ, floats or tensors that broadcast over (B, 1, …); `schedule.at(t, x0)`
            gives the tensors for a batch of training steps, `schedule[t]` the floats of one step.
    Raises:
        InvalidArgument: x0 and eps differ in shape.
    """
    if x0.shape != eps.shape:
        raise InvalidArgument(
            f"eps must have the shape of x0, {tuple(x0.shape)}, got {tuple(eps.shape)}"
        )
    return level.alpha * x0 + level.sigma * eps


class NoiseSchedule:
    """The levels of all training steps t = 0 … T−1, from ᾱ_t.

    Args:
        betas: tensor (T,) of β_t in (0, 1], float64 (exact) or float32 (diffusers' reading). Only
            the last may be 1: no signal is left then.
    Attributes:
        betas, alpha_bar: β_t and ᾱ_t, (T,) tensors of that dtype on the CPU.
    Raises:
        InvalidArgument: betas is not such a sequence, or rounds to one whose ᾱ does not fall.
    """

    def __init__(self, betas: Tensor) -> None:
        if betas.ndim != 1 or len(betas) == 0:
            raise InvalidArgument(f"betas must be (T,) with T >= 1, got {tuple(betas.shape)}")
        if not bool(((betas > 0) & (betas <= 1)).all()) or bool((betas[:-1] == 1).any()):
            raise InvalidArgument("betas must lie in (0, 1), the last one in (0, 1]")
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        if not bool((alpha_bar.diff() < 0).all()) or alpha_bar[0] == 1:
            raise InvalidArgument(
                "alpha_bar must fall in every step, from below 1: "
                f"in {alpha_bar.dtype} these betas are too small, or leave no signal before the end"
            )
        self.betas = betas
        self._tabulate(alpha_bar)

    def _tabulate(self, alpha_bar: Tensor) -> None:
        self.alpha_bar = alpha_bar
        self._alpha = alpha_bar.sqrt()
        self._sigma = (1 - alpha_bar).sqrt()
        self._levels = list(map(Level, self._alpha.tolist(), self._sigma.tolist()))
        self._ratio = ((1 - alpha_bar) / alpha_bar).sqrt().numpy()  # σ/α, inf where ᾱ = 0
        self._on_device: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @classmethod
    def named(
        cls,
        name: str = "linear",
        num_train_timesteps: int = 1000,
        *,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        trained_betas: Sequence[float] | None = None,
        rescale_zero_snr: bool = False,
        dtype: torch.dtype = torch.float64,
        laplace: Callable[[float], float] | None = None,
    ) -> "NoiseSchedule":
        """Build a schedule by the name diffusers gives it.

        Args:
            name: "linear" (DDPM), "scaled_linear" (latent diffusion: linear in √β),
                "squaredcos_cap_v2" (the cosine schedule of Nichol & Dhariwal 2021,
                arXiv:2102.09672, eq. 17, β capped at 0.999), "sigmoid" (GeoDiff), "laplace"
                (`laplace_alpha_bar`, β capped at 0.999) or "exp" (ᾱ falls as e^−12t/T).
            num_train_timesteps: T, the number of training steps.
            beta_start, beta_end: first and last β in (0, 1), for "linear", "scaled_linear" and
                "sigmoid".
            trained_betas: T values of β that replace the named schedule.
            rescale_zero_snr: whether √ᾱ is shifted and scaled so that ᾱ_{T−1} = 0 (Lin et al. 2023,
                arXiv:2305.08891, algorithm 1).
            dtype: torch.float64, or torch.float32 for diffusers' rounding.
            laplace: function from t/T in [0, 1] to ᾱ up to a factor, instead of
                `laplace_alpha_bar`.
        Raises:
            InvalidArgument: unknown name or a value outside its range.
        """
        alpha_bars = _ALPHA_BARS | {"laplace": laplace or laplace_alpha_bar}
        betas = _betas(
            name, num_train_timesteps, beta_start, beta_end, trained_betas, dtype, alpha_bars
        )
        return cls(_zero_terminal_snr(betas) if rescale_zero_snr else betas)

    def ending_at(self, alpha_bar: float) -> "NoiseSchedule":
        """Return this schedule with another ᾱ_{T−1}; β does not change."""
        other = copy.copy(self)
        other._tabulate(torch.cat([self.alpha_bar[:-1], self.alpha_bar.new_tensor([alpha_bar])]))
        return other

    def __len__(self) -> int:
        return len(self._levels)

    def __getitem__(self, t: int) -> Level:
        """Return the level of training step t in 0..T−1, as floats. Raises InvalidArgument."""
        return self._levels[whole_number("timestep", t, 0, len(self) - 1)]

    def levels(self) -> list[Level]:
        """Return the levels of all T training steps, as Python floats."""
        return list(self._levels)

    def at(self, t: Tensor, like: Tensor) -> Level:
        """Return the levels of a batch of training steps, as tensors to multiply `like` with.

        Args:
            t: integer steps (B,) in 0..T−1 on the device of `like` (not checked: that would sync).
            like: tensor (B, C, *space) that gives dtype, device and number of axes.
        Returns:
            Level of two (B, 1, …, 1) tensors.
        Raises:
            InvalidArgument: t is not one integer per image of `like`.
        """
        if t.is_floating_point() or t.shape != like.shape[:1]:
            raise InvalidArgument(
                f"t must be {like.shape[0]} integers, got {t.dtype} of shape {tuple(t.shape)}"
            )
        key = (like.device, like.dtype)
        if key not in self._on_device:
            self._on_device[key] = (self._alpha.to(*key), self._sigma.to(*key))
        shape = (-1,) + (1,) * (like.ndim - 1)
        alpha, sigma = self._on_device[key]
        return Level(alpha[t].view(shape), sigma[t].view(shape))

    def sigma_of(self, t: np.ndarray) -> np.ndarray:
        """Return σ_t/α_t at real training steps, by linear interpolation in the table.

        Args:
            t: steps, an array of any shape; a step outside 0…T−1 counts as the nearer end.
        Returns:
            float64 array like t; inf beyond T−2 if no signal is left at T−1.
        Raises:
            InvalidArgument: t holds something other than numbers.
        """
        return np.interp(_numbers("t", t, -math.inf), np.arange(len(self)), self._ratio)

    def timestep_of(self, sigma: np.ndarray) -> np.ndarray:
        """Return the real training step t with σ_t/α_t = sigma, by linear interpolation in ln σ.

        This is the inverse of `sigma_of` at whole steps; between them `sigma_of` is linear in σ.
        diffusers' Euler interpolates in the same two ways.

        Args:
            sigma: ratios >= 0 of any shape; a ratio outside the table counts as the nearer end.
        Returns:
            float64 array like sigma, in [0, T−1].
        Raises:
            InvalidArgument: sigma holds a negative number, or something other than numbers.
        """
        log_sigma = np.log(np.maximum(_numbers("sigma", sigma), 1e-10))
        table, last = np.log(self._ratio), len(self) - 1
        # The table rises, but `ending_at` may lower its end: its last entry <= sigma counts.
        rising = np.minimum.accumulate(table[::-1])[::-1]
        below = (np.searchsorted(rising, log_sigma, side="right") - 1).clip(0, max(last - 1, 0))
        above = np.minimum(below + 1, last)
        with np.errstate(divide="ignore", invalid="ignore"):
            weight = (table[below] - log_sigma) / (table[below] - table[above])
        weight = np.where(np.isnan(weight), 1, np.clip(weight, 0, 1))  # ∞/∞; 0/0 if T = 1
        return (1 - weight) * below + weight * above


def _betas(
    name: str,
    steps: int,
    start: float,
    end: float,
    trained: Sequence[float] | None,
    dtype: torch.dtype,
    alpha_bars: Mapping[str, Callable[[float], float]],
) -> Tensor:
    steps = whole_number("num_train_timesteps", steps, 1, MAX_TRAIN_TIMESTEPS)
    if trained is not None:
        return _checked_betas(trained, steps, dtype)
    one_of("beta_schedule", name, BETA_SCHEDULES)
    start, end = real_number("beta_start", start, 0, 1), real_number("beta_end", end, 0, 1)
    if not 0 < start <= end < 1:
        raise InvalidArgument(
            f"beta_start and beta_end must satisfy 0 < beta_start <= beta_end < 1, "
            f"got {start:g} and {end:g}"
        )
    if name == "linear":
        return torch.linspace(start, end, steps, dtype=dtype)
    if name == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=dtype) ** 2
    if name == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, steps, dtype=dtype)) * (end - start) + start
    f = alpha_bars[name]
    betas = [min(1 - f((t + 1) / steps) / f(t / steps), 0.999) for t in range(steps)]
    return torch.tensor(betas, dtype=dtype)


def laplace_alpha_bar(s: float) -> float:
    """Return ᾱ at s = t/T in [0, 1] where the log-SNR of a uniform t has a Laplace distribution.

    The quantiles of the log-SNR are 2λ = −½·sgn(½ − s)·ln(1 − 2|½ − s|) (Hang et al. 2024,
    arXiv:2407.03297, table 1, with their μ = 0 and b = ½), and ᾱ = SNR/(1 + SNR): half of the
    variance at s = ½.
    """
    tail = math.sqrt(1 - 2 * abs(0.5 - s))  # the SNR below ½, its inverse above
    return tail / (1 + tail) if s > 0.5 else 1 / (1 + tail)


_ALPHA_BARS: dict[str, Callable[[float], float]] = {  # up to a factor, at s = t/T in [0, 1]
    "squaredcos_cap_v2": lambda s: math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2,  # N&D eq. 17
    "exp": lambda s: math.exp(s * -12.0),
}


def _checked_betas(trained: Sequence[float], steps: int, dtype: torch.dtype) -> Tensor:
    try:
        betas = torch.as_tensor(np.asarray(trained, dtype=np.float64), dtype=dtype)
    except (TypeError, ValueError, OverflowError):
        betas = torch.empty(0, dtype=dtype)
    if betas.ndim != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
        raise InvalidArgument(
            f"trained_betas must be a sequence of numbers in (0, 1), got {str(trained)[:80]}"
        )
    if len(betas) != steps:
        raise InvalidArgument(
            f"trained_betas must be one number for each of num_train_timesteps={steps}, "
            f"got {len(betas)}"
        )
    return betas


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))  # Lin et al. 2023, algorithm 1
    alpha_bar = root**2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def karras_sigmas(sigma_min: float, sigma_max: float, n: int, rho: float = 7.0) -> np.ndarray:
    """Return n noise levels, uniform in σ^(1/ρ) (Karras et al. 2022, arXiv:2206.00364, eq. 5).

    Args:
        sigma_min, sigma_max: last and first σ, 0 < sigma_min <= sigma_max.
        n: number of levels, at least 1; one level is sigma_max.
        rho: exponent ρ in [1, 100]; 1 is uniform in σ, more puts more steps at low noise; 7 is the
            paper's.
    Returns:
        (n,) float64 array that falls from sigma_max to sigma_min.
    Raises:
        InvalidArgument: a value outside its range.
    """
    low, high, ramp = _grid(sigma_min, sigma_max, n)
    rho = real_number("rho", rho, 1, 100)
    low, high = low ** (1 / rho), high ** (1 / rho)
    return (high + ramp * (low - high)) ** rho  # Karras et al. eq. 5


def exponential_sigmas(sigma_min: float, sigma_max: float, n: int) -> np.ndarray:
    """Return n noise levels, uniform in ln σ and thus in λ (Lu et al. 2022, arXiv:2206.00927).

    diffusers has this grid twice: `use_exponential_sigmas`, and `use_lu_lambdas`, whose ρ is 1.
    Arguments, result and errors as in `karras_sigmas`.
    """
    low, high, ramp = _grid(sigma_min, sigma_max, n)
    return np.exp(np.linspace(math.log(high), math.log(low), len(ramp)))


def beta_sigmas(
    sigma_min: float, sigma_max: float, n: int, a: float = 0.6, b: float = 0.6
) -> np.ndarray:
    """Return n noise levels at equal quantiles of a Beta(a, b) distribution over [σ_min, σ_max].

    σ_i = σ_min + (σ_max − σ_min)·F⁻¹(1 − i/(n−1)): with a, b < 1 both ends get more steps than the
    middle (Lee et al. 2024, arXiv:2407.12173). a and b lie in [0.1, 10], 0.6 is diffusers' choice.
    Other arguments, result and errors as in `karras_sigmas`.
    """
    low, high, ramp = _grid(sigma_min, sigma_max, n)
    a, b = real_number("a", a, 0.1, 10), real_number("b", b, 0.1, 10)
    quantiles = 1 - ramp
    quantiles[1:-1] = _beta_quantile(quantiles[1:-1], a, b)  # 0 and 1 stay where they are
    return low + quantiles * (high - low)


def shifted_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Move the σ of a flow towards noise (Esser et al. 2024, arXiv:2403.03206, section 5.3.2).

    σ' = s·σ / (1 + (s−1)·σ) divides the ratio (1−σ)/σ by s, so shifts multiply. diffusers' dynamic
    shifting, s / (s + 1/σ − 1), is the same function: s = exp(mu) if `time_shift_type` is
    "exponential", s = mu if "linear". sigmas lie in [0, 1] and have any shape (float32 stays
    float32), shift is above 0; raises InvalidArgument otherwise.
    """
    sigmas, shift = _numbers("sigmas", sigmas, 0, 1), _positive("shift", shift)
    return np.minimum(shift * sigmas / (1 + (shift - 1) * sigmas), 1)  # 1 may round to 1 + 2e-16


def stretched_sigmas(sigmas: np.ndarray, terminal: float) -> np.ndarray:
    """Scale the signal 1 − σ so that the last σ is `terminal` (LTX-Video, as in diffusers).

    sigmas is (n,) in [0, 1], the last below 1 (float32 stays float32), terminal lies in (0, 1);
    raises InvalidArgument otherwise.
    """
    signal = 1 - _numbers("sigmas", sigmas, 0, 1)
    if signal.ndim != 1 or not len(signal) or signal[-1] == 0:
        raise InvalidArgument(f"sigmas must be (n,) with the last below 1, got {str(sigmas)[:80]}")
    if not 0 < real_number("terminal", terminal, 0, 1) < 1:
        raise InvalidArgument(f"terminal must be above 0 and below 1, got {terminal}")
    return 1 - signal / (signal[-1] / (1 - terminal))


def _grid(sigma_min: float, sigma_max: float, n: int) -> tuple[float, float, np.ndarray]:
    low, high = sigma_range(sigma_min, sigma_max)
    return low, high, np.linspace(0, 1, whole_number("n", n, 1, MAX_TRAIN_TIMESTEPS))


def sigma_range(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """Return both ends of a grid in σ, 0 < sigma_min <= sigma_max.

    Raises:
        InvalidArgument: an end is outside its range.
    """
    high = _positive("sigma_max", sigma_max)
    return _positive("sigma_min", sigma_min, high), high


def _positive(name: str, value: float, high: float = math.inf) -> float:
    number = real_number(name, value, 0, high)
    if number == 0:
        raise InvalidArgument(f"{name} must be above 0, got 0")
    return number


def _numbers(name: str, values: object, low: float = 0, high: float = math.inf) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "iuf" or not bool(((array >= low) & (array <= high)).all()):
        allowed = f"numbers in [{low:g}, {high:g}]"
        raise InvalidArgument(f"{name} must be {allowed}, got {str(values)[:80]}")
    return array


def _beta_quantile(p: np.ndarray, a: float, b: float) -> np.ndarray:
    """Return x in (0, 1) with F(x) = p in (0, 1), F the distribution function of Beta(a, b)."""
    half = math.exp(_log_beta_cdf(0.5, a, b)[0])
    below = _beta_quantile_below_half(np.minimum(p, half), a, b)
    above = 1 - _beta_quantile_below_half(np.minimum(1 - p, 1 - half), b, a)  # DLMF 8.17.4
    return np.where(p <= half, below, above)


def _beta_quantile_below_half(p: np.ndarray, a: float, b: float) -> np.ndarray:
    # Newton on ln F against ln x from the asymptote at 0, F ≈ x^a/(a·B). This curve bends one way
    # only, and the asymptote lies on the side from which Newton cannot overshoot.
    x = np.minimum(np.exp((np.log(p) + _log_a_beta(a, b)) / a), 0.5)
    for _ in range(10):
        log_cdf, slope = _log_beta_cdf(x, a, b)
        x = np.minimum(x * np.exp((np.log(p) - log_cdf) / slope), 0.5)
    return x


def _log_beta_cdf(x: np.ndarray | float, a: float, b: float) -> tuple[np.ndarray, np.ndarray]:
    """Return ln F(x) at 0 < x <= 1/2, and its derivative by ln x: a series of positive terms."""
    k = np.arange(100)
    series = np.polyval(np.cumprod(np.r_[1, (a + b + k) / (a + 1 + k)])[::-1], x)  # DLMF 8.17.8
    log_cdf = a * np.log(x) + b * np.log1p(-x) + np.log(series) - _log_a_beta(a, b)
    return log_cdf, a / ((1 - x) * series)


def _log_a_beta(a: float, b: float) -> float:
    return math.log(math.gamma(a + 1) * math.gamma(b) / math.gamma(a + b))  # ln(a·B(a, b))
