"""The step that every scheduler shares: conversion, clipping, history, noise, forward noising.

A scheduler steps through a grid of levels from noise to data. `step` takes the network's output at
one level, turns it into (x0, ε) with `prediction.split`, and calls `update`, the one method that
implements a paper, for the sample at the next level. Options and grid are the two layers below:
`core/config.py` and `core/grid.py`. Class names, options and attributes are those of diffusers
(https://huggingface.co/docs/diffusers/api/schedulers/overview), so a scheduler works in its
pipelines and reads and writes its `scheduler_config.json`.
"""

import copy
import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.noise import Generators, randn
from minidiff.prediction import clip, dynamic_threshold, split, target
from minidiff.schedule import Level, add_noise
from minidiff.schedulers.core import table
from minidiff.schedulers.core.grid import Grid
from minidiff.schedulers.core.inputs import check_pair, check_step, host_number, model_input
from minidiff.schedulers.core.quirks import Exact

Noise = Callable[[], Tensor]


class SchedulerOutput(NamedTuple):
    """The result of `step`.

    Attributes:
        prev_sample: x at the next, cleaner level, (B, C, *space).
        pred_original_sample: the clean sample x̂0 that this step predicted, after clipping.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor

    # diffusers' outputs are read by name as well: output["prev_sample"], output.to_tuple().

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else tuple(self)[key]

    def keys(self) -> tuple[str, ...]:
        return self._fields

    def values(self) -> tuple[Tensor, ...]:
        return tuple(self)

    def to_tuple(self) -> tuple[Tensor, ...]:
        return tuple(self)


class Evaluation(NamedTuple):
    """One evaluation of the network: its input x, and the x0 and ε that its output implies."""

    level: Level
    x: Tensor
    x0: Tensor
    eps: Tensor


class Scheduler(Grid):
    """Base of all schedulers. A new sampler implements `update`, and `__init__` if it has options.

    Attributes:
        init_noise_sigma: standard deviation of the noise that sampling starts from.
        past: the last `history` evaluations, the oldest first.
        noise_source: function from a tensor to the noise of the next step, in its shape; None to
            draw from a generator. `coefficients` sets it.
    See `Grid` and `Configured` for the others.
    """

    order = 1  # network evaluations per step, in diffusers' pipelines
    init_noise_sigma = 1.0
    history = 0  # number of earlier evaluations that `update` uses
    noise_source: Callable[[Tensor], Tensor] | None = None
    compatibles: Sequence[type["Scheduler"]] = ()  # classes that accept its config, as in diffusers

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        compat: str = "exact",
    ) -> None:
        self._configure(locals())

    def update(
        self, x: Tensor, x0: Tensor, eps: Tensor, now: Level, nxt: Level, noise: Noise
    ) -> Tensor:
        """Return the sample at `nxt` from the sample x = α·x0 + σ·ε at `now`: the paper.

        Args:
            x, x0, eps: noisy sample, predicted clean sample (clipped) and predicted noise.
            now, nxt: levels; `nxt.sigma` may be 0.
            noise: function that returns standard normal noise of the shape of x; called at most
                once.
        `self.past[-1]` is the evaluation before this one, where `history` is at least 1.
        """
        raise NotImplementedError  # every paper is a subclass

    def _use_reading(self, reading: Exact) -> None:
        self.past: deque[Evaluation] = deque(maxlen=self.history)
        super()._use_reading(reading)

    def copied(self) -> Self:
        """Return a copy whose steps and grids change nothing of this scheduler."""
        other = copy.copy(self)
        other.past = copy.copy(self.past)  # the only state that is changed in place
        return other

    def reread(self, reading: Exact) -> Self:
        """Return this scheduler under another reading, such as `quirks.departing("phi3")`."""
        other = copy.copy(self)
        other._use_reading(reading)
        return other

    def restart(self, begin_index: int = 0) -> None:
        """Discard any sampling in progress and start again on the same grid, see `Grid.restart`."""
        self.past.clear()
        super().restart(begin_index)

    # --- one step --------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Return the network's input for a sample x_t.

        Variance-preserving schedulers return the sample.
        """
        return model_input(sample, timestep)

    def scaled_input(self, sample: Tensor, level: Level) -> Tensor:
        """Return the network's input for a sample at any level, see `scale_model_input`."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step towards the data.

        Before `set_timesteps` it warns, or is refused where diffusers has no grid then. DDPM and
        DDIM look their levels up, so that a step may be repeated; the others refuse one too many.

        Args:
            model_output, sample: network output and its unscaled input x_t, (B, C, *space).
            timestep: entry of `timesteps` at which the network was evaluated. A tensor on another
                device is read back (a sync); `sample.py` passes host integers.
            generator: source of the noise, see `minidiff.noise.randn`; stochastic methods only.
            variance_noise: the noise itself, instead of a generator.
            return_dict: False for a plain tuple.
        Raises:
            InvalidArgument: the timestep is not on the grid, or shapes or dtypes do not fit.
        """
        return self._step(
            model_output, timestep, sample, generator, variance_noise, return_dict=return_dict
        )

    def _step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators,
        variance_noise: Tensor | None,
        *,
        return_dict: bool,
        **options: Any,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        check_step(model_output, sample, variance_noise, generator, return_dict)
        now, nxt = self._levels_at(self._host_timestep(timestep))
        noise = self._noise(model_output, generator, variance_noise)
        here = self._evaluate(model_output, sample, now, noise, **options)
        now, x, x0, eps = here
        prev = self.update(x, x0, eps, now, nxt, noise, **options)
        if self.num_inference_steps is None:
            every = f"all {len(self.grid)} entries of its default grid"
            warnings.warn(f"step before set_timesteps visits {every}", stacklevel=3)
        if self.history:
            self.past.append(here)
        if self._step_index is not None:
            self._step_index += 1
            if self.history and self._step_index == len(self.grid):
                self.past.clear()  # no later step needs the history
        prev = prev.to(model_output.dtype)
        return SchedulerOutput(prev, x0) if return_dict else (prev, x0)

    def _host_timestep(self, timestep: float | Tensor) -> float:
        """Return the timestep as a number, without a sync where steps are counted."""
        i = self._step_index
        counted = i is not None and i < len(self.grid)
        if counted and isinstance(timestep, Tensor) and not timestep.is_cpu:
            return self.grid[i]
        return host_number(timestep)

    def _evaluate(
        self, out: Tensor, x: Tensor, now: Level, noise: Noise, **options: Any
    ) -> Evaluation:
        """Return what `update` takes: x (churn adds noise to it), x0 clipped, ε not clipped."""
        x0, eps = self._split(out, x, now)
        return Evaluation(now, x, self._clip(x0), eps)

    def _split(self, out: Tensor, x: Tensor, now: Level) -> tuple[Tensor, Tensor]:
        """Return (x0, ε) that the output implies."""
        return split(out, x, now, self.config.prediction_type)

    def split(self, model_output: Tensor, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Return the clean sample and the noise, (x0, ε), that the output for x implies.

        Nothing is clipped. A learned variance in the output is ignored.

        Args:
            model_output, x: network output and noisy sample, (B, C, *space).
            level: α and σ of x.
        """
        if self.config.get("variance_type") in ("learned", "learned_range"):
            model_output, _ = split_variance(model_output, x)
        return self._split(model_output, x, level)

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """Return the network's target for α·x0 + σ·ε: the inverse of `split`."""
        return target(x0, eps, level, self.config.prediction_type)

    def _levels_at(self, t: float) -> tuple[Level, Level]:
        if self.history and t == self.grid[self._begin_index or 0]:
            self.past.clear()  # sampling begins again
        return self.grid_levels(t)

    def _noise(self, like: Tensor, generator: Generators, variance_noise: Tensor | None) -> Noise:
        """Return the function from which a stochastic step takes its noise."""
        if variance_noise is not None:
            return lambda: variance_noise
        if (source := self.noise_source) is not None:
            return lambda: source(like)
        return lambda: randn(like.shape, generator, like.device, self._noise_dtype(like))

    def _noise_dtype(self, model_output: Tensor) -> torch.dtype:
        return model_output.dtype

    def _clip(self, x0: Tensor) -> Tensor:
        c = self.config
        if c.get("thresholding"):
            return dynamic_threshold(x0, c.dynamic_thresholding_ratio, c.sample_max_value)
        return clip(x0, c.clip_sample_range) if c.get("clip_sample") else x0

    def coefficients(self, num_inference_steps: int, **step_options: Any) -> table.Coefficients:
        """Return the table A, B, C of this sampler's linear steps, see `schedulers/core/table.py`.

        Args:
            num_inference_steps: number of steps, as for `set_timesteps`.
            step_options: options of `step`, such as DDIM's `eta`.
        Raises:
            InvalidArgument: an option makes a step nonlinear, or see `set_timesteps`.
        """
        return table.coefficients(self, num_inference_steps, **step_options)

    # --- forward noising -------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t = α_t·x0 + σ_t·ε for training steps (B,), or (1,) for all images."""
        check_pair("noise", noise, "original_samples", original_samples)
        return add_noise(original_samples, noise, self._batch_level(timesteps, original_samples))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return v = α·ε − σ·x0 for a batch of training steps, the target of "v_prediction"."""
        check_pair("noise", noise, "sample", sample)
        return target(sample, noise, self._batch_level(timesteps, sample), "v_prediction")

    def _batch_level(self, timesteps: Tensor, like: Tensor) -> Level:
        t = self._flat(timesteps).to(like.device)
        if t.dtype not in (torch.int64, torch.int32) or len(t) not in (1, like.shape[0]):
            raise InvalidArgument(
                f"timesteps must be 1 or {like.shape[0]} integers, "
                f"got {t.dtype} of shape {tuple(t.shape)}"
            )
        if t.is_cpu and len(t) and not 0 <= int(t.min()) <= int(t.max()) < len(self.schedule):
            raise InvalidArgument(
                f"timesteps must be in 0..{len(self.schedule) - 1}, got {t.min():g} to {t.max():g}"
            )
        return self.schedule.at(t.expand(like.shape[0]) if len(t) == 1 else t, like)


class IndexedScheduler(Scheduler):
    """A scheduler that looks up the first timestep, then counts, as multistep methods must."""

    has_default_grid = False  # may step before `set_timesteps`, on the grid of all training steps

    def due_levels(self, t: float) -> tuple[Level, Level]:
        """Return the levels of the grid entry that is due, and of the one after it."""
        i = self._advance_to(t)
        return self.levels[i], self.levels[i + 1]

    _levels_at = due_levels

    def index_for_timestep(
        self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None
    ) -> int:
        """Return the grid entry at this timestep, the second one where it is repeated.

        Args:
            timestep: entry of the grid.
            schedule_timesteps: grid to search instead of `timesteps`.
        Raises:
            InvalidArgument: the grid does not have this timestep.
        """
        grid = self.timesteps if schedule_timesteps is None else schedule_timesteps
        found = (grid == host_number(timestep)).nonzero().flatten().tolist()
        if not found:
            raise InvalidArgument(f"timestep {timestep} is not among scheduler.timesteps")
        return found[min(1, len(found) - 1)]

    def _advance_to(self, t: float) -> int:
        """Return the grid entry of this step, by counting; the first step looks it up."""
        if self.num_inference_steps is None and not self.has_default_grid:
            raise InvalidArgument("call set_timesteps before step")
        if self._step_index is None:
            self._step_index = self._position(t) if self._begin_index is None else self._begin_index
        if self._step_index >= len(self.grid):
            raise InvalidArgument(
                f"all {len(self.grid)} steps are done: call set_timesteps to sample again"
            )
        if not math.isclose(t, self.grid[self._step_index], rel_tol=1e-5, abs_tol=1e-5):
            self._position(t)  # refuses a timestep that this grid does not have
        return self._step_index


def split_variance(model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Return the prediction and the learned variance, each half of the output's 2·C channels.

    Raises:
        InvalidArgument: the output does not have twice the channels of the sample.
    """
    if model_output.ndim != sample.ndim or model_output.shape[1] != 2 * sample.shape[1]:
        raise InvalidArgument(
            f"model_output must have {2 * sample.shape[1]} channels for a learned variance_type, "
            f"got shape {tuple(model_output.shape)}"
        )
    prediction, variance = model_output.chunk(2, dim=1)
    return prediction, variance
