"""Objectives: noise levels, model input, conditioning on time, and target of the network.

For an image x0 and noise ε at a level (α, σ) the noisy image is x = α·x0 + σ·ε, and the network is
to predict the row p·x0 + q·ε of `minidiff.prediction`:

    prediction type          level                time t          input         row (p, q)
    epsilon, sample, v       of a β schedule      the step        x             of each type
    flow                     (1 − σ, σ)           T·σ             x             (−1, 1)
    edm                      (1, σ)               ¼·ln σ          c_in·x        F of EDM

    L = E_level [ w · ‖ network − (p·x0 + q·ε) ‖² ]          (mean over the elements of an image)

Each objective has a scheduler that samples it and also computes its target and input, so training
and sampling agree. The levels are distributed in one of three ways:

    uniform        in the time t
    log_normal     ln(σ/α) ~ N(mean, std²)     (Karras et al. 2022, arXiv:2206.00364, table 1)
    logit_normal   logit σ ~ N(mean, std²)     (Esser et al. 2024, arXiv:2403.03206, eq. 19)

In a flow σ/(1 − σ) is σ/α, so the last two are one formula under two names. Weights apply to the
error of x̂0, as in their papers, and are converted to weights of the network's error, which is
(p − q·α/σ) times as large:

    none           1 for the network's error
    min_snr        min(α²/σ², γ) for x̂0's        (Hang et al. 2023, arXiv:2303.09556, eq. 8)
    edm            (s² + σ_d²)/(s·σ_d)² for x̂0's, s = σ/α   (Karras et al. 2022, table 1, λ(σ))

Everything that belongs to a level is a float64 number on the host; a batch of levels goes to the
device in one piece.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.prediction import edm_row, row, split
from minidiff.runtime.shapes import append_dims
from minidiff.schedule import Level, add_noise
from minidiff.schedulers import Scheduler
from minidiff.schedulers.base import split_variance
from minidiff.schedulers.edm import EDMSigmas

MOMENTS = {"log_normal": (-1.2, 1.2), "logit_normal": (0.0, 1.0)}  # the papers' mean and std
MIN_SNR_GAMMA = 5.0  # Hang et al. 2023, section 4.3
VLB_WEIGHT = 0.001  # Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 16, λ
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # Karras et al. 2022, table 1: range of sampling

Network = Callable[[Tensor, Tensor], Tensor]  # (x, t) → output, with the condition bound

Values = Any  # an array on the host or a tensor on the device: equations hold for both


class Levels(NamedTuple):
    """The levels of a batch and what belongs to them, one entry per image.

    Attributes:
        alpha, sigma: scales of x = α·x0 + σ·ε.
        t: time, as the network is conditioned on it.
        weight: weight of the image's loss.

    `Objective.levels` returns them on the host, as float64 arrays (B,).
    """

    alpha: Values
    sigma: Values
    t: Values
    weight: Values

    def part(self, images: slice) -> "Levels":
        """Return the levels of these images of the batch."""
        return Levels(*(values[images] for values in self))

    def on(self, like: Tensor) -> "Levels":
        """Return float32 tensors on the device of `like` (B, C, *space), α and σ as (B, 1, …)."""
        table = torch.from_numpy(np.stack(self)).float()
        alpha, sigma, t, weight = table.to(like.device, non_blocking=True)
        alpha, sigma = append_dims(alpha, like.ndim), append_dims(sigma, like.ndim)
        return Levels(alpha, sigma, t, weight)

    @property
    def level(self) -> Level:
        """α and σ."""
        return Level(self.alpha, self.sigma)


class Spread(NamedTuple):
    """A normal distribution of ln(σ/α)."""

    mean: float
    std: float

    def ratios(self, u: np.ndarray) -> np.ndarray:
        """Return σ/α at quantiles in [0, 1), float64."""
        inside = torch.from_numpy(u).clamp(2**-53, 1 - 2**-53)  # 0 would be −∞
        return np.exp(self.mean + self.std * torch.special.ndtri(inside).numpy())


Weight = Callable[[Level, tuple], np.ndarray]  # (level, row) → weights of the network's error


def quantiles(n: int, generator: torch.Generator) -> np.ndarray:
    """Draw n numbers in [0, 1), one from each of n equal parts, in random order, float64.

    A batch then covers all levels evenly, which reduces the variance of the loss (Kingma et al.
    2021, arXiv:2107.00630, appendix I.1).
    """
    order = torch.randperm(n, generator=generator)
    inside = torch.rand(n, generator=generator, dtype=torch.float64)
    return ((order + inside) / n).numpy()


class Objective:
    """A prediction on the levels of a β schedule: "epsilon", "sample" or "v_prediction".

    Args:
        scheduler: scheduler that samples the trained network.
        spread: distribution of the levels; None for uniform.
        weight: function from level and row to the weight of the network's error.
    Attributes:
        scheduler: the argument.
        channels: output channels of the network per input channel.
    """

    channels = 1

    def __init__(self, scheduler: Scheduler, spread: Spread | None, weight: Weight) -> None:
        self.scheduler, self.spread, self.weight = scheduler, spread, weight

    def levels(self, u: np.ndarray) -> Levels:
        """Return the levels at quantiles u (B,) in [0, 1) of their distribution, on the host."""
        level, t = self._levels(u)
        weight = np.broadcast_to(self.weight(level, self.row(level)), u.shape)
        return Levels(level.alpha, level.sigma, t, weight)

    def loss(self, network: Network, x0: Tensor, eps: Tensor, levels: Levels) -> Tensor:
        """Return the weighted error of the network's prediction, the mean per image, (B,) float32.

        Args:
            network: (x, t) → output; x (B, C, *space), t (B,).
            x0, eps: clean images in the network's space and standard normal noise of their shape.
            levels: levels of the images, after `Levels.on`.
        """
        x = add_noise(x0, eps, levels.level)
        out = network(self.model_input(x, levels.level), levels.t).float()
        return levels.weight * self.error(out, x, x0, eps, levels)

    def error(self, out: Tensor, x: Tensor, x0: Tensor, eps: Tensor, levels: Levels) -> Tensor:
        """Return the mean squared error of each image's output, before its weight, (B,)."""
        target = self.scheduler.target(x0, eps, levels.level)
        return (out - target).square().flatten(1).mean(1)

    # --- what distinguishes the objectives ----------------------------------------------------

    def _levels(self, u: np.ndarray) -> tuple[Level, np.ndarray]:
        """Return levels (B,) and times, here whole steps."""
        schedule = self.scheduler.schedule
        if self.spread is None:
            t = np.minimum(np.floor(u * len(schedule)), len(schedule) - 1)
        else:  # samplers evaluate the network at whole steps
            t = np.rint(schedule.timestep_of(self.spread.ratios(u)))
        alpha, sigma = self._level_table[t.astype(int)].T
        return Level(alpha, sigma), t

    @cached_property
    def _level_table(self) -> np.ndarray:
        """α and σ of every step, float64 (T, 2)."""
        return np.array(self.scheduler.schedule.levels())

    def row(self, level: Level) -> tuple:
        """Return (p, q) of the network's prediction p·x0 + q·ε."""
        return row(self.scheduler.config.prediction_type, level)

    def model_input(self, x: Tensor, level: Level) -> Tensor:
        """Return the network's input for the noisy images x."""
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

    scheduler: EDMSigmas

    def _levels(self, u: np.ndarray) -> tuple[Level, np.ndarray]:
        if self.spread is None:
            sigma = SIGMA_MIN * (SIGMA_MAX / SIGMA_MIN) ** u
        else:
            sigma = self.spread.ratios(u)
        return Level(np.ones_like(sigma), sigma), np.log(sigma) / 4  # c_noise

    def row(self, level: Level) -> tuple:
        return edm_row(level, self.scheduler.config.sigma_data)

    def model_input(self, x: Tensor, level: Level) -> Tensor:
        return self.scheduler.precondition_inputs(x, level.sigma)


class LearnedVariance(Objective):
    """The prediction and, in as many further channels, the variance of the reverse step.

    L = L_simple + 0.001·L_vlb (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 16). L_vlb is the sum
    over the T steps of KL(q(x_{t−1} | x_t, x0) ‖ p(x_{t−1} | x_t)), at t = 0 the likelihood of the
    bytes, in nats per element. One step of it, times T, is an unbiased estimate. It trains the
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
        return simple + VLB_WEIGHT * len(schedule) * bound

    def bound(self, interpolation: Tensor, guess: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Return the terms of the variational bound at steps t, in nats per element, (B,).

        Args:
            interpolation: the network's v, nominally in [−1, 1]; log σ² = f·ln β + (1 − f)·ln β̃,
                f = (v + 1)/2 (eq. 15).
            guess: x̂0 that the network's prediction implies.
            x0: clean images.
            t: steps, int64 (B,).
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
        """Return x0's factor in the posterior's mean, ln β and ln β̃ by step, float32 (3, T)."""
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
    """Return ln P(x0) where x0 is one of 256 grey levels in [−1, 1], each the centre of its bin.

    The first and the last bin are open (Ho et al. 2020, arXiv:2006.11239, eq. 13).
    """
    inverse = torch.exp(-log_std)
    upper = torch.special.ndtr((x0 - mean + 1 / 255) * inverse)
    lower = torch.special.ndtr((x0 - mean - 1 / 255) * inverse)
    upper = torch.where(x0 > 0.999, 1.0, upper)
    lower = torch.where(x0 < -0.999, 0.0, lower)
    return (upper - lower).clamp_min(1e-12).log()
