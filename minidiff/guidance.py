"""Guidance: denoiser in, denoiser out.

A denoiser is a function (x_t, t) → output. Guidance combines what a network says under two
conditions, or what two networks say, into another denoiser, so the sampling loop never knows of
it. A condition is what the network is told besides, by the names of its arguments:
`{"class_labels": labels}`, or `{"encoder_hidden_states": tokens}`.

Most methods extrapolate from an output u that is not wanted through one, c, that is:

    pair = both(network, condition, null)      (x_t, t) → (c, u), from one batch of twice the size
    pair = pair_of(good, bad)                  the same from any two denoisers
    pair = autoguided(pair, bad, w)            … with a c that is led away from a weaker network's

    extrapolated(pair, w)                      u + w·(c − u)
    rescaled(pair, w, φ)                       … with the spread of c (Lin et al. 2023)
    projected(pair, w, meaning)                … without what only brightens (Sadat et al. 2024)

    within(guided, plain, meaning, low, high)  guided at some levels (Kynkäänniemi et al. 2024)
    thresholded(denoise, meaning)              x̂0 kept in range (Saharia et al. 2022)
    classifier_guided(denoise, log_prob, …)    led by a classifier (Dhariwal & Nichol 2021)

w is diffusers' scale: 1 is c itself. Where a method works on x̂0 it has to know what the output at
t means; `meaning_of` in `sample.py` tells it for a scheduler, `reading` for a noise schedule.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, listed, real_number
from minidiff.prediction import dynamic_threshold, row, solve
from minidiff.runtime.shapes import append_dims
from minidiff.schedule import Level

Denoiser = Callable[[Tensor, float], Tensor]
Pair = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # what is wanted, and what is not
Network = Callable[..., Tensor]  # (x, t, **condition) → output
Condition = Mapping[str, Any]  # name → tensor (B, …), or another such mapping


class Meaning(NamedTuple):
    """What a network's input and output at one t stand for.

    Attributes:
        level: α and σ of x_t = α·x0 + σ·ε, as the network is shown it.
        row: p and q of out = p·x0 + q·ε, see `prediction.py`.
    """

    level: Level
    row: tuple[float, float]

    def split(self, out: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x̂0, ε̂) that an output implies. Raises InvalidArgument: it implies none."""
        if out.shape != x.shape:
            raise InvalidArgument(
                f"guidance on x0 needs an output of the shape of x, {tuple(x.shape)}, "
                f"got {tuple(out.shape)}"
            )
        try:
            return solve(out, x, self.level, self.row)
        except ZeroDivisionError:
            raise InvalidArgument(
                f"guidance on x0 cannot work at {self.level}: the output says nothing of x0 there"
            ) from None

    def moved(self, out: Tensor, change: Tensor) -> Tensor:
        """The output that implies another x̂0, by so much, for the same x.

        Raises InvalidArgument: the level is clean, where x0 is x.
        """
        (alpha, sigma), (p, q) = self.level, self.row
        if sigma == 0:
            raise InvalidArgument("guidance on x0 cannot work at sigma=0, where x0 is x")
        # p·x0 + q·ε with ε = (x − α·x0)/σ, differentiated by x0
        return torch.add(out, change, alpha=p - q * alpha / sigma)


Reader = Callable[[float], Meaning]


def reading(level_of: Callable[[float], Level], prediction_type: str) -> Reader:
    """What a network of this prediction type means at t.

    Args:
        level_of: such as `NoiseSchedule.__getitem__`.
    Raises:
        InvalidArgument: another prediction type, when it is asked.
    """
    return lambda t: Meaning(level_of(t), row(prediction_type, level_of(t)))


# --- denoisers and pairs of them -----------------------------------------------------------------


def conditional(network: Network, condition: Condition) -> Denoiser:
    """The network under one condition, as a denoiser; {} for an unconditional network."""
    return lambda x, t: network(x, t, **condition)


def both(network: Network, condition: Condition, null: Condition) -> Pair:
    """The network under two conditions at once, in one batch of twice the size.

    Args:
        network: called as network(x, t, **condition).
        condition, null: what is wanted, and its absence (or what is not wanted, a negative
            prompt); of the same names and shapes, one entry an image.
    Raises:
        InvalidArgument: conditions of different names or shapes.
    """
    joined = _joined(condition, null)

    def ask(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        c, u = network(torch.cat([x, x]), t, **joined).chunk(2)
        return c, u

    return ask


def pair_of(wanted: Denoiser, unwanted: Denoiser) -> Pair:
    """Two denoisers asked one after the other."""
    return lambda x, t: (wanted(x, t), unwanted(x, t))


# --- extrapolation -------------------------------------------------------------------------------


def extrapolated(pair: Pair, scale: float) -> Denoiser:
    """u + w·(c − u).

    Args:
        scale: w; 1 is c, 0 is u.
    Raises:
        InvalidArgument: a scale that is not finite.
    """
    scale = real_number("guidance_scale", scale, -math.inf)

    def denoise(x: Tensor, t: float) -> Tensor:
        c, u = pair(x, t)
        return u + scale * (c - u)

    return denoise


def classifier_free(
    network: Network, condition: Condition, null: Condition, scale: float
) -> Denoiser:
    """Classifier-free guidance: u + w·(c − u), c and u from one batch of twice the size.

    Args:
        network, condition, null: see `both`.
        scale: w in diffusers' convention: 1 is the conditional network itself (and costs one
            evaluation an image, not two), 0 the unconditional one. Ho & Salimans 2022,
            arXiv:2207.12598, eq. 6 has w − 1 in its place.
    Raises:
        InvalidArgument: a scale that is not finite, or conditions of different names or shapes.
    """
    guided = extrapolated(both(network, condition, null), scale)
    return conditional(network, condition) if scale == 1 else guided


def autoguidance(good: Denoiser, bad: Denoiser, scale: float) -> Denoiser:
    """Away from a weaker network's output, both under the same condition: u + w·(c − u).

    A smaller or less trained network makes the same mistakes, only larger ones; unlike
    classifier-free guidance this does not narrow the samples to what the condition makes likely
    (Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself",
    arXiv:2406.02507, eq. 6).

    Raises:
        InvalidArgument: a scale that is not finite.
    """
    return extrapolated(pair_of(good, bad), scale)


def autoguided(pair: Pair, bad: Denoiser, scale: float) -> Pair:
    """The pair whose wanted output c is led away from a weaker network's by `autoguidance`.

    Any method that extrapolates from u then does so through a better c: two kinds of guidance at
    once, of which this one changes nothing where the weaker network agrees.

    Raises:
        InvalidArgument: a scale that is not finite.
    """
    real_number("autoguidance_scale", scale, -math.inf)

    def ask(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        c, u = pair(x, t)
        return torch.lerp(bad(x, t), c, scale), u

    return ask


def rescaled(pair: Pair, scale: float, share: float) -> Denoiser:
    """Extrapolation whose output has the standard deviation of c, image by image.

    A large w enlarges the output as a whole, which over-exposes the picture (Lin et al. 2023,
    "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv:2305.08891, section 3.4).

    Args:
        scale: w.
        share: φ in [0, 1], how much of the result is rescaled; the paper takes 0.7.
    Raises:
        InvalidArgument: a scale that is not finite, or a share outside [0, 1].
    """
    scale = real_number("guidance_scale", scale, -math.inf)
    share = real_number("guidance_rescale", share, 0, 1)

    def denoise(x: Tensor, t: float) -> Tensor:
        c, u = pair(x, t)
        guided = u + scale * (c - u)  # Lin eq. 14
        factor = _std(c) / _std(guided)  # eq. 15
        return guided * (share * factor + (1 - share))  # eq. 16

    return denoise


def _std(x: Tensor) -> Tensor:
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)


def projected(
    pair: Pair,
    scale: float,
    meaning: Reader,
    *,
    parallel: float = 0.0,
    momentum: float = -0.5,
    threshold: float = math.inf,
) -> Denoiser:
    """Adaptive projected guidance, on x̂0: x̂c + (w − 1)·(Δ⊥ + η·Δ∥) with Δ = x̂c − x̂u.

    The part of Δ along x̂c only raises contrast and saturation, so it is left out; what stays may
    be limited in length and lead away from where it led before (Sadat et al. 2024, "Eliminating
    Oversaturation and Artifacts of High Guidance Scales in Diffusion Models", arXiv:2410.02416,
    eq. 7 to 10 and algorithm 1).

    The momentum is that of one trajectory: it begins anew where t rises, and a second evaluation
    at the same t (Heun's method) takes the place of the first.

    Args:
        scale: w.
        meaning: of the network's output.
        parallel: η; 1 with no momentum and no threshold is plain extrapolation.
        momentum: β, usually negative; 0 for none.
        threshold: r, the greatest length of Δ, over all elements of an image.
    Raises:
        InvalidArgument: a number that is not finite (but threshold may be infinite), or a
            threshold of 0 or less.
    """
    scale = real_number("guidance_scale", scale, -math.inf)
    parallel = real_number("parallel", parallel, -math.inf)
    average = _Average(real_number("momentum", momentum, -1, 1))
    if threshold != math.inf and real_number("threshold", threshold, 0) == 0:
        raise InvalidArgument("threshold must be above 0, got 0")

    def denoise(x: Tensor, t: float) -> Tensor:
        c, u = pair(x, t)
        at = meaning(t)
        x0, unwanted = at.split(c, x)[0], at.split(u, x)[0]
        delta = average(x0 - unwanted, t)  # algorithm 1, momentum
        if threshold != math.inf:
            delta = delta * (threshold / _length(delta)).clamp(max=1)  # eq. 9
        along = append_dims((delta * x0).flatten(1).sum(1), x.ndim) / _length(x0) ** 2
        update = delta - (1 - parallel) * along * x0  # eq. 7 and 8
        return at.moved(c, (scale - 1) * update)

    return denoise


def _length(x: Tensor) -> Tensor:
    """The norm of each image, (B, 1, …); 0 counts as the smallest number above it."""
    norm = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
    return norm.clamp(min=torch.finfo(x.dtype).tiny ** 0.5)


class _Average:
    """Δ + β·(the average before): of a trajectory, over the different t that it visits."""

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self._before: Tensor | None = None  # up to the t before this one
        self._latest: tuple[float, Tensor | None] = (math.inf, None)

    def __call__(self, delta: Tensor, t: float) -> Tensor:
        last, average = self._latest
        if t > last:
            self._before = None
        elif t < last:
            self._before = average
        if self._before is not None:
            delta = delta + self.momentum * self._before
        self._latest = t, delta
        return delta


# --- denoisers made of denoisers -----------------------------------------------------------------


def within(guided: Denoiser, plain: Denoiser, meaning: Reader, low: float, high: float) -> Denoiser:
    """Guidance in an interval of noise levels alone.

    At high noise guidance narrows the choice of pictures, at low noise it changes nothing
    (Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval Improves Sample and
    Distribution Quality in Diffusion Models", arXiv:2404.07724, eq. 6).

    Args:
        guided, plain: the denoisers inside and outside; only one of them is asked.
        low, high: the interval (low, high] of σ/α, EDM's σ. 0 and infinity hold everything that
            has noise in it.
    Raises:
        InvalidArgument: not two numbers with 0 <= low < high.
    """
    low, high = interval_of((low, high))

    def denoise(x: Tensor, t: float) -> Tensor:
        alpha, sigma = meaning(t).level
        inside = low * alpha < sigma and (high == math.inf or sigma <= high * alpha)
        return guided(x, t) if inside else plain(x, t)

    return denoise


def thresholded(
    denoise: Denoiser, meaning: Reader, ratio: float = 0.995, max_value: float = math.inf
) -> Denoiser:
    """The same denoiser with x̂0 kept in [−1, 1] by its own percentile, see `dynamic_threshold`.

    Guidance drives x̂0 out of the range of pixels, where the network has never been; cutting it at
    the percentile and dividing by that keeps detail (Saharia et al. 2022, "Imagen",
    arXiv:2205.11487, section 2.3). For pixels, not for latents, which have no such range.

    Args:
        denoise: guided, mostly.
        meaning: of its output.
        ratio: the quantile of |x̂0|, in (0, 1].
        max_value: upper limit of it, at least 1.
    Raises:
        InvalidArgument: a number outside its range.
    """
    if real_number("ratio", ratio, 0, 1) == 0:
        raise InvalidArgument("ratio must be above 0, got 0")
    if max_value != math.inf:
        real_number("max_value", max_value, 1)

    def clipped(x: Tensor, t: float) -> Tensor:
        at, out = meaning(t), denoise(x, t)
        x0, _ = at.split(out, x)
        return at.moved(out, dynamic_threshold(x0, ratio, max_value) - x0)

    return clipped


def classifier_guided(
    denoise: Denoiser, log_prob: Denoiser, meaning: Reader, scale: float
) -> Denoiser:
    """Led by the gradient of a classifier: ε̂ − w·σ·∇ ln p(y|x_t).

    Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", arXiv:2105.05233,
    algorithm 2. With the exact classifier of the exact distributions on an unconditional denoiser
    this is classifier-free guidance of the same w.

    Args:
        denoise: conditional or not.
        log_prob: (x_t, t) → ln p(y|x_t) (B,), differentiable in x_t, which it is shown as the
            network is; the classifier must know noisy pictures.
        meaning: of the denoiser's output.
        scale: w, 0 for none.
    Raises:
        InvalidArgument: a scale that is not finite. When it is asked: log_prob gives anything but
            one number an image.
    """
    scale = real_number("scale", scale, -math.inf)

    def guided(x: Tensor, t: float) -> Tensor:
        at, out = meaning(t), denoise(x, t)
        alpha, sigma = at.level
        if alpha == 0:
            return out  # x_t is noise alone, of which no classifier can say anything
        with torch.enable_grad():
            here = x.detach().requires_grad_()
            log_p = log_prob(here, t)
            if log_p.shape != x.shape[:1]:
                raise InvalidArgument(
                    f"log_prob must give one number an image, ({len(x)},), got {tuple(log_p.shape)}"
                )
            (gradient,) = torch.autograd.grad(log_p.sum(), here)
        # algorithm 2 moves ε̂ by −w·σ·∇; as x stays, x̂0 moves by w·σ²/α·∇
        return at.moved(out, gradient * (scale * sigma**2 / alpha))

    return guided


# --- conditions, and numbers of fewer bits -------------------------------------------------------


def _joined(condition: Condition, null: Condition) -> dict[str, Any]:
    """Both conditions as one batch of twice the size."""
    if condition.keys() != null.keys():
        raise InvalidArgument(
            f"null must have the names of condition, {sorted(condition)}, got {sorted(null)}"
        )
    joined: dict[str, Any] = {}
    for name, value in condition.items():
        other = null[name]
        if isinstance(value, Mapping):
            joined[name] = _joined(value, other)
        elif value.shape == other.shape:
            joined[name] = torch.cat([value, other])
        else:
            raise InvalidArgument(
                f"{name} must have the same shape in both conditions, got {tuple(value.shape)} "
                f"and {tuple(other.shape)}"
            )
    return joined


def each_tensor(condition: Condition, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The condition with every tensor changed, such as moved to a device or cut to a part."""
    return {
        name: each_tensor(value, change) if isinstance(value, Mapping) else change(value)
        for name, value in condition.items()
    }


def autocast(network: Network, dtype: torch.dtype) -> Network:
    """The same network, or denoiser, with its matrix work in `dtype`; its output is float32 again.

    Only the network runs in low precision. Guidance and the sampler's arithmetic stay in float32,
    where the differences between outputs and between steps would otherwise drown.
    """

    def narrow(x: Tensor, t: float, **condition: Any) -> Tensor:
        with torch.autocast(x.device.type, dtype):
            return network(x, t, **condition).float()

    return narrow


def in_dtype(network: Network, dtype: torch.dtype) -> Network:
    """The same around a network whose weights are `dtype`; its output is as x again."""
    return lambda x, t, **condition: network(x.to(dtype), t, **condition).to(x.dtype)


def concat_channels(network: Network, extra: Tensor) -> Network:
    """Return a network whose input has further channels behind those of x.

    Args:
        extra: (B, C', *space); repeated where x holds a multiple of B images, as `both` makes.
    """

    def concatenated(x: Tensor, t: float, **condition: Any) -> Tensor:
        copies = extra.repeat(len(x) // len(extra), *(1,) * (extra.ndim - 1))
        return network(torch.cat([x, copies], dim=1), t, **condition)

    return concatenated


def interval_of(interval: Sequence[float] | None) -> tuple[float, float] | None:
    """Return two rising σ/α, the second possibly infinite, or None.

    Raises:
        InvalidArgument: not two numbers with 0 <= low < high.
    """
    if interval is None:
        return None
    low, high = listed("guidance_interval", interval, 2)
    low = real_number("guidance_interval", low, 0)
    high = high if high == math.inf else real_number("guidance_interval", high, 0)
    if low >= high:
        raise InvalidArgument(f"guidance_interval must rise, got {low:g} and {high:g}")
    return low, high
