"""Mixtures with classes, whose guided density is known, and a distance between sets of points."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.exact import GaussianMixture
from minidiff.schedule import CLEAN, Level


class LabelledMixture:
    """Classes y, each a mixture p(x|y); their union is a mixture p(x).

    Guidance of scale w aims at the conditional tilted towards what the class makes likely,

        p(x|y)·p(y|x)^(w−1)/Z  ∝  p(x|y)^w·p(x)^(1−w)

    (Ho & Salimans 2022, arXiv:2207.12598, section 3). Its score at every noise level is *not* that
    of the noisy versions of this density, so even perfect networks do not sample it exactly
    (Bradley & Nakkiran 2024, arXiv:2408.09000).

    Args:
        classes: p(x|y) of each class, all of the same dimension D.
        shares: p(y) of each class, positive; equal by default.
    Raises:
        InvalidArgument: the numbers of classes and shares, or the dimensions, differ.
    """

    def __init__(
        self, classes: Sequence[GaussianMixture], shares: Sequence[float] | None = None
    ) -> None:
        shares = [1.0] * len(classes) if shares is None else list(shares)
        if len(shares) != len(classes) or len({one.means.shape[1] for one in classes}) != 1:
            raise InvalidArgument(
                "classes must have the same dimension, and as many shares as classes"
            )
        self.classes = list(classes)
        self.shares = torch.tensor(shares, dtype=torch.float64) / sum(shares)
        pairs = list(zip(self.shares, self.classes, strict=True))
        self.union = GaussianMixture(
            torch.cat([share * one.weights for share, one in pairs]),
            torch.cat([one.means for one in classes]),
            torch.cat([one.stds for one in classes]),
        )

    def log_posterior(self, x: Tensor, label: int, level: Level = CLEAN) -> Tensor:
        """Return ln p(y|x_t), the log-probability of a perfect classifier, (B,) float64."""
        likelihood = self.classes[label].log_prob(x, level)
        return self.shares[label].log() + likelihood - self.union.log_prob(x, level)

    def tilted(
        self, label: int, scale: float, n: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw n samples of p(x|y)·p(y|x)^(w−1)/Z, (n, D) float64, by rejection: p(y|x) is at most
        1.

        Args:
            label: class y.
            scale: guidance scale w, at least 1.
            n: number of samples.
            generator: source of the proposals; None for torch's global one.
        Raises:
            InvalidArgument: a scale below 1.
        """
        if scale < 1:
            raise InvalidArgument(f"scale must be at least 1, got {scale:g}")
        kept, number = [], 0
        while number < n:
            x = self.classes[label].sample(4 * n, generator)
            chance = ((scale - 1) * self.log_posterior(x, label)).exp()
            accepted = x[torch.rand(len(x), generator=generator, dtype=torch.float64) < chance]
            kept.append(accepted)
            number += len(accepted)
        return torch.cat(kept)[:n]


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Return √(2·E‖a − b‖ − E‖a − a'‖ − E‖b − b'‖) of two sets of points (N, D), (M, D).

    It is 0 for equal distributions, up to sampling error of order N^−½ (Székely & Rizzo 2013,
    "Energy statistics", section 2).
    """

    def within(x: Tensor) -> float:
        return (torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))).item()

    squared = 2 * torch.cdist(a, b).mean().item() - within(a) - within(b)
    return math.sqrt(max(squared, 0.0))
