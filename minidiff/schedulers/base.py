"""What every scheduler shares: options, grid, history, clipping, and the contract of diffusers.

A scheduler walks a grid of levels from noise to data. `step` takes the network's output at one
level, turns it into (x0, ε) with `prediction.split`, and asks `update`, the one method a paper
fills in, for the sample at the next level. Class names, options and attributes are those of
diffusers (https://huggingface.co/docs/diffusers/api/schedulers/overview), so a scheduler drops
into its pipelines and reads and writes its `scheduler_config.json`.
"""

import copy
import inspect
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, whole_number
from minidiff.noise import Generators, randn
from minidiff.prediction import clip, dynamic_threshold, split, target
from minidiff.runtime import files
from minidiff.runtime.files import Config
from minidiff.schedule import Level, NoiseSchedule, add_noise
from minidiff.schedulers.core import options as option_rules
from minidiff.schedulers.core import table
from minidiff.schedulers.core.quirks import READINGS, Exact

CONFIG_NAME = "scheduler_config.json"


class SchedulerOutput(NamedTuple):
    """What `step` returns.

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

    to_tuple = values


class Evaluation(NamedTuple):
    """One call of the network: the sample x at a level, and what the output says of it."""

    level: Level
    x: Tensor
    x0: Tensor
    eps: Tensor


class Scheduler:
    """Base of all schedulers. A new sampler writes `update`, and `__init__` if it has options.

    Attributes:
        config: the options, as a dict with attribute access.
        timesteps: (n,) tensor, the training steps at which the network is asked, falling.
        grid: the same as a list of host numbers.
        levels: n + 1 `Level`s: of each timestep, and of the end.
        num_inference_steps: as given to `set_timesteps`; None before it.
        init_noise_sigma: standard deviation of the noise that sampling starts from.
    """

    order = 1  # network evaluations a step, in diffusers' pipelines
    init_noise_sigma = 1.0
    history = 0  # earlier evaluations that `update` looks at
    unsupported: Mapping[str, Any] = {}  # option -> the only value that can work
    choices: Mapping[str, Sequence] = {}  # option -> its values, where the family has others
    translated: Mapping[str, Mapping] = {}  # option -> another class' values and what they become
    compatibles: Sequence[type["Scheduler"]] = ()  # classes that take its config, as in diffusers

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

    def __new__(cls, *args: Any, **kwargs: Any) -> "Scheduler":
        try:
            given = inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs).arguments
        except TypeError as error:
            options = ", ".join(cls._defaults())
            raise InvalidArgument(f"{cls.__name__} {error}; its options are {options}") from None
        self = super().__new__(cls)
        self._given = set(given)  # only these move on to another class, see `from_config`
        return self

    def _configure(self, options: dict[str, Any]) -> None:
        """Check the constructor's arguments, keep them as `config` and build the tables."""
        options = {k: v for k, v in options.items() if k not in ("self", "__class__")}
        for name, value in options.items():
            option_rules.check(type(self).__name__, name, value, self.choices, self.unsupported)
        option_rules.check_flow(options)
        config = Config(options, _class_name=type(self).__name__)
        if isinstance(config.get("trained_betas"), np.ndarray | Tensor):
            config["trained_betas"] = config["trained_betas"].tolist()
        implied = [name for name in options if name not in self._given]
        if implied:
            config["_use_default_values"] = implied
        self._internal_dict = config  # diffusers' pipelines assign to this name
        self.reading = READINGS[config.compat]
        self.num_inference_steps: int | None = None
        self.past: deque[Evaluation] = deque(maxlen=self.history)
        self._prepare()

    def _prepare(self) -> None:
        """Build the tables; until `set_timesteps` the grid is every training step."""
        self.schedule = self._schedule()
        self._every_level = self._table()
        every = list(range(len(self.schedule)))[::-1]
        self._set_grid(every, [*map(self.level, every), self.final_level], device=None)

    @classmethod
    def has_option(cls, name: str) -> bool:
        """Whether the constructor takes an option of this name."""
        return name in cls._defaults()

    def reread(self, reading: Exact) -> "Scheduler":
        """The same scheduler under another reading, such as `quirks.departing("phi3")`."""
        other = copy.copy(self)
        other.reading, other.num_inference_steps = reading, None
        other.past = deque(maxlen=self.history)
        other._prepare()
        return other

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

        Options that this class lacks but another scheduler of the family has are carried along,
        for the next class that is made from this one's config. A value that was only the other
        class's default is left out; unknown names are refused. A value of `solver_type` or
        `algorithm_type` that only the other class has becomes this class' own default, as in
        diffusers (`translated`).

        Raises:
            InvalidArgument: an unknown option, or a value that this class does not support.
        """
        implied = config.get("_use_default_values", ())
        given = {k: v for k, v in config.items() if not k.startswith("_") and k not in implied}
        options = {**config.get("_carried", {}), **given, **overrides}
        own = cls._defaults()
        for name in sorted(options.keys() - own.keys() - option_rules.FAMILY):
            raise InvalidArgument(
                f"{name!r} is not an option of {cls.__name__}; it has {', '.join(own)}"
            )
        for name, values in cls.translated.items():
            if name in options and name not in overrides:
                options[name] = values.get(options[name], options[name])
        scheduler = cls(**{name: value for name, value in options.items() if name in own})
        carried = {name: value for name, value in options.items() if name not in own}
        if carried:
            scheduler.config["_carried"] = carried
        return scheduler

    @classmethod
    def load_config(cls, folder: str | Path, subfolder: str | None = None) -> dict[str, Any]:
        """What `scheduler_config.json` holds, for `from_config`. Raises CheckpointError."""
        content = files.read_json(Path(folder, subfolder or "") / CONFIG_NAME)
        return {"compat": "diffusers"} | content  # a config without it is diffusers' own

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, subfolder: str | None = None, **overrides: Any
    ) -> "Scheduler":
        """Read `scheduler_config.json`, written by minidiff or by diffusers.

        Args:
            folder, subfolder: of the file; the folder of a pipeline has it in "scheduler".
            overrides: options that take the place of the file's.
        Raises:
            CheckpointError: the file is missing or not a config.
            InvalidArgument: an option that this class does not support.
        """
        return cls.from_config(cls.load_config(folder, subfolder), **overrides)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `scheduler_config.json`, which diffusers reads as well. Raises CheckpointError."""
        content = {**self.config.get("_carried", {}), **self.config}
        content = {k: v for k, v in content.items() if k not in ("_carried", "_use_default_values")}
        if content["compat"] == "diffusers":
            del content["compat"]  # `load_config` puts it back
        files.write_json(Path(folder) / CONFIG_NAME, content)

    save_config = save_pretrained  # of a scheduler there is nothing else to save

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
        grid = self._chosen_grid(num_inference_steps, timesteps)
        self._place(grid, [*map(self.level, grid), self.final_level], device)

    def _place(
        self,
        grid: list[int] | list[float],
        levels: list[Level],
        device: torch.device | str | None,
        dtype: torch.dtype = torch.int64,
        steps: int | None = None,
    ) -> None:
        """Accept a grid and its levels; `steps` is n where an entry is not a whole step."""
        self._check_levels(levels)
        self.num_inference_steps = steps or len(grid)
        self._set_grid(grid, levels, device, dtype)

    def _chosen_grid(
        self, num_inference_steps: int | None, timesteps: Sequence[int] | None
    ) -> list[int]:
        """Training steps, strictly falling: those given, or so many of them."""
        if (num_inference_steps is None) == (timesteps is None):
            raise InvalidArgument("give either num_inference_steps or timesteps, not both or none")
        last = self.config.num_train_timesteps - 1
        if timesteps is not None:
            grid = [whole_number("timesteps", t, 0, last) for t in timesteps]
            if not grid or any(a <= b for a, b in pairwise(grid)):
                raise InvalidArgument(f"timesteps must be strictly falling, got {timesteps}")
            return grid
        whole_number("num_inference_steps", num_inference_steps, 1, last + 1)
        grid = [int(t) for t in self._spaced(num_inference_steps)]
        if any(a <= b for a, b in pairwise(grid)):
            raise InvalidArgument(
                f"num_inference_steps={num_inference_steps} with timestep_spacing="
                f"{self.config.get('timestep_spacing', 'linspace')!r} repeats timesteps in "
                "diffusers: take fewer, or compat='exact'"
            )
        self._check_first_timestep(grid[0])
        return grid

    def _check_first_timestep(self, first: float) -> None:
        last = self.config.num_train_timesteps - 1
        if first > last:
            raise InvalidArgument(
                f"steps_offset={self.config.steps_offset} moves the first timestep to {first:g}, "
                f"beyond {last}"
            )

    def _check_levels(self, levels: list[Level]) -> None:
        """Refuse a grid on which the options cannot work."""
        if levels[0].alpha == 0 and self.config.prediction_type == "epsilon":
            raise InvalidArgument(
                "prediction_type 'epsilon' says nothing at zero terminal SNR, where sampling "
                "starts: use prediction_type 'v_prediction' or rescale_betas_zero_snr=False"
            )

    def _spaced(self, n: int) -> np.ndarray:
        c = self.config
        return self.reading.timesteps(
            c.timestep_spacing, n, c.num_train_timesteps, c.get("steps_offset", 0)
        )

    def _set_grid(
        self,
        grid: list[int] | list[float],
        levels: list[Level],
        device: torch.device | str | None,
        dtype: torch.dtype = torch.int64,
    ) -> None:
        """Walk these timesteps through these levels (one more: the end), from the start."""
        self.timesteps = torch.tensor(grid, dtype=dtype, device=device)
        self.grid, self.levels = grid, levels
        self._index: dict[float, int] = {}
        seen: Counter[float] = Counter()
        for i, t in enumerate(grid):  # of a repeated timestep the second entry, as in diffusers
            seen[t] += 1
            if seen[t] <= 2:
                self._index[t] = i
        self._index[grid[0]] = 0  # but sampling begins at the beginning
        self.restart()

    def restart(self, begin_index: int = 0) -> None:
        """Forget any sampling under way and begin again on the same grid.

        Args:
            begin_index: entry of the grid to begin at, see `set_begin_index`.
        Raises:
            InvalidArgument: the grid has no such entry.
        """
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self.past.clear()
        if begin_index:
            self.set_begin_index(begin_index)

    def _schedule(self) -> NoiseSchedule:
        c = self.config
        return NoiseSchedule.named(
            c.beta_schedule,
            c.num_train_timesteps,
            beta_start=c.beta_start,
            beta_end=c.beta_end,
            trained_betas=c.trained_betas,
            rescale_zero_snr=c.get("rescale_betas_zero_snr", False),
            dtype=self.reading.dtype,
            laplace=self.reading.laplace,
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

    def grid_levels(self, t: float) -> tuple[Level, Level]:
        """The level of grid entry t and the one after it. Raises InvalidArgument."""
        i = self._position(t)
        return self.levels[i], self.levels[i + 1]

    def _position(self, t: float) -> int:
        if t not in self._index:
            raise InvalidArgument(f"timestep {t:g} is not among scheduler.timesteps")
        return self._index[t]

    # --- one step --------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The network's input for a sample; variance-preserving schedulers change nothing."""
        return sample

    def shown(self, sample: Tensor, level: Level) -> Tensor:
        """The same for a sample at any level."""
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
        now, nxt = self._levels_at(self._host_timestep(timestep))
        noise = self._noise(model_output, generator, variance_noise)
        here = self._evaluate(model_output, sample, now, noise, **options)
        now, x, x0, eps = here
        prev = self.update(x, x0, eps, now, nxt, noise, **options)
        if self.history:
            self.past.append(here)
        if self._step_index is not None:
            self._step_index += 1
            if self.history and self._step_index == len(self.grid):
                self.past.clear()  # no step is left to look back
        if prev.dtype != model_output.dtype:
            prev = prev.to(model_output.dtype)
        output = SchedulerOutput(prev, x0)
        return output if return_dict else tuple(output)

    def _host_timestep(self, timestep: float | Tensor) -> float:
        """The timestep as a number, without waiting for a GPU where the step is counted anyway."""
        i = self._step_index
        counted = i is not None and i < len(self.grid)
        if counted and isinstance(timestep, Tensor) and not timestep.is_cpu:
            return self.grid[i]
        return host_number(timestep)

    def _evaluate(
        self, out: Tensor, x: Tensor, now: Level, noise: Callable[[], Tensor], **options: Any
    ) -> Evaluation:
        """What `update` sees: x as it is (churn adds noise), x0 clipped, ε as the network said."""
        x0, eps = self._split(out, x, now)
        return Evaluation(now, x, self._clip(x0), eps)

    def _split(self, out: Tensor, x: Tensor, now: Level) -> tuple[Tensor, Tensor]:
        """(x0, ε) that the output implies."""
        return split(out, x, now, self.config.prediction_type)

    def split(self, model_output: Tensor, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """The clean sample and the noise, (x0, ε), that the output for x at a level implies.

        Nothing is clipped. Of an output that also holds a learned variance only the prediction
        is read.
        """
        if self.config.get("variance_type") in ("learned", "learned_range"):
            model_output, _ = split_variance(model_output, x)
        return self._split(model_output, x, level)

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """What the network of this scheduler should say of α·x0 + σ·ε: the inverse of `split`."""
        return target(x0, eps, level, self.config.prediction_type)

    def _levels_at(self, t: float) -> tuple[Level, Level]:
        if self.history and t == self.grid[self._begin_index or 0]:
            self.past.clear()  # sampling begins anew
        return self.grid_levels(t)

    def _noise(
        self, like: Tensor, generator: Generators, variance_noise: Tensor | None
    ) -> Callable[[], Tensor]:
        """Where a stochastic step takes its noise from, when it asks for it."""
        if variance_noise is not None:
            return lambda: variance_noise
        return lambda: randn(like.shape, generator, like.device, self._noise_dtype(like))

    def _noise_dtype(self, model_output: Tensor) -> torch.dtype:
        return model_output.dtype

    def _clip(self, x0: Tensor) -> Tensor:
        c = self.config
        if c.get("thresholding"):
            return dynamic_threshold(x0, c.dynamic_thresholding_ratio, c.sample_max_value)
        return clip(x0, c.clip_sample_range) if c.get("clip_sample") else x0

    def coefficients(self, num_inference_steps: int, **step_options: Any) -> table.Coefficients:
        """The table A, B, C of this sampler's linear steps, see `schedulers/table.py`.

        Raises:
            InvalidArgument: an option makes a step nonlinear, or as `set_timesteps`.
        """
        return table.coefficients(self, num_inference_steps, **step_options)

    # --- forward noising -------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = α_t·x0 + σ_t·ε for a batch of training steps (B,), or (1,) for all images."""
        _check_pair("noise", noise, "original_samples", original_samples)
        return add_noise(original_samples, noise, self._batch_level(timesteps, original_samples))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = α·ε − σ·x0 for a batch of training steps, the target of "v_prediction"."""
        _check_pair("noise", noise, "sample", sample)
        return target(sample, noise, self._batch_level(timesteps, sample), "v_prediction")

    def _batch_level(self, timesteps: Tensor, like: Tensor) -> Level:
        t = torch.as_tensor(timesteps, device=like.device).flatten()
        if t.is_cpu and len(t) and not 0 <= int(t.min()) <= int(t.max()) < len(self.schedule):
            raise InvalidArgument(
                f"timesteps must be in 0..{len(self.schedule) - 1}, got {t.min():g} to {t.max():g}"
            )
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
            if not k.startswith("_") and not option_rules.same(v, self._defaults().get(k))
        )
        return f"{type(self).__name__}({changed})"


class IndexedScheduler(Scheduler):
    """Counts its steps instead of looking the timestep up, as multistep methods must."""

    has_default_grid = False  # may step before `set_timesteps`, on the grid of all training steps

    def due_levels(self, t: float) -> tuple[Level, Level]:
        """The levels of the grid entry whose turn it is, and of the one after it."""
        i = self._advance_to(t)
        return self.levels[i], self.levels[i + 1]

    _levels_at = due_levels

    def _advance_to(self, t: float) -> int:
        """The entry of the grid that this step is at; the first step looks its timestep up."""
        if self.num_inference_steps is None and not self.has_default_grid:
            raise InvalidArgument("call set_timesteps before step")
        if self._step_index is None:
            self._step_index = self._position(t) if self._begin_index is None else self._begin_index
        if self._step_index >= len(self.grid):
            raise InvalidArgument(
                f"all {len(self.grid)} steps are done: call set_timesteps to sample again"
            )
        if not math.isclose(t, self.grid[self._step_index], rel_tol=1e-5, abs_tol=1e-5):
            self._position(t)  # refuses what is no timestep of this grid
        return self._step_index


def split_variance(model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """The prediction and the learned variance, each half of the output's 2·C channels."""
    if model_output.ndim != sample.ndim or model_output.shape[1] != 2 * sample.shape[1]:
        raise InvalidArgument(
            f"model_output must have {2 * sample.shape[1]} channels for a learned variance_type, "
            f"got shape {tuple(model_output.shape)}"
        )
    prediction, variance = model_output.chunk(2, dim=1)
    return prediction, variance


def host_number(timestep: int | float | Tensor) -> int | float:
    """A timestep as Python number; of a tensor on another device this is a sync.

    Raises:
        InvalidArgument: it is neither a number nor a tensor of one.
    """
    if isinstance(timestep, Tensor) and timestep.numel() == 1:
        return timestep.item()
    if isinstance(timestep, bool | str | Tensor) or not hasattr(timestep, "__float__"):
        raise InvalidArgument(f"timestep must be one number, got {timestep!r}")
    return timestep


def _check_tensors(
    output: Tensor, sample: Tensor, variance_noise: Tensor | None, generator: Generators
) -> None:
    if not (isinstance(output, Tensor) and isinstance(sample, Tensor)):
        raise InvalidArgument(
            "model_output and sample must be tensors, "
            f"got {type(output).__name__} and {type(sample).__name__}"
        )
    if output.shape != sample.shape:
        raise InvalidArgument(
            f"model_output must have the shape of sample, {tuple(sample.shape)}, "
            f"got {tuple(output.shape)}"
        )
    if not (output.is_floating_point() and output.dtype == sample.dtype):
        raise InvalidArgument(
            "model_output and sample must be floating point of one dtype, "
            f"got {output.dtype} and {sample.dtype}"
        )
    if variance_noise is not None:
        if generator is not None:
            raise InvalidArgument("give either variance_noise or generator, not both")
        if variance_noise.shape != sample.shape:
            raise InvalidArgument(
                f"variance_noise must have the shape of sample, {tuple(sample.shape)}, "
                f"got {tuple(variance_noise.shape)}"
            )
    # On a GPU this would wait for the network in every step, so there the pictures are checked.
    if output.is_cpu and not torch.compiler.is_compiling():
        _check_finite(output)


def _check_pair(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Refuse what would be broadcast or promoted without a word."""
    if tensor.shape != like.shape:
        raise InvalidArgument(
            f"{name} must have the shape of {like_name}, {tuple(like.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    if not (tensor.is_floating_point() and tensor.dtype == like.dtype):
        raise InvalidArgument(
            f"{name} and {like_name} must be floating point of one dtype, "
            f"got {tensor.dtype} and {like.dtype}"
        )


def _check_finite(output: Tensor) -> None:
    if math.isfinite(output.sum().item()) or bool(output.isfinite().all()):
        return  # a sum is quick, but can overflow where no entry is infinite
    kind = "NaN" if bool(output.isnan().any()) else "infinite"
    share = 1 - output.isfinite().double().mean().item()
    raise InvalidArgument(f"model_output must be finite, got {kind} in {share:.1%} of its entries")
