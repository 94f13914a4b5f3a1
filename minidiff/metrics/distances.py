"""Fréchet and kernel distance between two sets of features.

Both are 0 for equal distributions. They are given in ‰ of the spread of the real features, so they
do not depend on the units of a feature and can be compared between data sets:

    FD‰   1000·(|μ_r − μ_f|² + tr(C_r + C_f − 2·(C_r·C_f)^½)) / tr(C_r)
    KD‰   1000·MMD²(real, fake) / (E k(x, x) − E k(x, x'))        k(x, y) = (x·y/D + 1)³

FD‰ depends on means and covariances only, and is biased upwards by about D/N. KD‰ depends on third
moments too, and is unbiased. A value of 1000 is a distance as large as the spread of the data. The
formulas are those of the Fréchet and the kernel inception distance, but network and scale are not,
so the values must never be called FID and KID.

Sources: M. Heusel et al. 2017, arXiv:1706.08500, eq. 6; M. Bińkowski et al. 2018,
arXiv:1801.01401, section 4; A. Gretton et al. 2012, JMLR 13, eq. 3.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, whole_number

BLOCK = 1000  # real samples, and fake ones, of one estimate of the kernel distance


class Moments(NamedTuple):
    """A Gaussian fit: mean (D,) and unbiased covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor


def moments(samples: Tensor) -> Moments:
    """Fit a Gaussian to features (N, D).

    Raises:
        InvalidArgument: fewer than 2·D samples, too few for a covariance, or values that are
            not finite.
    """
    if samples.ndim != 2 or len(samples) < 2 * samples.shape[1]:
        raise InvalidArgument(
            "a Fréchet distance needs features (N, D) with N ≥ 2·D, "
            f"got {tuple(samples.shape)}: draw more samples"
        )
    require_finite("features", samples)
    samples = samples.double()
    return Moments(samples.mean(dim=0), torch.cov(samples.T))


def frechet_distance(real: Tensor | Moments, fake: Tensor | Moments) -> float:
    """Return FD‰ between the Gaussian fits of two sets of features.

    It is 0 for equal fits, and 1000 where the squared distance equals the total variance of the
    real features. A finite sample of a perfect model does not reach 0: compare with
    `Evaluator.floor`.

    Args:
        real, fake: features (N, D), or their `moments`.

    Raises:
        InvalidArgument: too few samples, different D, or equal real features.

    Source: Heusel et al. 2017, arXiv:1706.08500, eq. 6, divided by tr(C_real).
    """
    real, fake = (x if isinstance(x, Moments) else moments(x) for x in (real, fake))
    if real.mean.shape != fake.mean.shape:
        raise InvalidArgument(
            f"real and fake must have the same number of features, got {len(real.mean)} and "
            f"{len(fake.mean)}"
        )
    # tr (C_r·C_f)^½ = tr (S·C_f·S)^½ with S = C_r^½: the same eigenvalues, but of a symmetric
    # matrix, so no square root is complex.
    root = _symmetric_root(real.covariance)
    cross = torch.linalg.eigvalsh(root @ fake.covariance @ root).clamp(min=0).sqrt().sum()
    shift = (real.mean - fake.mean).square().sum()
    spread = _spread(real.covariance)
    distance = shift + spread + fake.covariance.trace() - 2 * cross
    return 1000 * max(distance.item(), 0.0) / spread  # rounding may fall below 0


def kernel_distance(real: Tensor, fake: Tensor, block: int = BLOCK) -> tuple[float, float]:
    """Return KD‰ between two sets of features, and its standard error.

    A polynomial kernel depends on units, so features are first shifted by the mean of the real
    ones and divided by their root mean square deviation √(tr C_real/D). Each pair of a real and a
    fake block gives one unbiased estimate. The result is the mean of the estimates, and may by
    chance be below 0 for equal distributions.

    Args:
        real, fake: features (N, D) and (M, D), each in random order; the first
            min(N, M)//block blocks are used, at least one.
        block: real samples, and fake ones, of one estimate; at least 2.

    Returns:
        The distance, and its standard error over blocks, NaN for a single block.

    Raises:
        InvalidArgument: fewer than 2 samples, different D, values that are not finite, or
            equal real features.

    Source: Bińkowski et al. 2018, arXiv:1801.01401, section 4; Gretton et al. 2012, eq. 3.
    """
    check_pair(real, fake)
    whole_number("number of samples", min(len(real), len(fake)), 2)
    block = min(whole_number("block", block, 2), len(real), len(fake))
    blocks = min(len(real), len(fake)) // block
    real, fake = real.double(), fake.double().to(real.device)
    mean = real.mean(dim=0)
    scale = math.sqrt(_spread(torch.cov(real.T).reshape(mean.numel(), -1)) / mean.numel())
    real, fake = (real - mean) / scale, (fake - mean) / scale
    estimates, spreads = [], []
    for x, y in zip(real.split(block)[:blocks], fake.split(block)[:blocks], strict=True):
        within = _kernel(x, x)
        equal, other = within.diagonal().mean(), _mean_of_pairs(within)
        estimates.append(other + _mean_of_pairs(_kernel(y, y)) - 2 * _kernel(x, y).mean())
        spreads.append(equal - other)  # the variance of the real features in the kernel's space
    found = 1000 * torch.stack(estimates) / torch.stack(spreads).mean()
    error = found.std().item() / math.sqrt(blocks) if blocks > 1 else math.nan
    return found.mean().item(), error


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return k(x, y) of all pairs of rows."""
    return (x @ y.T / x.shape[1] + 1) ** 3  # Bińkowski et al., section 4


def _mean_of_pairs(kernel: Tensor) -> Tensor:
    """Return the mean over i ≠ j (Gretton et al. eq. 3); pairs with i = j would add a bias."""
    n = len(kernel)
    return (kernel.sum() - kernel.diagonal().sum()) / (n * (n - 1))


def _spread(covariance: Tensor) -> float:
    """Return the total variance. Raises InvalidArgument where it is 0."""
    spread = covariance.trace().item()
    if spread <= 0:
        raise InvalidArgument("real features must differ from each other, got copies of one")
    return spread


def check_pair(real: Tensor, fake: Tensor) -> None:
    """Refuse all but two sets of finite features with the same D. Raises InvalidArgument."""
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise InvalidArgument(
            f"real and fake must be (N, D) and (M, D), got {tuple(real.shape)} and "
            f"{tuple(fake.shape)}"
        )
    require_finite("real", real)
    require_finite("fake", fake)


def require_finite(name: str, values: Tensor) -> None:
    """Refuse values that are NaN or infinite. Raises InvalidArgument."""
    if not torch.isfinite(values).all():
        raise InvalidArgument(f"{name} must be finite, got NaN or infinity")


def _symmetric_root(matrix: Tensor) -> Tensor:
    """Return the square root of a positive semidefinite matrix; rounding below 0 is clamped."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
