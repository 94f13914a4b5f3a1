"""Flow matching: straight lines between noise and data, followed by Euler's method.

    x = (1 − σ)·x0 + σ·ε,      dx/dσ = ε − x0 = out

The network predicts the slope of the line, so a step from σ to σ' adds (σ' − σ)·out, which is the
point at σ' on the line through x̂0 and ε̂.

Sources: Lipman et al. 2023, "Flow Matching for Generative Modeling", arXiv:2210.02747; Liu et al.
2023, "Flow Straight and Fast" (rectified flow), arXiv:2209.03003; Esser et al. 2024, "Scaling
Rectified Flow Transformers" (Stable Diffusion 3), arXiv:2403.03206, for the shift.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, real_number, whole_number
from minidiff.noise import Generators
from minidiff.runtime.checks import real
from minidiff.schedule import MAX_TRAIN_TIMESTEPS, Level, shifted_sigmas, stretched_sigmas
from minidiff.schedulers.base import Evaluation, SchedulerOutput
from minidiff.schedulers.core import options as option_rules
from minidiff.schedulers.core.inputs import check_pair
from minidiff.schedulers.core.options import falling
from minidiff.schedulers.core.sigmas import FORMULAS, SigmaScheduler

Tokens = tuple[Level, Level] | None  # of every token: now and next, tensors (B, N, 1)


class FlowMatchEulerDiscreteScheduler(SigmaScheduler):
    """Euler's method for rectified flows (Stable Diffusion 3, Flux, LTX-Video, Mochi).

    Args are diffusers' (same names, same defaults). `shift` moves all σ towards noise; larger
    pictures need more of it. With `use_dynamic_shifting` the shift is exp(mu), or mu if
    `time_shift_type` is "linear", and `mu` an argument of `set_timesteps`. `base_shift`,
    `max_shift`, `base_image_seq_len` and `max_image_seq_len` are read by `mu_of` and by diffusers'
    pipelines. `shift_terminal` is the last σ, with `invert_sigmas` σ is the fraction of the data
    instead of the noise, `stochastic_sampling` draws new noise in every step. `compat` is
    "diffusers" or "exact", see `quirks.py`.

    Attributes:
        sigmas: (n + 1,) tensor on the CPU, the σ of each timestep and of the end; before
            `set_timesteps` (T,), of every training step.
        timesteps: (n,) tensor, T·σ, real numbers.
        shift: the fixed shift.
        sigma_min, sigma_max: of the training steps.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
        compat: str = "diffusers",
    ) -> None:
        self._configure(locals())

    has_default_grid = True

    def _prepare(self) -> None:
        c = self.config
        self._shift = c.shift
        self._formula = option_rules.at_most_one(c, *FORMULAS)
        steps = np.arange(c.num_train_timesteps, 0, -1, dtype=self._numpy_dtype)
        sigmas = steps / c.num_train_timesteps
        if not c.use_dynamic_shifting:
            sigmas = shifted_sigmas(sigmas, c.shift)
        self._place_flow(sigmas, sigmas * c.num_train_timesteps, None, inverted=False)
        self.sigmas = self.sigmas[:-1]
        self.sigma_max, self.sigma_min = self.sigmas[[0, -1]].tolist()
        self.num_inference_steps = None

    @property
    def _numpy_dtype(self) -> np.dtype:
        return np.dtype("float32" if self.reading.dtype == torch.float32 else "float64")

    # --- grid ------------------------------------------------------------------------------

    @property
    def shift(self) -> float:
        """The fixed shift."""
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Set another fixed shift, from the next `set_timesteps` on. Raises InvalidArgument."""
        self._shift = option_rules.shift("shift", shift)

    def mu_of(self, image_seq_len: int) -> float:
        """Return the mu of a picture of this many tokens, on the line through two sizes.

        The two sizes and their mu are options.

        Raises:
            InvalidArgument: the options do not give two sizes.
        """
        c = self.config
        low, high = c.base_image_seq_len, c.max_image_seq_len
        if None in (c.base_shift, c.max_shift, low, high) or low == high:
            raise InvalidArgument(
                "base_shift and max_shift must be the mu of two sizes, base_image_seq_len and "
                f"max_image_seq_len; got {c.base_shift}, {c.max_shift}, {low} and {high}"
            )
        tokens = whole_number("image_seq_len", image_seq_len, 1)
        return c.base_shift + (c.max_shift - c.base_shift) * (tokens - low) / (high - low)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Choose the σ that sampling visits, and forget any sampling under way.

        Args:
            num_inference_steps: number of steps n, spaced evenly, then shifted, stretched, or
                replaced by a formula between the same ends, as the options say.
            device: device of `self.timesteps`.
            sigmas: strictly falling numbers in [0, 1] to shift and stretch instead of even ones.
            mu: shift with use_dynamic_shifting; ignored without it, as diffusers' Flux pipeline
                always passes it.
            timesteps: timesteps of the network, strictly falling in [0, T]; their σ is t/T unless
                `sigmas` gives it.
        Raises:
            InvalidArgument: nothing is given, lengths differ, or a value is outside its range.
        """
        c = self.config
        shaped = partial(self._shaped, shift=self._shift_with(mu))
        even = self._falling("sigmas", sigmas, 1)
        given = self._falling("timesteps", timesteps, c.num_train_timesteps)
        if given is not None and c.invert_sigmas:
            raise InvalidArgument(
                "timesteps cannot be given with invert_sigmas=True, which sets them"
            )
        n = _one_length(num_inference_steps, even, given)
        if even is not None:
            chosen = shaped(even)
        elif given is not None:
            chosen = self.reading.flow_sigmas_of(given / c.num_train_timesteps, shaped)
        else:
            ends = (self.sigma_max, self.sigma_min)
            chosen = shaped(self.reading.flow_line(ends, n, c.num_train_timesteps))
        chosen = chosen.astype(self._numpy_dtype)
        if (np.diff(chosen) >= 0).any():
            raise InvalidArgument(
                f"num_inference_steps={n} are too many for {self._numpy_dtype} to distinguish "
                "after shifting: take fewer, a smaller shift, or compat='exact'"
            )
        self._place_flow(chosen, given, device, inverted=c.invert_sigmas)

    def _shift_with(self, mu: float | None) -> Callable[[np.ndarray], np.ndarray]:
        """Return the function that shifts this grid."""
        if not self.config.use_dynamic_shifting:
            return lambda sigmas: shifted_sigmas(sigmas, self._shift)
        if mu is None:
            raise InvalidArgument("mu must be given with use_dynamic_shifting=True")
        factor = option_rules.shift_of(mu, self.config.time_shift_type)
        return lambda sigmas: self.reading.dynamic_shift(sigmas, factor)

    def _falling(self, name: str, values: Sequence[float] | None, high: float) -> np.ndarray | None:
        if values is None:
            return None
        return np.array(falling(name, values, real(0, high)), dtype=self._numpy_dtype)

    def _shaped(self, sigmas: np.ndarray, shift: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return the grid shifted, then stretched, then replaced by a formula, as options say."""
        with np.errstate(divide="ignore"):  # σ = 0 stays 0, in diffusers by way of 1/0
            sigmas = shift(sigmas)
        if self.config.shift_terminal is not None:
            if sigmas[-1] == 1:
                raise InvalidArgument("shift_terminal needs a last sigma below 1: take more steps")
            sigmas = stretched_sigmas(sigmas, self.config.shift_terminal)
        if self._formula is None:
            return sigmas
        if sigmas[-1] == 0:
            raise InvalidArgument(f"{self._formula}=True needs a last sigma above 0")
        return FORMULAS[self._formula](sigmas[-1].item(), sigmas[0].item(), len(sigmas))

    def _place_flow(
        self,
        sigmas: np.ndarray,
        timesteps: np.ndarray | None,
        device: torch.device | str | None,
        *,
        inverted: bool,
    ) -> None:
        if inverted:
            sigmas = 1 - sigmas
        if timesteps is None:
            timesteps = sigmas * self.config.num_train_timesteps
        self._inverted = inverted
        self._row = self.reading.flow_row(inverted)
        self._place_sigmas(timesteps, sigmas, 1.0 if inverted else 0.0, device)

    def sigma_levels(self, sigmas: np.ndarray) -> list[Level]:
        return self.reading.flow_path(sigmas, self._inverted)

    def _check_levels(self, levels: list[Level]) -> None:
        """Accept any start: a flow can start anywhere."""

    def level(self, t: float) -> Level:
        """Return the level that the network expects at t in [0, T], on the grid or not."""
        steps = self.config.num_train_timesteps
        return self.sigma_levels(np.array([real_number("timestep", t, 0, steps) / steps]))[0]

    # --- one step --------------------------------------------------------------------------

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
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step along the line, see `Scheduler.step`.

        Args:
            timestep: entry of `timesteps`, not an index into them.
            s_churn, s_tmin, s_tmax, s_noise: arguments without effect in diffusers; leave them.
            generator: source of the noise of stochastic_sampling.
            per_token_timesteps: (B, N), for samples (B, N, C) where every token has its own level;
                each goes down to the next σ of the grid. None for other samples.
            others: see `Scheduler.step`.
        Raises:
            InvalidArgument: one of the four is set, the timestep is a whole number or not on the
                grid, or shapes or dtypes do not fit.
        """
        if (s_churn, s_tmin, s_tmax, s_noise) != (0.0, 0.0, math.inf, 1.0):
            raise InvalidArgument(
                "s_churn, s_tmin, s_tmax and s_noise have no effect on a flow: leave them at "
                f"0, 0, inf and 1, got {s_churn}, {s_tmin}, {s_tmax} and {s_noise}"
            )
        if not (
            timestep.is_floating_point()
            if isinstance(timestep, Tensor)
            else isinstance(timestep, float)
        ):
            raise InvalidArgument(
                f"timestep must be an entry of timesteps, a float, got {timestep}"
            )
        tokens = None
        if per_token_timesteps is not None:
            tokens = self._token_levels(per_token_timesteps, sample)
            stochastic = self.config.stochastic_sampling
            model_output = self.reading.token_output(model_output, stochastic)
        return self._step(
            model_output, timestep, sample, generator, None, return_dict=return_dict, tokens=tokens
        )

    def _evaluate(self, out, x, now, noise, *, tokens: Tokens) -> Evaluation:
        x, now = self.reading.solver_sample(x), tokens[0] if tokens else now
        return Evaluation(now, x, *self._split(out, x, now))

    def update(self, x, x0, eps, now, nxt, noise, *, tokens: Tokens) -> Tensor:
        if tokens:
            _, nxt = tokens
        if self.config.stochastic_sampling:
            eps = noise().to(x0.dtype)
        return torch.lerp(x0, eps, nxt.sigma)  # rectified flow eq. 1: (1 − σ')·x0 + σ'·ε

    def _split(self, out: Tensor, x: Tensor, now: Level) -> tuple[Tensor, Tensor]:
        """Return (x0, ε), as `prediction.solve`; 1 − σ + σ = 1 leaves nothing to divide by."""
        slope = out if self._row == (-1.0, 1.0) else -out  # ε − x0
        if isinstance(now.sigma, Tensor):  # of every token
            x0 = x - now.sigma * slope
        else:
            x0 = torch.sub(x, slope, alpha=now.sigma)
        return x0, x0 + slope

    def _token_levels(self, timesteps: Tensor, sample: Tensor) -> tuple[Level, Level]:
        """Return the level of every token, and the grid's next one below it."""
        if self._inverted:
            raise InvalidArgument("per_token_timesteps cannot be combined with invert_sigmas=True")
        shape = tuple(getattr(timesteps, "shape", ())) or timesteps
        if not isinstance(timesteps, Tensor) or sample.ndim != 3 or shape != sample.shape[:2]:
            raise InvalidArgument(
                "per_token_timesteps must be a tensor (B, N) for a sample (B, N, C), got "
                f"{shape!r} and {tuple(sample.shape)}"
            )
        now = (timesteps.to(self.reading.dtype) / self.config.num_train_timesteps)[..., None]
        grid = self.sigmas.to(now.device)
        nxt = torch.where(grid < now - 1e-6, grid, 0).amax(dim=-1, keepdim=True)
        now, nxt = (s.to(torch.promote_types(sample.dtype, torch.float32)) for s in (now, nxt))
        return Level(1 - now, now), Level(1 - nxt, nxt)

    def _noise_dtype(self, model_output: Tensor) -> torch.dtype:
        return self.reading.solver_sample(model_output).dtype

    # --- forward noising -------------------------------------------------------------------

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Return x = (1 − σ)·x0 + σ·ε at entries of `timesteps`, (B,) or (1,) for all images.

        After `set_begin_index` it is the present entry, whatever `timestep` is.
        """
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the network's target dx/dσ, the same everywhere on the line."""
        check_pair("noise", noise, "sample", sample)
        self._flat(timesteps)  # refuses what are no numbers
        p, q = self._row
        return p * sample + q * noise

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        p, q = self._row
        return p * x0 + q * eps

    def _batch_level(self, timesteps: Tensor, like: Tensor) -> Level:
        if self.config.invert_sigmas and self.num_inference_steps is None:
            raise InvalidArgument("call set_timesteps before adding noise with invert_sigmas=True")
        return super()._batch_level(timesteps, like)


def _one_length(n: int | None, sigmas: np.ndarray | None, timesteps: np.ndarray | None) -> int:
    """Return the number of steps, on which all given arguments must agree."""
    if n is not None:
        whole_number("num_inference_steps", n, 1, MAX_TRAIN_TIMESTEPS)
    lengths = {} if n is None else {"num_inference_steps": n}
    for name, given in {"sigmas": sigmas, "timesteps": timesteps}.items():
        if given is not None:
            lengths[name] = len(given)
    if not lengths:
        raise InvalidArgument("give num_inference_steps, sigmas or timesteps")
    if len(set(lengths.values())) > 1:
        listed = " and ".join(f"{name} for {length}" for name, length in lengths.items())
        raise InvalidArgument(f"numbers of steps differ: {listed}")
    return next(iter(lengths.values()))
