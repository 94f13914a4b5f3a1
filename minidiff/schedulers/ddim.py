"""DDIM: the same training, a reverse process that need not be random.

    x_s = α_s·x̂0 + √(σ_s² − s̃²)·ε̂ + s̃·z,      s̃ = η·(σ_s/σ_t)·√(1 − ᾱ_t/ᾱ_s)

η = 0 follows the probability-flow ODE with steps of order one, η = 1 is DDPM's posterior.

Source: Song, Meng & Ermon 2021, "Denoising Diffusion Implicit Models", arXiv:2010.02502.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, real_number, true_or_false
from minidiff.noise import Generators
from minidiff.prediction import combine, split
from minidiff.schedule import Level
from minidiff.schedulers.base import Scheduler, SchedulerOutput


class DDIMScheduler(Scheduler):
    """Deterministic (η = 0) or partly random sampling in tens of steps.

    Args are diffusers' (same names, same defaults). `set_alpha_to_one=False` ends at the level of
    training step 0 instead of at the data. `thresholding` replaces `clip_sample` where a
    config sets both. `steps_offset` moves only "leading" timesteps. `compat` is "diffusers" or
    "exact", see `quirks.py`.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        compat: str = "diffusers",
    ) -> None:
        self._configure(locals())

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step, see `Scheduler.step`.

        Args:
            eta: η in [0, 1]: 0 deterministic, 1 as random as DDPM.
            use_clipped_model_output: whether ε̂ follows from the clipped x̂0, so that both stay
                consistent with x_t; otherwise ε̂ is the network's.
            others: see `Scheduler.step`.
        Raises:
            InvalidArgument: eta is out of range, or as `Scheduler.step`.
        """
        clipped = true_or_false("use_clipped_model_output", use_clipped_model_output)
        return self._step(
            model_output, timestep, sample, generator, variance_noise,
            return_dict=return_dict, eta=real_number("eta", eta, 0, 1), eps_from_x0=clipped,
        )  # fmt: skip

    def update(self, x, x0, eps, now, nxt, noise, *, eta: float, eps_from_x0: bool) -> Tensor:
        if eps_from_x0:
            _, eps = split(x0, x, now, "sample")
        if eta == 0:
            return combine(nxt.alpha, x0, nxt.sigma, eps)  # DDIM eq. 12 without noise
        std = eta * nxt.sigma / now.sigma * math.sqrt(now.variance_since(nxt))  # DDIM eq. 16
        direction = self.reading.ddim_direction(now, nxt, eta, std)
        mean = combine(nxt.alpha, x0, direction, eps)  # DDIM eq. 12
        return torch.add(mean, noise(), alpha=std)

    def _levels_at(self, t: float) -> tuple[Level, Level]:
        if self.num_inference_steps is None:
            raise InvalidArgument("call set_timesteps before step")
        return self.reading.ddim_levels(self, t)

    @property
    def final_alpha_cumprod(self) -> Tensor:
        """ᾱ of the result, a tensor (): 1, or ᾱ_0 without `set_alpha_to_one`."""
        first = self.alphas_cumprod[0]
        return torch.ones_like(first) if self.config.set_alpha_to_one else first

    @property
    def final_level(self) -> Level:
        """The level of the result: that of the data, or of training step 0."""
        if self.config.set_alpha_to_one:
            return self.reading.clean()
        return self.level(0)
