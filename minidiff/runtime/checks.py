"""Option checks declared beside the defaults and applied in one place.

    @dataclass(frozen=True)
    class Config:
        batch_size: int = option(32, "images per step", whole(1, 65536))
        sampler: str | None = option(None, "stored sampler", optional(choice(*NAMES)))

        def __post_init__(self):
            check_fields(self)

A check takes the name of an option and its value, returns the value, and raises InvalidArgument
naming both and what is allowed. Tables of checks serve options that are not fields (schedulers).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minidiff.errors import (
    InvalidArgument,
    listed,
    one_of,
    real_number,
    true_or_false,
    whole_number,
)

Check = Callable[[str, Any], Any]


def whole(low: int, high: int | None = None) -> Check:
    """Allow whole numbers in low..high."""
    return lambda name, value: whole_number(name, value, low, high)


def real(low: float = -math.inf, high: float = math.inf) -> Check:
    """Allow finite numbers in [low, high]."""
    return lambda name, value: real_number(name, value, low, high)


def positive(name: str, value: Any) -> float:
    """Allow finite numbers above 0."""
    if real_number(name, value, 0) == 0:
        raise InvalidArgument(f"{name} must be above 0, got {value!r}")
    return value


def choice(*allowed: str | None) -> Check:
    """Allow the values listed."""

    def check(name: str, value: Any) -> Any:
        one_of(name, value, allowed)
        return value

    return check


def text(name: str, value: Any) -> str:
    """Allow texts."""
    if not isinstance(value, str):
        raise InvalidArgument(f"{name} must be a text, got {value!r}")
    return value


def callback(name: str, value: Any) -> Callable:
    """Allow functions, and whatever else can be called."""
    if not callable(value):
        raise InvalidArgument(f"{name} must be a function, got {value!r}")
    return value


def instance(*kinds: type) -> Check:
    """Allow objects of the classes."""
    wanted = " or ".join(kind.__name__ for kind in kinds)

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, kinds):
            got = repr(value) if isinstance(value, str | int | None) else type(value).__name__
            raise InvalidArgument(f"{name} must be of type {wanted}, got {got}")
        return value

    return check


def flag(name: str, value: Any) -> bool:
    """Allow True and False."""
    return true_or_false(name, value)


def optional(check: Check) -> Check:
    """Allow None as well."""
    return lambda name, value: None if value is None else check(name, value)


def each(check: Check, *, length: int | None = None, least: int = 0) -> Check:
    """Allow lists and tuples whose every entry passes.

    Args:
        check: check of one entry.
        length: number of entries; None for any.
        least: minimum number of entries.
    """

    def check_all(name: str, value: Any) -> Any:
        if len(listed(name, value, length)) < least:
            raise InvalidArgument(f"{name} must list at least {least}, got {value!r}")
        for entry in value:
            check(name, entry)
        return value

    return check_all


def one_or_each(check: Check, *, length: int | None = None) -> Check:
    """Allow one value, or a list or tuple of `length` values."""
    several = each(check, length=length)
    return lambda name, value: (several if isinstance(value, list | tuple) else check)(name, value)


def interval_of(interval: Sequence[float] | None) -> tuple[float, float] | None:
    """Return two increasing σ/α, the second possibly infinite, or None.

    Raises:
        InvalidArgument: not two numbers with 0 <= low < high.
    """
    if interval is None:
        return None
    low, high = listed("guidance_interval", interval, 2)
    low = real_number("guidance_interval", low, 0)
    high = high if high == math.inf else real_number("guidance_interval", high, 0)
    if low >= high:
        raise InvalidArgument(f"guidance_interval must rise, got {low:g} and {high:g}")
    return low, high


def option(default: Any, help: str, check: Check, **metadata: Any) -> Any:
    """Return a dataclass field with its help text and its check.

    Args:
        default: default value.
        help: noun phrase without the default, which `--help` adds.
        check: check that `check_fields` applies.
        metadata: further entries of the field, such as a flag or a group of `--help`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "check": check, **metadata})


def check_fields(config: Any) -> None:
    """Apply the check of every field that has one. Raises InvalidArgument naming the field."""
    for field in dataclasses.fields(config):
        if check := field.metadata.get("check"):
            check(field.name, getattr(config, field.name))


def check_all(values: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Apply a table of checks to the options that it names. Raises InvalidArgument."""
    for name, value in values.items():
        if name in checks:
            checks[name](name, value)
