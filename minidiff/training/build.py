"""The pipeline that a training begins with, and checks of what cannot be trained."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.data.augment import augmented
from minidiff.data.protocol import Data, check_data, is_constant
from minidiff.data.stream import MEASURED_IMAGES, evenly_spaced
from minidiff.errors import InvalidArgument
from minidiff.nn import MLP, SpaceToDepth, UNet, mlp
from minidiff.nn.blocks.attention import Attention
from minidiff.nn.blocks.layers import ResnetBlock
from minidiff.nn.blocks.transformer import Transformer
from minidiff.pipeline import Pipeline
from minidiff.runtime.checks import check_all, instance, optional
from minidiff.schedulers import Scheduler
from minidiff.schedulers.core.names import sampler
from minidiff.text.conditioning import Condition
from minidiff.training.config import TrainConfig, options_of
from minidiff.training.start import adopted, check_fit, continued, scheduler_from

ARGUMENTS = {"config": instance(TrainConfig), "start": optional(instance(Pipeline))}


def build(config: TrainConfig, data: Data, start: Pipeline | None = None) -> Pipeline:
    """Return the pipeline to be trained: fresh with weights from the seed, or a copy of the start.

    torch's global random state is left as it was. Constant data are warned of.

    Raises:
        InvalidArgument: as `check`.
    """
    config = resolve(config, data, start)
    if is_constant(data.batch(evenly_spaced(len(data), 16))[0]):
        warnings.warn(
            f"data {data.name} are of one colour: there is nothing to learn", stacklevel=4
        )
    if start is not None:
        return continued(start, config, data)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # weights are drawn on the CPU
        unet, condition = silenced(network_of(config, data)), data.condition(config)
    guidable = config.label_dropout and condition.unet_options
    pixels = SpaceToDepth(config.block) if config.block > 1 else None
    return Pipeline(
        unet.to(memory_format=torch.channels_last),
        scheduler_of(config),
        data.decoder or pixels,
        data.class_names,
        config.guidance_scale if guidable else 1.0,
        config.num_inference_steps,
        condition.prompts,
        config.guidance_interval if guidable else None,
        guide=config.guide,
    )


def scheduler_of(config: TrainConfig) -> Scheduler:
    """Return the scheduler that is stored with a fresh model. Raises InvalidArgument."""
    own = config.objective().scheduler
    return sampler(config.sampler, own) if config.sampler else own


def resolve(config: TrainConfig, data: Data, start: Pipeline | None = None) -> TrainConfig:
    """Return the config with the options that it leaves to the data and to the start.

    Of the data σ_data is measured, where the objective needs it.

    Raises:
        InvalidArgument: no data set, no TrainConfig, all images are of one grey, or the config
            disagrees with the start.
    """
    config = _begun(config, data, start)
    if not config.measures_data:
        return config
    chosen = evenly_spaced(len(data), MEASURED_IMAGES)
    parts = [data.batch(index)[0].double() for index in chosen.split(512)]
    count = sum(part.numel() for part in parts)
    mean = sum(float(part.sum()) for part in parts) / count
    std = math.sqrt(sum(float((part - mean).square().sum()) for part in parts) / count)
    if not std:
        raise InvalidArgument(f"data {data.name} are of one grey: sigma_data cannot be measured")
    return replace(config, sigma_data=std)


def check(config: TrainConfig, data: Data, start: Pipeline | None = None) -> None:
    """Refuse what cannot be trained, without taking memory.

    Raises:
        InvalidArgument: there are no images, `block` does not divide their size, they are smaller
            than the levels of `channels`, a network refuses its sizes, a sampler the objective, a
            reference batch would be of images that are not stored, a guidance network would read
            a text encoder that is trained on, config and data do not fit the start, or an
            argument is of another type.
    """
    config = _begun(config, data, start)
    seen(config, data)
    if start is not None:
        check_fit(start, config, data)
        scheduler_from(start, config)
    else:
        _check_fresh(config, data)
    if config.stable_target and not data.is_stored:
        raise InvalidArgument(
            f"stable_target must be 0 for {data.name}: it draws from stored images or latents, "
            f"got {config.stable_target}"
        )
    with torch.device("meta"):
        condition = data.condition(config)
    if config.autoguidance_scale != 1 and any(True for _ in condition.parameters()):
        raise InvalidArgument(
            f"autoguidance_scale must be 1 for {data.name}, whose text encoder learns on when the "
            f"guidance network does not; got {config.autoguidance_scale:g}"
        )


def _begun(config: TrainConfig, data: Data, start: Pipeline | None) -> TrainConfig:
    """Return the config with the options that the data fix and the start decides.

    Raises:
        InvalidArgument: an argument is of another type, or config and data or start disagree.
    """
    check_data(data)
    check_all({"config": config, "start": start}, ARGUMENTS)
    given = options_of(config)
    for name, value in data.fixed_options.items():
        if given.get(name, value) != value:
            raise InvalidArgument(f"{name} must be {value} for {data.name}, got {given[name]}")
    config = replace(config, **data.fixed_options)
    return config if start is None else adopted(config, start)


def _check_fresh(config: TrainConfig, data: Data) -> None:
    """Refuse a fresh network or scheduler that cannot be built. Raises InvalidArgument."""
    # Whether a sampler fits does not depend on σ_data, which is only measured when a run begins.
    scheduler_of(replace(config, sigma_data=1.0) if config.measures_data else config)
    with torch.device("meta"):
        network_of(config, data)


def encoder(config: TrainConfig) -> Callable[[Tensor], Tensor]:
    """Return the function from the items of a batch to the network's space."""
    return (lambda x: x) if config.block == 1 else SpaceToDepth(config.block).to_latents


def seen(config: TrainConfig, data: Data) -> Data:
    """Return the data with augmentation. Raises InvalidArgument, see `augmented`."""
    if data.decoder is not None:
        for name, none in (("block", 1), ("shift", 0), ("flip", False)):
            if (given := getattr(config, name)) != none:
                raise InvalidArgument(f"{name} must be {none} for latents of a vae, got {given}")
    if not (config.shift or config.flip):
        return data
    return augmented(data, shift=config.shift, flip=config.flip, seed=config.seed)


def network_of(config: TrainConfig, data: Data) -> UNet | MLP:
    """Return a fresh network. Raises InvalidArgument where config and data do not fit."""
    if not len(data):
        raise InvalidArgument(f"data {data.name} must hold at least one image, got none")
    if (network := data.network(config)) is not None:
        return network
    if len(data.shape) != 3:
        raise InvalidArgument(f"data must be images, {data.name} has items of shape {data.shape}")
    channels, height, width = data.shape
    if height % config.block or width % config.block:
        raise InvalidArgument(
            f"block must divide the image size {height}×{width}, got {config.block}"
        )
    side = (height // config.block, width // config.block)
    if len(config.channels) > 1 and min(side) <= 2 ** (len(config.channels) - 2):
        raise InvalidArgument(
            f"channels must have few enough levels to halve {side[0]}×{side[1]} between them, "
            f"got {config.channels}"
        )
    with torch.device("meta"):  # weights of the condition are drawn after those of the network
        condition = data.condition(config)
    return UNet(
        sample_size=side[0] if side[0] == side[1] else side,
        in_channels=channels * config.block**2,
        out_channels=channels * config.block**2 * (2 if config.learn_variance else 1),
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        dropout=config.dropout,
        norm_num_groups=groups_of(config.channels),
        # Time and class scale the features as well as shift them: adaptive group normalization
        # (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233, section 3).
        resnet_time_scale_shift="scale_shift",
        **_attention(config, condition),
    )


def silenced(network: UNet | MLP) -> UNet | MLP:
    """Set the last layer of every residual branch and of the network to zero; return the network.

    Every block then begins as the identity, as in the code of Ho et al. 2020 and Dhariwal & Nichol
    2021 (`zero_module`).
    """
    last = [network.linear_out if isinstance(network, MLP) else network.conv_out]
    for module in network.modules():
        if isinstance(module, ResnetBlock):
            last.append(module.conv2)
        elif isinstance(module, Attention):
            last.append(module.to_out[0])
        elif isinstance(module, Transformer):
            last.append(module.proj_out)
        elif isinstance(module, mlp.Block):
            last.append(module.linear_2)
    for layer in last:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return network


def _attention(config: TrainConfig, condition: Condition) -> dict[str, Any]:
    """Return the blocks of the network and what they attend to, as options of diffusers' classes.

    Attention costs the square of the positions: it is at the smallest level only.
    """
    last, others = config.channels[-1], len(config.channels) - 1
    head, reads_text = math.gcd(last, 32), "cross_attention_dim" in condition.unet_options
    kind = "CrossAttn" if reads_text else "Attn"
    return {
        "down_block_types": ("DownBlock2D",) * others + (f"{kind}DownBlock2D",),
        "up_block_types": (f"{kind}UpBlock2D",) + ("UpBlock2D",) * others,
        # Channels of a head, or, in the class that reads texts, the number of heads.
        "attention_head_dim": last // head if reads_text else head,
        **condition.unet_options,
    }


def groups_of(channels: Sequence[int]) -> int:
    """Return the number of groups of the norms.

    A group has 16 channels or a multiple, which fit a CPU's vectors; otherwise there are eight
    groups. No group has a single channel, whose mean it would remove.
    """
    common = math.gcd(*channels)
    groups = common // 16 if common % 16 == 0 else math.gcd(common, 8)
    return groups // 2 if groups == min(channels) and groups > 1 else groups
