"""The allowed values of every scheduler option, in one table, whichever class has the option.

Names and values are those of diffusers 0.42.1. An option that a class has but that cannot work
there is refused by the class itself (`unsupported`, or its constructor).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from minidiff.errors import InvalidArgument, one_of, real_number
from minidiff.prediction import PREDICTION_TYPES
from minidiff.runtime.checks import Check, choice, each, flag, optional, positive, real, whole
from minidiff.schedule import MAX_TRAIN_TIMESTEPS
from minidiff.schedulers.core.quirks import READINGS

LARGEST_SAMPLE = 1e4  # half precision holds it
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")

shift = real(1e-4, 1e4)  # of a flow; beyond, float32 cannot distinguish its σ


def shift_of(mu: float, time_shift_type: str) -> float:
    """Return the dynamic shift for mu: e^mu, or mu if "linear". Raises InvalidArgument."""
    if time_shift_type == "linear":
        return shift("mu", mu)
    return math.exp(real_number("mu", mu, -9, 9))


def falling(name: str, values: Iterable, check: Check, dtype: type | None = None) -> list:
    """Return a custom grid as a list of host numbers.

    Args:
        name: argument, for messages.
        values: at least one number; an array or a tensor is read back.
        check: range of each number.
        dtype: NumPy type in which the numbers must still fall, where they are rounded later.
    Raises:
        InvalidArgument: a number fails the check, or the numbers do not fall strictly.
    """
    numbers = host_numbers(name, values, check)
    if not numbers or not is_falling(numbers if dtype is None else [*map(dtype, numbers)]):
        raise InvalidArgument(f"{name} must be strictly falling, got {str(values)[:80]}")
    return numbers


def host_numbers(name: str, values: Iterable, check: Check) -> list:
    """Return a list, an array or a tensor as a list of numbers. Raises InvalidArgument."""
    values = values.tolist() if isinstance(values, np.ndarray | Tensor) else values
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping):
        raise InvalidArgument(f"{name} must be a list of numbers, got {values!r}")
    return [check(name, value) for value in values]


def is_falling(numbers: Sequence[float]) -> bool:
    """Return whether every number is below the one before it."""
    return all(a > b for a, b in pairwise(numbers))


def _lambda_min(name: str, value: Any) -> None:
    if value != -math.inf:  # the default clips nothing
        real_number(name, value, -math.inf)


def _fraction(name: str, value: Any) -> None:
    if not 0 < real_number(name, value, 0, 1) < 1:
        raise InvalidArgument(f"{name} must be between 0 and 1, got {value!r}")


def _unchecked(name: str, value: Any) -> None:
    """Accept any value: `NoiseSchedule.named` checks β and its schedule."""


_CHECKS: dict[str, Check] = {
    "num_train_timesteps": whole(1, MAX_TRAIN_TIMESTEPS),
    "beta_start": _unchecked,
    "beta_end": _unchecked,
    "beta_schedule": _unchecked,
    "trained_betas": _unchecked,
    "rescale_betas_zero_snr": flag,
    "prediction_type": choice(*PREDICTION_TYPES, "flow_prediction"),
    "compat": choice(*READINGS),
    # clipping of x0
    "clip_sample": flag,
    "clip_sample_range": real(0, LARGEST_SAMPLE),
    "thresholding": flag,
    "dynamic_thresholding_ratio": real(0, 1),
    "sample_max_value": real(1e-4, LARGEST_SAMPLE),
    # the grid
    "timestep_spacing": choice(*TIMESTEP_SPACINGS),
    "steps_offset": whole(0, MAX_TRAIN_TIMESTEPS),
    "set_alpha_to_one": flag,
    "final_sigmas_type": choice("zero", "sigma_min"),
    "lambda_min_clipped": _lambda_min,
    "interpolation_type": choice("linear", "log_linear"),
    "timestep_type": choice("discrete", "continuous"),
    "use_karras_sigmas": flag,
    "use_exponential_sigmas": flag,
    "use_beta_sigmas": flag,
    "use_lu_lambdas": flag,
    "use_flow_sigmas": flag,
    "flow_shift": shift,
    "shift": shift,
    "shift_terminal": optional(_fraction),
    "use_dynamic_shifting": flag,
    "time_shift_type": choice("exponential", "linear"),
    "base_shift": optional(real()),
    "max_shift": optional(real()),
    "base_image_seq_len": optional(whole(1)),
    "max_image_seq_len": optional(whole(1)),
    "invert_sigmas": flag,
    "sigma_min": optional(real(1e-10, 1e10)),
    "sigma_max": optional(real(1e-10, 1e10)),
    "sigma_data": real(1e-10, 1e10),
    "sigma_schedule": choice("karras", "exponential"),
    "rho": positive,
    "original_inference_steps": whole(1),
    "timestep_scaling": real(0, 1e10),
    # the update
    "variance_type": choice(None, "fixed_small", "fixed_small_log", "fixed_large", "learned",
                             "learned_range"),
    "solver_order": whole(1, 3),
    "solver_type": choice("midpoint", "heun"),
    "algorithm_type": choice("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
    "lower_order_final": flag,
    "euler_at_final": flag,
    "predict_x0": flag,
    "disable_corrector": each(whole(0)),
    "solver_p": _unchecked,
    "skip_prk_steps": flag,
    "stochastic_sampling": flag,
}  # fmt: skip

# Every option of any scheduler: `from_config` may find it in another class' config.
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
        owner: name of the class, for the message.
        name, value: option and what was given.
        choices: option → allowed values, where this class differs from its family.
        unsupported: option → the only value that this class supports.
    """
    if name in unsupported:
        if not same(value, unsupported[name]):
            raise InvalidArgument(
                f"{name}={value!r} is not supported by {owner}; leave it at {unsupported[name]!r}"
            )
    elif name in choices:
        one_of(name, value, choices[name])
    elif name in _CHECKS:  # a scheduler defined elsewhere checks its own options
        _CHECKS[name](name, value)


def modern(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with the names of diffusers 0.1 to 0.10 replaced by today's.

    An option that is there under today's name counts.

    Args:
        options: content of a config.
    Raises:
        InvalidArgument: an option of that time has a value that nothing today stands for.
    """
    result = {name: value for name, value in options.items() if name not in _OF_2022}
    for name in _OF_2022.keys() & options.keys():
        allowed, today = _OF_2022[name]
        if allowed(name, value := options[name]) is not None and today:
            meaning = {True: "epsilon", False: "sample"}[value] if "epsilon" in name else value
            result.setdefault(today, meaning)
    return result


# Name in 2022 → its values, and today's name; None for what has no effect.
_OF_2022: dict[str, tuple[Check, str | None]] = {
    "predict_epsilon": (optional(flag), "prediction_type"),
    "timesteps": (optional(whole(1, MAX_TRAIN_TIMESTEPS)), "num_train_timesteps"),
    "clip_alpha_at_one": (optional(flag), "set_alpha_to_one"),
    "tensor_format": (choice(None, "pt", "np"), None),
    "timestep_values": (choice(None), None),
}


def check_flow(config: Mapping[str, Any]) -> None:
    """Refuse options of a flow without use_flow_sigmas. Raises InvalidArgument."""
    if config.get("use_flow_sigmas"):
        return
    if config.get("prediction_type") == "flow_prediction":
        raise InvalidArgument(
            "prediction_type 'flow_prediction' needs use_flow_sigmas=True: it belongs to flow "
            "levels; on variance-preserving levels it is called 'flow'"
        )
    for name, idle in (("flow_shift", 1.0), ("use_dynamic_shifting", False)):
        if "use_flow_sigmas" in config and config[name] != idle:
            raise InvalidArgument(f"{name}={config[name]!r} needs use_flow_sigmas=True")


def at_most_one(config: Mapping[str, Any], *names: str) -> str | None:
    """Return the one flag of `names` that is set, or None; refuse several."""
    chosen = [name for name in names if config.get(name)]
    if len(chosen) > 1:
        raise InvalidArgument(f"{' and '.join(chosen)} exclude each other: set one of them")
    return chosen[0] if chosen else None


def same(a: Any, b: Any) -> bool:
    """Compare two values: arrays (trained_betas) never equal, and True differs from 1."""
    if isinstance(a, np.ndarray | Tensor) or isinstance(b, np.ndarray | Tensor):
        return False
    return type(a) is type(b) and a == b
