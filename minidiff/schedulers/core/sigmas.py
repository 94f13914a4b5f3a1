"""Grids placed in σ, the noise-to-signal ratio, rather than on training steps.

A solver may visit any falling σ: those of evenly spaced training steps, or those of a formula
(Karras et al. 2022, exponential, Beta quantiles, the shifted straight line of flow matching). The
network is then evaluated at the training step that belongs to σ. Each scheduler has its own scaling
of the sample:

    variance preserving  x = (x0 + σ·ε)/√(1 + σ²)      DPM-Solver, UniPC
    variance exploding   x = x0 + σ·ε                  Euler, Heun, EDM
    flow                 x = (1 − σ)·x0 + σ·ε          flow matching
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, real_number, whole_number
from minidiff.noise import Generators
from minidiff.prediction import solve
from minidiff.runtime.shapes import append_dims
from minidiff.schedule import (
    MAX_TRAIN_TIMESTEPS,
    Level,
    NoiseSchedule,
    beta_sigmas,
    exponential_sigmas,
    karras_sigmas,
    shifted_sigmas,
)
from minidiff.schedulers.base import IndexedScheduler, SchedulerOutput
from minidiff.schedulers.core.options import at_most_one, shift_of

FORMULAS: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "use_karras_sigmas": karras_sigmas,
    "use_exponential_sigmas": exponential_sigmas,
    "use_beta_sigmas": beta_sigmas,
    "use_lu_lambdas": exponential_sigmas,  # Lu et al. 2022 place λ = −ln σ evenly
}


class SigmaScheduler(IndexedScheduler):
    """Base of the solvers whose grid may be a formula in σ, and that count their steps.

    Attributes:
        sigmas: (n + 1,) tensor on the CPU, the σ of each timestep and of the end.
    """

    output_type: str  # prediction type, or "edm", for methods that add noise to their input

    sigmas: Tensor

    def sigma_levels(self, sigmas: np.ndarray) -> list[Level]:
        """Return the levels of a sample at these σ."""
        if self.config.get("use_flow_sigmas"):
            return self.reading.flow_levels(sigmas)
        return self.reading.preserving_levels(sigmas)

    def present_level(self, timestep: float | Tensor) -> Level:
        """Return the level of the network's next input. Raises InvalidArgument."""
        return self.levels[self._advance_to(self._host_timestep(timestep))]

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        variance_noise: Tensor | None = None,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step, see `Scheduler.step`."""
        return self._step(
            model_output, timestep, sample, generator, variance_noise, return_dict=return_dict
        )

    def _place_sigmas(
        self,
        grid: np.ndarray,
        sigmas: np.ndarray,
        end: float,
        device: torch.device | str | None = None,
        *,
        steps: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Accept timesteps (n,), their σ (n,) and the σ after them; as `_place`."""
        every = np.append(sigmas, end)
        dtype = dtype or (torch.int64 if grid.dtype.kind == "i" else self.reading.dtype)
        numbers = torch.tensor(grid, dtype=dtype).tolist()  # rounded as `timesteps` is
        self._place(numbers, self.sigma_levels(every), device, dtype, steps)
        self.sigmas = torch.tensor(every, dtype=self.reading.dtype)

    def _host_timesteps(self, timesteps: Tensor | Sequence[float]) -> list[float]:
        """Return timesteps as host numbers, rounded as the grid is."""
        t = self._flat(timesteps)
        return (t if isinstance(timesteps, Tensor) else t.to(self.reading.dtype)).tolist()

    # --- forward noising on the grid ----------------------------------------------------------

    def _batch_level(self, timesteps: Tensor, like: Tensor) -> Level:
        """Return the levels of grid entries (B,), or (1,) for all images.

        After `set_begin_index` it is the level of the present entry, whatever `timesteps` is:
        pipelines for image-to-image and inpainting rely on that.
        """
        t = self._host_timesteps(timesteps)
        if len(t) not in (1, like.shape[0]):
            raise InvalidArgument(f"timesteps must be 1 or {like.shape[0]} numbers, got {len(t)}")
        if self._begin_index is None:
            at = [self._position(each) for each in t]
        else:
            at = [self._begin_index if self._step_index is None else self._step_index]
        pairs = torch.tensor([self.levels[i] for i in at], dtype=torch.float64)
        return Level(*(append_dims(scale, like.ndim) for scale in pairs.to(like).T))


class TrainedSigmas(SigmaScheduler):
    """A grid over a trained noise schedule: its steps, or a formula between its σ_min and σ_max."""

    def _schedule(self) -> NoiseSchedule:
        return self.reading.solver_schedule(super()._schedule())

    def _prepare(self) -> None:
        self._formula()
        self.schedule = self._schedule()
        steps = np.arange(len(self.schedule))[::-1]
        every = np.append(self.schedule.sigma_of(steps), 0.0)
        self._set_grid(steps.tolist(), self.sigma_levels(every), device=None)
        self.sigmas = torch.tensor(every, dtype=self.reading.dtype)

    def level(self, t: float) -> Level:
        """Return the level of training step t, a real number in 0 … T−1. Raises InvalidArgument."""
        if self.config.get("use_flow_sigmas"):
            steps = self.config.num_train_timesteps
            return self.sigma_levels(np.array([real_number("timestep", t, 0, steps) / steps]))[0]
        t = real_number("timestep", t, 0, len(self.schedule) - 1)
        return self.sigma_levels(self.schedule.sigma_of(np.array([t])))[0]

    def _end(self, sigmas: np.ndarray) -> float:
        """Return the σ after the last step."""
        if self.config.get("final_sigmas_type", "zero") == "zero":
            return 0.0
        # A formula ends there too, up to rounding: the last step must not rise.
        return min(self.schedule.sigma_of(np.zeros(1)).item(), sigmas[-1])

    def _formula(self, timesteps: Sequence | None = None) -> str | None:
        """Return the option that places σ by a formula, if one is set. Raises InvalidArgument."""
        formula = at_most_one(self.config, *FORMULAS, "use_flow_sigmas")
        if formula and timesteps is not None:
            raise InvalidArgument(f"timesteps cannot be given with {formula}=True, which sets them")
        return formula


class SolverSigmas(TrainedSigmas):
    """The grid of DPM-Solver and UniPC: n whole training steps, or n σ's, and the end."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the grid, and forget any sampling under way.

        Args:
            num_inference_steps: number of steps n, spaced by `timestep_spacing` or a formula for σ.
            device: device of `self.timesteps`.
            mu: logarithm of the flow_shift of this grid; only with use_dynamic_shifting.
            timesteps: strictly falling steps in 0 … T−1, instead of a number.
        Raises:
            InvalidArgument: neither or both are given, or a value is outside its range.
        """
        formula = self._formula(timesteps)
        shift = self._flow_shift(mu)
        if formula is None:
            grid = np.array(self._chosen_grid(num_inference_steps, timesteps))
            sigmas = self.schedule.sigma_of(grid)
        else:
            n = whole_number("num_inference_steps", num_inference_steps, 1, MAX_TRAIN_TIMESTEPS)
            grid, sigmas = self._by_formula(formula, n, shift)
        self._place_sigmas(grid, sigmas, self._end(sigmas), device)

    def _split(self, out: Tensor, x: Tensor, now: Level) -> tuple[Tensor, Tensor]:
        return solve(out, x, now, self.reading.solver_row(self.config.prediction_type, now))

    def _flow_shift(self, mu: float | None) -> float:
        c = self.config
        if mu is None:
            return c.get("flow_shift", 1.0)
        if not c.use_dynamic_shifting:
            raise InvalidArgument(f"mu={mu!r} needs use_dynamic_shifting=True")
        return shift_of(mu, c.time_shift_type)

    def _by_formula(self, formula: str, n: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
        steps = len(self.schedule)
        if formula == "use_flow_sigmas":
            return self._on_flow(self._flow_sigmas(n, shift))
        reach = self.reading.steps_in_reach(self._steps_above_lambda_min(), steps)
        low, high = self.schedule.sigma_of(np.array([0, reach - 1])).tolist()
        low, high = self.config.get("sigma_min") or low, self.config.get("sigma_max") or high
        if high == math.inf:
            raise InvalidArgument(
                f"{formula}=True cannot start at zero terminal SNR, where sigma is infinite: set "
                "rescale_betas_zero_snr=False"
            )
        place = self.reading.lu_sigmas if formula == "use_lu_lambdas" else FORMULAS[formula]
        sigmas = place(low, high, n)
        t = self.schedule.timestep_of(sigmas)
        return self.reading.formula_timesteps(t, self._rounds(formula)), sigmas

    def _flow_sigmas(self, n: int, shift: float) -> np.ndarray:
        """Return the straight line from just below pure noise towards the data, shifted."""
        straight = 1 - np.linspace(1, 1 / len(self.schedule), n + 1)
        return shifted_sigmas(straight[::-1][:-1], shift)

    def _on_flow(self, sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the timesteps σ·T of the σ of a flow, and these σ."""
        t = self.reading.formula_timesteps(sigmas * len(self.schedule), rounded=False)
        return t, sigmas

    def _rounds(self, formula: str) -> bool:
        """Return whether diffusers rounds the timesteps of this formula; others it cuts off."""
        return formula in ("use_karras_sigmas", "use_lu_lambdas")

    def _end(self, sigmas: np.ndarray) -> float:
        if self.config.use_flow_sigmas and self.config.final_sigmas_type != "zero":
            return self.reading.flow_end(sigmas, self.schedule)
        return super()._end(sigmas)

    def _steps_above_lambda_min(self) -> int:
        steps = len(self.schedule)
        low = self.config.get("lambda_min_clipped", -math.inf)
        if low == -math.inf:
            return steps
        rising = -np.log(self.schedule.sigma_of(np.arange(steps)[::-1]))  # λ = ln(α/σ)
        return steps - int(np.searchsorted(rising, low))

    def _spaced(self, n: int) -> np.ndarray:
        c = self.config
        return self.reading.solver_timesteps(
            c.get("timestep_spacing", "linspace"),
            n,
            self._steps_above_lambda_min(),
            c.get("steps_offset", 0),
            len(self.schedule),
        )
