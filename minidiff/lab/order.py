"""The measured order of convergence of a sampler, where the exact solution is known.

    from minidiff.lab.order import flow_error, order
    order(lambda n: flow_error(DDIMScheduler(**FINE, clip_sample=False, compat="exact"), n), 280)

For a mixture of Gaussians the optimal network, its probability flow and its marginals are known in
closed form (`minidiff.exact`), so a solver's error can be measured. An ODE solver of order p
divides its error by 2ᵖ when its steps are halved. A stochastic sampler follows no path. On Gaussian
data its every step is linear, so the variance of its output is known from its table: this gives its
weak order without Monte Carlo.

Errors are measured after four fifths of the steps: the last steps of every schedule are so uneven
in λ that they would hide the order of the method. Use a fine schedule (`FINE`), so that whole
timesteps are even enough.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, listed, real_number, whole_number
from minidiff.exact import GaussianMixture
from minidiff.schedule import Level
from minidiff.schedulers import SCHEDULERS, Scheduler

FINE: dict[str, Any] = {"num_train_timesteps": 100_000, "beta_start": 1e-6, "beta_end": 2e-4}
MIXTURE = GaussianMixture([0.3, 0.7], [[-1.0], [1.5]], [0.4, 0.6])
GAUSSIAN = GaussianMixture([1.0], [[0.0]], [0.5])


class Method(NamedTuple):
    """A solver with the order its paper claims.

    Attributes:
        scheduler: class name.
        options: options of its constructor.
        order: p, where the error of n steps is proportional to n^−p.
        weak: the order is that of the variance on Gaussian data, not of a path.
        measure: arguments of `flow_error` or `variance_error`.
        n: number of steps; the order shows between n and 2n.
    """

    scheduler: str
    options: dict[str, Any]
    order: int
    weak: bool = False
    measure: Mapping[str, Any] = MappingProxyType({})
    n: int = 240

    def build(self, compat: str = "exact") -> Scheduler:
        """Return a new scheduler."""
        return SCHEDULERS[self.scheduler](**self.options, compat=compat)

    def error(self, n: int, compat: str = "exact") -> float:
        """Return the error with n steps."""
        return self.error_of(self.build(compat), n)

    def error_of(self, scheduler: Scheduler, n: int) -> float:
        """Return the error of another scheduler with n steps, measured in the same way."""
        result, truth = self.result_of(scheduler, n)
        return (result - truth).abs().max().item()

    def result_of(self, scheduler: Scheduler, n: int) -> tuple[Tensor, Tensor]:
        """Return the result of a scheduler and the true one, by `flow_end` or `variance_end`."""
        return (variance_end if self.weak else flow_end)(scheduler, n, **self.measure)

    def measured_order(self, compat: str = "exact") -> float:
        """Return the order of convergence between `self.n` and twice as many steps."""
        scheduler = self.build(compat)
        return order(lambda n: self.error_of(scheduler, n), self.n)


_FINE = FINE | {"prediction_type": "sample"}
_UNCLIPPED = _FINE | {"clip_sample": False, "timestep_spacing": "linspace"}
_NO_SHORT_END = _FINE | {"lower_order_final": False}
_SDE = _NO_SHORT_END | {"algorithm_type": "sde-dpmsolver++"}
_NOISE = _NO_SHORT_END | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min",
                          "prediction_type": "epsilon"}  # fmt: skip
_NOISE_SDE = _NOISE | {"algorithm_type": "sde-dpmsolver"}
_EPSILON = {"prediction_type": "epsilon"}
_DEIS = _NO_SHORT_END | _EPSILON
_NO_CORRECTOR = {"disable_corrector": list(range(100_000))}

_CHURN = {"s_churn": 4.0}
_MULTI, _SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
_EDM, _EDM_PART = "EDMDPMSolverMultistepScheduler", {"part": 0.6}
_EDM_ODE = _EPSILON | {"lower_order_final": False}
_EDM_SDE = _EDM_ODE | {"algorithm_type": "sde-dpmsolver++"}
_PNDM = _FINE | _EPSILON | {"timestep_spacing": "linspace"}
_UNIPC, _UNIPC_NOISE = "UniPCMultistepScheduler", {"predict_x0": False,
                                                   "final_sigmas_type": "sigma_min"}  # fmt: skip


def _by_order(name: str, scheduler: str, options: dict, gain: int = 0) -> dict[str, Method]:
    """Return the methods of solver_order p = 1, 2, 3, which converge with order p + gain."""
    return {
        name.format(p): Method(
            scheduler,
            options | {"solver_order": p},
            p + gain,
            measure={"exact_starts": p + gain - 1},
        )
        for p in (1, 2, 3)
    }


METHODS: dict[str, Method] = {
    "DDIM": Method("DDIMScheduler", _UNCLIPPED, 1),
    "Euler": Method("EulerDiscreteScheduler", _FINE, 1),
    "Euler, EDM": Method("EDMEulerScheduler", _EPSILON, 1, measure=_EDM_PART),
    "Euler, flow": Method("FlowMatchEulerDiscreteScheduler", {}, 1),
    "Heun": Method("HeunDiscreteScheduler", _FINE, 2, measure={"stride": 2}),
    "KDPM2": Method("KDPM2DiscreteScheduler", _FINE | _EPSILON, 2, measure={"stride": 2}),
    **{
        f"LMS-{p}": Method(
            "LMSDiscreteScheduler", _FINE, p, measure={"order": p, "exact_starts": p - 1}
        )
        for p in (1, 2, 3, 4)
    },
    **_by_order("DEIS-{}", "DEISMultistepScheduler", _DEIS),
    "PNDM": Method("PNDMScheduler", _PNDM, 2, n=480),
    "PLMS": Method("PNDMScheduler", _PNDM | {"skip_prk_steps": True}, 2, n=480),
    "DPM-Solver-1": Method(_MULTI, _NOISE | {"solver_order": 1}, 1),
    "DPM-Solver-2M": Method(_MULTI, _NOISE, 2),
    "DPM-Solver-3M": Method(_MULTI, _NOISE | {"solver_order": 3}, 3, measure={"exact_starts": 2}),
    "DPM-Solver-2S": Method(_SINGLE, _NOISE, 2, measure={"stride": 2}),
    "DPM-Solver-3S": Method(_SINGLE, _NOISE | {"solver_order": 3}, 3, measure={"stride": 3}),
    "DPM-Solver++ 1": Method(_MULTI, _NO_SHORT_END | {"solver_order": 1}, 1),
    "DPM-Solver++ 2M": Method(_MULTI, _NO_SHORT_END, 2),
    "DPM-Solver++ 2M, heun": Method(_MULTI, _NO_SHORT_END | {"solver_type": "heun"}, 2),
    "DPM-Solver++ 3M": Method(
        _MULTI, _NO_SHORT_END | {"solver_order": 3}, 3, measure={"exact_starts": 2}
    ),
    "DPM-Solver++ 2S": Method(_SINGLE, _FINE, 2, measure={"stride": 2}),
    "DPM-Solver++ 3S": Method(_SINGLE, _FINE | {"solver_order": 3}, 3, measure={"stride": 3}),
    "DPM-Solver++ 1, EDM": Method(_EDM, _EDM_ODE | {"solver_order": 1}, 1, measure=_EDM_PART),
    "DPM-Solver++ 2M, EDM": Method(_EDM, _EDM_ODE, 2, measure=_EDM_PART),
    "DPM-Solver++ 3M, EDM": Method(
        _EDM, _EDM_ODE | {"solver_order": 3}, 3, measure=_EDM_PART | {"exact_starts": 2}
    ),
    **_by_order("UniPC-{}", _UNIPC, _FINE, gain=1),
    **_by_order("UniPC-{}, noise", _UNIPC, _FINE | _UNIPC_NOISE, gain=1),
    **_by_order("UniP-{}", _UNIPC, _FINE | _NO_CORRECTOR),
    "DDPM": Method("DDPMScheduler", _UNCLIPPED, 1, weak=True),
    "DDPM, large variance": Method(
        "DDPMScheduler", _UNCLIPPED | {"variance_type": "fixed_large"}, 1, weak=True
    ),
    "DDIM, η = 1": Method("DDIMScheduler", _UNCLIPPED, 1, weak=True, measure={"eta": 1.0}),
    "Euler ancestral": Method("EulerAncestralDiscreteScheduler", _FINE | _EPSILON, 1, weak=True),
    "Euler, churned": Method("EulerDiscreteScheduler", _FINE, 1, weak=True, measure=_CHURN),
    "Euler, EDM, churned": Method(
        "EDMEulerScheduler", _EPSILON, 1, weak=True, measure=_EDM_PART | _CHURN
    ),
    "SDE-DPM-Solver 1": Method(_MULTI, _NOISE_SDE | {"solver_order": 1}, 1, weak=True),
    "SDE-DPM-Solver 2M": Method(_MULTI, _NOISE_SDE, 2, weak=True, n=480),
    "SDE-DPM-Solver++ 1": Method(_MULTI, _SDE | {"solver_order": 1}, 1, weak=True),
    "SDE-DPM-Solver++ 2M": Method(_MULTI, _SDE, 2, weak=True),
    "SDE-DPM-Solver++ 2M, heun": Method(_MULTI, _SDE | {"solver_type": "heun"}, 2, weak=True),
    "SDE-DPM-Solver++ 3M": Method(_MULTI, _SDE | {"solver_order": 3}, 2, weak=True, n=960),
    "SDE-DPM-Solver++ 2S": Method(_SINGLE, _SDE, 2, weak=True, measure={"stride": 2}),
    "SDE-DPM-Solver++ 3S, heun": Method(
        _SINGLE,
        _SDE | {"solver_order": 3, "solver_type": "heun"},
        2,
        weak=True,
        measure={"stride": 3},
    ),
    **{
        f"SDE-DPM-Solver++ {name}, EDM": Method(
            _EDM, _EDM_SDE | {"solver_order": p}, min(p, 2), True, _EDM_PART, n=480
        )
        for p, name in enumerate(("1", "2M", "3M"), 1)
    },
}


def order(error: Callable[[int], float], n: int) -> float:
    """Return the order of convergence between n and 2n steps: log₂ of the ratio of their errors."""
    return math.log2(error(n) / error(2 * n))


def curve(
    scheduler: "Scheduler | Method", steps: Sequence[int] = (20, 40, 80, 160, 320), **measure: Any
) -> list[float]:
    """Return the error along the probability flow for each number of steps, for a log-log plot.

    Args:
        scheduler: scheduler for `flow_error`, or an entry of `METHODS`, which knows its measure.
        steps: numbers of steps.
        measure: further arguments of `flow_error`, for a scheduler.
    Raises:
        InvalidArgument: steps is empty or holds other than whole numbers from 1.
    """
    for n in listed("steps", steps):
        whole_number("steps", n, 1)
    if isinstance(scheduler, Method):
        return [scheduler.error(n, **measure) for n in steps]
    return [flow_error(scheduler, n, **measure) for n in steps]


def output_of(scheduler: Scheduler, data: GaussianMixture, x: Tensor, level: Level) -> Tensor:
    """Return the optimal network's output for this data and this scheduler, for x at a level.

    The errors below evaluate it at the level of the timestep, the only one that a network knows.
    """
    return scheduler.target(data.denoise(x, level), data.noise(x, level), level)


def flow_error(
    scheduler: Scheduler,
    n: int,
    *,
    part: float = 0.8,
    stride: int = 1,
    exact_starts: int = 0,
    **step_options: Any,
) -> float:
    """Return the largest error along the probability flow of a mixture, after part of the steps.

    Args:
        scheduler: deterministic scheduler, compat="exact" unless departures are measured.
        n: number of steps, for `set_timesteps`.
        part: fraction of the steps after which the error is measured, in (0, 1].
        stride: grid entries of one step, where it has stages (Heun 2, singlestep p).
        exact_starts: number of first steps replaced by the exact solution. A multistep method
            begins with lower orders; with an exact history its own order shows.
        step_options: options of `step`.
    """
    x, truth = flow_end(
        scheduler, n, part=part, stride=stride, exact_starts=exact_starts, **step_options
    )
    return (x - truth).abs().max().item()


def flow_end(
    scheduler: Scheduler,
    n: int,
    *,
    part: float = 0.8,
    stride: int = 1,
    exact_starts: int = 0,
    **step_options: Any,
) -> tuple[Tensor, Tensor]:
    """Return the ends of 21 paths of a mixture, by this solver and exact; see `flow_error`."""
    scheduler.set_timesteps(n)
    begin, stop = scheduler.levels[0], _entry(scheduler, part, stride)
    spread = math.hypot(begin.alpha, begin.sigma)
    start = spread * torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]
    x = start
    for i, t in enumerate(scheduler.grid[:stop]):
        out = output_of(scheduler, MIXTURE, x, scheduler.level(t))
        x = scheduler.step(out, t, x, return_dict=False, **step_options)[0]
        if i < exact_starts:
            x = MIXTURE.flow(start, begin, scheduler.levels[i + 1])
    return x, MIXTURE.flow(start, begin, scheduler.levels[stop])


def variance_error(
    scheduler: Scheduler, n: int, *, part: float = 0.8, stride: int = 1, **step_options: Any
) -> float:
    """Return the error of the variance on data N(0, ¼) after part of the steps."""
    variance, truth = variance_end(scheduler, n, part=part, stride=stride, **step_options)
    return (variance - truth).abs().item()


def variance_end(
    scheduler: Scheduler, n: int, *, part: float = 0.8, stride: int = 1, **step_options: Any
) -> tuple[Tensor, Tensor]:
    """Return the variance of x that this sampler gives data N(0, ¼), and the true one."""
    table = scheduler.coefficients(n, **step_options)
    one = torch.ones(1, 1, dtype=torch.float64)
    gains = [
        output_of(scheduler, GAUSSIAN, one, scheduler.level(t)).item() / scale
        for t, scale in zip(table.timesteps, table.input_scale.tolist(), strict=True)
    ]
    exact = [level.alpha**2 * 0.25 + level.sigma**2 for level in table.levels]
    scheduler.set_timesteps(n)
    stop = _entry(scheduler, part, stride)
    variances = table.variance(gains, start=exact[0])
    ends = torch.tensor([variances[stop - 1], exact[stop]], dtype=torch.float64)
    return ends[0], ends[1]


def _entry(scheduler: Scheduler, part: float, stride: int) -> int:
    """Return the number of grid entries that part of the steps takes."""
    real_number("part", part, 0, 1)
    entry = round(part * len(scheduler.grid) / stride) * stride
    if entry == 0:
        raise InvalidArgument(
            f"part={part} of {len(scheduler.grid)} grid entries is less than a step"
        )
    return entry
