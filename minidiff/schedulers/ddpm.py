"""DDPM: ancestral sampling from the posterior of the forward process.

    x_s = (α_s·β/σ_t²)·x̂0 + (α_t/α_s)·(σ_s²/σ_t²)·x_t + √β̃·z

    β = 1 − ᾱ_t/ᾱ_s,      β̃ = β·σ_s²/σ_t²

Given x0, one forward step can be undone exactly: q(x_s | x_t, x0) is Gaussian, for any s < t. The
network supplies x0 and the step draws from that Gaussian, whose variance is β̃. In the last step z
is 0.

Source: Ho, Jain & Abbeel 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from minidiff.noise import Generators
from minidiff.prediction import combine
from minidiff.schedulers.base import Scheduler, SchedulerOutput, split_variance
from minidiff.schedulers.core.inputs import host_number


class DDPMScheduler(Scheduler):
    """Ancestral sampling; stochastic, best with hundreds of steps.

    Args are diffusers' (same names, same defaults). `variance_type` is the variance of the
    reverse step: "fixed_small" is the posterior's β̃, "fixed_large" the forward step's β,
    "learned_range" an interpolation by the network's second half of the channels (Nichol &
    Dhariwal 2021, arXiv:2102.09672, eq. 15). diffusers' "fixed_large_log" and "learned" give NaN
    there and are refused here. `thresholding` replaces `clip_sample` where a config sets
    both. `steps_offset` moves only "leading" timesteps. `compat` is "diffusers" or
    "exact", see `quirks.py`.
    """

    choices: ClassVar = {
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
    }

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        compat: str = "diffusers",
    ) -> None:
        self._configure(locals())

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step, see `Scheduler.step`; "learned_range" needs 2·C channels of output."""
        interpolation = None
        if self.config.variance_type == "learned_range":
            model_output, interpolation = split_variance(model_output, sample)
        return self._step(
            model_output, timestep, sample, generator, None,
            return_dict=return_dict, interpolation=interpolation,
        )  # fmt: skip

    def previous_timestep(self, timestep: int | Tensor) -> Tensor:
        """Return the grid entry after this one, a tensor (); −1 after the last one.

        Raises:
            InvalidArgument: the timestep is not on the grid.
        """
        following = self._position(host_number(timestep)) + 1
        return self.timesteps[following] if following < len(self.grid) else torch.tensor(-1)

    def update(self, x, x0, eps, now, nxt, noise, *, interpolation: Tensor | None) -> Tensor:
        beta = now.variance_since(nxt)
        weights = (
            nxt.alpha * beta / now.sigma**2,
            now.alpha / nxt.alpha * nxt.sigma**2 / now.sigma**2,
        )  # DDPM eq. 7
        weight_x0, weight_x = self.reading.posterior(weights, now, nxt)
        mean = combine(weight_x0, x0, weight_x, x)
        if nxt.sigma == 0 and not self.reading.adds_noise_at_the_end(now, self.level(0)):
            return mean
        small = max(nxt.sigma**2 / now.sigma**2 * beta, 1e-20)  # DDPM eq. 7, β̃
        if interpolation is not None:
            fraction = (interpolation + 1) / 2
            log_variance = fraction * math.log(beta) + (1 - fraction) * math.log(small)
            return mean + torch.exp(0.5 * log_variance) * noise()  # Nichol & Dhariwal eq. 15
        variance = beta if self.config.variance_type == "fixed_large" else small
        return torch.add(mean, noise(), alpha=math.sqrt(variance))
