"""A training target with less noise: the mean of all images that may explain the noisy one.

A network that predicts x0 from x = α·x0 + σ·ε learns the mean of all x0 that may have led to x,
from one of them at a time. At the noisier levels there are many. Weighted by how well they explain
x, the images of a reference batch y_1 … y_n estimate that mean far better than x0 alone:

    x̄0 = Σ w_i·y_i,    w_i ∝ exp(−‖x − α·y_i‖² / 2σ²),    i = 0 … n,  y_0 = x0

(Xu, Tong & Jaakkola 2023, arXiv:2302.00670, section 3). Its expectation, given x, tends to that
of x0 as n grows. With ε̄ = (x − α·x̄0)/σ the same x is α·x̄0 + σ·ε̄. An objective that is given
the pair (x̄0, ε̄) instead of (x0, ε) has the same input and the better target, for every prediction
type. An image whose class is given is explained by images of that class alone.

The loss then lacks the noise of the target: a run with a reference batch logs a smaller loss than
one without, at the same quality.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.schedule import Level

MAX_RATIO = 1e4  # α/σ; above it x0 alone explains x, and squares would overflow float32


class Reference(NamedTuple):
    """Images that represent the data: y float32 (n, *shape), labels int64 (n,) or None."""

    y: Tensor
    labels: Tensor | None


def stable_pair(
    x0: Tensor, eps: Tensor, level: Level, allowed: Tensor | None, reference: Reference
) -> tuple[Tensor, Tensor]:
    """Return x̄0 and ε̄ with the same noisy images: α·x̄0 + σ·ε̄ = α·x0 + σ·ε.

    Args:
        x0, eps: clean images and their noise, float32 (B, *shape).
        level: tensors α, σ (B, 1, …) that multiply them.
        allowed: True where an image of the reference may explain x, bool (B, n); None for all.
        reference: reference batch.
    Returns:
        x̄0 and ε̄, shaped like x0.
    """
    own, y = x0.flatten(1), reference.y.flatten(1)
    ratio = (level.alpha / level.sigma).flatten(1).clamp_max(MAX_RATIO)
    # −‖x − α·y‖²/2σ² without the terms that do not depend on y
    scaled = ratio * (ratio * own + eps.flatten(1))  # α·x/σ²
    fits = scaled @ y.T - ratio.square() / 2 * y.square().sum(1)
    own_fits = ((scaled - ratio.square() / 2 * own) * own).sum(1, keepdim=True)
    if allowed is not None:
        fits = fits.masked_fill(~allowed, -torch.inf)
    weights = torch.cat([own_fits, fits], dim=1).softmax(dim=1)
    mean = torch.empty_like(x0)  # in the same memory format, in which convolutions are fast
    mean.copy_((weights[:, :1] * own + weights[:, 1:] @ y).view(x0.shape))
    return mean, eps + ratio.view(level.alpha.shape) * (x0 - mean)
