"""What every scheduler shares: options, grid, history, clipping, and the contract of diffusers.

A scheduler walks a grid of levels from noise to data. `step` takes the network's output at one
level, turns it into (x0, ε) with `prediction.split`, and asks `update`, the one method a paper
fills in, for the sample at the next level. Class names, options and attributes are those of
diffusers (https://huggingface.co/docs/diffusers/api/schedulers/overview), so a scheduler drops
into its pipelines and reads and writes its `scheduler_config.json`.
"""

import inspect
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff import checkpoint
from minidiff.checkpoint import Config
from minidiff.errors import InvalidArgument, one_of, real_number, whole_number
from minidiff.noise import Generators, randn
from minidiff.prediction import PREDICTION_TYPES, clip, dynamic_threshold, split, target
from minidiff.schedule import Level, NoiseSchedule, add_noise
from minidiff.schedulers.quirks import READINGS

TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")
CONFIG_NAME = "scheduler_config.json"

# Each option, whichever scheduler has it, is checked in one place: here.
_FLAGS = (
    "clip_sample",
    "thresholding",
    "rescale_betas_zero_snr",
    "set_alpha_to_one",
    "lower_order_final",
    "euler_at_final",
)
_CHOICES = {
    "timestep_spacing": TIMESTEP_SPACINGS,
    "prediction_type": PREDICTION_TYPES,
    "compat": tuple(READINGS),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    "solver_type": ("midpoint", "heun"),
    "final_sigmas_type": ("zero", "sigma_min"),
}


class SchedulerOutput(NamedTuple):
    """What `step` returns.

    Attributes:
        prev_sample: x at the next, cleaner level, (B, C, *space).
        pred_original_sample: the clean sample x̂0 that this step predicted, after clipping.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class Past(NamedTuple):
    """One earlier evaluation of the network, for multistep methods."""

    level: Level
    x0: Tensor


class Scheduler:
    """Base of all schedulers. A new sampler writes `__init__` (its options) and `update`.

    Attributes:
        config: the options, as a dict with attribute access.
        timesteps: (n,) int64 tensor, the training steps at which the network is asked, falling.
        grid: the same as a list of host integers.
        levels: n + 1 `Level`s: of each timestep, and of the end.
        num_inference_steps: n, or None before `set_timesteps`.
        init_noise_sigma: standard deviation of the noise that sampling starts from.
    """

    order = 1  # network evaluations a step, in diffusers' pipelines
    init_noise_sigma = 1.0
    history = 0  # earlier evaluations that `update` looks at
    unsupported: Mapping[str, Any] = {}  # option -> the only value that is supported so far

    def update(
        self,
        x: Tensor,
        x0: Tensor,
        eps: Tensor,
        now: Level,
        nxt: Level,
        noise: Callable[[], Tensor],
    ) -> Tensor:
        """The paper: the sample at `nxt` from the sample x = α·x0 + σ·ε at `now`.

        Args:
            x, x0, eps: noisy sample, predicted clean sample (clipped) and predicted noise.
            now, nxt: levels; `nxt.sigma` may be 0.
            noise: called for standard normal noise of the shape of x, at most once.
        `self.past[-1]` is the evaluation before this one, if `history` asks for any.
        """
        raise NotImplementedError  # a subclass is the paper

    # --- options ---------------------------------------------------------------------------

    def _configure(self, options: dict[str, Any]) -> None:
        """Check the constructor's arguments, keep them as `config` and build the tables."""
        options = {k: v for k, v in options.items() if k not in ("self", "__class__")}
        for name, value in options.items():
            _check_option(type(self).__name__, name, value, self.unsupported)
        defaults = self._defaults()
        config = Config(options, _class_name=type(self).__name__)
        if isinstance(config["trained_betas"], np.ndarray | Tensor):
            config["trained_betas"] = config["trained_betas"].tolist()
        config["_use_default_values"] = [k for k, v in options.items() if _same(v, defaults[k])]
        self._internal_dict = config  # diffusers' pipelines assign to this name
        self.reading = READINGS[config.compat]
        self.schedule = self._schedule()
        self.num_inference_steps: int | None = None
        self.past: deque[Past] = deque(maxlen=self.history)
        self._begin_index: int | None = None
        self._every_level = self._table()
        self._set_grid(list(range(len(self.schedule)))[::-1], device=None)

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        signature = inspect.signature(cls.__init__).parameters
        return {name: p.default for name, p in signature.items() if name != "self"}

    @property
    def config(self) -> Config:
        return self._internal_dict

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> "Scheduler":
        """Build from another scheduler's config, minidiff's or diffusers', as diffusers does.

        Options that this class lacks but another scheduler of the family has are left out, and so
        is a value that was only the other class's default; unknown names are refused.

        Raises:
            InvalidArgument: an unknown option, or a value that this class does not support.
        """
        implied = config.get("_use_default_values", ())
        options = {
            name: value
            for name, value in config.items()
            if not name.startswith("_") and name not in implied
        } | overrides
        own = cls._defaults()
        for name in options.keys() - own.keys() - _FAMILY_OPTIONS:
            raise InvalidArgument(
                f"{name!r} is not an option of {cls.__name__}; it has {', '.join(own)}"
            )
        return cls(**{name: value for name, value in options.items() if name in own})

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None) -> "Scheduler":
        """Read `scheduler_config.json`, written by minidiff or by diffusers.

        Raises:
            CheckpointError: the file is missing or not a config.
            InvalidArgument: it holds an option that this class does not support.
        """
        return cls.from_config(checkpoint.read_json(Path(folder, subfolder or "") / CONFIG_NAME))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `scheduler_config.json`, which diffusers reads as well. Raises CheckpointError."""
        content = {k: v for k, v in self.config.items() if k != "_use_default_values"}
        if content["compat"] == "diffusers":
            del content["compat"]  # a config without it is diffusers' own, and reads as such
        checkpoint.write_json(Path(folder) / CONFIG_NAME, content)

    # --- grid ------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the training steps that sampling visits, and forget any sampling under way.

        Args:
            num_inference_steps: 1 … num_train_timesteps; spaced as `timestep_spacing` says.
            device: where `self.timesteps` lies.
            timesteps: instead of a number: strictly falling steps in 0 … T−1.
        Raises:
            InvalidArgument: neither or both are given, or a value is outside its range.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise InvalidArgument("give either num_inference_steps or timesteps, not both or none")
        last = self.config.num_train_timesteps - 1
        if timesteps is not None:
            grid = [whole_number("timesteps", t, 0, last) for t in timesteps]
            if not grid or any(a <= b for a, b in pairwise(grid)):
                raise InvalidArgument(f"timesteps must be strictly falling, got {timesteps}")
        else:
            whole_number("num_inference_steps", num_inference_steps, 1, last + 1)
            grid = [int(t) for t in self._spaced(num_inference_steps)]
            if any(a <= b for a, b in pairwise(grid)):
                raise InvalidArgument(
                    f"num_inference_steps={num_inference_steps} with timestep_spacing="
                    f"{self.config.timestep_spacing!r} repeats timesteps in diffusers: take fewer, "
                    "or compat='exact'"
                )
        if max(grid) > last:
            raise InvalidArgument(
                f"steps_offset={self.config.steps_offset} moves the first timestep to {grid[0]}, "
                f"beyond {last}"
            )
        self.num_inference_steps = len(grid)
        self._set_grid(grid, device)
        self._check_levels()

    def _check_levels(self) -> None:
        """Refuse a grid on which the options cannot work."""
        if self.levels[0].alpha == 0 and self.config.prediction_type == "epsilon":
            raise InvalidArgument(
                "prediction_type 'epsilon' says nothing at zero terminal SNR, where sampling "
                "starts: use prediction_type 'v_prediction' or rescale_betas_zero_snr=False"
            )

    def _spaced(self, n: int) -> np.ndarray:
        c = self.config
        return self.reading.timesteps(
            c.timestep_spacing, n, c.num_train_timesteps, c.get("steps_offset", 0)
        )

    def _set_grid(self, grid: list[int], device: torch.device | str | None) -> None:
        self.grid = grid
        self._index = {t: i for i, t in enumerate(grid)}
        self.timesteps = torch.tensor(grid, dtype=torch.int64, device=device)
        self.levels = [*map(self.level, grid), self.final_level]
        self._step_index: int | None = None
        self._begin_index = None
        self.past.clear()

    def _schedule(self) -> NoiseSchedule:
        c = self.config
        return NoiseSchedule.named(
            c.beta_schedule,
            c.num_train_timesteps,
            beta_start=c.beta_start,
            beta_end=c.beta_end,
            trained_betas=c.trained_betas,
            rescale_zero_snr=c.rescale_betas_zero_snr,
            dtype=self.reading.dtype,
        )

    def _table(self) -> list[Level]:
        return self.reading.table(self.schedule)

    def level(self, t: int) -> Level:
        """The level of training step t in 0 … T−1, on the grid or not. Raises InvalidArgument."""
        return self._every_level[whole_number("timestep", t, 0, len(self._every_level) - 1)]

    @property
    def final_level(self) -> Level:
        """Where the last step ends: at the data."""
        return self.reading.clean()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this entry of the grid (image-to-image skips the noisiest ones)."""
        self._begin_index = whole_number("begin_index", begin_index, 0, len(self.grid) - 1)

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """How many grid entries are behind; None before the first step."""
        return self._step_index

    def grid_levels(self, t: int) -> tuple[Level, Level]:
        """The level of grid entry t and the one after it. Raises InvalidArgument."""
        i = self._position(t)
        return self.levels[i], self.levels[i + 1]

    def _position(self, t: int) -> int:
        if t not in self._index:
            raise InvalidArgument(f"timestep {t} is not among scheduler.timesteps")
        return self._index[t]

    # --- one step --------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The network's input for a sample; variance-preserving schedulers change nothing."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One step towards the data.

        Args:
            model_output, sample: the network's output and its input x_t, (B, C, *space).
            timestep: the entry of `timesteps` at which the network was asked. A tensor on another
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
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators,
        variance_noise: Tensor | None,
        *,
        return_dict: bool,
        **options: Any,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        _check_tensors(model_output, sample, variance_noise, generator)
        now, nxt = self._levels_at(timestep)
        x0, eps = split(model_output, sample, now, self.config.prediction_type)
        x0 = self._clip(x0)
        dtype = self._noise_dtype(model_output)

        def noise() -> Tensor:
            if variance_noise is not None:
                return variance_noise
            return randn(model_output.shape, generator, model_output.device, dtype)

        prev = self.update(sample, x0, eps, now, nxt, noise, **options)
        self.past.append(Past(now, x0))
        if self._step_index is not None:
            self._step_index += 1
        output = SchedulerOutput(prev.to(model_output.dtype), x0)
        return output if return_dict else tuple(output)

    def _levels_at(self, timestep: int | Tensor) -> tuple[Level, Level]:
        return self.grid_levels(int(timestep))

    def _noise_dtype(self, model_output: Tensor) -> torch.dtype:
        return model_output.dtype

    def _clip(self, x0: Tensor) -> Tensor:
        c = self.config
        if c.thresholding:
            return dynamic_threshold(x0, c.dynamic_thresholding_ratio, c.sample_max_value)
        return clip(x0, c.clip_sample_range) if c.get("clip_sample") else x0

    # --- forward noising -------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = α_t·x0 + σ_t·ε for a batch of training steps (B,), or (1,) for all images."""
        return add_noise(original_samples, noise, self._batch_level(timesteps, original_samples))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = α·ε − σ·x0 for a batch of training steps, the target of "v_prediction"."""
        return target(sample, noise, self._batch_level(timesteps, sample), "v_prediction")

    def _batch_level(self, timesteps: Tensor, like: Tensor) -> Level:
        t = torch.as_tensor(timesteps, device=like.device).flatten()
        return self.schedule.at(t.expand(like.shape[0]) if len(t) == 1 else t, like)

    # --- attributes that users of diffusers look for ----------------------------------------

    @property
    def betas(self) -> Tensor:
        return self.schedule.betas

    @property
    def alphas(self) -> Tensor:
        return 1 - self.schedule.betas

    @property
    def alphas_cumprod(self) -> Tensor:
        return self.schedule.alpha_bar

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def __repr__(self) -> str:
        changed = ", ".join(
            f"{k}={v!r}"
            for k, v in self.config.items()
            if not k.startswith("_") and k not in self.config["_use_default_values"]
        )
        return f"{type(self).__name__}({changed})"


class IndexedScheduler(Scheduler):
    """Counts its steps instead of looking the timestep up, as multistep methods must."""

    def _levels_at(self, timestep: int | Tensor) -> tuple[Level, Level]:
        if self.num_inference_steps is None:
            raise InvalidArgument("call set_timesteps before step")
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = begin if begin is not None else self._position(int(timestep))
        i = self._step_index
        if i >= len(self.grid):
            raise InvalidArgument(
                f"all {len(self.grid)} steps are done: call set_timesteps to sample again"
            )
        return self.levels[i], self.levels[i + 1]


def _check_option(owner: str, name: str, value: Any, unsupported: Mapping[str, Any]) -> None:
    if name in unsupported:
        if not _same(value, unsupported[name]):
            raise InvalidArgument(
                f"{name}={value!r} is not supported by {owner}; leave it at {unsupported[name]!r}"
            )
    elif name in _FLAGS:
        if not isinstance(value, bool):
            raise InvalidArgument(f"{name} must be True or False, got {value!r}")
    elif name in _CHOICES:
        one_of(name, value, _CHOICES[name])
    elif name == "solver_order":
        whole_number(name, value, 1, 3)
    elif name == "steps_offset":
        whole_number(name, value, 0)
    elif name == "clip_sample_range":
        real_number(name, value, 0)
    elif name == "dynamic_thresholding_ratio":
        real_number(name, value, 0, 1)
    elif name == "sample_max_value":
        real_number(name, value, 1)
    elif name == "lambda_min_clipped" and value != -math.inf:  # the default clips nothing
        real_number(name, value, -math.inf)


def _check_tensors(
    output: Tensor, sample: Tensor, variance_noise: Tensor | None, generator: Generators
) -> None:
    if output.shape != sample.shape:
        raise InvalidArgument(
            f"model_output must have the shape of sample, {tuple(sample.shape)}, "
            f"got {tuple(output.shape)}"
        )
    for name, tensor in (("model_output", output), ("sample", sample)):
        if not tensor.is_floating_point():
            raise InvalidArgument(f"{name} must be floating point, got {tensor.dtype}")
    if variance_noise is not None and generator is not None:
        raise InvalidArgument("give either variance_noise or generator, not both")
    if variance_noise is not None and variance_noise.shape != sample.shape:
        raise InvalidArgument(
            f"variance_noise must have the shape of sample, {tuple(sample.shape)}, "
            f"got {tuple(variance_noise.shape)}"
        )


def _same(a: Any, b: Any) -> bool:
    """Equality that survives arrays (trained_betas) and tells True from 1."""
    if isinstance(a, np.ndarray | Tensor) or isinstance(b, np.ndarray | Tensor):
        return False
    return type(a) is type(b) and a == b


# Every option that some scheduler of diffusers 0.42.1 has: `from_config` may meet it in a config
# that another class wrote.
_FAMILY_OPTIONS = frozenset(
    [
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "variance_type",
        "clip_sample",
        "prediction_type",
        "thresholding",
        "dynamic_thresholding_ratio",
        "clip_sample_range",
        "sample_max_value",
        "timestep_spacing",
        "steps_offset",
        "rescale_betas_zero_snr",
        "set_alpha_to_one",
        "solver_order",
        "algorithm_type",
        "solver_type",
        "lower_order_final",
        "euler_at_final",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "use_lu_lambdas",
        "use_flow_sigmas",
        "flow_shift",
        "final_sigmas_type",
        "lambda_min_clipped",
        "use_dynamic_shifting",
        "time_shift_type",
        "interpolation_type",
        "sigma_min",
        "sigma_max",
        "timestep_type",
        "predict_x0",
        "disable_corrector",
        "solver_p",
        "skip_prk_steps",
        "original_inference_steps",
        "timestep_scaling",
        "compat",
    ]
)
