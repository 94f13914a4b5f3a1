"""Latent consistency models: a network that jumps to the data in one step, used a few times.

A consistency function f maps any point of a trajectory of the probability-flow ODE to the clean
end of it. Written as

    f(x, t) = c_skip(t)·x + c_out(t)·x̂0(x, t),      c_skip(0) = 1,  c_out(0) = 0

it is the identity at t = 0 by construction. Sampling jumps to the data, adds fresh noise of the
next, lower level, and jumps again.

Sources: Song et al. 2023, "Consistency Models", arXiv:2303.01469; Luo et al. 2023, "Latent
Consistency Models", arXiv:2310.04378.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, real_number, true_or_false, whole_number
from minidiff.noise import Generators
from minidiff.prediction import combine
from minidiff.schedulers.base import Evaluation, IndexedScheduler, SchedulerOutput
from minidiff.schedulers.ddim import DDIMScheduler
from minidiff.schedulers.ddpm import DDPMScheduler

SIGMA_DATA = 0.5  # of the data, as in EDM; diffusers has it fixed


def boundary(scaled: Any) -> tuple[Any, Any]:
    """Return c_skip and c_out of f at s·t, a number or a tensor (Luo et al. 2023, appendix A)."""
    norm = (scaled**2 + SIGMA_DATA**2) ** 0.5
    return (SIGMA_DATA / norm) ** 2, scaled / norm


class LCMSchedulerOutput(NamedTuple):
    """The result of `LCMScheduler.step`.

    Attributes:
        prev_sample: x at the next level, (B, C, *space); after the last step `denoised`.
        denoised: f(x, t), the end of the trajectory through x.
    """

    prev_sample: Tensor
    denoised: Tensor

    __getitem__ = SchedulerOutput.__getitem__
    keys, values, to_tuple = SchedulerOutput.keys, SchedulerOutput.values, SchedulerOutput.to_tuple


class LCMScheduler(IndexedScheduler):
    """One to eight steps, for networks distilled to it.

    Args are diffusers' (same names, same defaults). The network was distilled on
    `original_inference_steps` evenly spaced training steps, and sampling visits some of them.
    `timestep_scaling` sets how fast c_skip falls with t. `timestep_spacing`, `steps_offset` and
    `set_alpha_to_one` have no effect, as in diffusers: the steps and the clean end are fixed. Every
    Stable Diffusion config has them, and they are kept for the next class that is made from this
    one's config. `thresholding` replaces `clip_sample` where a config sets both. `compat` is
    "diffusers" or "exact", see `quirks.py`.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Sequence[float] | None = None,
        original_inference_steps: int = 50,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
        compat: str = "diffusers",
    ) -> None:
        self._configure(locals())

    final_alpha_cumprod = DDIMScheduler.final_alpha_cumprod
    previous_timestep = DDPMScheduler.previous_timestep

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """Choose the training steps that sampling visits, and forget any sampling under way.

        Args:
            num_inference_steps: number of steps n, spread over those that the network was distilled
                on.
            device: device of `self.timesteps`.
            original_inference_steps: number of distilled steps, instead of the option of that name.
            timesteps: strictly falling steps in 0 … T−1, instead of a number.
            strength: fraction in (0, 1] of the noise to start at (image-to-image).
        Raises:
            InvalidArgument: neither or both are given, a value is outside its range, or there are
                fewer distilled steps than requested.
        """
        if real_number("strength", strength, 0, 1) == 0:
            raise InvalidArgument("strength must be above 0, got 0")
        if timesteps is None and num_inference_steps is not None:
            whole_number("num_inference_steps", num_inference_steps, 1)
            grid = self._distilled(num_inference_steps, original_inference_steps, strength)
            end = self.reading.clean()
        else:
            if original_inference_steps is not None:
                raise InvalidArgument(
                    "original_inference_steps has no effect with timesteps: leave it out"
                )
            chosen = self._chosen_grid(num_inference_steps, timesteps)
            num_inference_steps = len(chosen)
            grid = chosen[len(chosen) - int(len(chosen) * strength) :]
            if not grid:
                raise InvalidArgument(
                    f"strength={strength:g} leaves none of the timesteps {chosen}"
                )
            end = self.reading.consistency_end(self.level(grid[-1]), len(grid) < len(chosen))
        levels = [*map(self.level, grid), end]
        self._place(grid, levels, device, steps=num_inference_steps)

    def _distilled(self, n: int, original: int | None, strength: float) -> list[int]:
        """Return n of the steps that the network was distilled on."""
        steps = self.config.num_train_timesteps
        original = self.config.original_inference_steps if original is None else original
        whole_number("original_inference_steps", original, 1, steps)
        reach = int(original * strength)
        if n > reach:
            raise InvalidArgument(
                f"num_inference_steps must be at most {reach}, original_inference_steps times "
                f"strength, {original} x {strength:g}; got {n}"
            )
        falling = np.arange(reach, 0, -1) * (steps // original) - 1
        return falling[np.floor(np.linspace(0, reach, n, endpoint=False)).astype(int)].tolist()

    def _evaluate(self, out, x, now, noise) -> Evaluation:
        _, _, x0, eps = super()._evaluate(out, x, now, noise)
        c_skip, c_out = boundary(self.grid[self._step_index] * self.config.timestep_scaling)
        jump = combine(c_skip, x, c_out, x0)  # Consistency Models eq. 5
        return Evaluation(now, x, jump, eps)

    def update(self, x, x0, eps, now, nxt, noise) -> Tensor:
        if nxt.sigma == 0:
            return x0
        # Consistency Models algorithm 1
        return torch.add(nxt.alpha * x0, noise(), alpha=nxt.sigma)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, Tensor]:
        """Jump to the data and back up to noise; arguments and errors as in `Scheduler.step`."""
        true_or_false("return_dict", return_dict)
        prev, x0 = self._step(model_output, timestep, sample, generator, None, return_dict=False)
        output = LCMSchedulerOutput(prev, x0)  # type: ignore[call-arg]  # methods are no fields
        return output if return_dict else (prev, x0)
