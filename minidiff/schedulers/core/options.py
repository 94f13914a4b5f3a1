"""What the options of the schedulers may be: each name, whichever class has it, is checked once.

Names and values are those of diffusers 0.42.1. An option that a class has but that cannot work
there is refused by the class itself (`unsupported`, or its constructor).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from minidiff.errors import InvalidArgument, one_of, real_number, whole_number
from minidiff.prediction import PREDICTION_TYPES
from minidiff.schedule import MAX_TRAIN_TIMESTEPS
from minidiff.schedulers.core.quirks import READINGS

LARGEST_SAMPLE = 1e4  # half precision holds it
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} must be True or False, got {value!r}")


def _choice(*allowed: str | None) -> Callable[[str, Any], None]:
    return lambda name, value: one_of(name, value, allowed)


def _whole(low: int, high: int | None = None) -> Callable[[str, Any], None]:
    return lambda name, value: whole_number(name, value, low, high)


def _real(low: float, high: float = math.inf) -> Callable[[str, Any], None]:
    return lambda name, value: real_number(name, value, low, high)


def _positive(name: str, value: Any) -> None:
    if real_number(name, value, 0) == 0:
        raise InvalidArgument(f"{name} must be above 0, got {value!r}")


def shift(name: str, value: Any) -> float:
    """The shift of a flow; beyond, float32 cannot tell its σ apart. Raises InvalidArgument."""
    return real_number(name, value, 1e-4, 1e4)


def shift_of(mu: float, time_shift_type: str) -> float:
    """The dynamic shift that mu stands for: e^mu, or mu if "linear". Raises InvalidArgument."""
    if time_shift_type == "linear":
        return shift("mu", mu)
    return math.exp(real_number("mu", mu, -9, 9))


def _optional(check: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    return lambda name, value: None if value is None else check(name, value)


def _lambda_min(name: str, value: Any) -> None:
    if value != -math.inf:  # the default clips nothing
        real_number(name, value, -math.inf)


def _share(name: str, value: Any) -> None:
    if not 0 < real_number(name, value, 0, 1) < 1:
        raise InvalidArgument(f"{name} must be between 0 and 1, got {value!r}")


def _steps(name: str, value: Any) -> None:
    if not isinstance(value, list | tuple):
        raise InvalidArgument(f"{name} must be a list of step numbers, got {value!r}")
    for step in value:
        whole_number(name, step, 0)


def _nothing(name: str, value: Any) -> None:
    """β and its schedule are checked where they are used, in `NoiseSchedule.named`."""


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "num_train_timesteps": _whole(1, MAX_TRAIN_TIMESTEPS),
    "beta_start": _nothing,
    "beta_end": _nothing,
    "beta_schedule": _nothing,
    "trained_betas": _nothing,
    "rescale_betas_zero_snr": _flag,
    "prediction_type": _choice(*PREDICTION_TYPES, "flow_prediction"),
    "compat": _choice(*READINGS),
    # clipping of x0
    "clip_sample": _flag,
    "clip_sample_range": _real(0, LARGEST_SAMPLE),
    "thresholding": _flag,
    "dynamic_thresholding_ratio": _real(0, 1),
    "sample_max_value": _real(1e-4, LARGEST_SAMPLE),
    # the grid
    "timestep_spacing": _choice(*TIMESTEP_SPACINGS),
    "steps_offset": _whole(0, MAX_TRAIN_TIMESTEPS),
    "set_alpha_to_one": _flag,
    "final_sigmas_type": _choice("zero", "sigma_min"),
    "lambda_min_clipped": _lambda_min,
    "interpolation_type": _choice("linear", "log_linear"),
    "timestep_type": _choice("discrete", "continuous"),
    "use_karras_sigmas": _flag,
    "use_exponential_sigmas": _flag,
    "use_beta_sigmas": _flag,
    "use_lu_lambdas": _flag,
    "use_flow_sigmas": _flag,
    "flow_shift": shift,
    "shift": shift,
    "shift_terminal": _optional(_share),
    "use_dynamic_shifting": _flag,
    "time_shift_type": _choice("exponential", "linear"),
    "base_shift": _optional(_real(-math.inf)),
    "max_shift": _optional(_real(-math.inf)),
    "base_image_seq_len": _optional(_whole(1)),
    "max_image_seq_len": _optional(_whole(1)),
    "invert_sigmas": _flag,
    "sigma_min": _optional(_real(1e-10, 1e10)),
    "sigma_max": _optional(_real(1e-10, 1e10)),
    "sigma_data": _real(1e-10, 1e10),
    "sigma_schedule": _choice("karras", "exponential"),
    "rho": _positive,
    "original_inference_steps": _whole(1),
    "timestep_scaling": _real(0, 1e10),
    # the update
    "variance_type": _choice(None, "fixed_small", "fixed_small_log", "fixed_large", "learned",
                             "learned_range"),
    "solver_order": _whole(1, 3),
    "solver_type": _choice("midpoint", "heun"),
    "algorithm_type": _choice("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
    "lower_order_final": _flag,
    "euler_at_final": _flag,
    "predict_x0": _flag,
    "disable_corrector": _steps,
    "solver_p": _nothing,
    "skip_prk_steps": _flag,
    "stochastic_sampling": _flag,
}  # fmt: skip

# Every option that some scheduler has: `from_config` may meet it in another class' config.
FAMILY = frozenset(_CHECKS)


def check(
    owner: str,
    name: str,
    value: Any,
    choices: Mapping[str, Sequence[str | None]],
    unsupported: Mapping[str, Any],
) -> None:
    """Refuse an option's value. Raises InvalidArgument naming the option.

    Args:
        owner: the class' name, for the message.
        choices: values of this class where it allows fewer or others than its family.
        unsupported: option → the only value that this class supports.
    """
    if name in unsupported:
        if not same(value, unsupported[name]):
            raise InvalidArgument(
                f"{name}={value!r} is not supported by {owner}; leave it at {unsupported[name]!r}"
            )
    elif name in choices:
        one_of(name, value, choices[name])
    elif name in _CHECKS:  # an option of a scheduler defined elsewhere is its own business
        _CHECKS[name](name, value)


def check_flow(config: Mapping[str, Any]) -> None:
    """Refuse what is said of a flow by a scheduler that walks none. Raises InvalidArgument."""
    if config.get("use_flow_sigmas"):
        return
    if config.get("prediction_type") == "flow_prediction":
        raise InvalidArgument(
            "prediction_type 'flow_prediction' needs use_flow_sigmas=True: it is on flow levels "
            "alone; on variance-preserving levels it is called 'flow'"
        )
    for name, idle in (("flow_shift", 1.0), ("use_dynamic_shifting", False)):
        if "use_flow_sigmas" in config and config[name] != idle:
            raise InvalidArgument(f"{name}={config[name]!r} needs use_flow_sigmas=True")


def at_most_one(config: Mapping[str, Any], *names: str) -> str | None:
    """The one flag of `names` that is set, or None. Raises InvalidArgument if several are."""
    chosen = [name for name in names if config.get(name)]
    if len(chosen) > 1:
        raise InvalidArgument(f"{' and '.join(chosen)} exclude each other: set one of them")
    return chosen[0] if chosen else None


def same(a: Any, b: Any) -> bool:
    """Equality that survives arrays (trained_betas) and tells True from 1."""
    if isinstance(a, np.ndarray | Tensor) or isinstance(b, np.ndarray | Tensor):
        return False
    return type(a) is type(b) and a == b
