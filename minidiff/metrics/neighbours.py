"""What nearest neighbours tell: density and coverage on features, and copying on pixels.

    coverage   the share of real images that have a sample in their neighbourhood
    density    how many neighbourhoods a sample lies in, of the k that a real one is expected in
    copying    how much nearer a sample is to the training images than to held-out ones

Source of the first two: M. F. Naeem et al. 2020, arXiv:2002.09797, section 3. The third is the
idea of C. Meehan et al. 2020, arXiv:2004.05675: a model that generalises is as near to the images
that it was trained on as new data are.
"""

import math

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, whole_number
from minidiff.metrics.distances import check_pair

NEIGHBOURS = 5  # k of density and coverage, the value of their paper
_MAX_DISTANCES = 2**24  # held at a time: 128 MiB
_IMAGES = 4096  # compared with at a time


def radii(real: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """The distance of every real sample to its k-th nearest other one, float64 (N,).

    Args:
        real: features (N, D), N > k, checked by `density_and_coverage`.
    """
    real = real.double()
    found = []
    for start, centres in _chunks(real, len(real)):
        distances = torch.cdist(centres, real)
        itself = torch.arange(len(centres), device=real.device)
        distances[itself, itself + start] = math.inf
        found.append(distances.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(found)


def density_and_coverage(
    real: Tensor, fake: Tensor, k: int = NEIGHBOURS, known_radii: Tensor | None = None
) -> tuple[float, float]:
    """How samples lie in the neighbourhoods of real ones.

    The neighbourhood of a real sample is the closed ball whose radius is the distance to its k-th
    nearest other real sample. Density is the mean number of balls that a fake sample lies in,
    over k: about 1 for samples of the real distribution, less by the share of samples where no
    real one is near. It may exceed 1 in the middle of the data, as many balls meet there. Coverage
    is the share of balls with a fake sample in them: about 1 − 2⁻ᵏ for as many fake as real
    samples of one distribution.

    Args:
        real: features (N, D), N > k.
        fake: features (M, D).
        k: how many real neighbours the ball reaches.
        known_radii: `radii(real, k)`, where they are known already.

    Returns:
        Density, at least 0, and coverage in 0..1.

    Raises:
        InvalidArgument: k is not in 1..N−1, there is no fake sample, D differs, or a value is
            not finite.

    Source: Naeem et al. 2020, arXiv:2002.09797, section 3.
    """
    k = whole_number("k", k, 1, len(real) - 1)
    whole_number("number of fake samples", len(fake), 1)
    check_pair(real, fake)
    real, fake = real.double(), fake.double().to(real.device)  # float32 loses near duplicates
    radius = radii(real, k) if known_radii is None else known_radii
    inside = torch.zeros((), dtype=torch.int64, device=real.device)
    covered = torch.zeros_like(inside)
    for start, centres in _chunks(real, len(fake)):
        balls = radius[start : start + len(centres), None]
        hit = torch.cdist(centres, fake) <= balls
        inside += hit.sum()
        covered += hit.any(dim=1).sum()
    return inside.item() / (k * len(fake)), covered.item() / len(real)


def coverage(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> float:
    """The share of real samples that have a fake one in their neighbourhood, in 0..1.

    Arguments and errors as `density_and_coverage`, of which it is the second figure.
    """
    return density_and_coverage(real, fake, k)[1]


def _chunks(rows: Tensor, columns: int) -> list[tuple[int, Tensor]]:
    """Parts of the rows, and where they start, whose distances to so many columns fit in memory."""
    size = max(1, _MAX_DISTANCES // max(len(rows), columns))
    return [(start, rows[start : start + size]) for start in range(0, len(rows), size)]


def copying(samples: Tensor, training: Tensor, held_out: Tensor) -> float:
    """The median of d(sample, nearest training image)/d(sample, nearest held-out image).

    Distances are Euclidean, between pixels. Copies of training images give 0. What is unrelated to
    both gives the figure that other real images give, which is below 1 where there are more
    training than held-out images: compare with that.

    Args:
        samples, training, held_out: uint8 (N, C, H, W) of one shape but for N, on any device;
            the work is done on that of the samples.

    Returns:
        The ratio, at least 0. A sample that equals a held-out image but no training image
        counts as infinite, one that equals both as 0.

    Raises:
        InvalidArgument: no images, other dtypes, or shapes that differ.
    """
    for name, images in (("samples", samples), ("training", training), ("held_out", held_out)):
        if images.dtype != torch.uint8 or not len(images) or images.shape[1:] != samples.shape[1:]:
            raise InvalidArgument(
                f"{name} must be at least one uint8 image of shape {tuple(samples.shape[1:])}, "
                f"got {images.dtype} {tuple(images.shape)}"
            )
    to_training = nearest_distance(samples, training)
    ratio = to_training / nearest_distance(samples, held_out)
    return torch.where(to_training == 0, 0, ratio).median().item()


def nearest_distance(samples: Tensor, images: Tensor) -> Tensor:
    """The Euclidean distance of every sample to the nearest of the images, float64 (N,).

    Args:
        samples, images: uint8 (N, C, H, W) and (M, C, H, W), M ≥ 1.
    """
    found = []
    for rows in samples.split(_MAX_DISTANCES // _IMAGES):
        queries = _centred(rows)
        best = torch.full((len(rows),), math.inf, device=rows.device)
        nearest = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        for start in range(0, len(images), _IMAGES):
            others = _centred(images[start : start + _IMAGES].to(rows.device))
            # |q − o|² but for |q|², which is the same for all o
            distances = torch.addmm(others.square().sum(dim=1), queries, others.T, alpha=-2)
            values, index = distances.min(dim=1)
            nearer = values < best
            best = torch.where(nearer, values, best)
            nearest = torch.where(nearer, index + start, nearest)
        # Float32 can tell which image is near, but not that a copy is at distance 0.
        closest = images[nearest.to(images.device)].to(rows.device)
        gap = rows.flatten(1).double() - closest.flatten(1).double()
        found.append(gap.square().sum(dim=1).sqrt())
    return torch.cat(found)


def _centred(images: Tensor) -> Tensor:
    """Float32 rows around 0, where products are smallest and round least."""
    return images.flatten(1).float() - 127.5
