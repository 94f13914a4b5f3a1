"""Objectives: how noisy the images are, what the network is shown and told, and what it should say.

For an image x0 and noise ε at a level (α, σ) the network sees x = α·x0 + σ·ε and should say the
row p·x0 + q·ε of `minidiff.prediction`:

    prediction type          level                told t          shown         row (p, q)
    epsilon, sample, v       of a β schedule      the step        x             their own
    flow                     (1 − σ, σ)           T·σ             x             (−1, 1)
    edm                      (1, σ)               ¼·ln σ          c_in·x        F of EDM

    L = E_level [ w · ‖ network − (p·x0 + q·ε) ‖² ]          (mean over the elements of an image)

Each comes with the scheduler that samples it, and asks that scheduler for target and input, so
that what is sampled is what was learnt. The levels are spread in one of three ways:

    uniform        in what the network is told
    log_normal     ln(σ/α) ~ N(mean, std²)     (Karras et al. 2022, arXiv:2206.00364, table 1)
    logit_normal   logit σ ~ N(mean, std²)     (Esser et al. 2024, arXiv:2403.03206, eq. 19)

In a flow σ/(1 − σ) is σ/α, so the last two are one formula under two names. Weights are given for
the error of x̂0, as their papers do, and turned into weights of the network's own error, which is
(p − q·α/σ) times as large:

    none           1 for the network's error
    min_snr        min(α²/σ², γ) for x̂0's        (Hang et al. 2023, arXiv:2303.09556, eq. 8)
    edm            (s² + σ_d²)/(s·σ_d)² for x̂0's, s = σ/α   (Karras et al. 2022, table 1, λ(σ))

Everything that belongs to a level is a number of the host in float64; a batch of levels goes to
the device in one piece.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.prediction import edm_row, row, split
from minidiff.runtime.shapes import append_dims
from minidiff.schedule import Level, add_noise
from minidiff.schedulers import Scheduler
from minidiff.schedulers.base import split_variance

PRESERVING = ("epsilon", "sample", "v_prediction")
PREDICTION_TYPES = (*PRESERVING, "flow", "edm")
SPREADS = {  # of the levels, by prediction type; the first is what None means
    **dict.fromkeys(PRESERVING, ("uniform", "log_normal")),
    "flow": ("logit_normal", "uniform"),
    "edm": ("log_normal", "uniform"),
}
NOISE_LEVELS = ("uniform", "log_normal", "logit_normal")
MOMENTS = {"log_normal": (-1.2, 1.2), "logit_normal": (0.0, 1.0)}  # the papers' mean and std
LOSS_WEIGHTS = ("none", "min_snr", "edm")
MIN_SNR_GAMMA = 5.0  # Hang et al. 2023, section 4.3
VLB_SHARE = 0.001  # Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 16, λ
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # Karras et al. 2022, table 1: where an EDM is sampled

Network = Callable[[Tensor, Tensor], Tensor]  # (x, t) → output, conditions already told


class Levels(NamedTuple):
    """The levels of a batch and what belongs to them, one entry an image.

    Attributes:
        alpha, sigma: of x = α·x0 + σ·ε.
        t: what the network is told.
        weight: of the image's loss.

    On the host, as `Objective.levels` makes them, all are float64 arrays (B,).
    """

    alpha: np.ndarray | Tensor
    sigma: np.ndarray | Tensor
    t: np.ndarray | Tensor
    weight: np.ndarray | Tensor

    def part(self, images: slice) -> "Levels":
        """The levels of a part of the batch."""
        return Levels(*(values[images] for values in self))

    def on(self, like: Tensor) -> "Levels":
        """float32 on the device of `like` (B, C, *space); α and σ are (B, 1, …) to multiply it."""
        table = torch.from_numpy(np.stack(self)).float()
        alpha, sigma, t, weight = table.to(like.device, non_blocking=True)
        alpha, sigma = append_dims(alpha, like.ndim), append_dims(sigma, like.ndim)
        return Levels(alpha, sigma, t, weight)

    @property
    def level(self) -> Level:
        return Level(self.alpha, self.sigma)


class Spread(NamedTuple):
    """A normal distribution of ln(σ/α)."""

    mean: float
    std: float

    def ratios(self, u: np.ndarray) -> np.ndarray:
        """σ/α at these quantiles in [0, 1), float64."""
        inside = torch.from_numpy(u).clamp(2**-53, 1 - 2**-53)  # 0 would be −∞
        return np.exp(self.mean + self.std * torch.special.ndtri(inside).numpy())


Weight = Callable[[Level, tuple], np.ndarray]  # (level, row) → weights of the network's error


def quantiles(n: int, generator: torch.Generator) -> np.ndarray:
    """Random numbers (n,) in [0, 1), one from each n-th of it, in random order, float64.

    Every batch then sees all levels evenly, which takes variance out of the loss (Kingma et al.
    2021, arXiv:2107.00630, appendix I.1).
    """
    order = torch.randperm(n, generator=generator)
    inside = torch.rand(n, generator=generator, dtype=torch.float64)
    return ((order + inside) / n).numpy()


class Objective:
    """A prediction of x on the levels of a β schedule: "epsilon", "sample" or "v_prediction".

    Args:
        scheduler: samples what is learnt.
        spread: of the levels; None for uniform.
        weight: of the loss.
    Attributes:
        scheduler: as given.
        channels: of the network's output, for each of its input.
    """

    channels = 1

    def __init__(self, scheduler: Scheduler, spread: Spread | None, weight: Weight) -> None:
        self.scheduler, self.spread, self.weight = scheduler, spread, weight

    def levels(self, u: np.ndarray) -> Levels:
        """The levels at quantiles u (B,) in [0, 1) of their distribution, on the host."""
        level, t = self._levels(u)
        weight = np.broadcast_to(self.weight(level, self.row(level)), u.shape)
        return Levels(level.alpha, level.sigma, t, weight)

    def loss(self, network: Network, x0: Tensor, eps: Tensor, levels: Levels) -> Tensor:
        """Weighted squared error of the network's prediction, an image's mean, (B,) float32.

        Args:
            network: (x, t) → output; x (B, C, *space), t (B,).
            x0, eps: clean images in the network's space and standard normal noise like them.
            levels: of the images, after `Levels.on`.
        """
        x = add_noise(x0, eps, levels.level)
        out = network(self.shown(x, levels.level), levels.t).float()
        return levels.weight * self.error(out, x, x0, eps, levels)

    def error(self, out: Tensor, x: Tensor, x0: Tensor, eps: Tensor, levels: Levels) -> Tensor:
        """Mean squared error of an image's output, before its weight, (B,)."""
        target = self.scheduler.target(x0, eps, levels.level)
        return (out - target).square().flatten(1).mean(1)

    # --- what distinguishes the objectives ----------------------------------------------------

    def _levels(self, u: np.ndarray) -> tuple[Level, np.ndarray]:
        """Levels (B,) and what the network is told, whole steps."""
        schedule = self.scheduler.schedule
        if self.spread is None:
            t = np.minimum(np.floor(u * len(schedule)), len(schedule) - 1)
        else:  # the samplers ask at whole steps
            t = np.rint(schedule.timestep_of(self.spread.ratios(u)))
        alpha, sigma = np.array(schedule.levels())[t.astype(int)].T
        return Level(alpha, sigma), t

    def row(self, level: Level) -> tuple:
        """(p, q) of what the network says."""
        return row(self.scheduler.config.prediction_type, level)

    def shown(self, x: Tensor, level: Level) -> Tensor:
        """What the network sees of x."""
        return x


class FlowObjective(Objective):
    """The slope of the straight line from data to noise, x = (1 − σ)·x0 + σ·ε."""

    def _levels(self, u: np.ndarray) -> tuple[Level, np.ndarray]:
        sigma = u if self.spread is None else (ratio := self.spread.ratios(u)) / (1 + ratio)
        return Level(1 - sigma, sigma), sigma * self.scheduler.config.num_train_timesteps

    def row(self, level: Level) -> tuple:
        return row("flow", level)


class EDMObjective(Objective):
    """F of EDM's preconditioning, x = x0 + σ·ε (Karras et al. 2022, table 1)."""

    def _levels(self, u: np.ndarray) -> tuple[Level, np.ndarray]:
        if self.spread is None:
            sigma = SIGMA_MIN * (SIGMA_MAX / SIGMA_MIN) ** u
        else:
            sigma = self.spread.ratios(u)
        return Level(np.ones_like(sigma), sigma), np.log(sigma) / 4  # c_noise

    def row(self, level: Level) -> tuple:
        return edm_row(level, self.scheduler.config.sigma_data)

    def shown(self, x: Tensor, level: Level) -> Tensor:
        return self.scheduler.precondition_inputs(x, level.sigma)


class LearnedVariance(Objective):
    """The prediction, and in as many channels again the variance of the reverse step.

    L = L_simple + 0.001·L_vlb (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 16). L_vlb is the sum
    over the T steps of KL(q(x_{t−1} | x_t, x0) ‖ p(x_{t−1} | x_t)), at t = 0 the likelihood of the
    bytes, in nats an element; one step of it, times T, is its unbiased estimate. It teaches the
    variance alone: the mean is detached. Images are pixels in [−1, 1] of 256 grey levels.
    """

    channels = 2

    def error(self, out: Tensor, x: Tensor, x0: Tensor, eps: Tensor, levels: Levels) -> Tensor:
        prediction, interpolation = split_variance(out, x)
        simple = super().error(prediction, x, x0, eps, levels)
        schedule = self.scheduler.schedule
        guess, _ = split(
            prediction.detach(), x, levels.level, self.scheduler.config.prediction_type
        )
        bound = self.bound(interpolation, guess, x0, levels.t.long())
        return simple + VLB_SHARE * len(schedule) * bound

    def bound(self, interpolation: Tensor, guess: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """The term of the variational bound that belongs to step t, nats an element, (B,).

        Args:
            interpolation: the network's v in [−1, 1], nominally; log σ² = f·ln β + (1 − f)·ln β̃,
                f = (v + 1)/2 (eq. 15).
            guess: the x̂0 that the network's prediction implies.
        """
        table = self._posterior(x0.device)[:, t]
        gain, log_beta, log_small = (append_dims(row, x0.ndim) for row in table)
        fraction = (interpolation + 1) / 2
        log_variance = fraction * log_beta + (1 - fraction) * log_small
        gap = gain * (x0 - guess)  # between the means of q and p, DDPM eq. 7
        wider = log_variance - log_small
        kl = (wider + torch.expm1(-wider) + gap.square() * torch.exp(-log_variance)) / 2
        decoder = -byte_log_likelihood(x0, guess, log_variance / 2)
        return torch.where(t == 0, decoder.flatten(1).mean(1), kl.flatten(1).mean(1))

    def _posterior(self, device: torch.device) -> Tensor:
        """Of all steps: what x0 counts in the posterior's mean, ln β and ln β̃, (3, T) float32."""
        if not hasattr(self, "_table"):
            levels = self.scheduler.schedule.levels()
            rows = []
            for now, nxt in zip(levels, [Level(1.0, 0.0), *levels], strict=False):
                beta = now.variance_since(nxt)
                small = nxt.sigma**2 / now.sigma**2 * beta  # DDPM eq. 7, β̃
                rows.append([nxt.alpha * beta / now.sigma**2, math.log(beta), small])
            table = np.array(rows).T
            table[2, 0] = (
                table[2, min(1, len(levels) - 1)] or levels[0].sigma ** 2
            )  # 0 has no logarithm
            table[2] = np.log(table[2])
            self._table = torch.from_numpy(table).float()
        if self._table.device != device:  # once: a copy at every step would make the host wait
            self._table = self._table.to(device, non_blocking=True)
        return self._table


def byte_log_likelihood(x0: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """ln P(x0) where x0 is one of 256 grey levels in [−1, 1], each the middle of its bin.

    The first and the last bin are open (Ho et al. 2020, arXiv:2006.11239, eq. 13).
    """
    inverse = torch.exp(-log_std)
    upper = torch.special.ndtr((x0 - mean + 1 / 255) * inverse)
    lower = torch.special.ndtr((x0 - mean - 1 / 255) * inverse)
    upper = torch.where(x0 > 0.999, 1.0, upper)
    lower = torch.where(x0 < -0.999, 0.0, lower)
    return (upper - lower).clamp_min(1e-12).log()
