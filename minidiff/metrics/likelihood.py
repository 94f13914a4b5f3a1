"""How probable a model finds given images: two estimates of −ln p(x), for any prediction type.

Every noise level is a point on a circle. Divided by √(α² + σ²), a noisy sample is

    z = cos φ·x0 + sin φ·ε,      φ = arctan(σ/α),      dz/dφ = cos φ·ε − sin φ·x0,

whatever the schedule: variance preserving, variance exploding or a flow (T. Salimans and J. Ho
2022, arXiv:2202.00512, appendix D). The model is normal noise z ~ N(0, I) at its noisiest level,
turned back to its cleanest one, φ_0, and divided by cos φ_0.

`flow_log_prob` follows the probability flow from x to the noise, and how it stretches space on the
way; with x̂0 and ε̂ of the network in place of x0 and ε,

    ln p(z at φ_0) = ln N(z at φ_T; 0, I) + ∫ ∇·(dz/dφ) dφ        (Y. Song et al. 2021,
                                                    arXiv:2011.13456, eqs. 39 and 40, section D.2).

`variational_bound` is an upper bound of −ln p(x) of the model that is sampled step by step through
the levels that it was trained at (J. Ho et al. 2020, arXiv:2006.11239, eq. 5; D. Kingma et al.
2021, arXiv:2107.00630, eqs. 13 and 14, with SNR = α²/σ²):

    KL(q(z_T | x0) ‖ N(0, I)) + ½·Σ_t (SNR_{t−1} − SNR_t)·|x0 − x̂0(z_t)|² − ln p(x0 | z_0).

That is for steps with the variance β̃ of the posterior, which is right where x0 is certain. Where
it is not, near the data above all, the variance β of the forward step is (Ho et al., section 3.2).
With r = β̃/β, the step from z_t is then worth r times as much, plus D/2·(r − 1 − ln r).
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

FLOW_STEPS = 32  # of four evaluations
DRAWS = 64
PIXEL = 2 / 255  # the distance of neighbouring bytes in [−1, 1]
VARIANCES = ("small", "large")
MAX_EXACT = 256  # dimensions whose derivatives are taken one by one


class Node(NamedTuple):
    """A noise level that the network was trained at.

    Attributes:
        t: what the network is told.
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
        prior: of the noisiest level, the divergence from pure noise.
        small: of all steps from there to the cleanest level, of variance β̃.
        large: of the same steps, of variance β.
        decoder: of the data, given the cleanest level.
    """

    prior: Tensor
    small: Tensor
    large: Tensor
    decoder: Tensor

    def total(self, variance: str) -> Tensor:
        """The bound of −ln p(x), (B,), of the model whose steps are "small" or "large".

        Raises:
            InvalidArgument: another variance.
        """
        one_of("variance", variance, VARIANCES)
        return self.prior + getattr(self, variance) + self.decoder


class Model:
    """A denoiser and the levels that it was trained at, on the circle.

    Args:
        denoise: (x_t, t) → network output, of the scheduler's prediction type; asked at those
            levels only.
        scheduler: gives the levels and the prediction type; how it samples does not matter.
    """

    def __init__(self, denoise: Denoiser, scheduler: Scheduler) -> None:
        self.denoise = denoise
        # Until `set_timesteps` the grid of a scheduler is all that its network was trained at.
        self.scheduler = scheduler.reread(scheduler.reading)
        self.scheduler.num_inference_steps = len(self.scheduler.grid)  # it may be walked
        places = zip(self.scheduler.grid, self.scheduler.levels, strict=False)  # without the end
        rising = sorted((Node(t, level) for t, level in places), key=lambda node: node.angle)
        self.nodes = [
            node
            for i, node in enumerate(rising)
            if node.angle > 0 and (i == 0 or node.angle > rising[i - 1].angle)
        ]
        if len(self.nodes) < 3:
            raise InvalidArgument(f"a likelihood needs three noise levels, {scheduler} has fewer")

    def steps(self, most: int) -> list[tuple[Node, Node, Node]]:
        """At most so many steps from clean to noisy, each with a level in its middle.

        They are as even in ln φ as there are levels.
        """
        logs = torch.tensor([math.log(node.angle) for node in self.nodes], dtype=torch.float64)
        wanted = torch.linspace(float(logs[0]), float(logs[-1]), 2 * most + 1, dtype=torch.float64)
        places = (logs[:, None] - wanted).abs().argmin(dim=0).unique().tolist()
        if len(places) % 2 == 0:  # at the noisy end there is most often a level more to take
            between = (places[-2] + places[-1]) // 2
            places = [*places[:-1], between, places[-1]] if between > places[-2] else places[:-1]
        chosen = [self.nodes[i] for i in places]
        return list(zip(chosen[:-2:2], chosen[1::2], chosen[2::2], strict=True))

    def split(self, z: Tensor, node: Node) -> tuple[Tensor, Tensor]:
        """(x̂0, ε̂) for z on the circle at a level."""
        x = z * node.norm
        # A copy, as some schedulers count their steps, and here levels come in any order.
        shown = copy.copy(self.scheduler).scale_model_input(x, node.t)
        return self.scheduler.split(self.denoise(shown, node.t), x, node.level)

    def velocity(self, z: Tensor, node: Node) -> Tensor:
        """dz/dφ that the network implies."""
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
    """ln p(x) of the density that the probability flow gives the model.

    The classical Runge-Kutta method in ln φ. The divergence is exact, one derivative a dimension,
    or Hutchinson's estimate εᵀ·J·ε, whose mean over probes is exact (Song et al. 2021, eq. 40).

    Args:
        denoise: (x_t, t) → network output, differentiable; it is asked at levels that it was
            trained at, four times a step.
        scheduler: of the model, for its levels and its prediction type.
        x: clean samples (B, *shape), float32 or float64, which is the precision of the result.
        steps: how many at most; there are never more than levels.
        probes: (K, B, *shape) with mean 0 and variance 1, such as `rademacher` gives; None for
            the exact divergence, of at most 256 dimensions.
    Returns:
        (B,) float64, in nats.
    Raises:
        InvalidArgument: an argument is out of range, or the network's prediction type says nothing
            at one of its levels.
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
    """One step from the first level to the last: z there, and how much ln p fell on the way.

    The level between them is not quite in the middle. So time is w in [0, 1], of which
    u = ln φ is the parabola that passes through the three at w = 0, ½ and 1.
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
    """Random signs (probes, *shape), drawn on the CPU and moved to the device and dtype of `like`.

    Of all probes with mean 0 and variance 1 they have the smallest variance of εᵀ·J·ε
    (M. Hutchinson 1990).
    """
    signs = torch.randint(2, (probes, *shape), generator=generator)
    return (2 * signs - 1).to(like)


def _with_divergence(
    model: Model, z: Tensor, node: Node, probes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dz/dφ, and the sum of its derivatives along every dimension, (B,) float64."""
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
    """An upper bound of −ln p(x) of the model that is sampled through all of its levels.

    The sum over levels is estimated from a random few, one from each of equally probable strata;
    a level's probability is its step in ln φ, as most terms are about as large as that.

    Args:
        denoise, scheduler, x: as in `flow_log_prob`.
        generator: of the noise, see `minidiff.noise.randn`.
        draws: how many levels; None for every one, once.
        bin_width: None if x is a point of a continuous space. Otherwise x are the centres of bins
            of this width in [−1, 1], the outermost open (Ho et al. 2020, eq. 13), and the
            bound is that of −ln P(bin): for bytes `PIXEL`.
        seed: which levels are drawn; the same for all images.
    Returns:
        The parts of the bound. The decoder is a normal distribution around x̂0 at the cleanest
        level, with that level's standard deviation σ/α.
    Raises:
        InvalidArgument: as `flow_log_prob`.
    """
    dimensions = _dimensions(x)
    if bin_width is not None and real_number("bin_width", bin_width, 0, 2) == 0:
        raise InvalidArgument("bin_width must be above 0, got 0")
    model = Model(denoise, scheduler)
    first, last = model.nodes[0], model.nodes[-1]

    def clean(node: Node) -> Tensor:
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
    """Which steps 1 … T−1 of the bound to take, and the weight of each."""
    if draws is None:
        return [(i, 1.0) for i in range(1, len(nodes))]
    draws = whole_number("draws", draws, 1)
    logs = torch.tensor([math.log(node.angle) for node in nodes], dtype=torch.float64)
    share = logs.diff() / (logs[-1] - logs[0])
    noise = torch.rand(draws, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    strata = (torch.arange(draws) + noise) / draws
    chosen = torch.searchsorted(share.cumsum(dim=0), strata).clamp(max=len(share) - 1)
    return [(i + 1, 1 / (draws * share[i].item())) for i in chosen.tolist()]


def _decoder(x: Tensor, mean: Tensor, node: Node, bin_width: float | None) -> Tensor:
    """−ln p(x | z_0), summed over dimensions."""
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
    """ln P(low ≤ ε ≤ high) of a standard normal ε, with all digits in both tails."""
    flip = low + high > 0  # in the lower tail both ends of an interval keep their digits
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    outer, inner = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return outer + torch.log(-torch.expm1(inner - outer))


def bits_per_dimension(nats: Tensor, dimensions: int, bin_width: float | None = None) -> Tensor:
    """−log₂ p over D, from −ln p (B,).

    Args:
        nats: −ln p of a density, or −ln P of bins.
        dimensions: D.
        bin_width: if `nats` are of a density of dequantised data: the width of the bins of the
            data, whose −log₂ P the result then bounds.
    """
    bits = nats / (dimensions * math.log(2))
    return bits if bin_width is None else bits - math.log2(bin_width)


def _dimensions(x: Tensor) -> int:
    if x.ndim < 2 or not x.numel() or x.dtype not in (torch.float32, torch.float64):
        raise InvalidArgument(
            f"x must be float32 or float64 (B, *shape), got {x.dtype} {tuple(x.shape)}"
        )
    return x[0].numel()
