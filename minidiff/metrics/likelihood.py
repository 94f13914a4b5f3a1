"""Likelihood of images under a model: two estimates of −ln p(x), for any prediction type.

Every noise level is a point on a circle. Divided by √(α² + σ²), a noisy sample is

    z = cos φ·x0 + sin φ·ε,      φ = arctan(σ/α),      dz/dφ = cos φ·ε − sin φ·x0,

for every schedule: variance preserving, variance exploding or a flow (T. Salimans and J. Ho 2022,
arXiv:2202.00512, appendix D). The model is normal noise z ~ N(0, I) at its noisiest level, carried
back to its cleanest one, φ_0, and divided by cos φ_0.

`flow_log_prob` follows the probability flow from x to the noise and integrates its divergence; with
the network's x̂0 and ε̂ for x0 and ε,

    ln p(z at φ_0) = ln N(z at φ_T; 0, I) + ∫ ∇·(dz/dφ) dφ        (Y. Song et al. 2021,
                                                    arXiv:2011.13456, eqs. 39 and 40, section D.2).

`variational_bound` is an upper bound of −ln p(x) for ancestral sampling through all levels of the
training (J. Ho et al. 2020, arXiv:2006.11239, eq. 5; D. Kingma et al.
2021, arXiv:2107.00630, eqs. 13 and 14, with SNR = α²/σ²):

    KL(q(z_T | x0) ‖ N(0, I)) + ½·Σ_t (SNR_{t−1} − SNR_t)·|x0 − x̂0(z_t)|² − ln p(x0 | z_0).

That is for steps with the variance β̃ of the posterior, the optimum where x0 is certain. Where it is
not, as near the data, the variance β of the forward step is better (Ho et al., section 3.2). With
r = β̃/β, the term of z_t is then multiplied by r, and D/2·(r − 1 − ln r) is added.
"""

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, one_of, real_number, whole_number
from minidiff.guidance import Denoiser
from minidiff.noise import Generators, randn
from minidiff.schedule import Level
from minidiff.schedulers import Scheduler

FLOW_STEPS = 32  # each of four evaluations of the network
DRAWS = 64
PIXEL = 2 / 255  # distance of neighbouring bytes in [−1, 1]
VARIANCES = ("small", "large")
MAX_EXACT = 256  # dimensions of an exact divergence, each with a derivative


class Node(NamedTuple):
    """A noise level of the training.

    Attributes:
        t: time argument of the network.
        level: α and σ.
    """

    t: float
    level: Level

    @property
    def angle(self) -> float:
        """φ = arctan(σ/α), in (0, π/2]."""
        return math.atan2(self.level.sigma, self.level.alpha)

    @property
    def norm(self) -> float:
        """√(α² + σ²)."""
        return math.hypot(*self.level)

    @property
    def snr(self) -> float:
        """α²/σ²."""
        return (self.level.alpha / self.level.sigma) ** 2


class Bound(NamedTuple):
    """The parts of a variational bound, in nats, (B,) float64 each.

    Attributes:
        prior: divergence of the noisiest level from pure noise.
        small: all steps from there to the cleanest level, with variance β̃.
        large: the same steps with variance β.
        decoder: data given the cleanest level.
    """

    prior: Tensor
    small: Tensor
    large: Tensor
    decoder: Tensor

    def total(self, variance: str) -> Tensor:
        """Return the bound of −ln p(x), (B,), for steps of one variance.

        Args:
            variance: "small" for β̃, "large" for β.
        Raises:
            InvalidArgument: for another variance.
        """
        one_of("variance", variance, VARIANCES)
        return self.prior + getattr(self, variance) + self.decoder


class Model:
    """A denoiser and the levels of its training, on the circle.

    Args:
        denoise: function (x_t, t) → network output of the scheduler's prediction type; evaluated
            at the levels of the training only.
        scheduler: source of the levels and of the prediction type; its solver is not used.
    """

    def __init__(self, denoise: Denoiser, scheduler: Scheduler) -> None:
        self.denoise = denoise
        # Before `set_timesteps`, the grid of a scheduler has all levels of the training.
        self.scheduler = scheduler.reread(scheduler.reading)
        self.scheduler.num_inference_steps = len(self.scheduler.grid)  # so that steps are allowed
        places = zip(
            self.scheduler.grid, self.scheduler.levels, strict=False
        )  # without the clean end
        rising = sorted((Node(t, level) for t, level in places), key=lambda node: node.angle)
        self.nodes = [
            node
            for i, node in enumerate(rising)
            if node.angle > 0 and (i == 0 or node.angle > rising[i - 1].angle)
        ]
        if len(self.nodes) < 3:
            raise InvalidArgument(f"a likelihood needs three noise levels, {scheduler} has fewer")

    def steps(self, most: int) -> list[tuple[Node, Node, Node]]:
        """Return steps from clean to noisy: their first level, a middle one, and the last.

        They are spaced as evenly in ln φ as the levels allow.

        Args:
            most: largest number of steps.
        """
        logs = torch.tensor([math.log(node.angle) for node in self.nodes], dtype=torch.float64)
        wanted = torch.linspace(float(logs[0]), float(logs[-1]), 2 * most + 1, dtype=torch.float64)
        places = (logs[:, None] - wanted).abs().argmin(dim=0).unique().tolist()
        if len(places) % 2 == 0:  # the noisy end most often has an unused level
            between = (places[-2] + places[-1]) // 2
            places = [*places[:-1], between, places[-1]] if between > places[-2] else places[:-1]
        chosen = [self.nodes[i] for i in places]
        return list(zip(chosen[:-2:2], chosen[1::2], chosen[2::2], strict=True))

    def split(self, z: Tensor, node: Node) -> tuple[Tensor, Tensor]:
        """Return x̂0 and ε̂ for z on the circle at a level."""
        x = z * node.norm
        # A copy, as some schedulers count their steps, and levels come in any order here.
        model_input = copy.copy(self.scheduler).scale_model_input(x, node.t)
        return self.scheduler.split(self.denoise(model_input, node.t), x, node.level)

    def velocity(self, z: Tensor, node: Node) -> Tensor:
        """Return dz/dφ by the network's prediction."""
        x0, eps = self.split(z, node)
        return math.cos(node.angle) * eps - math.sin(node.angle) * x0


def flow_log_prob(
    denoise: Denoiser,
    scheduler: Scheduler,
    x: Tensor,
    *,
    steps: int = FLOW_STEPS,
    probes: Tensor | None = None,
) -> Tensor:
    """Return ln p(x) of the density that the probability flow of a model defines.

    The flow is solved by the classical Runge-Kutta method in ln φ. The divergence is exact, with a
    derivative per dimension, or Hutchinson's unbiased estimate εᵀ·J·ε (Song et al. 2021, eq. 40).

    Args:
        denoise: differentiable function (x_t, t) → network output; evaluated four times a step,
            at levels of the training.
        scheduler: source of the levels and of the prediction type.
        x: clean samples (B, *shape), float32 or float64; the computation has the same precision.
        steps: largest number of steps; the number of levels is a limit too.
        probes: (K, B, *shape) with mean 0 and variance 1, such as from `rademacher`; None for
            the exact divergence in at most 256 dimensions.
    Returns:
        (B,) float64, in nats.
    Raises:
        InvalidArgument: an argument is out of range, or the prediction type has no solution for
            x0 and ε at one of the levels.
    """
    steps = whole_number("steps", steps, 1)
    dimensions = _dimensions(x)
    if probes is None:
        whole_number("dimensions of an exact divergence", dimensions, 1, MAX_EXACT)
    elif probes.shape[1:] != x.shape or not len(probes) or probes.dtype != x.dtype:
        raise InvalidArgument(
            f"probes must be (K, {', '.join(map(str, x.shape))}) and {x.dtype}, "
            f"got {tuple(probes.shape)} and {probes.dtype}"
        )
    model = Model(denoise, scheduler)
    start = math.cos(model.nodes[0].angle)
    z, gained = start * x, torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for now, middle, nxt in model.steps(steps):
        z, gain = _runge_kutta(model, z, (now, middle, nxt), probes)
        gained += gain
    square = z.double().square().flatten(1).sum(dim=1)
    prior = -square / 2 - dimensions / 2 * math.log(2 * math.pi)
    return prior + gained + dimensions * math.log(start)


def _runge_kutta(
    model: Model, z: Tensor, levels: tuple[Node, Node, Node], probes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return z at the last of three levels, and the integral of the divergence up to it.

    The second level is not exactly in the middle. So the step is taken in w from 0 to 1, where
    u = ln φ is the parabola through the three levels at w = 0, ½ and 1.
    """
    u0, u1, u2 = (math.log(node.angle) for node in levels)
    slopes = (-3 * u0 + 4 * u1 - u2, u2 - u0, u0 - 4 * u1 + 3 * u2)  # du/dw
    rates = [slope * node.angle for slope, node in zip(slopes, levels, strict=True)]  # dφ/dw
    moved, gained = torch.zeros_like(z), torch.zeros(len(z), dtype=torch.float64, device=z.device)
    at = z
    for stage, reach, weight in ((0, 0.5, 1 / 6), (1, 0.5, 1 / 3), (1, 1.0, 1 / 3), (2, 0, 1 / 6)):
        velocity, divergence = _with_divergence(model, at, levels[stage], probes)
        moved = moved + weight * rates[stage] * velocity
        gained += weight * rates[stage] * divergence
        at = z + reach * rates[stage] * velocity
    return z + moved, gained


def rademacher(
    shape: Sequence[int], generator: torch.Generator, like: Tensor, probes: int = 1
) -> Tensor:
    """Return random signs (probes, *shape) on the device and in the dtype of a tensor.

    Among probes with mean 0 and variance 1, they give the smallest variance of εᵀ·J·ε
    (M. Hutchinson 1990).

    Args:
        shape: shape of one probe.
        generator: generator on the CPU.
        like: tensor whose device and dtype the signs get.
        probes: number of probes.
    """
    signs = torch.randint(2, (probes, *shape), generator=generator)
    return (2 * signs - 1).to(like)


def _with_divergence(
    model: Model, z: Tensor, node: Node, probes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return dz/dφ and its divergence, (B,) float64."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        velocity = model.velocity(z, node)
        if probes is None:
            total = _trace(velocity, z)
        else:
            total = torch.zeros(len(z), dtype=torch.float64, device=z.device)
            for i, probe in enumerate(probes):
                last = i == len(probes) - 1
                (pulled,) = torch.autograd.grad(velocity, z, probe, retain_graph=not last)
                total += (pulled * probe).double().flatten(1).sum(dim=1)
            total /= len(probes)
    return velocity.detach(), total


def _trace(velocity: Tensor, z: Tensor) -> Tensor:
    """Return the exact divergence, (B,) float64, by a derivative per dimension."""
    flat = velocity.flatten(1)
    total = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for i in range(flat.shape[1]):
        (row,) = torch.autograd.grad(flat[:, i].sum(), z, retain_graph=i < flat.shape[1] - 1)
        total += row.flatten(1)[:, i].double()
    return total


@torch.no_grad()
def variational_bound(
    denoise: Denoiser,
    scheduler: Scheduler,
    x: Tensor,
    *,
    generator: Generators = None,
    draws: int | None = DRAWS,
    bin_width: float | None = None,
    seed: int = 0,
) -> Bound:
    """Return an upper bound of −ln p(x) for ancestral sampling through all levels.

    The sum over levels is estimated from random levels, one from each of equally probable strata.
    The probability of a level is proportional to its step in ln φ, as most terms nearly are.

    Args:
        denoise: function (x_t, t) → network output, evaluated at levels of the training.
        scheduler: source of the levels and of the prediction type.
        x: clean samples (B, *shape), float32 or float64.
        generator: generators of the noise, see `minidiff.noise.randn`.
        draws: number of random levels; None for the exact sum.
        bin_width: None for points of a continuous space. Otherwise x are the centres of bins of
            this width in [−1, 1], the outermost open (Ho et al. 2020, eq. 13), and the bound is
            that of −ln P(bin); `PIXEL` for bytes.
        seed: seed of the random levels, which all images share.
    Returns:
        The parts of the bound. The decoder is a normal distribution around x̂0 at the cleanest
        level, with that level's standard deviation σ/α.
    Raises:
        InvalidArgument: an argument is out of range, or the prediction type has no solution for
            x0 and ε at one of the levels.
    """
    dimensions = _dimensions(x)
    if bin_width is not None and real_number("bin_width", bin_width, 0, 2) == 0:
        raise InvalidArgument("bin_width must be above 0, got 0")
    model = Model(denoise, scheduler)
    first, last = model.nodes[0], model.nodes[-1]

    def clean(node: Node) -> Tensor:
        """Return x̂0 of a noisy sample at a level."""
        noise = randn(x.shape, generator, x.device, x.dtype)
        z = math.cos(node.angle) * x + math.sin(node.angle) * noise
        return model.split(z, node)[0].double()

    small = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    large = torch.zeros_like(small)
    for i, weight in _terms(model.nodes, draws, whole_number("seed", seed, 0)):
        nxt, now = model.nodes[i - 1], model.nodes[i]
        missed = (x.double() - clean(now)).square().flatten(1).sum(dim=1)
        term = (nxt.snr - now.snr) / 2 * missed  # Kingma et al. eq. 14
        r = (math.sin(nxt.angle) / math.sin(now.angle)) ** 2  # β̃/β, Ho et al. eq. 7
        small += weight * term
        large += weight * (r * term + dimensions / 2 * (r - 1 - math.log(r)))

    mean, variance = math.cos(last.angle), math.sin(last.angle) ** 2
    squares = x.double().square().flatten(1).sum(dim=1)
    prior = (mean**2 * squares + dimensions * (variance - 1 - math.log(variance))) / 2
    return Bound(prior, small, large, _decoder(x.double(), clean(first), first, bin_width))


def _terms(nodes: list[Node], draws: int | None, seed: int) -> list[tuple[int, float]]:
    """Return steps of 1 … T−1 with their weights in the sum over all."""
    if draws is None:
        return [(i, 1.0) for i in range(1, len(nodes))]
    draws = whole_number("draws", draws, 1)
    logs = torch.tensor([math.log(node.angle) for node in nodes], dtype=torch.float64)
    probability = logs.diff() / (logs[-1] - logs[0])
    noise = torch.rand(draws, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    strata = (torch.arange(draws) + noise) / draws
    chosen = torch.searchsorted(probability.cumsum(dim=0), strata).clamp(max=len(probability) - 1)
    return [(i + 1, 1 / (draws * probability[i].item())) for i in chosen.tolist()]


def _decoder(x: Tensor, mean: Tensor, node: Node, bin_width: float | None) -> Tensor:
    """Return −ln p(x | z_0), summed over dimensions."""
    std = node.level.sigma / node.level.alpha
    away = (x - mean) / std
    if bin_width is None:
        logs = -away.square() / 2 - math.log(std * math.sqrt(2 * math.pi))
        return -logs.flatten(1).sum(dim=1)
    half = bin_width / 2
    low = torch.where(x <= half - 1, -math.inf, away - half / std)  # Ho et al. eq. 13
    high = torch.where(x >= 1 - half, math.inf, away + half / std)
    return -_log_of_interval(low, high).flatten(1).sum(dim=1)


def _log_of_interval(low: Tensor, high: Tensor) -> Tensor:
    """Return ln P(low ≤ ε ≤ high) of a standard normal ε, precise in both tails."""
    flip = low + high > 0  # the lower tail keeps the digits of both ends
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    outer, inner = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return outer + torch.log(-torch.expm1(inner - outer))


def bits_per_dimension(nats: Tensor, dimensions: int, bin_width: float | None = None) -> Tensor:
    """Return −log₂ p per dimension, (B,).

    Args:
        nats: −ln p of a density, or −ln P of bins, (B,).
        dimensions: number of dimensions D.
        bin_width: width of the data's bins for a density of dequantised data, where the result
            bounds −log₂ P of the bins; None for no conversion.
    """
    bits = nats / (dimensions * math.log(2))
    return bits if bin_width is None else bits - math.log2(bin_width)


def _dimensions(x: Tensor) -> int:
    """Return the number of dimensions of a sample. Raises InvalidArgument."""
    if x.ndim < 2 or not x.numel() or x.dtype not in (torch.float32, torch.float64):
        raise InvalidArgument(
            f"x must be float32 or float64 (B, *shape), got {x.dtype} {tuple(x.shape)}"
        )
    return x[0].numel()
