"""How good samples of points are, with the same figures of fresh points beside them.

    print(table(compared(pipe(num_images=10_000, output_type="pt").images, "ring")))

`ring` and `grid` are mixtures of Gaussians, so a sample is near a mode or it is not. For the other
shapes a sample counts as near where its nearest of many points lies no farther than for 99 % of
fresh points. A perfect model reaches the figures of fresh points.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.data import toys
from minidiff.errors import InvalidArgument
from minidiff.lab.mixtures import energy_distance

MAX_STDS = 3  # standard deviations from a mean that count as near it
MIN_SHARE = 1 / 6  # of the points that a mode should hold, below which it counts as missed
MAX_POINTS = 5_000  # points that distances are computed between


class PointScores(NamedTuple):
    """Scores of points.

    Attributes:
        near: fraction of points near a mode, or near the data where there are no modes.
        modes: modes with a sixth or more of the points that they should hold; None without modes.
        distance: energy distance to fresh points.
    """

    near: float
    modes: int | None
    distance: float


def score(points: Tensor, name: str) -> PointScores:
    """Return the scores of points.

    Args:
        points: (N, 2), finite.
        name: name of `minidiff.data.toys.NAMES`.
    Raises:
        InvalidArgument: points of another shape, fewer than two or not finite, or another name.
    """
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 2 or not points.isfinite().all():
        got = tuple(points.shape)
        raise InvalidArgument(f"points must be (N, 2), N ≥ 2, without NaN or infinity; got {got}")
    points, fresh = points.cpu().double(), toys.load(name, "test", MAX_POINTS, 1).points.double()
    distance = energy_distance(points[:MAX_POINTS], fresh)
    if name in toys.MIXTURES:
        truth = toys.mixture(name)
        nearest, mode = torch.cdist(points, truth.means).min(1)
        near = nearest < MAX_STDS * truth.stds[mode]
        counts = mode[near].bincount(minlength=len(truth.means))
        covered = int((counts >= MIN_SHARE * len(points) / len(truth.means)).sum())
        return PointScores(float(near.double().mean()), covered, distance)
    known = toys.load(name, "test", 4 * MAX_POINTS, 2).points.double()
    limit = torch.cdist(fresh, known).amin(1).quantile(0.99)
    near = torch.cdist(points[:MAX_POINTS], known).amin(1) <= limit
    return PointScores(float(near.double().mean()), None, distance)


def compared(points: Tensor, name: str) -> dict[str, PointScores]:
    """Return the scores of "model", samples (N, 2), and of as many "fresh points".

    Raises:
        InvalidArgument: see `score`.
    """
    fresh = toys.load(name, "test", max(2, len(points)), 3).points
    return {"model": score(points, name), "fresh points": score(fresh, name)}


def table(found: dict[str, PointScores]) -> str:
    """Return the scores of `compared` as a table."""
    lines = [f"{'':<26}" + "".join(f"{column:>14}" for column in found)]
    near = "near the data, %" if found["model"].modes is None else "within 3σ of a mode, %"
    for title, i, factor, digits in ((near, 0, 100, 2), ("modes covered", 1, 1, 0),
                                     ("energy distance", 2, 1, 4)):  # fmt: skip
        cells = [scores[i] for scores in found.values()]
        if None not in cells:
            lines.append(f"{title:<26}" + "".join(f"{factor * c:>14.{digits}f}" for c in cells))
    return "\n".join(lines)
