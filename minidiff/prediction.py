"""A prediction type is a row: out = p·x0 + q·ε.

Together with x = α·x0 + σ·ε a row gives two equations for two unknowns, so one 2×2 solve turns
any prediction into (x0, ε):

    type           p    q    source
    epsilon        0    1    DDPM, arXiv:2006.11239, eq. 14
    sample         1    0    the clean image itself
    v_prediction  −σ    α    Salimans & Ho 2022, arXiv:2202.00512, appendix D
    flow          −1    1    Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023, arXiv:2209.03003

v is defined on variance-preserving levels, α² + σ² = 1. At another level (such as
variance-exploding α = 1) it is the v of the same sample divided by √(α² + σ²). EDM's row has its
own function, `edm_row`. This is the only place that knows prediction types.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, one_of
from minidiff.schedule import Level

HostNumber = (float, np.floating)  # a tuple: isinstance takes longer for a union


def _velocity_row(level: Level) -> tuple:
    norm2 = level.alpha**2 + level.sigma**2
    if isinstance(norm2, HostNumber) and abs(float(norm2) - 1) < 4e-7:
        return -level.sigma, level.alpha  # off only by the rounding of a float32 table
    return -level.sigma / norm2**0.5, level.alpha / norm2**0.5


_ROWS: dict[str, Callable[[Level], tuple]] = {
    "epsilon": lambda level: (0.0, 1.0),
    "sample": lambda level: (1.0, 0.0),
    "v_prediction": _velocity_row,
    "flow": lambda level: (-1.0, 1.0),
}
PREDICTION_TYPES = tuple(_ROWS)
_ROWS["flow_prediction"] = _ROWS["flow"]  # diffusers' name for it


def row(prediction_type: str, level: Level) -> tuple:
    """Return (p, q) of out = p·x0 + q·ε at this level. Raises InvalidArgument for another type."""
    if prediction_type not in _ROWS:
        one_of("prediction_type", prediction_type, _ROWS)
    return _ROWS[prediction_type](level)


def edm_row(level: Level, sigma_data: float) -> tuple:
    """Return (p, q) of EDM's preconditioned network F, at a level (1, σ).

    x0 = c_skip·x + c_out·F with c_skip = σ_d²/(σ² + σ_d²), c_out = σ·σ_d/√(σ² + σ_d²)
    (Karras et al. 2022, arXiv:2206.00364, table 1), solved for F.
    """
    scale = (level.sigma**2 + sigma_data**2) ** 0.5
    return level.sigma / (sigma_data * scale), -sigma_data / scale


def target(x0: Tensor, eps: Tensor, level: Level, prediction_type: str) -> Tensor:
    """Return the network's target for x = α·x0 + σ·ε.

    Args:
        x0, eps: clean sample and the noise added to it, (B, C, *space).
        level: α and σ, floats or tensors that broadcast over (B, 1, …).
        prediction_type: "epsilon", "sample", "v_prediction" or "flow".
    Raises:
        InvalidArgument: for another prediction type.
    """
    p, q = row(prediction_type, level)
    return combine(p, x0, q, eps)


def split(out: Tensor, x: Tensor, level: Level, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Return the clean sample and the noise that the network's output implies.

    Args:
        out, x: network output and noisy sample, (B, C, *space).
        level: α and σ of x, floats or tensors as in `target`.
        prediction_type: one of the types of `target`.
    Returns:
        (x0, ε), each (B, C, *space), with α·x0 + σ·ε = x and p·x0 + q·ε = out.
    Raises:
        InvalidArgument: another prediction type, or a level at which the output does not determine
            x0 or ε: "epsilon" at α = 0 (pure noise), "sample" at σ = 0 (clean).
    """
    try:
        return solve(out, x, level, row(prediction_type, level))
    except ZeroDivisionError:
        raise InvalidArgument(
            f"prediction_type {prediction_type!r} does not determine x0 and noise at "
            f"alpha={level.alpha:g}, sigma={level.sigma:g}"
        ) from None


def solve(out: Tensor, x: Tensor, level: Level, row: tuple) -> tuple[Tensor, Tensor]:
    """Solve α·x0 + σ·ε = x and p·x0 + q·ε = out for (x0, ε), for any row (p, q).

    Raises:
        ZeroDivisionError: the two equations are one, for a row and a level of floats.
    """
    (alpha, sigma), (p, q) = level, row
    determinant = q * alpha - p * sigma
    if isinstance(determinant, HostNumber):
        if determinant == 0:
            raise ZeroDivisionError
        if p == -sigma and q == alpha:
            determinant = 1.0  # v at a variance-preserving level, where this is α² + σ²
    host = isinstance(p, HostNumber)
    x0 = out if host and p == 1 and q == 0 else combine(q, x, -sigma, out, determinant)
    eps = out if host and p == 0 and q == 1 else combine(alpha, out, -p, x, determinant)
    return x0, eps


def combine(
    a: float | Tensor, u: Tensor, b: float | Tensor, v: Tensor, over: float | Tensor = 1.0
) -> Tensor:
    """Return (a·u + b·v)/over, without needless passes over memory for a host-side 0 or 1."""
    if isinstance(a, Tensor) or isinstance(b, Tensor) or isinstance(over, Tensor):
        return (a * u + b * v) / over  # reading a tensor for 0 or 1 would sync
    if a == 0 or b == 0:
        factor, total = (b, v) if a == 0 else (a, u)
        total = total if factor == 1 else torch.mul(total, factor)
    elif a == 1 and over == 1:
        return torch.add(u, v, alpha=b)
    else:  # fused would round once less than diffusers, visible where terms cancel or are clipped
        total = (u if a == 1 else torch.mul(u, a)) + torch.mul(v, b)  # quicker than a * u
    return total if over == 1 else total / over


def weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ w·tensor, without passes over memory for weights 0 and 1."""
    (first, w), *rest = [(t, w) for t, w in zip(tensors, weights, strict=True) if w]
    total = first if w == 1 else torch.mul(first, w)
    for tensor, w in rest:
        total = torch.add(total, tensor, alpha=w)
    return total


def clip(x0: Tensor, limit: float) -> Tensor:
    """Clamp a predicted clean sample to [−limit, limit], the range of the data."""
    return x0.clamp(-limit, limit)


def dynamic_threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    """Clamp each image to its own percentile and rescale to [−1, 1].

    s is the `ratio` quantile of |x0| per image, limited to [1, max_value]; the result is
    clamp(x0, −s, s)/s (Saharia et al. 2022, arXiv:2205.11487, section 2.3).

    Args:
        x0: clean sample (B, C, *space) of any floating dtype; 16-bit types use float32.
        ratio: quantile in (0, 1].
        max_value: upper limit of s, above 0; a limit below 1 applies as well, as in diffusers.
    """
    wide = x0.to(torch.promote_types(x0.dtype, torch.float32)).flatten(1)
    s = torch.quantile(wide.abs(), ratio, dim=1, keepdim=True).clamp(1, max_value)
    return (wide.clamp(-s, s) / s).view(x0.shape).to(x0.dtype)
