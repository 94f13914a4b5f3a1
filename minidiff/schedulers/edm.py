"""EDM: a network preconditioned for its noise level, and σ itself as the time.

The network F is wrapped so that its input, output and target have variance 1 at every σ,

    x̂0 = c_skip·x + c_out·F(c_in·x; c_noise),      σ_d the standard deviation of the data,

    c_skip = σ_d²/(σ² + σ_d²)      c_out = σ·σ_d/√(σ² + σ_d²)
    c_in   = 1/√(σ² + σ_d²)        c_noise = ¼·ln σ

The samplers are those of `euler.py` and `dpm_solver.py`. There are no training steps: what a
scheduler calls timesteps are the values of c_noise.

Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
arXiv:2206.00364, table 1.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, real_number, whole_number
from minidiff.noise import Generators
from minidiff.prediction import combine, edm_row
from minidiff.runtime.checks import positive
from minidiff.schedule import MAX_TRAIN_TIMESTEPS, Level, sigma_range
from minidiff.schedulers.base import Evaluation, SchedulerOutput
from minidiff.schedulers.core.inputs import check_pair, host_number, model_input
from minidiff.schedulers.core.options import falling
from minidiff.schedulers.core.sigmas import SigmaScheduler
from minidiff.schedulers.dpm_solver import DPMSolverMultistepScheduler, multistep
from minidiff.schedulers.euler import churn, euler_step, evaluate_churned


class EDMSigmas(SigmaScheduler):
    """The grid of EDM and its preconditioning; x = x0 + σ·ε.

    `prediction_type` "epsilon" is diffusers' name for F, "v_prediction" for −F.
    """

    choices: ClassVar = {"prediction_type": ("epsilon", "v_prediction")}
    grid_dtype = torch.float64  # of Karras' grid in diffusers
    more_at_first = 0  # additional grid entries before set_timesteps

    def sigma_levels(self, sigmas: np.ndarray) -> list[Level]:
        return self.reading.exploding_levels(sigmas)

    def level(self, t: float) -> Level:
        """Return the level of c_noise t, on the grid or not. Raises InvalidArgument."""
        return self.sigma_levels(np.exp([4 * real_number("timestep", t, -math.inf)]))[0]

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise that sampling starts from."""
        return self.reading.edm_start(self.config.sigma_max)

    # --- preconditioning ----------------------------------------------------------------------

    def precondition_inputs(self, sample: Tensor, sigma: float | Tensor) -> Tensor:
        """Return c_in·x; σ is a number, or a tensor that broadcasts over (B, 1, …)."""
        return sample / (sigma**2 + self.config.sigma_data**2) ** 0.5

    def precondition_noise(self, sigma: float | Tensor) -> Tensor:
        """Return c_noise, a tensor of the shape of σ; a number counts as (1,)."""
        if not isinstance(sigma, Tensor):
            sigma = torch.tensor([sigma], dtype=self.reading.dtype)
        return 0.25 * torch.log(sigma)

    def precondition_outputs(
        self, sample: Tensor, model_output: Tensor, sigma: float | Tensor
    ) -> Tensor:
        """Return x̂0 = c_skip·x + c_out·F, with F or −F for `model_output`; σ as above."""
        data = self.config.sigma_data
        c_skip = data**2 / (sigma**2 + data**2)  # table 1
        c_out = self._sign * sigma * data / (sigma**2 + data**2) ** 0.5  # table 1
        return combine(c_skip, sample, c_out, model_output)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """Return the network's input c_in·x. Raises InvalidArgument for a timestep off the grid."""
        sample = model_input(sample, timestep)
        if self.num_inference_steps is None:  # looked up, as in diffusers: nothing is counted yet
            return self.scaled_input(sample, self.grid_levels(host_number(timestep))[0])
        return self.scaled_input(sample, self.present_level(timestep))

    def scaled_input(self, sample: Tensor, level: Level) -> Tensor:
        return self.precondition_inputs(sample, level.sigma)

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        p, q = edm_row(level, self.config.sigma_data)
        return self._sign * (p * x0 + q * eps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the network's target, F or −F, for x0 = sample and this noise."""
        check_pair("noise", noise, "sample", sample)
        return self.target(sample, noise, self._batch_level(timesteps, sample))

    @property
    def _sign(self) -> int:
        return 1 if self.config.prediction_type == "epsilon" else -1

    def _split(self, out: Tensor, x: Tensor, now: Level) -> tuple[Tensor, Tensor]:
        x0 = self.precondition_outputs(x, out, now.sigma)
        return x0, (x - x0) / now.sigma

    # --- grid ---------------------------------------------------------------------------------

    def _prepare(self) -> None:
        c = self.config
        sigma_range(c.sigma_min, c.sigma_max)
        real_number("rho", c.rho, 1, 100)
        self._place_edm(self._sigmas_of(c.num_train_timesteps + self.more_at_first))
        self.num_inference_steps = None  # until set_timesteps the grid is fine

    def _sigmas_of(self, n: int | None) -> np.ndarray:
        """Return n levels from σ_max to σ_min."""
        c = self.config
        n = whole_number("num_inference_steps", n, 1, MAX_TRAIN_TIMESTEPS)
        return self.reading.edm_sigmas(
            c.sigma_schedule, c.sigma_min, c.sigma_max, n, c.rho, self.grid_dtype
        )

    def _place_edm(self, sigmas: np.ndarray, device: torch.device | str | None = None) -> None:
        """Accept these σ (n,), their c_noise, and the end."""
        grid = self.precondition_noise(torch.tensor(sigmas, dtype=self.reading.dtype)).numpy()
        c, end = self.config, 0.0
        if c.final_sigmas_type == "sigma_min":
            end = self.reading.edm_end(sigmas, c.sigma_min, c.get("algorithm_type"))
        self._place_sigmas(grid, sigmas, end, device)


class EDMEulerScheduler(EDMSigmas):
    """Euler's method for EDM's networks (Karras et al. 2022, algorithm 2 at first order).

    Args are diffusers' (same names, same defaults). `compat` is "diffusers" or "exact", see
    `quirks.py`.
    """

    has_default_grid = True
    output_type = "edm"  # no row of `prediction.PREDICTION_TYPES`
    more_at_first = 1

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: str = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: str = "zero",
        compat: str = "diffusers",
    ) -> None:
        self._configure(locals())

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the grid, and forget any sampling under way.

        Args:
            num_inference_steps: number of steps n, spaced by `sigma_schedule`.
            device: device of `self.timesteps`.
            sigmas: strictly falling σ, instead of a number; the end follows them. Not in diffusers'
                reading, where they mean something else.
        Raises:
            InvalidArgument: neither or both are given, or a value is outside its range.
        """
        if (num_inference_steps is None) == (sigmas is None):
            raise InvalidArgument("give either num_inference_steps or sigmas, not both or none")
        if sigmas is None:
            self._place_edm(self._sigmas_of(num_inference_steps), device)
        else:
            self.reading.check_edm_sigmas(sigmas)
            self._place_edm(np.array(falling("sigmas", sigmas, positive)), device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
        pred_original_sample: Tensor | None = None,
        variance_noise: Tensor | None = None,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step, see `Scheduler.step` and `EulerDiscreteScheduler.step` for churn.

        Args:
            pred_original_sample: x̂0 where it is known already; `model_output` is then ignored.
            others: see `EulerDiscreteScheduler.step`.
        """
        x0_is_given = pred_original_sample is not None
        return self._step(
            model_output if pred_original_sample is None else pred_original_sample,
            timestep, sample, generator, variance_noise, return_dict=return_dict,
            churn=churn(s_churn, s_tmin, s_tmax, s_noise), x0_is_given=x0_is_given,
        )  # fmt: skip

    def _evaluate(self, out, x, now, noise, *, churn, x0_is_given) -> Evaluation:
        here = evaluate_churned(self, out, x, now, noise, churn)
        if x0_is_given:
            return here._replace(x0=out, eps=(here.x - out) / here.level.sigma)
        return here

    def update(self, x, x0, eps, now, nxt, noise, *, churn, x0_is_given) -> Tensor:
        return euler_step(x, x0, eps, now.sigma, nxt.sigma - now.sigma)


class EDMDPMSolverMultistepScheduler(EDMSigmas):
    """DPM-Solver++ of order 1, 2 or 3 for EDM's networks.

    Args are diffusers' (same names, same defaults), see `DPMSolverMultistepScheduler`. `compat` is
    "diffusers" or "exact", see `quirks.py`; diffusers has no "sde-dpmsolver++" of order 3 here.
    """

    history = DPMSolverMultistepScheduler.history
    choices: ClassVar = EDMSigmas.choices | {"algorithm_type": ("dpmsolver++", "sde-dpmsolver++")}
    translated: ClassVar = DPMSolverMultistepScheduler.translated
    grid_dtype = torch.float32

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: str = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rho: float = 7.0,
        solver_order: int = 2,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        final_sigmas_type: str = "zero",
        compat: str = "diffusers",
    ) -> None:
        self._configure(locals())

    def _configure(self, options: dict[str, Any]) -> None:
        super()._configure(options)
        self.reading.check_edm_solver(self.config.algorithm_type, self.config.solver_order)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Choose the grid, and forget any sampling under way.

        Args:
            num_inference_steps: number of steps n, spaced by `sigma_schedule`.
            device: device of `self.timesteps`.
        Raises:
            InvalidArgument: the number is out of range.
        """
        self._place_edm(self._sigmas_of(num_inference_steps), device)

    def update(self, x, x0, eps, now, nxt, noise) -> Tensor:
        x = self.reading.edm_sample(x)
        return multistep(self, Evaluation(now, x, x0, eps), nxt, noise)
