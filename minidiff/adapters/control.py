"""Control: images that steer a sampling through ControlNets, as a wrapper around the network.

    residuals = Σ scale · net(x_t, t, image, condition)       over the nets that act at this step
    out = unet(x_t, t, condition, residuals)

Both halves of guidance get the control. A net whose scale is 0, or whose interval is over, is not
evaluated, so the result is that of the network alone, bit for bit.

Source: Zhang et al. 2023, https://arxiv.org/abs/2302.05543; steps and scales as in diffusers'
`StableDiffusionControlNetPipeline`.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, listed, real_number, true_or_false
from minidiff.guidance import Condition, Network, each_tensor
from minidiff.images.pixels import as_pixels
from minidiff.nn import ControlNet, UNet
from minidiff.nn.controlnet import guessing
from minidiff.pipeline.space import LatentSpace, PointSpace
from minidiff.pipeline.walk import StepEnd
from minidiff.runtime.checks import instance

if TYPE_CHECKING:
    from minidiff.pipeline.pipeline import Pipeline

# Options in which a ControlNet and its network agree: widths of the residuals, and conditioning.
_CONTROLLED_OPTIONS = (
    "block_out_channels", "layers_per_block", "cross_attention_dim", "num_class_embeds",
    "class_embed_type", "projection_class_embeddings_input_dim", "addition_embed_type",
)  # fmt: skip
Watching = Callable[[slice, StepEnd], Callable[[Network], Network]]


class Hint(NamedTuple):
    """What one ControlNet is given.

    Attributes:
        net: the ControlNet.
        image: (N, C, H, W) in [0, 1], one for each image of the call.
        scale: factor of its residuals.
        interval: fractions of the steps between which it acts.
    """

    net: ControlNet
    image: Tensor
    scale: float
    interval: tuple[float, float]


def fitting(
    nets: Sequence[ControlNet], unet: UNet, space: LatentSpace | PointSpace
) -> tuple[ControlNet, ...]:
    """Return ControlNets that fit a network.

    Args:
        nets: the ControlNets.
        unet, space: the network and its space.
    Raises:
        InvalidArgument: names the option in which a net and the network differ.
    """
    for net in nets:
        instance(ControlNet)("controlnets", net)
        pairs = {name: (net.config[name], unet.config.get(name)) for name in _CONTROLLED_OPTIONS}
        pairs["in_channels"] = (net.config.in_channels, space.channels)
        divisor = 1 if space.vae is None else space.vae.divisor
        pairs["stride of the hint"] = (net.stride, divisor)
        for name, (given, wanted) in pairs.items():
            as_lists = [list(v) if isinstance(v, tuple) else v for v in (given, wanted)]
            if as_lists[0] != as_lists[1]:
                raise InvalidArgument(
                    f"a ControlNet of this network must have {name}={as_lists[1]!r}, "
                    f"got {as_lists[0]!r}"
                )
    return tuple(nets)


def watching(
    pipe: "Pipeline",
    image: Any,
    scale: float | Sequence[float],
    interval: Sequence,
    guess_mode: bool,
    *,
    n: int,
    size: tuple[int, ...],
    first_step: int,
) -> Watching:
    """Return the function from a batch and its callback to the wrapper of its network.

    Args:
        pipe: pipeline of the call.
        image, scale, interval, guess_mode: the call's `control_image`, `control_scale`,
            `control_interval` and `guess_mode`.
        n: number of images of the call.
        size: their height and width in pixels.
        first_step: entry of the scheduler's grid where sampling begins.
    Raises:
        InvalidArgument: an argument is out of range, or given without a ControlNet, or missing.
    """
    true_or_false("guess_mode", guess_mode)
    count = len(pipe.controlnets)
    if not count:
        for name, given, default in (
            ("control_image", image, None),
            ("control_scale", scale, 1.0),
            ("control_interval", interval, (0.0, 1.0)),
            ("guess_mode", guess_mode, False),
        ):
            if given is not default and given != default:
                raise InvalidArgument(f"{name} needs a ControlNet, and this pipeline has none")
        return lambda batch, step_end: step_end.watch
    if image is None:
        raise InvalidArgument("control_image must be given: this pipeline has a ControlNet")
    images = [image] if count == 1 else listed("control_image", image, count)
    scales = _each("control_scale", scale, count, several=isinstance(scale, list | tuple))
    pairs = _each("control_interval", interval, count, several=_is_nested(interval))
    hints = [
        Hint(net, _control_image(net, one, n, size), _scale(factor), _interval(pair))
        for net, one, factor, pair in zip(pipe.controlnets, images, scales, pairs, strict=True)
    ]

    def of_batch(batch: slice, step_end: StepEnd) -> Callable[[Network], Network]:
        part = [hint._replace(image=hint.image[batch].to(pipe.device)) for hint in hints]
        return lambda network: step_end.watch(
            steered(network, part, partial(_progress, pipe, first_step), guess_mode, pipe.dtype)
        )

    return of_batch


def steered(
    network: Network,
    hints: Sequence[Hint],
    progress: Callable[[float], tuple[float, float]],
    guess_mode: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Network:
    """Return the network with the residuals of ControlNets.

    Args:
        network: U-Net that takes `residuals`.
        hints: ControlNets and their images (B, …), repeated if x holds a multiple of B images.
        progress: function from t to the fractions of the steps before and after the one at t.
        guess_mode: stronger residuals in the middle than outside, and none for the second half of
            a guided batch, which is the unconditional one.
        dtype: number type of the ControlNets' matrix products.
    """

    def evaluate(x: Tensor, t: float, **condition: Any) -> Tensor:
        begin, end = progress(t)
        active = [h for h in hints if h.scale and h.interval[0] <= begin and end <= h.interval[1]]
        if not active:
            return network(x, t, **condition)
        half = guess_mode and len(x) == 2 * len(active[0].image)
        given = {name: value for name, value in condition.items() if name != "timestep_cond"}
        part = x.chunk(2)[0] if half else x
        given = each_tensor(given, lambda value: value[: len(part)])
        found = [_residuals(hint, part, t, given, guess_mode, dtype) for hint in active]
        residuals = [sum(each[1:], each[0]) for each in zip(*found, strict=True)]
        if half:
            residuals = [torch.cat([r, torch.zeros_like(r)]) for r in residuals]
        return network(x, t, residuals=residuals, **condition)

    return evaluate


def _residuals(
    hint: Hint, x: Tensor, t: float, condition: Condition, guess_mode: bool, dtype: torch.dtype
) -> list[Tensor]:
    weights = hint.net.conv_in.weight.dtype
    image = hint.image.repeat(len(x) // len(hint.image), 1, 1, 1)
    plain = dtype == torch.float32
    with nullcontext() if plain else torch.autocast(x.device.type, dtype):
        found = hint.net(x.to(weights), t, image.to(weights), **condition)
    found = guessing(found) if guess_mode else found
    return [hint.scale * residual for residual in found]


def _progress(pipe: "Pipeline", first_step: int, t: float) -> tuple[float, float]:
    """Return the fractions of the steps before and after the one at t, as diffusers counts."""
    scheduler = pipe.scheduler
    entry = scheduler.step_index
    if entry is None:  # before the first step; some schedulers never count
        entry = scheduler.grid.index(t, scheduler.begin_index or 0)
    index, steps = entry - first_step, len(scheduler.grid) - first_step
    return index / steps, (index + 1) / steps


# --- arguments of a call ---------------------------------------------------------------------


def _each(name: str, value: Any, count: int, *, several: bool) -> tuple:
    """Return one value for each of several ControlNets."""
    return listed(name, value, count) if several else (value,) * count


def _is_nested(interval: Any) -> bool:
    return isinstance(interval, list | tuple) and any(isinstance(i, list | tuple) for i in interval)


def _scale(value: Any) -> float:
    return real_number("control_scale", value, -math.inf)


def _interval(value: Any) -> tuple[float, float]:
    begin, end = (
        real_number("control_interval", v, 0, 1) for v in listed("control_interval", value, 2)
    )
    if begin >= end:
        raise InvalidArgument(f"control_interval must rise, got {begin:g} and {end:g}")
    return begin, end


def _control_image(net: ControlNet, given: Any, n: int, size: tuple[int, ...]) -> Tensor:
    """Return the control images of n images. Raises InvalidArgument."""
    image = as_pixels(given, net.config.conditioning_channels, "control_image", low=0)
    if tuple(image.shape[-2:]) != tuple(size):
        raise InvalidArgument(
            f"control_image must have the size of the images, {tuple(size)}, got "
            f"{tuple(image.shape[-2:])}: resize it, or give height and width"
        )
    if n % len(image):
        raise InvalidArgument(
            f"control_image must be one image, or one for each of the {n} to generate; "
            f"got {len(image)}"
        )
    return image.repeat_interleave(n // len(image), 0)
