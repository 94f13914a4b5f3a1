"""The few exceptions minidiff raises on purpose.

Every message names the argument or the file, what was given and what is allowed, so that the
command line can print it as one line and a program can catch one class.
"""


class MinidiffError(Exception):
    """Base of every error that minidiff raises on purpose."""


class InvalidArgument(MinidiffError, ValueError):
    """An argument is outside what its name allows; raised before any work starts."""


class DataError(MinidiffError):
    """A data file is missing, truncated or not what it claims to be."""


class CheckpointError(MinidiffError):
    """A checkpoint folder is missing, damaged, or does not fit the model that reads it."""


class TrainingError(MinidiffError):
    """Training cannot go on: the loss or a gradient is not finite."""


class Stopped(MinidiffError):
    """Training was asked to stop and did, with everything saved.

    Attributes:
        signal: the number of the signal that asked.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def one_of(name: str, value: object, allowed: object) -> None:
    """Refuse `value` unless it is one of `allowed`; the message lists them all."""
    if not isinstance(value, str | int | None) or value not in tuple(allowed):
        known = ", ".join(str(choice) for choice in allowed)
        raise InvalidArgument(f"{name} must be one of {known}; got {value!r}")


def whole_number(name: str, value: object, low: int, high: int | None = None) -> int:
    """Refuse `value` unless it is an int in low..high (True and 3.0 are not ints here)."""
    try:
        number = None if isinstance(value, bool) else value.__index__()
    except (AttributeError, TypeError):  # arrays and tensors have the method, but not for this
        number = None
    if number is not None and low <= number and (high is None or number <= high):
        return number
    allowed = f"in {low}..{high}" if high is not None else f"at least {low}"
    if number is None:
        raise InvalidArgument(f"{name} must be a whole number {allowed}, got {value!r}")
    raise InvalidArgument(f"{name} must be {allowed}, got {number}")


def real_number(name: str, value: object, low: float, high: float = float("inf")) -> float:
    """Refuse `value` unless it is a finite number in [low, high]; NaN never passes."""
    try:
        number = None if isinstance(value, bool | str | bytes) else float(value)
    except OverflowError:  # 10**400 is an int, and no float
        number = float("inf")
    except (TypeError, ValueError, RuntimeError):  # arrays and tensors of several numbers
        number = None
    if number is None:
        raise InvalidArgument(f"{name} must be a number, got {value!r}")
    if not low <= number <= high or abs(number) == float("inf"):
        at_least = "" if low == -float("inf") else f" and at least {low:g}"
        allowed = f"in [{low:g}, {high:g}]" if high != float("inf") else f"finite{at_least}"
        raise InvalidArgument(f"{name} must be {allowed}, got {number:g}")
    return number


def true_or_false(name: str, value: object) -> bool:
    """Refuse `value` unless it is True or False (1 and 0 are not)."""
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} must be True or False, got {value!r}")
    return value


def listed(name: str, value: object, length: int | None = None) -> tuple:
    """Refuse `value` unless it is a list or a tuple, of `length` entries where that is given."""
    if not isinstance(value, list | tuple):
        raise InvalidArgument(f"{name} must be a list or a tuple, got {value!r}")
    if length is not None and len(value) != length:
        raise InvalidArgument(f"{name} must have {length} entries, got {len(value)}: {value!r}")
    return tuple(value)
