"""The U-Net: down to small pictures, through the middle, and up again with skip connections.

    sample ─ conv_in ─┬──────────────────── skips ───────────────────┬─ norm, act, conv_out ─ out
                      └ down₀ ──┬────────── skips ─────────┬── up₂ ──┘
                                └ down₁ ──┬─ skips ─┬─ up₁ ┘
                                          └ down₂ ─ mid ─ up₀

A level is a few residual blocks, each followed by attention where the block type says so. The
down path keeps every result on a stack; the up path takes them off in reverse order, joining
each to its own as extra channels. All blocks are told the time, and the class where there is
one, by one embedding. Submodule names are those of diffusers' checkpoints, so that weights load
without renaming.

Sources: Ronneberger et al. 2015, "U-Net", https://arxiv.org/abs/1505.04597; Ho et al. 2020,
"Denoising Diffusion Probabilistic Models", https://arxiv.org/abs/2006.11239, appendix B. The
arguments and what they mean are those of diffusers' `UNet2DModel`.
"""

from dataclasses import asdict, fields

import torch
from torch import Tensor, nn

from minidiff.checkpoint import Config
from minidiff.errors import InvalidArgument
from minidiff.nn.attention import Attention
from minidiff.nn.layers import (
    ACTIVATIONS,
    CONVOLUTIONS,
    RESNET_BLOCKS,
    Center,
    Downsample,
    FourierTime,
    GroupNorm,
    Grow,
    Halve,
    LabelTable,
    LabelTimes,
    LabelVectors,
    NoLabels,
    ResnetBlock,
    SinusoidalTime,
    TimestepEmbedding,
    Upsample,
)
from minidiff.nn.model import Model
from minidiff.nn.unet_config import UNetConfig


class UNet(Model):
    """A U-Net in one, two or three dimensions, equal to diffusers' `UNet2DModel`.

    Args:
        config: the fields of UNetConfig, by name; what is left out has diffusers' default. In
            addition `dims`, the axes of space (1, 2 or 3; default 2).
    Raises:
        InvalidArgument: an unknown name, a value that is not allowed, or two that do not go
            together.

    `unet.config` holds all arguments. `unet.to(memory_format=torch.channels_last)` is the fast
    way for two dimensions.
    """

    class_name = "UNet2DModel"

    def __init__(self, **config: object):
        super().__init__()
        known = [field.name for field in fields(UNetConfig)]
        if unknown := sorted(config.keys() - set(known)):
            raise InvalidArgument(f"{unknown[0]} must be one of {', '.join(known)}")
        c = UNetConfig(**config)
        self.config, self.dims, self.smallest_side = _written(c), c.dims, c.smallest_side

        conv, channels = CONVOLUTIONS[c.dims], c.block_out_channels
        levels = range(len(channels))
        self.center = Center() if c.center_input_sample else nn.Identity()
        self.time_proj, self.time_embedding = _time(c)
        self.class_embedding = _classes(c, self.time_proj)
        self.time_act = ACTIVATIONS[c.act_fn]()
        self.conv_in = conv(c.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(DownBlock(c, level) for level in levels)
        self.mid_block = MidBlock(c) if c.mid_block_type else NoMidBlock()
        self.up_blocks = nn.ModuleList(UpBlock(c, level) for level in reversed(levels))
        self.conv_norm_out = GroupNorm(c.norm_num_groups, channels[0], c.norm_eps, nn.SiLU())
        self.conv_out = conv(channels[0], c.out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: int | float | Tensor,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """Map a noisy sample and its time to what the network predicts.

        Args:
            sample: (B, in_channels, *space), any sizes: where a side is odd the up path grows to
                the size of the skip connection, as diffusers' conditional U-Net does.
            timestep: one time for the batch (a number or a tensor ()), or one an image, (B,).
            class_labels: int64 (B,) for num_class_embeds, below it (unchecked: reading them
                would wait for the device); numbers (B,) for class_embed_type "timestep";
                (B, time_channels) for "identity"; None without classes.
        Returns:
            (B, out_channels, *space), in the memory format of `sample`.
        Raises:
            InvalidArgument: a wrong shape or type; labels missing, or given for no reason.
        """
        t = self._checked_times(sample, timestep)
        labels = self.class_embedding(class_labels, len(sample))
        emb = self.time_act(self.time_embedding(self.time_proj(t)) + labels)

        x = self.conv_in(self.center(sample))
        skips = [x]
        for block in self.down_blocks:
            x = block(x, emb, skips)
        x = self.mid_block(x, emb)
        for block in self.up_blocks:
            x = block(x, emb, skips)
        return self.time_proj.rescale_output(self.conv_out(self.conv_norm_out(x)), t)

    def _checked_times(self, sample: Tensor, timestep: int | float | Tensor) -> Tensor:
        """Refuse bad input by name; return the times, (B,) on the sample's device."""
        if not isinstance(sample, Tensor):
            raise InvalidArgument(f"sample must be a tensor, got {type(sample).__name__}")
        if not sample.is_floating_point():
            raise InvalidArgument(f"sample must be floating point, got {sample.dtype}")
        entering, sides = self.config.in_channels, tuple(sample.shape[2:])
        if len(sides) != self.dims or sample.shape[1] != entering or not len(sample):
            raise InvalidArgument(
                f"sample must have shape (B, {entering}{', side' * self.dims}), "
                f"got {tuple(sample.shape)}"
            )
        if min(sides) < self.smallest_side:
            raise InvalidArgument(f"sample must have sides >= {self.smallest_side}, got {sides}")
        if not isinstance(timestep, Tensor):
            if isinstance(timestep, bool) or not hasattr(timestep, "__float__"):
                raise InvalidArgument(f"timestep must be a number or a tensor, got {timestep!r}")
            return torch.full((len(sample),), float(timestep), device=sample.device)
        if timestep.shape not in ((), (len(sample),)):
            raise InvalidArgument(
                f"timestep must have shape () or ({len(sample)},), got {tuple(timestep.shape)}"
            )
        return timestep.to(sample.device).expand(len(sample))


class DownBlock(nn.Module):
    """One level of the down path: residual blocks, attention, then half the size."""

    def __init__(self, c: UNetConfig, level: int):
        super().__init__()
        before, width = c.block_out_channels[max(level - 1, 0)], c.block_out_channels[level]
        attends, resize = c.down_level(level)
        inputs = [before] + (c.layers_per_block - 1) * [width]
        self.resnets = nn.ModuleList(_resnet(c, entering, width) for entering in inputs)
        self.attentions = nn.ModuleList(_attention(c, width, attends) for _ in inputs)
        self.downsamplers = nn.ModuleList()
        if level < len(c.block_out_channels) - 1:
            if resize == "conv":
                self.downsamplers.append(Downsample(c.dims, width, c.downsample_padding))
            else:
                self.downsamplers.append(_resnet(c, width, width, resize=Halve(c.dims)))

    def forward(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        """Return the level's result; every step of it is pushed on `skips`."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x, emb))
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x, emb)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    """The middle, at the smallest size: residual block, attention, residual block."""

    def __init__(self, c: UNetConfig):
        super().__init__()
        width, scale = c.block_out_channels[-1], c.mid_block_scale_factor
        groups = c.norm_num_groups if c.resnet_time_scale_shift == "default" else None
        self.resnets = nn.ModuleList(_resnet(c, width, width, output_scale=scale) for _ in range(2))
        attention = nn.Identity()
        if c.add_attention:
            attention = Attention(
                width,
                c.attention_head_dim or width,
                c.attn_norm_num_groups or groups,
                c.norm_eps,
                scale,
            )
        self.attentions = nn.ModuleList([attention])

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, emb))
        return self.resnets[1](x, emb)


class NoMidBlock(nn.Module):
    """The middle of a network without one."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return x


class UpBlock(nn.Module):
    """One level of the up path: residual blocks that take the skips back, then twice the size."""

    def __init__(self, c: UNetConfig, level: int):
        super().__init__()
        channels, last = c.block_out_channels, len(c.block_out_channels) - 1
        width, below, above = channels[level], channels[min(level + 1, last)], channels[level - 1]
        attends, resize = c.up_level(level)
        # The stack gives back this level's own results and then what entered the level.
        entering = [below] + c.layers_per_block * [width]
        skipping = c.layers_per_block * [width] + [above if level else width]
        self.resnets = nn.ModuleList(
            _resnet(c, x + skip, width) for x, skip in zip(entering, skipping, strict=True)
        )
        self.attentions = nn.ModuleList(_attention(c, width, attends) for _ in entering)
        self.upsamplers = nn.ModuleList()
        if level > 0:
            if resize == "conv":
                self.upsamplers.append(Upsample(c.dims, width))
            else:
                self.upsamplers.append(_resnet(c, width, width, resize=Grow()))

    def forward(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        """Return the level's result; every residual block joins one off the top of `skips`."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(torch.cat([x, skips.pop()], dim=1), emb))
        for upsample in self.upsamplers:
            x = upsample(x, emb, skips[-1].shape[2:])
        return x


# ------------------------------------------------------- options to parts, at construction


def _resnet(c: UNetConfig, entering: int, width: int, **options: object) -> ResnetBlock:
    return RESNET_BLOCKS[c.resnet_time_scale_shift](
        c.dims,
        entering,
        width,
        c.time_channels,
        groups=c.norm_num_groups,
        eps=c.norm_eps,
        act=c.act_fn,
        dropout=c.dropout,
        **options,
    )


def _attention(c: UNetConfig, width: int, attends: bool) -> nn.Module:
    if not attends:
        return nn.Identity()
    return Attention(width, c.attention_head_dim or width, c.norm_num_groups, c.norm_eps)


def _time(c: UNetConfig) -> tuple[nn.Module, TimestepEmbedding]:
    features = c.block_out_channels[0]
    if c.time_embedding_type == "fourier":
        return FourierTime(features), TimestepEmbedding(2 * features, c.time_channels)
    sinusoids = SinusoidalTime(features, c.flip_sin_to_cos, c.freq_shift)
    return sinusoids, TimestepEmbedding(features, c.time_channels)


def _classes(c: UNetConfig, time_features: nn.Module) -> nn.Module:
    if c.class_embed_type == "timestep":
        return LabelTimes(time_features, c.time_channels)
    if c.class_embed_type == "identity":
        return LabelVectors(c.time_channels)
    if c.num_class_embeds is not None:
        return LabelTable(c.num_class_embeds, c.time_channels)
    return NoLabels()


def _written(c: UNetConfig) -> Config:
    """The configuration as config.json has it: `dims` is minidiff's own, so only where not 2."""
    config = Config(asdict(c))
    if c.dims == 2:
        del config["dims"]
    return config
