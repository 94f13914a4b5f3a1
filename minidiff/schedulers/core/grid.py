"""The grid of a scheduler: the timesteps that sampling visits, their levels, and its position.

The middle layer of a scheduler, see `config.py`.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, whole_number
from minidiff.runtime.checks import whole
from minidiff.schedule import Level, NoiseSchedule
from minidiff.schedulers.core.config import Configured
from minidiff.schedulers.core.inputs import on_device
from minidiff.schedulers.core.options import falling, is_falling
from minidiff.schedulers.core.quirks import Exact


class Grid(Configured):
    """The timesteps, falling, and one level more than timesteps: that of the result.

    Attributes:
        timesteps: (n,) tensor, the training steps at which the network is evaluated, falling.
        grid: the same as a list of host numbers.
        levels: n + 1 `Level`s, one for each timestep and one for the end.
        num_inference_steps: n as given to `set_timesteps`; None before it.
        schedule: the levels of all training steps.
    """

    def _use_reading(self, reading: Exact) -> None:
        super()._use_reading(reading)
        self.num_inference_steps: int | None = None
        self._prepare()

    def _prepare(self) -> None:
        """Build the tables; until `set_timesteps` the grid is every training step."""
        self.schedule = self._schedule()
        self._every_level = self._table()
        every = list(range(len(self.schedule)))[::-1]
        self._set_grid(every, [*map(self.level, every), self.final_level], device=None)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the training steps that sampling visits, and forget any sampling under way.

        Args:
            num_inference_steps: number of steps n in 1 … T, spaced by `timestep_spacing`.
            device: device of `self.timesteps`.
            timesteps: strictly falling steps in 0 … T−1, instead of a number.
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
        """Accept a grid and its levels; `steps` is n where a step takes several entries."""
        self._check_levels(levels)
        self.num_inference_steps = steps or len(grid)
        self._set_grid(grid, levels, device, dtype)

    def _chosen_grid(
        self, num_inference_steps: int | None, timesteps: Sequence[int] | None
    ) -> list[int]:
        """Return strictly falling training steps: those given, or this many of them."""
        if (num_inference_steps is None) == (timesteps is None):
            raise InvalidArgument("give either num_inference_steps or timesteps, not both or none")
        last = self.config.num_train_timesteps - 1
        if timesteps is not None:
            return falling("timesteps", timesteps, whole(0, last))
        n = whole_number("num_inference_steps", num_inference_steps, 1, last + 1)
        grid = [int(t) for t in self._spaced(n)]
        if not is_falling(grid):
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
                "prediction_type 'epsilon' does not determine x0 at zero terminal SNR, where "
                "sampling starts: use 'v_prediction' or rescale_betas_zero_snr=False"
            )

    def _spaced(self, n: int) -> np.ndarray:
        """Return n training steps as `timestep_spacing` places them."""
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
        """Visit these timesteps at these levels (one more, for the end), from the start."""
        self.timesteps = on_device(grid, dtype, device)
        self.grid, self.levels = grid, levels
        self._index: dict[float, int] = {}
        seen: Counter[float] = Counter()
        for i, t in enumerate(grid):  # the second entry of a repeated timestep, as in diffusers
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
        self._step_index: Any = None  # an int; None until the first step
        self._begin_index: int | None = None
        if begin_index:
            self.set_begin_index(begin_index)

    # --- levels ----------------------------------------------------------------------------

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
        """Return the level of training step t in 0 … T−1, on the grid or not.

        Raises:
            InvalidArgument: there is no such step.
        """
        return self._every_level[whole_number("timestep", t, 0, len(self._every_level) - 1)]

    @property
    def final_level(self) -> Level:
        """The level of the result: that of the data."""
        return self.reading.clean()

    def grid_levels(self, t: float) -> tuple[Level, Level]:
        """Return the level of grid entry t and the one after it. Raises InvalidArgument."""
        i = self._position(t)
        return self.levels[i], self.levels[i + 1]

    def _position(self, t: float) -> int:
        """Return the index of timestep t in the grid. Raises InvalidArgument."""
        if t not in self._index:
            raise InvalidArgument(f"timestep {t:g} is not among scheduler.timesteps")
        return self._index[t]

    def _flat(self, timesteps: Tensor | Sequence[float]) -> Tensor:
        """Return timesteps () or (B,) as a tensor (B,), unchecked. Raises InvalidArgument."""
        t = timesteps if isinstance(timesteps, Tensor) else np.asarray(timesteps)
        if not isinstance(t, Tensor) and t.dtype.kind in "iuf":
            t = torch.as_tensor(t)
        if not isinstance(t, Tensor) or t.is_complex() or t.dtype == torch.bool:
            raise InvalidArgument(f"timesteps must be numbers, got {timesteps!r}")
        return t.flatten()

    # --- position --------------------------------------------------------------------------

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this entry of the grid (image-to-image skips the noisiest ones)."""
        self._begin_index = whole_number("begin_index", begin_index, 0, len(self.grid) - 1)

    @property
    def begin_index(self) -> int | None:
        """The entry of the grid that sampling starts at; None for the first."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """The number of grid entries already visited; None before the first step."""
        return self._step_index

    # --- attributes that users of diffusers look for ----------------------------------------

    @property
    def betas(self) -> Tensor:
        """β of every training step, (T,)."""
        return self.schedule.betas

    @property
    def alphas(self) -> Tensor:
        """1 − β of every training step, (T,)."""
        return 1 - self.schedule.betas

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ of every training step, (T,)."""
        return self.schedule.alpha_bar

    def __len__(self) -> int:
        return self.config.num_train_timesteps
