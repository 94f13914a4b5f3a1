"""Figures from nearest neighbours: density and coverage on features, copying on pixels.

    coverage   fraction of real images with a sample in their neighbourhood
    density    number of neighbourhoods that hold a sample, over the k expected of a real one
    copying    distance of a sample to the training images, relative to that to held-out images

Source of the first two: M. F. Naeem et al. 2020, arXiv:2002.09797, section 3. The third follows
C. Meehan et al. 2020, arXiv:2004.05675: samples of a model that generalises are as far from its
training images as new data are.
"""

import math

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, whole_number
from minidiff.metrics.distances import check_pair

NEIGHBOURS = 5  # k of density and coverage, as in Naeem et al.
_MAX_DISTANCES = 2**24  # in memory at once: 128 MiB of float64
_IMAGES = 4096  # reference images compared with at once


def radii(real: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Return the distance of every real sample to its k-th nearest other one, float64 (N,).

    Args:
        real: features (N, D), N > k, which `density_and_coverage` checks.
        k: number of the neighbour.
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
    """Return density and coverage of samples in the neighbourhoods of real ones.

    The neighbourhood of a real sample is the closed ball that reaches its k-th nearest other real
    sample. Density is the mean number of balls that hold a fake sample, divided by k. It is about 1
    for samples of the real distribution, lower where samples are far from the data, and above 1
    where they crowd in dense regions. Coverage is the fraction of balls with a fake sample in them:
    about 1 − 2⁻ᵏ for equally many real and fake samples of one distribution.

    Args:
        real: features (N, D), N > k.
        fake: features (M, D).
        k: number of real neighbours in a ball.
        known_radii: `radii(real, k)`; None to compute them.

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
    """Return the fraction of real samples in 0..1 with a fake one in their neighbourhood.

    Arguments and errors are those of `density_and_coverage`, whose second figure this is.
    """
    return density_and_coverage(real, fake, k)[1]


def _chunks(rows: Tensor, columns: int) -> list[tuple[int, Tensor]]:
    """Return parts of the rows, and their offsets, whose distances to the columns fit in memory."""
    size = max(1, _MAX_DISTANCES // max(len(rows), columns))
    return [(start, rows[start : start + size]) for start in range(0, len(rows), size)]


def copying(samples: Tensor, training: Tensor, held_out: Tensor) -> float:
    """Return the median of d(sample, nearest training image)/d(sample, nearest held-out image).

    Distances are Euclidean, between pixels. Copies of training images give 0. Independent samples
    give the value of other real images, which is below 1 where there are more training than
    held-out images: compare with that value.

    Args:
        samples, training, held_out: uint8 (N, C, H, W) of one C, H and W, on any device;
            computed on that of the samples.

    Returns:
        The ratio, at least 0. A sample that equals a held-out image has an infinite ratio, and one
        that equals a training image the ratio 0.

    Raises:
        InvalidArgument: no images, another dtype, or different shapes.
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
    """Return the Euclidean distance of every sample to its nearest image, float64 (N,).

    Args:
        samples, images: uint8 (N, C, H, W) and (M, C, H, W), M ≥ 1.
    """
    found = []
    for rows in samples.split(_MAX_DISTANCES // _IMAGES):
        queries = _centred(rows)
        best = torch.full((len(rows),), math.inf, dtype=queries.dtype, device=rows.device)
        nearest = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        for start in range(0, len(images), _IMAGES):
            others = _centred(images[start : start + _IMAGES].to(rows.device))
            # |q − o|² − |q|², as |q|² is equal for all o
            distances = torch.addmm(others.square().sum(dim=1), queries, others.T, alpha=-2)
            values, index = distances.min(dim=1)
            nearer = values < best
            best = torch.where(nearer, values, best)
            nearest = torch.where(nearer, index + start, nearest)
        # Float32 suffices to find the nearest image, but rounds the distance 0 of a copy.
        closest = images[nearest.to(images.device)].to(rows.device)
        gap = rows.flatten(1).double() - closest.flatten(1).double()
        found.append(gap.square().sum(dim=1).sqrt())
    return torch.cat(found)


def _centred(images: Tensor) -> Tensor:
    """Return float32 rows centred at 0, where products are small and round least."""
    return images.flatten(1).float() - 127.5
