"""Distributions whose denoiser, score, marginals and flow are known in closed form.

A mixture of isotropic Gaussians stays one under noising: with x_t = α·x0 + σ·ε,

    p_t(x) = Σ_k w_k · N(x; α·μ_k, v_k·I),      v_k = α²·s_k² + σ²,

so everything that a trained network approximates has a formula (the posterior of a Gaussian:
Bishop 2006, "Pattern Recognition and Machine Learning", section 2.3.3; the score from it: Efron
2011, "Tweedie's formula and selection bias"). Samplers are measured against it without training.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.schedule import CLEAN, Level

MAX_NUMBERS = 1 << 24  # in one table of distances, 128 MiB in float64
MAX_SET = 1 << 28  # numbers in a set of images, 2 GiB
FLOW_ERROR = 1e-8  # of the flow in more than one dimension
MAX_FLOW_STEPS = 1 << 14


class GaussianMixture:
    """Σ_k w_k · N(μ_k, s_k²·I) in D dimensions, seen through any noise level.

    All arithmetic is float64. Methods take x of shape (B, *shape) with D elements per image and
    return its shape and dtype; densities are (B,).

    Args:
        weights: positive weights (K,), divided by their sum.
        means: means (K, D).
        stds: standard deviations (K,), 0 for a point.
    Raises:
        InvalidArgument: the shapes do not fit or a value is out of range.
    """

    def __init__(
        self,
        weights: Sequence[float] | Tensor,
        means: Sequence[Sequence[float]] | Tensor,
        stds: Sequence[float] | Tensor,
    ) -> None:
        w, m, s = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, stds))
        if m.ndim != 2 or m.numel() == 0 or not w.shape == s.shape == m.shape[:1]:
            raise InvalidArgument(
                "weights, means, stds must be (K,), (K, D), (K,), "
                f"got {tuple(w.shape)}, {tuple(m.shape)}, {tuple(s.shape)}"
            )
        if not bool((w > 0).all() and (s >= 0).all() and torch.isfinite(w.sum() + s.sum())):
            raise InvalidArgument("weights must be positive and stds at least 0, all finite")
        self.weights, self.means, self.stds = w / w.sum(), m, s

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Return n clean samples, (n, D) float64."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[k] + self.stds[k, None] * z

    def log_prob(self, x: Tensor, level: Level = CLEAN) -> Tensor:
        """Return ln p_t(x), the noisy marginal, (B,) float64."""
        return torch.logsumexp(self._joint(self._flat(x), level), dim=1)

    def denoise(self, x: Tensor, level: Level) -> Tensor:
        """Return E[x0 | x_t = x], the prediction of a perfect network.

        In component k, (x0, x_t) is jointly Gaussian with covariance α·s_k², hence

            E[x0 | x, k] = μ_k + (α·s_k²/v_k)·(x − α·μ_k),

        averaged over the posterior P(k | x).
        """
        gain = level.alpha * self.stds**2 / self._variance(level)
        return self._average(x, level, 1 - gain * level.alpha, gain)

    def score(self, x: Tensor, level: Level) -> Tensor:
        """Return ∇ ln p_t(x) = Σ_k P(k | x)·(α·μ_k − x)/v_k."""
        v = self._variance(level)
        return self._average(x, level, level.alpha / v, -1 / v)

    def noise(self, x: Tensor, level: Level) -> Tensor:
        """Return E[ε | x_t = x] = −σ·∇ ln p_t(x) (Tweedie).

        Any prediction type is linear in (x0, ε), so a perfect network's output is
        `target(mixture.denoise(x, level), mixture.noise(x, level), level, prediction_type)`.
        """
        return -level.sigma * self.score(x, level)

    def flow(self, x: Tensor, now: Level, nxt: Level) -> Tensor:
        """Move x along the probability-flow ODE from level `now` to level `nxt`.

        The ODE carries p_now to p_nxt (Song et al. 2021, arXiv:2011.13456, section 4.3). On a line
        its paths cannot cross, so it is the only increasing map that does: F_nxt⁻¹(F_now(x)). For
        one component in any dimension it is α'·μ + √(v'/v)·(x − α·μ).

        Args:
            x: samples (B, *shape). The error is about 1e-15·F/p: a point between distant
                components, where p is nearly 0, is ill-conditioned. Several components in
                several dimensions are integrated numerically: see `_integrated`.
            now, nxt: levels of x and of the result.
        Raises:
            InvalidArgument: the flow in several dimensions meets a component of std 0 at σ = 0, or
                x lies so close to the border between components that its path is undecided.
        """
        flat = self._flat(x)
        if len(self.weights) == 1:
            stretch = (self._variance(nxt) / self._variance(now)).sqrt()
            y = nxt.alpha * self.means + stretch * (flat - now.alpha * self.means)
        elif self.means.shape[1] == 1:
            y = self._quantile(*self._log_tails(flat, now), nxt)
        else:
            y = self._integrated(flat, now, nxt)
        return y.view_as(x).to(x.dtype)

    def _integrated(self, flat: Tensor, now: Level, nxt: Level) -> Tensor:
        """Return the end of the flow's ODE dx = x̂0·dα + ε̂·dσ, to within `FLOW_ERROR`.

        Only the ratio σ/α matters to the flow, and x scales with r = √(α² + σ²). With u = x/r,
        α = cos φ and σ = sin φ it is

            du/dφ = cos φ·ε̂ − sin φ·x̂0 = Σ_k P(k | u)·sin φ·(cos φ·(1 − s_k²)·u − μ_k)/v_k.

        Steps of Runge & Kutta's fourth order are even in τ = asinh(φ/s), s the smallest std, which
        resolves the levels where components part. For each point they are halved until two results
        differ by less than 10·FLOW_ERROR·(1 + |u|): the error of the finer one is a fifteenth of
        that difference.
        """
        r, scale = math.hypot(*now), math.hypot(*nxt)
        first, last = (math.atan2(level.sigma, level.alpha) for level in (now, nxt))
        narrow = float(self.stds.min()) or min(first, last)
        if narrow == 0:
            raise InvalidArgument("flow in D > 1 needs stds above 0 where a level has σ = 0")
        begin, end = (math.asinh(angle / narrow) for angle in (first, last))

        def slope(tau: float, u: Tensor) -> Tensor:
            angle = narrow * math.sinh(tau)
            level = Level(math.cos(angle), math.sin(angle))
            pull = narrow * math.cosh(tau) * level.sigma / self._variance(level)  # with dφ/dτ
            return self._average(u, level, -pull, pull * level.alpha * (1 - self.stds**2))

        u = flat / r
        left, n = torch.arange(len(u)), 32  # points that are not decided yet
        coarse, result = _runge_kutta(slope, u, begin, end, 16), torch.empty_like(u)
        while len(left) and n <= MAX_FLOW_STEPS:
            fine = _runge_kutta(slope, u[left], begin, end, n)
            close = ((fine - coarse).abs() <= 10 * FLOW_ERROR * (1 + fine.abs())).all(1)
            result[left[close]] = scale * fine[close]
            left, coarse, n = left[~close], fine[~close], 2 * n
        if len(left):
            raise InvalidArgument(
                f"x has {len(left)} points whose flow {MAX_FLOW_STEPS} steps do not decide to "
                f"{FLOW_ERROR:g}"
            )
        return result

    def _log_tails(self, flat: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Return ln P(x_t ≤ x) and ln P(x_t > x), (B, 1): each is precise where it is small."""
        z = (flat - level.alpha * self.means.T) / self._variance(level).sqrt()
        lower, upper = torch.special.log_ndtr(z), torch.special.log_ndtr(-z)
        log_w = self.weights.log()
        return (
            torch.logsumexp(log_w + lower, dim=1, keepdim=True),
            torch.logsumexp(log_w + upper, dim=1, keepdim=True),
        )

    def _quantile(self, lower: Tensor, upper: Tensor, level: Level) -> Tensor:
        """Return the x with these log tails, by bisection on the smaller one."""
        # A quantile of the mixture lies between the smallest and the largest of its components'
        # quantiles, and 40 standard deviations is beyond what float64 can express in a tail.
        reach = 40 * self._variance(level).sqrt()
        centre = level.alpha * self.means[:, 0]
        low = torch.full_like(lower, (centre - reach).min().item())
        high = torch.full_like(lower, (centre + reach).max().item())
        use_lower = lower < upper
        for _ in range(80):  # halves the bracket below the last bit of any float64 in it
            middle = (low + high) / 2
            below, above = self._log_tails(middle, level)
            right = torch.where(use_lower, below < lower, above > upper)
            low, high = torch.where(right, middle, low), torch.where(right, high, middle)
        return (low + high) / 2

    def _variance(self, level: Level) -> Tensor:
        return level.alpha**2 * self.stds**2 + level.sigma**2

    def _joint(self, flat: Tensor, level: Level) -> Tensor:
        """Return ln(w_k · N(x; α·μ_k, v_k·I)), (B, K)."""
        v, means = self._variance(level), level.alpha * self.means
        if flat.shape[0] * means.numel() <= MAX_NUMBERS:
            distance = (flat[:, None] - means).square().sum(dim=2)
        else:  # loses digits where x is far from 0 and close to a mean, but needs no (B, K, D)
            squares = flat.square().sum(1, keepdim=True) + means.square().sum(1)
            distance = (squares - 2 * flat @ means.T).clamp_min(0)
        return self.weights.log() - distance / (2 * v) - flat.shape[1] / 2 * (2 * math.pi * v).log()

    def _average(self, x: Tensor, level: Level, a: Tensor, b: Tensor) -> Tensor:
        """Return Σ_k P(k | x)·(a_k·μ_k + b_k·x), like x; some rows of x at a time."""
        flat, parts = self._flat(x), []
        for part in flat.split(max(1, MAX_NUMBERS // len(self.means))):
            posterior = torch.softmax(self._joint(part, level), dim=1)
            parts.append((posterior * a) @ self.means + (posterior @ b)[:, None] * part)
        return torch.cat(parts).view_as(x).to(x.dtype)

    def _flat(self, x: Tensor) -> Tensor:
        flat = x.to(torch.float64).flatten(1)
        if flat.shape[1] != self.means.shape[1]:
            raise InvalidArgument(
                f"x must have {self.means.shape[1]} elements per image, got {tuple(x.shape)}"
            )
        return flat


def _runge_kutta(
    slope: Callable[[float, Tensor], Tensor], x: Tensor, begin: float, end: float, n: int
) -> Tensor:
    """Return the end of n steps of the classical method of fourth order."""
    h = (end - begin) / n
    for t in (begin + i * h for i in range(n)):
        k1 = slope(t, x)
        k2 = slope(t + h / 2, x + h / 2 * k1)
        k3 = slope(t + h / 2, x + h / 2 * k2)
        k4 = slope(t + h, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def of_images(images: Any) -> GaussianMixture:
    """Return the distribution of a finite set, whose denoiser is the perfect one for that set.

    Its `denoise` is the mean of the images weighted by how well each explains x. A sampler that
    uses it can only return images of the set. Every call compares x with all of them, some rows
    of x at a time.

    Args:
        images: tensor (N, *shape), or data of minidiff (`minidiff.data.load`).
    Raises:
        InvalidArgument: no images, values that are not finite, or more than `MAX_SET` numbers.
    """
    if callable(getattr(images, "batch", None)):
        images, _ = images.batch(torch.arange(len(images)))
    known = isinstance(images, Tensor) and images.ndim > 1 and images.isfinite().all()
    if not known or not 0 < images.numel() <= MAX_SET:
        got = tuple(getattr(images, "shape", ())) or type(images).__name__
        raise InvalidArgument(f"images must be finite (N, *shape), N·D to {MAX_SET}; got {got}")
    flat = images.flatten(1)
    return GaussianMixture(torch.ones(len(flat)), flat, torch.zeros(len(flat)))
