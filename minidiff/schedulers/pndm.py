"""PNDM: a classical method for the noise, DDIM for the step.

Linear multistep and Runge–Kutta methods leave the levels on which a network was trained. PNDM
stays on them: the step is DDIM's, and the classical method only supplies a better ε̂, an average
over evaluations,

    x_s = φ(x_t, ε̄, t, s) = (α_s/α_t)·x_t + (σ_s − σ_t·α_s/α_t)·ε̄.

The averages are those of even steps, while DDIM's ODE, d(x/α) = ε·d(σ/α), is even in σ/α. On a grid
of even training steps the order is therefore 2, as the paper claims; on one even in σ/α it is 4.

Source: Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds",
arXiv:2202.09778.
"""

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.prediction import combine
from minidiff.schedule import Level
from minidiff.schedulers.base import IndexedScheduler, SchedulerOutput
from minidiff.schedulers.ddim import DDIMScheduler

# Weights of the newest evaluation, the one before it, … (Adams–Bashforth of order 1 to 4).
ADAMS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class Call(NamedTuple):
    """One evaluation of the network: its level and input, its ε̂, and its output."""

    level: Level
    x: Tensor
    eps: Tensor
    out: Tensor


class Stage(NamedTuple):
    """The purpose of one entry of the grid.

    Attributes:
        place: 0 if a step begins here, else the number of evaluations in this step so far.
        weights: weights of this step's evaluations, in order; None to average earlier steps.
    """

    place: int
    weights: tuple[float, ...] | None


# Three steps of the classical Runge–Kutta method, and one of Heun's, with which a multistep method
# without them begins.
RUNGE_KUTTA = (
    Stage(0, (1,)),
    Stage(1, (0, 1)),
    Stage(2, (0, 0, 1)),
    Stage(3, (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
) * 3
MULTISTEP = Stage(0, None)
HEUN = (MULTISTEP, Stage(1, (1 / 2, 1 / 2)))


class PNDMScheduler(IndexedScheduler):
    """A fourth-order average with one evaluation per step after the first steps.

    Args are diffusers' (same names, same defaults). The first three steps are Runge–Kutta's with
    four evaluations each; `skip_prk_steps=True` (Stable Diffusion's choice) begins with one step of
    Heun's, with two. So `timesteps` repeats entries and has more than `num_inference_steps`.
    `set_alpha_to_one=False` ends at the level of training step 0 instead of at the data. `compat`
    is "diffusers" or "exact", see `quirks.py`.

    A loop needs only `step`; `step_prk` and `step_plms` are its two kinds, for loops over
    `prk_timesteps` and then `plms_timesteps`.

    Attributes:
        past: up to four evaluations at which a step began.
        stages: the evaluations of the step under way.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        skip_prk_steps: bool = False,
        set_alpha_to_one: bool = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        compat: str = "diffusers",
    ) -> None:
        self._configure(locals())

    def _prepare(self) -> None:
        self.past = deque(maxlen=len(ADAMS))  # kept by `update`: not every call begins a step
        self.stages: list[Call] = []
        super()._prepare()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the training steps that sampling visits, and forget any sampling under way.

        Args:
            num_inference_steps: number of steps, at least 4 with Runge–Kutta's; there are more
                evaluations.
            device: device of `self.timesteps`.
            timesteps: strictly falling steps in 0 … T−1, without repeats, instead of a number. The
                averages expect them to be even.
        Raises:
            InvalidArgument: neither or both are given, or a value is outside its range.
        """
        grid = self._chosen_grid(num_inference_steps, timesteps)
        if self.config.skip_prk_steps:
            visited = [*grid[:2], *grid[1:]]
        elif len(grid) >= 4:
            stride = self.config.num_train_timesteps // len(grid)
            visited = self._runge_kutta(grid[:4], stride) + grid[3:]
        else:
            raise InvalidArgument(
                "num_inference_steps must be at least 4 with skip_prk_steps=False, whose first "
                f"three steps are Runge-Kutta's; got {len(grid)}"
            )
        levels = [*map(self.level, visited), self.final_level]
        self._place(visited, levels, device, steps=len(grid))

    def restart(self, begin_index: int = 0) -> None:
        """Forget any sampling under way, the stages of a step included."""
        super().restart(begin_index)
        self.stages = []

    def _runge_kutta(self, grid: list[int], stride: int) -> list[int]:
        """Return the timesteps of three steps between these four entries: the ends, the middle
        twice.
        """
        visited = []
        for a, b in pairwise(grid):
            middle = self.reading.runge_kutta_middle(a, b, stride)
            visited += [a, middle, middle, b]
        return visited

    def update(self, x, x0, eps, now, nxt, noise) -> Tensor:
        here, stage = Call(now, x, eps, self._output), self._stage()
        if stage.place == 0:
            self.stages = []
            self.past.append(here)  # type: ignore[arg-type]  # an evaluation with its output
        elif len(self.stages) != stage.place:  # sampling began within this step
            return self._transfer(here, nxt, eps)
        self.stages.append(here)
        evaluations: list[Any] = self.stages
        weights = stage.weights
        if weights is None:
            evaluations = list(self.past)[::-1]
            weights = ADAMS[len(evaluations) - 1]
        start = self.stages[0]
        kind = self.config.prediction_type
        average = self.reading.average_noise(evaluations, weights, start, kind)
        return self._transfer(start, nxt, average)

    def _split(self, out: Tensor, x: Tensor, now: Level) -> tuple[Tensor, Tensor]:
        self._output = out  # diffusers averages it, see `average_noise`
        return super()._split(out, x, now)

    def _transfer(self, start: Call, nxt: Level, eps: Tensor) -> Tensor:
        """Return φ(x, ε) = a·x + b·ε: the step of DDIM with x̂0 = (x − σ·ε)/α."""
        a, b = self.reading.transfer(start.level, nxt)
        return combine(a, start.x, b, eps)  # DDIM eq. 12 at η = 0, PNDM's transfer part

    def _stage(self) -> Stage:
        i = self._step_index
        warm_up = HEUN if self.config.skip_prk_steps else RUNGE_KUTTA
        return warm_up[i] if i < len(warm_up) else MULTISTEP

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Take one stage of a step; arguments and errors as in `Scheduler.step`.

        `sample` is the network's input. Within a step of several evaluations the result is the
        network's next input.
        """
        return self._step(model_output, timestep, sample, None, None, return_dict=return_dict)

    def step_prk(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Take a Runge–Kutta stage with `step`. Raises InvalidArgument where none is due."""
        self._check_due("step_prk", runge_kutta=True)
        return self.step(model_output, timestep, sample, return_dict)

    def step_plms(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Take a linear multistep with `step`. Raises InvalidArgument where none is due."""
        self._check_due("step_plms", runge_kutta=False)
        return self.step(model_output, timestep, sample, return_dict)

    @property
    def prk_timesteps(self) -> np.ndarray | None:
        """The timesteps of Runge–Kutta stages; None before `set_timesteps`."""
        placed = self.num_inference_steps is not None
        return np.array(self.grid[: self._stages_first], dtype=np.int64) if placed else None

    @property
    def plms_timesteps(self) -> np.ndarray | None:
        """The timesteps after the Runge–Kutta stages; None before `set_timesteps`."""
        placed = self.num_inference_steps is not None
        return np.array(self.grid[self._stages_first :], dtype=np.int64) if placed else None

    @property
    def _stages_first(self) -> int:
        """The number of grid entries that are Runge–Kutta stages."""
        return 0 if self.config.skip_prk_steps else len(RUNGE_KUTTA)

    def _check_due(self, name: str, *, runge_kutta: bool) -> None:
        i = (self._begin_index or 0) if self._step_index is None else self._step_index
        if (i < self._stages_first) != runge_kutta:
            raise InvalidArgument(
                f"{name} is not for entry {i} of scheduler.timesteps: the first "
                f"{self._stages_first} are Runge-Kutta's"
            )

    def _levels_at(self, t: float) -> tuple[Level, Level]:
        if self.num_inference_steps is None:
            raise InvalidArgument("call set_timesteps before step")
        return self.reading.pndm_levels(self, t)

    final_alpha_cumprod = DDIMScheduler.final_alpha_cumprod

    @property
    def final_level(self) -> Level:
        """The level of the result: that of the data, or of training step 0."""
        return self.reading.clean() if self.config.set_alpha_to_one else self.level(0)
