"""Points in a plane, for models that train in seconds and can be plotted completely.

    moons          two interleaving half circles           labels: which
    swissroll      a spiral of one and a half turns        no labels
    spiral         two interleaving spirals                labels: which arm
    pinwheel       five bent arms                          labels: which arm
    checkerboard   the black squares of a 4×4 board        no labels
    ring           eight Gaussians on a circle             labels: which Gaussian
    grid           5×5 Gaussians                           labels: which Gaussian

Every point is a function of four random numbers that depend on (seed, index) alone: point i is the
same in a set of any size. All sets are centred, with a root mean square of about 1 per coordinate,
which suits the noise schedules for images. `mixture` is the distribution of `ring` and `grid`, with
denoiser, score and density in closed form (`minidiff.exact`).

Moons and roll are shaped as in scikit-learn, the pinwheel as in Johnson et al. 2016,
arXiv:1603.06277.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.data.protocol import Data, Purpose, check_labels, digest, random_words
from minidiff.errors import InvalidArgument, one_of, whole_number
from minidiff.exact import GaussianMixture
from minidiff.nn import MLP
from minidiff.noise import MAX_SEED
from minidiff.text.conditioning import ConditionConfig

COUNTS = {"train": 50_000, "test": 10_000}
_MAX_COUNT = 10**8  # points are held in memory
_STD = 0.1  # standard deviation of every Gaussian of a mixture
_ARMS = 5


@dataclass(frozen=True, eq=False)  # eq: tensors have no single truth value to compare by
class PointData(Data):
    """Points in D dimensions, all with a class label or all without.

    Attributes:
        name: name of the data in error messages and reports.
        points: float32 (N, D), finite.
        labels: int64 (N,) in 0..len(class_names) − 1, or None.
        class_names: one name per class, in label order; empty without labels.
    Raises:
        InvalidArgument: a dtype, a shape or a label does not fit this description.
    """

    name: str
    points: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...]
    is_stored: ClassVar[bool] = True
    fixed_options: ClassVar[Mapping[str, Any]] = {
        "block": 1, "shift": 0, "flip": False, "dropout": 0.0, "learn_variance": False
    }  # fmt: skip

    def __post_init__(self) -> None:
        points = self.points
        bad = int((~points.isfinite()).sum())
        if points.dtype != torch.float32 or points.ndim != 2 or not points.shape[1] or bad:
            raise InvalidArgument(
                f"points must be float32 (N, D), finite; got {points.dtype} "
                f"{tuple(points.shape)} with {bad} values of NaN or infinity"
            )
        check_labels(self.labels, len(points), self.class_names)

    def __len__(self) -> int:
        return len(self.points)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one point: (D,)."""
        return tuple(self.points.shape[1:])

    def to(self, device: torch.device | str) -> "PointData":
        """Return the data with its tensors on `device`."""
        labels = None if self.labels is None else self.labels.to(device)
        return PointData(self.name, self.points.to(device), labels, self.class_names)

    def batch(self, index: Tensor, position: int = 0) -> tuple[Tensor, Tensor | None]:
        """Return the points at `index`, float32 (B, D), and their labels int64 (B,) or None."""
        index = index.to(self.points.device, non_blocking=True)
        return self.points[index], None if self.labels is None else self.labels[index]

    def network(self, config: ConditionConfig) -> MLP:
        """Return a fresh `MLP`: the last of config.channels is its width, config.layers its depth.

        Of its `unet_options` the condition of points has the number of labels alone.
        """
        sizes = {"hidden_channels": config.channels[-1], "num_layers": config.layers}
        return MLP(in_channels=self.shape[0], **sizes, **self.condition(config).unet_options)

    def digests(self) -> dict[str, str]:
        """Return digests of points and labels."""
        held = {"points": self.points, "labels": self.labels}
        return {name: digest(part) for name, part in held.items() if part is not None}


def load(
    name: str, split: str = "train", count: int | None = None, seed: int = 0, start: int = 0
) -> PointData:
    """Draw a toy data set.

    Args:
        name: one of `NAMES`.
        split: "train" or "test", which are independent draws.
        count: number of points; by default 50,000 or 10,000.
        seed: seed of all points, 0 … 2³²−1.
        start: index of the first point; new points begin at `start + count`.
    Raises:
        InvalidArgument: a name or a number that is not allowed.
    """
    one_of("toy", name, NAMES)
    one_of("split", split, COUNTS)
    count = whole_number("count", COUNTS[split] if count is None else count, 1, _MAX_COUNT)
    seed = whole_number("seed", seed, 0, MAX_SEED)
    start = whole_number("start", start, 0, 2**63)
    purpose = Purpose.TOY_TRAIN if split == "train" else Purpose.TOY_TEST
    uniform = (random_words(seed, purpose, start, count) >> 11) * 2.0**-53  # in [0, 1)
    toy = _TOYS[name]
    raw, which = toy.draw(uniform)
    points = (raw - toy.centre) / math.sqrt(toy.square)
    labels = torch.from_numpy(which) if toy.class_names else None
    return PointData(name, torch.from_numpy(points).float(), labels, toy.class_names)


def mixture(name: str) -> GaussianMixture:
    """Return the distribution of "ring" or "grid". Raises InvalidArgument for others."""
    one_of("mixture", name, MIXTURES)
    means = _MEANS[name]
    return GaussianMixture(np.ones(len(means)), means, np.full(len(means), _STD))


# --- shapes: uniform numbers (N, 4) → points (N, 2) and classes (N,) ----------------------------

_Draw = tuple[np.ndarray, np.ndarray]


def _choice(u: np.ndarray, n: int) -> np.ndarray:
    """Return integers in 0..n−1 from uniform numbers."""
    return np.minimum((u * n).astype(np.int64), n - 1)


def _normal(u: np.ndarray) -> np.ndarray:
    """Return standard normal (N, 2) from uniform (N, 2) numbers, by Box & Muller 1958."""
    radius, angle = np.sqrt(-2 * np.log1p(-u[:, 0])), 2 * math.pi * u[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _moons(u: np.ndarray) -> _Draw:
    lower, angle = _choice(u[:, 0], 2), math.pi * u[:, 1]
    upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    curve = np.where(lower[:, None], np.array([1, 0.5]) - upper, upper)
    return curve + 0.1 * _normal(u[:, 2:]), lower


def _swissroll(u: np.ndarray) -> _Draw:
    t = 1.5 * math.pi * (1 + 2 * u[:, 1])  # angle and radius
    curve = t[:, None] * np.stack([np.cos(t), np.sin(t)], axis=1)
    return curve + 0.5 * _normal(u[:, 2:]), np.zeros(len(u), np.int64)


def _spiral(u: np.ndarray) -> _Draw:
    arm, t = _choice(u[:, 0], 2), 3 * math.pi * np.sqrt(u[:, 1])  # angle and radius, evenly spread
    turn = t + math.pi * arm
    curve = t[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    return curve + 0.3 * _normal(u[:, 2:]), arm


def _pinwheel(u: np.ndarray) -> _Draw:
    arm, noise = _choice(u[:, 0], _ARMS), _normal(u[:, 2:])
    along, across = 1 + 0.3 * noise[:, 0], 0.05 * noise[:, 1]
    turn = 2 * math.pi * arm / _ARMS + 0.25 * np.exp(along)  # bends the arm
    cos, sin = np.cos(turn), np.sin(turn)
    return np.stack([along * cos - across * sin, along * sin + across * cos], axis=1), arm


def _checkerboard(u: np.ndarray) -> _Draw:
    square = _choice(u[:, 0], 8)
    column = square // 2
    corner = np.stack([column, 2 * (square % 2) + column % 2], axis=1)
    return corner + u[:, 2:], square


def _gaussians(means: np.ndarray) -> Callable[[np.ndarray], _Draw]:
    def draw(u: np.ndarray) -> _Draw:
        which = _choice(u[:, 0], len(means))
        return means[which] + _STD * _normal(u[:, 2:]), which

    return draw


def _ring(n: int = 8) -> np.ndarray:
    """Return means on the circle with R²/2 + s² = 1, for unit variance."""
    angle = 2 * math.pi * np.arange(n) / n
    return math.sqrt(2 * (1 - _STD**2)) * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _grid(side: int = 5) -> np.ndarray:
    """Return means at distance d with d²·(n² − 1)/12 + s² = 1, for unit variance."""
    line = math.sqrt(12 * (1 - _STD**2) / (side**2 - 1)) * (np.arange(side) - (side - 1) / 2)
    return np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)


class _Toy(NamedTuple):
    """A shape, its mean, its mean variance per coordinate, and the names of its classes."""

    draw: Callable[[np.ndarray], _Draw]
    centre: tuple[float, float]
    square: float
    class_names: tuple[str, ...]


def _numbered(word: str, n: int) -> tuple[str, ...]:
    return tuple(f"{word} {i}" for i in range(n))


_PI = math.pi
_MEANS = {"ring": _ring(), "grid": _grid()}
MIXTURES = tuple(_MEANS)
_TOYS = {
    # Means and variances of the curves are integrals over the angle.
    "moons": _Toy(_moons, (0.5, 0.25), (1.3125 - 1 / _PI) / 2 + 0.01, ("upper", "lower")),
    "swissroll": _Toy(
        _swissroll, (2.0, 2 / (3 * _PI)), (9.75 * _PI**2 - 4 - (2 / (3 * _PI)) ** 2) / 2 + 0.25, ()
    ),
    "spiral": _Toy(_spiral, (0.0, 0.0), 9 * _PI**2 / 4 + 0.09, _numbered("arm", 2)),
    "pinwheel": _Toy(_pinwheel, (0.0, 0.0), (1 + 0.3**2 + 0.05**2) / 2, _numbered("arm", _ARMS)),
    "checkerboard": _Toy(_checkerboard, (2.0, 2.0), 16 / 12, ()),
    **{
        name: _Toy(_gaussians(means), (0.0, 0.0), 1.0, _numbered("Gaussian", len(means)))
        for name, means in _MEANS.items()
    },
}
NAMES = tuple(_TOYS)
