"""The network of a pipeline under a conditioning and guidance, as one function (x_t, t) → output.

Everything that lies between the sampling loop and the U-Net is here: text encoders, number types,
extra input channels, classifier-free guidance and autoguidance. Each takes functions and returns
one, so the loop knows none of them.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from minidiff.guidance import (
    Condition,
    Denoiser,
    Network,
    Pair,
    autocast,
    autoguidance,
    autoguided,
    both,
    concat_channels,
    conditional,
    each_tensor,
    extrapolated,
    in_dtype,
    within,
)
from minidiff.nn import DenoisingNetwork
from minidiff.nn.blocks.embeddings import SinusoidalTime
from minidiff.sample import meaning_of

if TYPE_CHECKING:
    from minidiff.pipeline.pipeline import Pipeline

Method = Callable[[Pair, float], Denoiser]  # (pair, w) → denoiser, such as `extrapolated`


class Guidance(NamedTuple):
    """Scale and method of guidance.

    Attributes:
        scale: w of classifier-free guidance; 1 disables it, unless `method` is another one.
        method: from a pair of outputs and w to a denoiser.
        interval: σ/α between which guidance applies; None for all.
        autoguidance: scale of autoguidance; 1 disables it.
    """

    scale: float = 1.0
    method: Method = extrapolated
    interval: tuple[float, float] | None = None
    autoguidance: float = 1.0


def build_denoiser(
    pipe: "Pipeline",
    conditioning: Tensor | Sequence[str] | None,
    guidance: Guidance,
    negative: Sequence[str] | None,
    size: tuple[int, int],
    extra_channels: Tensor | None,
    watch: Callable[[Network], Network],
) -> Denoiser:
    """Build the denoiser of a batch; see `Pipeline.denoiser`, which adds the pipeline's wraps."""
    condition = network_inputs(pipe, conditioning, size)
    if pipe.takes_guidance_scale:
        condition["timestep_cond"] = guidance_embedding(pipe, guidance.scale, len(conditioning))
    network = watch(prepared(pipe, pipe.unet, extra_channels))
    plain = denoise = conditional(network, condition)
    if guidance.autoguidance != 1:
        worse = conditional(prepared(pipe, pipe.guidance_network, extra_channels), condition)
        denoise = autoguidance(plain, worse, guidance.autoguidance)
    guides = guidance.scale != 1 or guidance.method is not extrapolated
    if guides and not pipe.takes_guidance_scale:
        pair = both(network, condition, null_inputs(pipe, conditioning, negative, size))
        if guidance.autoguidance != 1:
            pair = autoguided(pair, worse, guidance.autoguidance)
        denoise = guidance.method(pair, guidance.scale)
    if denoise is plain or guidance.interval is None:
        return denoise
    return within(denoise, plain, meaning_of(pipe.scheduler), *guidance.interval)


def prepared(pipe: "Pipeline", unet: DenoisingNetwork, extra_channels: Tensor | None) -> Network:
    """Return a network in its number type, float32 outside, with extra channels beside x."""
    weights = next(unet.parameters()).dtype
    if weights != torch.float32:
        network = in_dtype(unet, weights)
    elif pipe.dtype != torch.float32:
        network = autocast(unet, pipe.dtype)
    else:
        network = _in_input_dtype(unet)
    network = evaluated_by(pipe, unet, network)
    return network if extra_channels is None else concat_channels(network, extra_channels)


def evaluated_by(pipe: "Pipeline", part: Any, function: Any) -> Any:
    """Return the function of a network evaluated by its engine, if it has one."""
    return pipe.engines[part](function) if part in pipe.engines else function


def _in_input_dtype(network: Network) -> Network:
    """Return the network with output in the dtype of x, also within a caller's autocast."""
    return lambda x, t, **condition: network(x, t, **condition).to(x.dtype)


def network_inputs(
    pipe: "Pipeline", conditioning: Tensor | Sequence[str] | None, size: tuple[int, int]
) -> Condition:
    """Return the network's conditioning inputs for class labels (B,), B prompts, or nothing."""
    if conditioning is None:
        return {}
    if isinstance(conditioning, Tensor):
        return on_network(pipe, {"class_labels": conditioning})
    prompts = evaluated_by(pipe, pipe.prompts, pipe.prompts)
    return on_network(pipe, prompts.condition(conditioning, size))


def null_inputs(
    pipe: "Pipeline",
    conditioning: Tensor | Sequence[str] | None,
    negative: Sequence[str] | None,
    size: tuple[int, int],
) -> Condition:
    """Return the inputs that guidance extrapolates from: no class, the empty or a negative text."""
    if negative is not None:
        return network_inputs(pipe, negative, size)
    if conditioning is None or isinstance(conditioning, Tensor):
        nothing = None if conditioning is None else torch.full_like(
            conditioning, len(pipe.class_names)
        )  # fmt: skip
        return network_inputs(pipe, nothing, size)
    prompts = evaluated_by(pipe, pipe.prompts, pipe.prompts)
    return on_network(pipe, prompts.null(len(conditioning), size))


def guidance_embedding(pipe: "Pipeline", scale: float, n: int) -> Tensor:
    """Return sinusoids of w − 1, (n, time_cond_proj_dim).

    Source: Luo et al. 2023, "Latent Consistency Models", arXiv:2310.04378.
    """
    sinusoids = SinusoidalTime(pipe.unet.config.time_cond_proj_dim, False, freq_shift=1)
    embedded = sinusoids(1000 * torch.full((n,), scale - 1, dtype=torch.float32))
    return on_network(pipe, {"timestep_cond": embedded})["timestep_cond"]


def on_network(pipe: "Pipeline", condition: Condition) -> Condition:
    """Return the inputs on the network's device, floating point ones in its dtype."""
    like = next(pipe.unet.parameters())
    return each_tensor(
        condition,
        lambda tensor: tensor.to(
            like.device, like.dtype if tensor.is_floating_point() else None, non_blocking=True
        ),
    )
