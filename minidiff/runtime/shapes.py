"""Shapes that broadcast: one number per image, or per image and channel, over all positions."""

from torch import Tensor


def append_dims(x: Tensor, ndim: int) -> Tensor:
    """View a tensor with axes of size 1 appended until it has `ndim`: (B,) as (B, 1, …)."""
    return x.view(*x.shape, *(1,) * (ndim - x.ndim))
