"""Guidance: denoiser in, denoiser out.

A denoiser is a function (x_t, t) → output. Guidance combines the outputs of a network under two
conditions, or the outputs of two networks, into another denoiser, so the sampling loop
needs no knowledge of guidance. A condition is a mapping of the network's further arguments by name:
`{"class_labels": labels}`, or `{"encoder_hidden_states": tokens}`.

Most methods extrapolate from an unwanted output u through a wanted one, c:

    pair = both(network, condition, null)      (x_t, t) → (c, u), from one batch of twice the size
    pair = pair_of(good, bad)                  the same from any two denoisers
    pair = autoguided(pair, bad, w)            … with an autoguided c

    extrapolated(pair, w)                      u + w·(c − u)
    rescaled(pair, w, φ)                       … with the std of c (Lin et al. 2023)
    projected(pair, w, meaning)                … without the part along c (Sadat et al. 2024)

    within(guided, plain, meaning, low, high)  in an interval of levels (Kynkäänniemi et al. 2024)
    thresholded(denoise, meaning)              x̂0 kept in range (Saharia et al. 2022)
    classifier_guided(denoise, log_prob, …)    by a classifier (Dhariwal & Nichol 2021)

w is diffusers' scale: 1 is c itself. A method on x̂0 needs to know what the output at t stands for:
`sample.meaning_of` gives that of a scheduler, `reading` that of a noise schedule.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, real_number
from minidiff.prediction import dynamic_threshold, row, solve
from minidiff.runtime.checks import interval_of
from minidiff.runtime.shapes import append_dims
from minidiff.schedule import Level

Denoiser = Callable[[Tensor, float], Tensor]
Pair = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # → (c, u): wanted, unwanted
Network = Callable[..., Tensor]  # (x, t, **condition) → output
Condition = Mapping[str, Any]  # name → tensor (B, …), or another such mapping


class Meaning(NamedTuple):
    """Parameterization of a network at one t: its input and output in terms of x0 and ε.

    Attributes:
        level: α and σ of the network's input x_t = α·x0 + σ·ε.
        row: p and q of its output p·x0 + q·ε, see `prediction.py`.
    """

    level: Level
    row: tuple[float, float]

    def split(self, out: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (x̂0, ε̂) that an output implies.

        Raises:
            InvalidArgument: the shapes differ, or the output does not determine x0 at this level.
        """
        if out.shape != x.shape:
            raise InvalidArgument(
                f"guidance on x0 needs an output of the shape of x, {tuple(x.shape)}, "
                f"got {tuple(out.shape)}"
            )
        try:
            return solve(out, x, self.level, self.row)
        except ZeroDivisionError:
            raise InvalidArgument(
                f"guidance on x0 cannot work at {self.level}: the output does not determine x0"
            ) from None

    def moved(self, out: Tensor, change: Tensor) -> Tensor:
        """Return the output for the same x whose x̂0 differs by `change`.

        Raises:
            InvalidArgument: the level is clean, where x0 is x.
        """
        (alpha, sigma), (p, q) = self.level, self.row
        if sigma == 0:
            raise InvalidArgument("guidance on x0 cannot work at sigma=0, where x0 is x")
        # p·x0 + q·ε with ε = (x − α·x0)/σ, differentiated by x0
        return torch.add(out, change, alpha=p - q * alpha / sigma)


Reader = Callable[[float], Meaning]


def reading(level_of: Callable[[float], Level], prediction_type: str) -> Reader:
    """Return the meaning, at every t, of a network with this prediction type.

    Args:
        level_of: from t to its level, such as `NoiseSchedule.__getitem__`.
        prediction_type: see `minidiff.prediction`.
    Raises:
        InvalidArgument: when called, for an unknown prediction type.
    """
    return lambda t: Meaning(level_of(t), row(prediction_type, level_of(t)))


# --- denoisers and pairs of them -----------------------------------------------------------------


def conditional(network: Network, condition: Condition) -> Denoiser:
    """Return the network under a condition, {} for an unconditional one, as a denoiser."""
    return lambda x, t: network(x, t, **condition)


def both(network: Network, condition: Condition, null: Condition) -> Pair:
    """Return the network under two conditions, evaluated in one batch of twice the size.

    Args:
        network: called as network(x, t, **condition).
        condition, null: wanted condition, and its absence or a negative prompt, with the same
            names and shapes, one entry per image.
    Raises:
        InvalidArgument: conditions of different names or shapes.
    """
    joined = _joined(condition, null)

    def evaluate(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        c, u = network(torch.cat([x, x]), t, **joined).chunk(2)
        return c, u

    return evaluate


def pair_of(wanted: Denoiser, unwanted: Denoiser) -> Pair:
    """Return the outputs of two denoisers, evaluated one after the other."""
    return lambda x, t: (wanted(x, t), unwanted(x, t))


# --- extrapolation -------------------------------------------------------------------------------


def extrapolated(pair: Pair, scale: float) -> Denoiser:
    """Return the denoiser u + w·(c − u).

    Args:
        pair: wanted and unwanted output, (x_t, t) → (c, u).
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
    """Apply classifier-free guidance: u + w·(c − u), with c and u from one batch.

    Args:
        network, condition, null: see `both`.
        scale: w in diffusers' convention. 1 is the conditional network itself, with one evaluation
            per image instead of two; 0 is the unconditional one. Ho & Salimans 2022,
            arXiv:2207.12598, eq. 6, use w − 1 for this w.
    Raises:
        InvalidArgument: a scale that is not finite, or conditions of different names or shapes.
    """
    guided = extrapolated(both(network, condition, null), scale)
    return conditional(network, condition) if scale == 1 else guided


def autoguidance(good: Denoiser, bad: Denoiser, scale: float) -> Denoiser:
    """Guide a network by a worse version of itself, both under one condition: u + w·(c − u).

    A smaller or less trained network makes the same errors, only larger ones. Unlike
    classifier-free guidance, autoguidance does not reduce the variety of the samples.

    Source: Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself",
    arXiv:2406.02507, eq. 6.

    Args:
        good: denoiser whose output is c.
        bad: denoiser of the guidance network, whose output is u.
        scale: w; 1 is c.
    Raises:
        InvalidArgument: a scale that is not finite.
    """
    return extrapolated(pair_of(good, bad), scale)


def autoguided(pair: Pair, bad: Denoiser, scale: float) -> Pair:
    """Return a pair whose wanted output c is autoguided, for two kinds of guidance at once.

    Methods that extrapolate from u through c then use a better c. Where the guidance network agrees
    with c, the pair is unchanged.

    Args:
        pair: wanted and unwanted output of the network.
        bad: denoiser of the guidance network, see `autoguidance`.
        scale: scale of autoguidance; 1 disables it.
    Raises:
        InvalidArgument: a scale that is not finite.
    """
    real_number("autoguidance_scale", scale, -math.inf)

    def evaluate(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        c, u = pair(x, t)
        return torch.lerp(bad(x, t), c, scale), u

    return evaluate


def rescaled(pair: Pair, scale: float, share: float) -> Denoiser:
    """Extrapolate, and rescale the output to the standard deviation of c, image by image.

    A large w enlarges the output as a whole, which over-exposes the image (Lin et al. 2023,
    "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv:2305.08891, section 3.4).

    Args:
        pair: wanted and unwanted output.
        scale: w.
        share: φ in [0, 1], the weight of the rescaled output; the paper uses 0.7.
    Raises:
        InvalidArgument: a scale that is not finite, or φ outside [0, 1].
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
    """Apply adaptive projected guidance to x̂0: x̂c + (w − 1)·(Δ⊥ + η·Δ∥) with Δ = x̂c − x̂u.

    The part of Δ along x̂c only raises contrast and saturation, so it is left out. The rest may be
    limited in length, and a negative momentum subtracts the direction of earlier steps.

    The momentum belongs to one trajectory: it restarts where t rises, and a second evaluation at
    the same t (Heun's method) replaces the first.

    Source: Sadat et al. 2024, "Eliminating Oversaturation and Artifacts of High Guidance Scales
    in Diffusion Models", arXiv:2410.02416, eq. 7 to 10 and algorithm 1.

    Args:
        pair: wanted and unwanted output.
        scale: w.
        meaning: meaning of the network's output at t.
        parallel: η; 1 without momentum and threshold is plain extrapolation.
        momentum: β, usually negative; 0 disables it.
        threshold: r, the largest norm of Δ, over all elements of an image.
    Raises:
        InvalidArgument: a number that is not finite (threshold may be infinite), or a threshold
            that is not above 0.
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
    """Return the norm of each image, (B, 1, …), bounded away from zero."""
    norm = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
    return norm.clamp(min=torch.finfo(x.dtype).tiny ** 0.5)


# Ways of guidance by name: (pair, w, meaning) → denoiser. At w = 1 each of them is c.
METHODS: dict[str, Callable[[Pair, float, Reader], Denoiser]] = {
    "cfg": lambda pair, scale, meaning: extrapolated(pair, scale),
    "rescale": lambda pair, scale, meaning: rescaled(pair, scale, 0.7),
    "apg": projected,
}


class _Average:
    """Running average Δ + β·(previous average) over the timesteps of one trajectory."""

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self._before: Tensor | None = None  # average up to the previous t
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
    """Apply guidance only in an interval of noise levels.

    At high noise, guidance reduces the variety of samples; at low noise it has no effect.

    Source: Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval Improves Sample
    and Distribution Quality in Diffusion Models", arXiv:2404.07724, eq. 6.

    Args:
        guided, plain: denoisers inside and outside the interval; only one of them is evaluated.
        meaning: meaning of the denoisers' output at t.
        low, high: interval (low, high] of σ/α, EDM's σ; (0, inf) is every noisy level.
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
    """Keep x̂0 in [−1, 1] by dynamic thresholding, see `dynamic_threshold`.

    Guidance drives x̂0 out of the range of pixels, on which the network was trained. Clipping at a
    percentile and dividing by it keeps detail (Saharia et al. 2022, "Imagen", arXiv:2205.11487,
    section 2.3). It is meant for pixels: latents have no such range.

    Args:
        denoise: denoiser, usually a guided one.
        meaning: meaning of its output at t.
        ratio: quantile of |x̂0|, in (0, 1].
        max_value: upper limit of the quantile, at least 1.
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
    """Guide with the gradient of a classifier: ε̂ − w·σ·∇ ln p(y|x_t).

    With an exact classifier and an unconditional denoiser this equals classifier-free guidance of
    the same w.

    Source: Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis",
    arXiv:2105.05233, algorithm 2.

    Args:
        denoise: conditional or unconditional denoiser.
        log_prob: (x_t, t) → ln p(y|x_t) (B,), differentiable in x_t, with the network's input; the
            classifier must be trained on noisy images.
        meaning: meaning of the denoiser's output at t.
        scale: w; 0 disables it.
    Raises:
        InvalidArgument: a scale that is not finite; or, when evaluated, log_prob returns anything
            but one number per image.
    """
    scale = real_number("scale", scale, -math.inf)

    def guided(x: Tensor, t: float) -> Tensor:
        at, out = meaning(t), denoise(x, t)
        alpha, sigma = at.level
        if alpha == 0:
            return out  # x_t is pure noise, which no classifier can tell apart
        with torch.enable_grad():
            here = x.detach().requires_grad_()
            log_p = log_prob(here, t)
            if log_p.shape != x.shape[:1]:
                raise InvalidArgument(
                    f"log_prob must return one number per image, ({len(x)},), "
                    f"got {tuple(log_p.shape)}"
                )
            (gradient,) = torch.autograd.grad(log_p.sum(), here)
        # algorithm 2 moves ε̂ by −w·σ·∇; as x stays, x̂0 moves by w·σ²/α·∇
        return at.moved(out, gradient * (scale * sigma**2 / alpha))

    return guided


# --- conditions, number types and channels -------------------------------------------------------


def _joined(condition: Condition, null: Condition) -> dict[str, Any]:
    """Return both conditions as one batch of twice the size."""
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
    """Return the condition with a function applied to every tensor."""
    return {
        name: each_tensor(value, change) if isinstance(value, Mapping) else change(value)
        for name, value in condition.items()
    }


def autocast(network: Network, dtype: torch.dtype) -> Network:
    """Return the network, or denoiser, with matrix products in `dtype` and output in float32.

    Only the network runs in low precision. Guidance and the sampler stay in float32, because they
    subtract nearly equal numbers.
    """

    def narrow(x: Tensor, t: float, **condition: Any) -> Tensor:
        with torch.autocast(x.device.type, dtype):
            return network(x, t, **condition).float()

    return narrow


def in_dtype(network: Network, dtype: torch.dtype) -> Network:
    """Return a network whose weights are `dtype` with input and output in the dtype of x."""
    return lambda x, t, **condition: network(x.to(dtype), t, **condition).to(x.dtype)


def concat_channels(network: Network, extra: Tensor) -> Network:
    """Return a network whose input has extra channels appended to those of x.

    Args:
        network: network whose input has room for these channels.
        extra: (B, C', *space); repeated if x holds a multiple of B images, as under `both`.
    """

    def concatenated(x: Tensor, t: float, **condition: Any) -> Tensor:
        copies = extra.to(x.device).repeat(len(x) // len(extra), *(1,) * (extra.ndim - 1))
        return network(torch.cat([x, copies], dim=1), t, **condition)

    return concatenated
