"""Shapes that broadcast: one number per image, or per image and channel, over all positions.

Also the check of values, on the CPU only.
"""

import math
import warnings

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument


def readable(x: Tensor) -> bool:
    """Return True if reading an entry waits for no device and breaks no compiled graph."""
    return x.is_cpu and not torch.compiler.is_compiling()


def check_finite(name: str, x: Tensor) -> None:
    """Refuse NaN and infinite entries of a tensor that is `readable`. Raises InvalidArgument."""
    if problem := _not_finite(x):
        raise InvalidArgument(f"{name} must be finite, got {problem}")


def warn_unless_finite(name: str, x: Tensor) -> None:
    """Warn of what `check_finite` refuses: in training a step that is not finite may be skipped."""
    if problem := _not_finite(x):
        warnings.warn(f"{name} must be finite, got {problem}", stacklevel=4)


def check_mask(name: str, mask: Tensor) -> None:
    """Refuse other entries of a mask that is `readable`. Raises InvalidArgument."""
    if readable(mask) and not bool(((mask == 0) | (mask == 1)).all()):
        raise InvalidArgument(f"{name} must hold 0 and 1 only, got {mask.flatten().tolist()!s:.60}")


def _not_finite(x: Tensor) -> str:
    """Return the kind and the fraction of entries that are not finite; "" without any."""
    # A sum is quick, but can overflow where no entry is infinite.
    if not readable(x) or math.isfinite(x.sum().item()) or bool(x.isfinite().all()):
        return ""
    kind = "NaN" if bool(x.isnan().any()) else "infinite"
    return f"{kind} in {1 - x.isfinite().double().mean().item():.1%} of its entries"


def append_dims(x: Tensor, ndim: int) -> Tensor:
    """View a tensor with axes of size 1 appended until it has `ndim`: (B,) as (B, 1, …)."""
    return x.view(*x.shape, *(1,) * (ndim - x.ndim))
