"""DDIM run upwards: the noise that DDIM would turn into a given sample.

    x_t = α_t·x̂0 + σ_t·ε̂,      (x̂0, ε̂) from the network at the cleaner level s that x is at

This is an Euler step of the same ordinary differential equation as DDIM's, from the other end. The
way back misses the start only by how much ε̂ changes within a step.

Sources: Song, Meng & Ermon 2021, "Denoising Diffusion Implicit Models", arXiv:2010.02502, section
4.3; used to edit real pictures by Mokady et al. 2022, "Null-text inversion", arXiv:2211.09794.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.prediction import combine
from minidiff.schedule import Level
from minidiff.schedulers.base import IndexedScheduler, SchedulerOutput


class DDIMInverseScheduler(IndexedScheduler):
    """From a clean sample up to noise; `timesteps` rise.

    Args are diffusers' (same names, same defaults). `set_alpha_to_one=False` takes the sample to
    be at the level of training step 0 instead of clean: give both classes the same. Clipping x̂0
    makes the way up differ from the way back. `compat` is "diffusers" or "exact", see
    `quirks.py`.
    """

    choices: ClassVar = {"timestep_spacing": ("leading", "trailing")}

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
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        compat: str = "diffusers",
    ) -> None:
        self._configure(locals())

    def _prepare(self) -> None:
        super()._prepare()
        self._set_grid(*self.reading.inversion_grid(self, self.grid[::-1]), device=None)

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        """Choose the training steps to visit upwards, and forget any inversion under way.

        Args:
            num_inference_steps: number of steps in 1 … T, spaced by `timestep_spacing`.
            device: device of `self.timesteps`.
        Raises:
            InvalidArgument: the number is outside its range, or the options cannot work with it.
        """
        rising = self._chosen_grid(num_inference_steps, None)[::-1]
        self._place(*self.reading.inversion_grid(self, rising), device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step towards noise; arguments and errors as in `Scheduler.step`."""
        return self._step(model_output, timestep, sample, None, None, return_dict=return_dict)

    def update(self, x, x0, eps, now, nxt, noise) -> Tensor:
        return combine(nxt.alpha, x0, nxt.sigma, eps)  # DDIM eq. 12 with σ = 0, upwards

    def _levels_at(self, t: float) -> tuple[Level, Level]:
        if self.num_inference_steps is None:
            raise InvalidArgument("call set_timesteps before step")
        return self.reading.inversion_levels(self, t)

    def _check_levels(self, levels: list[Level]) -> None:
        if levels[0].sigma == 0 and self.config.prediction_type == "sample":
            raise InvalidArgument(
                "prediction_type 'sample' does not determine the noise of a clean sample, where "
                "inversion starts: use set_alpha_to_one=False"
            )

    @property
    def final_level(self) -> Level:
        """The level of the clean end: where DDIM ends and this class begins."""
        return self.reading.clean() if self.config.set_alpha_to_one else self.level(0)
