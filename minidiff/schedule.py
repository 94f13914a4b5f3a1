"""The one noise schedule: every β and every ᾱ of the project is in this file.

Forward noising mixes a clean sample x0 with Gaussian noise ε,

    x_t = α_t · x0 + σ_t · ε,        α_t = √ᾱ_t,   σ_t = √(1 − ᾱ_t),   ᾱ_t = ∏_{s ≤ t} (1 − β_s)

(Ho et al. 2020, arXiv:2006.11239, eq. 4). The rest of the project never sees β or ᾱ, only a
`Level`: the pair (α, σ). Its log-SNR is λ = ln(α/σ) (Kingma et al. 2021, arXiv:2107.00630), the
variable in which DPM-Solver integrates.

Tables are float64. diffusers builds the same tables in float32, so `dtype=torch.float32` is its
reading: the same code, rounded after every operation.
"""

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, one_of, real_number, whole_number

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
MAX_TRAIN_TIMESTEPS = 1_000_000  # tables are held in memory; more than this is a typing error


class Level(NamedTuple):
    """How much signal and how much noise: x = alpha · x0 + sigma · ε.

    Both are Python floats in [0, 1] for a sampler, or tensors that broadcast over (B, C, *space)
    for a training batch in which every image has its own level.
    """

    alpha: float | Tensor
    sigma: float | Tensor

    @property
    def lam(self) -> float:
        """λ = ln(α/σ), half the log signal-to-noise ratio; +inf when clean, −inf for pure noise."""
        if self.sigma == 0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf

    def variance_since(self, cleaner: "Level") -> float:
        """1 − ᾱ_t/ᾱ_s: the variance that forward noising adds from level s to this one, t.

        From one training step to the next it is β (DDPM eq. 2).
        """
        return 1 - (self.alpha / cleaner.alpha) ** 2


CLEAN = Level(1.0, 0.0)


def add_noise(x0: Tensor, eps: Tensor, level: Level) -> Tensor:
    """Forward noising: x = α·x0 + σ·ε (DDPM eq. 4).

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
    """ᾱ_t for t = 0 … T−1, looked up as `Level`s.

    Args:
        betas: (T,) tensor of β_t in (0, 1], float64 (exact) or float32 (diffusers' reading). Only
            the last may be 1: nothing is left of the signal then.
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
    ) -> "NoiseSchedule":
        """Build a schedule by the name diffusers gives it.

        Args:
            name: "linear" (DDPM), "scaled_linear" (latent diffusion: linear in √β),
                "squaredcos_cap_v2" (the cosine schedule of Nichol & Dhariwal 2021,
                arXiv:2102.09672, eq. 17, β capped at 0.999) or "sigmoid" (GeoDiff).
            num_train_timesteps: T, the number of training steps.
            beta_start, beta_end: first and last β in (0, 1); the cosine schedule ignores them.
            trained_betas: T values of β that replace the named schedule.
            rescale_zero_snr: shift and scale √ᾱ so that ᾱ_{T−1} = 0 (Lin et al. 2023,
                arXiv:2305.08891, algorithm 1).
            dtype: torch.float64, or torch.float32 for diffusers' rounding.
        Raises:
            InvalidArgument: unknown name or a value outside its range.
        """
        betas = _betas(name, num_train_timesteps, beta_start, beta_end, trained_betas, dtype)
        return cls(_zero_terminal_snr(betas) if rescale_zero_snr else betas)

    def ending_at(self, alpha_bar: float) -> "NoiseSchedule":
        """This schedule with another ᾱ_{T−1}; β is as before."""
        other = copy.copy(self)
        other._tabulate(torch.cat([self.alpha_bar[:-1], self.alpha_bar.new_tensor([alpha_bar])]))
        return other

    def __len__(self) -> int:
        return len(self._levels)

    def __getitem__(self, t: int) -> Level:
        """The level of training step t in 0..T−1, as Python floats. Raises InvalidArgument."""
        return self._levels[whole_number("timestep", t, 0, len(self) - 1)]

    def levels(self) -> list[Level]:
        """The levels of all T training steps, as Python floats."""
        return list(self._levels)

    def at(self, t: Tensor, like: Tensor) -> Level:
        """The levels of a batch of training steps, as tensors to multiply `like` with.

        Args:
            t: (B,) integer steps in 0..T−1 on the device of `like` (not checked: that would sync).
            like: (B, C, *space); gives dtype, device and number of axes.
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


def _betas(
    name: str,
    steps: int,
    start: float,
    end: float,
    trained: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    steps = whole_number("num_train_timesteps", steps, 1, MAX_TRAIN_TIMESTEPS)
    if trained is not None:
        return _checked_betas(trained, dtype)
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
    return torch.tensor(_cosine_betas(steps), dtype=dtype)


def _cosine_betas(steps: int, offset: float = 0.008, cap: float = 0.999) -> list[float]:
    def alpha_bar(s: float) -> float:
        return math.cos((s + offset) / (1 + offset) * math.pi / 2) ** 2  # Nichol & Dhariwal eq. 17

    return [min(1 - alpha_bar((t + 1) / steps) / alpha_bar(t / steps), cap) for t in range(steps)]


def _checked_betas(trained: Sequence[float], dtype: torch.dtype) -> Tensor:
    try:
        betas = torch.as_tensor(np.asarray(trained, dtype=np.float64), dtype=dtype)
    except (TypeError, ValueError, OverflowError):
        betas = torch.empty(0)
    if betas.ndim != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
        raise InvalidArgument(
            f"trained_betas must be a sequence of numbers in (0, 1), got {str(trained)[:80]}"
        )
    return betas


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))  # Lin et al. 2023, algorithm 1
    alpha_bar = root**2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
