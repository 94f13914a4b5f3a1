"""What is trained: a fresh pipeline for a config and data, and all its trained parts as one module.

What a network is told beside image and time, a class or a text, is a part of that module: the loop
that trains it knows neither.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from minidiff.data.protocol import Data
from minidiff.data.stream import MEASURED_IMAGES, evenly_spaced
from minidiff.errors import InvalidArgument
from minidiff.latents import LatentData
from minidiff.nn import AutoencoderKL, SpaceToDepth, UNet
from minidiff.pipeline import Pipeline
from minidiff.train_config import TrainConfig


class ClassLabels(nn.Module):
    """What a network with classes is told: the label itself, or that of "no class".

    A text encoder in its place would turn token ids into tokens, and be trained with the network.

    Attributes:
        null: what stands for "told nothing", an entry of what the data tell.
    """

    def __init__(self, null: int) -> None:
        super().__init__()
        self.register_buffer("null", torch.tensor(null), persistent=False)

    def forward(self, told: Tensor | None) -> Mapping[str, Tensor]:
        return {} if told is None else {"class_labels": told}


class Learner(nn.Module):
    """All that is trained, as one module: the network, and what turns what it is told into inputs.

    Args:
        unet: (x, t, **condition) → output.
        condition: a module that maps what the data tell of a batch, (B, …) or None, to the
            condition; its `null` is the entry that means nothing.
    """

    def __init__(self, unet: UNet, condition: nn.Module) -> None:
        super().__init__()
        self.unet, self.condition = unet, condition

    def forward(self, x: Tensor, t: Tensor, told: Tensor | None) -> Tensor:
        return self.unet(x, t, **self.condition(told))

    def hide(self, told: Tensor | None, hidden: Tensor) -> Tensor | None:
        """What the data tell (B, …), with `null` where `hidden` (B,) says so."""
        if told is None:
            return None
        hidden = hidden.to(told.device, non_blocking=True)
        return torch.where(hidden.view(-1, *(1,) * (told.ndim - 1)), self.condition.null, told)


def build(config: TrainConfig, data: Data) -> Pipeline:
    """A fresh pipeline of the size that `config` and the data ask for, weights from the seed.

    torch's global random state is left as it was.

    Raises:
        InvalidArgument: as `check`.
    """
    config = resolve(config, data)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # weights are drawn on the CPU
        unet = _network(config, data)
    return Pipeline(
        unet.to(memory_format=torch.channels_last),
        config.objective().scheduler,
        _decoder(config, data),
        data.class_names,
        config.guidance_scale if _hides_labels(config, data) else 1.0,
        config.num_inference_steps,
    )


def resolve(config: TrainConfig, data: Data) -> TrainConfig:
    """The config with what it leaves to the data: σ_data, where the objective asks for it.

    Raises:
        InvalidArgument: the images are all of one grey.
    """
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


def check(config: TrainConfig, data: Data) -> None:
    """Refuse what cannot be trained, without taking memory.

    Raises:
        InvalidArgument: there are no images, `block` does not divide their size, or the network
            refuses its sizes.
    """
    with torch.device("meta"):
        _network(config, data)


def _network(config: TrainConfig, data: Data) -> UNet:
    if not len(data):
        raise InvalidArgument(f"data {data.name} must hold at least one image, got none")
    channels, height, width = data.shape
    if isinstance(data, LatentData) and config.block != 1:
        raise InvalidArgument(f"block must be 1 for latents of a vae, got {config.block}")
    if height % config.block or width % config.block:
        raise InvalidArgument(
            f"block must divide the image size {height}×{width}, got {config.block}"
        )
    side = (height // config.block, width // config.block)
    depth = len(config.channels)
    return UNet(
        sample_size=side[0] if side[0] == side[1] else side,
        in_channels=channels * config.block**2,
        out_channels=channels * config.block**2 * (2 if config.learn_variance else 1),
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        dropout=config.dropout,
        # attention costs the square of the positions: at the smallest level only
        down_block_types=("DownBlock2D",) * (depth - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (depth - 1),
        attention_head_dim=math.gcd(config.channels[-1], 32),
        norm_num_groups=_groups(config.channels),
        num_class_embeds=data.num_classes + _hides_labels(config, data) or None,
    )


def _groups(channels: tuple[int, ...]) -> int:
    """Groups of 16 channels and multiples of it, which a CPU's vectors hold; else at most 8."""
    common = math.gcd(*channels)
    return common // 16 if common % 16 == 0 else math.gcd(common, 8)


def _decoder(config: TrainConfig, data: Data) -> SpaceToDepth | AutoencoderKL | None:
    """What makes pictures of what the network makes."""
    if isinstance(data, LatentData):
        return data.vae
    return SpaceToDepth(config.block) if config.block > 1 else None


def _hides_labels(config: TrainConfig, data: Data) -> bool:
    """Whether the network will know a label for "no class", so that guidance is possible."""
    return data.num_classes > 0 and config.label_dropout > 0
