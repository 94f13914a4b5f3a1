"""The exceptions of minidiff, and the checks of arguments that raise them.

Every message names the argument or the file, the value given and the values allowed. The command
line prints it as one line, and a program can catch all of them as MinidiffError.
"""

from difflib import get_close_matches


class MinidiffError(Exception):
    """Base of all exceptions of minidiff."""


class InvalidArgument(MinidiffError, ValueError):
    """An argument has a value that is not allowed; raised before any work starts."""


class DataError(MinidiffError):
    """A data file is missing, damaged or of another kind than expected."""


class CheckpointError(MinidiffError):
    """A checkpoint folder is missing, damaged, or does not fit the model that reads it."""


class TrainingError(MinidiffError):
    """Training cannot continue: the loss or a gradient is not finite."""


class Stopped(MinidiffError):
    """Training stopped on a signal, after saving everything.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def one_of(name: str, value: object, allowed: object) -> None:
    """Refuse `value` unless it is one of `allowed`, which the message lists."""
    if not isinstance(value, str | int | None) or value not in tuple(allowed):
        listed = ", ".join(str(choice) for choice in allowed)
        hint = suggestion(value, allowed)
        raise InvalidArgument(f"{name} must be one of {listed}; got {value!r}{hint}")


def suggestion(value: object, allowed: object) -> str:
    """Return "; did you mean …?" with a name that resembles a text or has its initials, or "".

    Args:
        value: what was given, such as "euler2", or "--lr" for "--learning-rate".
        allowed: names that are allowed.
    """
    if not isinstance(value, str):
        return ""
    names = {str(choice).lower(): str(choice) for choice in allowed}
    initials = {"".join(part[:1] for part in name.strip("-").split("-")): name for name in names}
    if any("++" in name for name in names):
        value = value.lower().replace("pp", "++")  # dpmpp, as k-diffusion spells it
    short = value.lower().strip("-")
    near = (
        [initials[short]]
        if len(short) > 1 and short in initials
        else get_close_matches(value.lower(), names, 1)
    )
    return "".join(f"; did you mean {names[name]}?" for name in near)


def whole_number(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return `value` as an int, refused unless it is in low..high; True and 3.0 are not ints."""
    try:
        number = None if isinstance(value, bool) else value.__index__()
    except (AttributeError, TypeError):  # arrays of several numbers have the method, and raise
        number = None
    if number is not None and low <= number and (high is None or number <= high):
        return number
    allowed = f"in {low}..{high}" if high is not None else f"at least {low}"
    if number is None:
        raise InvalidArgument(f"{name} must be a whole number {allowed}, got {value!r}")
    raise InvalidArgument(f"{name} must be {allowed}, got {number}")


def real_number(name: str, value: object, low: float, high: float = float("inf")) -> float:
    """Return `value` as a float, refused unless it is finite and in [low, high]."""
    try:
        number = None if isinstance(value, bool | str | bytes) else float(value)
    except OverflowError:  # 10**400 is too large for a float
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
    """Return `value`, refused unless it is True or False; 1 and 0 are not."""
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} must be True or False, got {value!r}")
    return value


def listed(name: str, value: object, length: int | None = None) -> tuple:
    """Return `value` as a tuple; refuse what is not a list, tuple or array of `length` entries.

    A `length` of None allows any.
    """
    if not isinstance(value, list | tuple) and getattr(value, "ndim", 0) == 1:
        value = value.tolist()  # an array or a tensor
    if not isinstance(value, list | tuple):
        raise InvalidArgument(f"{name} must be a list or a tuple, got {value!r}")
    if length is not None and len(value) != length:
        raise InvalidArgument(f"{name} must have {length} entries, got {len(value)}: {value!r}")
    return tuple(value)
