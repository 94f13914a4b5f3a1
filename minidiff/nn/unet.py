"""The U-Net: down to small pictures, through the middle, and up again with skip connections.

    sample ─ conv_in ─┬──────────────────── skips ───────────────────┬─ norm, act, conv_out ─ out
                      └ down₀ ──┬────────── skips ─────────┬── up₂ ──┘
                                └ down₁ ──┬─ skips ─┬─ up₁ ┘
                                          └ down₂ ─ mid ─ up₀

A level is a few residual blocks, each followed by attention where the block type says so: over the
positions of the picture, or over a text as well. The down path keeps every result on a stack; the
up path takes them off in reverse order, joining each to its own as extra channels. All blocks are
told the time, and the class where there is one, by one embedding. Submodule names are those of
diffusers' checkpoints, so that weights load without renaming.

Sources: Ronneberger et al. 2015, "U-Net", https://arxiv.org/abs/1505.04597; Ho et al. 2020,
"Denoising Diffusion Probabilistic Models", https://arxiv.org/abs/2006.11239, appendix B; with text
Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models",
https://arxiv.org/abs/2112.10752. The arguments and what they mean are those of diffusers'
`UNet2DModel` and `UNet2DConditionModel`.
"""

from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor, nn

from minidiff.errors import InvalidArgument
from minidiff.nn.blocks.attention import Attention, Context, NoAttention
from minidiff.nn.blocks.embeddings import (
    Add,
    Concatenate,
    FourierTime,
    LabelFeatures,
    LabelProjection,
    LabelTable,
    LabelTimes,
    LabelVectors,
    LogFourierTime,
    NoAddition,
    NoLabels,
    NoText,
    ProjectedText,
    SinusoidalTime,
    Text,
    TextTime,
    TimestepEmbedding,
    check_sample,
    times_of,
)
from minidiff.nn.blocks.layers import (
    ACTIVATIONS,
    CONVOLUTIONS,
    RESNET_BLOCKS,
    Center,
    Downsample,
    GroupNorm,
    Grow,
    Halve,
    ResnetBlock,
    Upsample,
)
from minidiff.nn.blocks.transformer import Transformer
from minidiff.nn.configs.unet import VOCABULARIES, unet_config
from minidiff.nn.configs.unet_plan import AttentionPlan, PictureAttention, Stage, UNetConfig
from minidiff.nn.model import Model
from minidiff.runtime.files import Config


class UNet(Model):
    """A U-Net in one, two or three dimensions, with or without a text to look at.

    Args:
        config: the arguments of diffusers' `UNet2DModel` or, where one is among them that only
            this class has, of `UNet2DConditionModel` (`_class_name` can say so too); what is left
            out has diffusers' default. In addition `dims`, the axes of space (1, 2 or 3; default
            2).
    Raises:
        InvalidArgument: an unknown name, a value that is not allowed, or two that do not go
            together.

    `unet.config` holds all arguments, `unet.class_name` the class of diffusers.
    `unet.to(memory_format=torch.channels_last)` is the fast way for two dimensions.
    """

    class_names = tuple(cls.class_name for cls in VOCABULARIES)

    def __init__(self, **config: object):
        super().__init__()
        c = unet_config(config)
        self.config, self.class_name = _written(c), c.class_name
        self.dims, self.smallest_side, self.text_channels = c.dims, c.smallest_side, c.text_channels

        # What it is told
        self.time_proj, self.time_embedding = _time(c)
        features = self.time_embedding.linear_1.in_features
        self.class_embedding = _classes(c, self.time_proj, features)
        self.join = Concatenate() if c.told_channels > c.time_channels else Add()
        self.add_embedding = _numbers(c)
        self.encoder_hid_proj = _text(c)
        self.time_act = nn.Sequential(_time_act(c), ACTIVATIONS[c.act_fn]())

        # In and down
        width = c.block_out_channels[0]
        self.center = Center() if c.center_input_sample else nn.Identity()
        self.conv_in = _convolution(c, c.in_channels, width, c.conv_in_kernel)
        self.down_blocks = nn.ModuleList()
        skips = [width]  # channels of what the stack will hold
        for stage in c.down_stages:
            self.down_blocks.append(DownBlock(c, width, stage))
            width = stage.width
            skips += [width] * (len(stage.attentions) + bool(stage.resize))

        # Middle
        self.mid_block = MidBlock(c, c.middle) if c.middle else NoMidBlock()

        # Up and out
        self.up_blocks = nn.ModuleList()
        for stage in c.up_stages:
            joined = [skips.pop() for _ in stage.attentions]
            self.up_blocks.append(UpBlock(c, width, joined, stage))
            width = stage.width
        act = ACTIVATIONS[c.last_act]()
        self.conv_norm_out = GroupNorm(c.norm_num_groups, width, c.norm_eps, act)
        self.conv_out = _convolution(c, width, c.out_channels, c.conv_out_kernel)

    def forward(
        self,
        sample: Tensor,
        timestep: int | float | Tensor,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Map a noisy sample and its time to what the network predicts.

        What a network has no use for must be None, and what it needs must be there.

        Args:
            sample: (B, in_channels, *space), any sizes: where a side is odd the up path grows to
                the size of the skip connection, as diffusers' conditional U-Net does.
            timestep: one time for the batch (a number or a tensor ()), or one an image, (B,).
            encoder_hidden_states: tokens of a text, (B, L, cross_attention_dim), or encoder_hid_dim
                where there is one.
            class_labels: int64 (B,) for num_class_embeds, below it (unchecked: reading them
                would wait for the device); numbers (B,) for class_embed_type "timestep";
                (B, time_channels) for "identity"; (B, projection_class_embeddings_input_dim) for
                the projections.
            timestep_cond: (B, time_cond_proj_dim), added to the time's features; may be None.
            added_cond_kwargs: for addition_embed_type "text_time" `text_embeds` (B, D) and
                `time_ids` (B, n).
            encoder_attention_mask: (B, L), 1 or True for tokens to look at; None for all.
        Returns:
            (B, out_channels, *space), in the memory format of `sample`.
        Raises:
            InvalidArgument: a wrong shape or type; something missing, or given for no reason.
        """
        t, batch = self._checked_times(sample, timestep), len(sample)
        text = self.encoder_hid_proj(encoder_hidden_states, encoder_attention_mask, batch)
        emb = self.time_embedding(self.time_proj(t), timestep_cond)
        emb = self.join(emb, self.class_embedding(class_labels, batch))
        emb = self.time_act(emb + self.add_embedding(added_cond_kwargs, batch))

        x = self.conv_in(self.center(sample))
        skips = [x]
        for block in self.down_blocks:
            x = block(x, emb, text, skips)
        x = self.mid_block(x, emb, text)
        for block in self.up_blocks:
            x = block(x, emb, text, skips)
        return self.time_proj.rescale_output(self.conv_out(self.conv_norm_out(x)), t)

    @classmethod
    def from_config(cls, config: Mapping) -> "UNet":
        """Build with fresh weights; `_class_name` says in whose words. Raises InvalidArgument."""
        return cls(**config)

    @classmethod
    def least_tensors(cls, config: Mapping) -> int:
        return unet_config(config).least_tensors

    def _checked_times(self, sample: Tensor, timestep: int | float | Tensor) -> Tensor:
        """Refuse bad input by name; return the times, (B,) on the sample's device."""
        check_sample(sample)
        entering, sides = self.config.in_channels, tuple(sample.shape[2:])
        if len(sides) != self.dims or sample.shape[1] != entering or not len(sample):
            raise InvalidArgument(
                f"sample must have shape (B, {entering}{', side' * self.dims}), "
                f"got {tuple(sample.shape)}"
            )
        if min(sides) < self.smallest_side:
            raise InvalidArgument(f"sample must have sides >= {self.smallest_side}, got {sides}")
        return times_of(sample, timestep)


class DownBlock(nn.Module):
    """One level of the down path: residual blocks, attention, then half the size."""

    def __init__(self, c: UNetConfig, entering: int, stage: Stage):
        super().__init__()
        width, places = stage.width, len(stage.attentions)
        inputs = [entering] + (places - 1) * [width]
        self.resnets = nn.ModuleList(_resnet(c, channels, width) for channels in inputs)
        self.attentions = nn.ModuleList(_attention(c, width, plan) for plan in stage.attentions)
        self.downsamplers = nn.ModuleList()
        if stage.resize == "conv":
            self.downsamplers.append(Downsample(c.dims, width, c.downsample_padding))
        elif stage.resize == "resnet":
            self.downsamplers.append(_resnet(c, width, width, resize=Halve(c.dims)))

    def forward(self, x: Tensor, emb: Tensor, text: Context | None, skips: list[Tensor]) -> Tensor:
        """Return the level's result; every step of it is pushed on `skips`."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x, emb), text)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x, emb)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    """The middle, at the smallest size: a residual block, then attention and another one."""

    def __init__(self, c: UNetConfig, stage: Stage):
        super().__init__()
        width, scale = stage.width, c.mid_block_scale_factor
        self.resnets = nn.ModuleList(
            _resnet(c, width, width, output_scale=scale) for _ in range(1 + len(stage.attentions))
        )
        self.attentions = nn.ModuleList(
            _attention(c, width, plan, scale) for plan in stage.attentions
        )

    def forward(self, x: Tensor, emb: Tensor, text: Context | None) -> Tensor:
        x = self.resnets[0](x, emb)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = resnet(attention(x, text), emb)
        return x


class NoMidBlock(nn.Module):
    """The middle of a network without one."""

    def forward(self, x: Tensor, emb: Tensor, text: Context | None) -> Tensor:
        return x


class UpBlock(nn.Module):
    """One level of the up path: residual blocks that take the skips back, then twice the size."""

    def __init__(self, c: UNetConfig, entering: int, joined: list[int], stage: Stage):
        super().__init__()
        width = stage.width
        inputs = [entering] + (len(joined) - 1) * [width]
        self.resnets = nn.ModuleList(
            _resnet(c, x + skip, width) for x, skip in zip(inputs, joined, strict=True)
        )
        self.attentions = nn.ModuleList(_attention(c, width, plan) for plan in stage.attentions)
        self.upsamplers = nn.ModuleList()
        if stage.resize == "conv":
            self.upsamplers.append(Upsample(c.dims, width))
        elif stage.resize == "resnet":
            self.upsamplers.append(_resnet(c, width, width, resize=Grow()))

    def forward(self, x: Tensor, emb: Tensor, text: Context | None, skips: list[Tensor]) -> Tensor:
        """Return the level's result; every residual block joins one off the top of `skips`."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(torch.cat([x, skips.pop()], dim=1), emb), text)
        for upsample in self.upsamplers:
            x = upsample(x, emb, skips[-1].shape[2:])
        return x


# ------------------------------------------------------- options to parts, at construction


def _resnet(c: UNetConfig, entering: int, width: int, **options: object) -> ResnetBlock:
    return RESNET_BLOCKS[c.resnet_time_scale_shift](
        c.dims,
        entering,
        width,
        c.told_channels,
        groups=c.norm_num_groups,
        eps=c.norm_eps,
        act=c.act_fn,
        dropout=c.dropout,
        **options,
    )


def _attention(
    c: UNetConfig, width: int, plan: AttentionPlan, output_scale: float = 1.0
) -> nn.Module:
    if plan is None:
        return NoAttention()
    if isinstance(plan, PictureAttention):
        return Attention(width, plan.head_dim, plan.groups, c.norm_eps, output_scale)
    return Transformer(
        c.dims,
        width,
        c.context_channels,
        heads=plan.heads,
        depth=plan.depth,
        groups=c.norm_num_groups,
        linear=c.use_linear_projection,
        only_cross=plan.only_cross,
    )


def _convolution(c: UNetConfig, entering: int, width: int, kernel: int) -> nn.Module:
    return CONVOLUTIONS[c.dims](entering, width, kernel, padding=kernel // 2)


def _time(c: UNetConfig) -> tuple[nn.Module, TimestepEmbedding]:
    width, first = c.time_channels, c.block_out_channels[0]
    if c.time_embedding_type == "positional":
        times, features = SinusoidalTime(first, c.flip_sin_to_cos, c.freq_shift), first
    elif c.told_noise_levels:
        times, features = LogFourierTime(2 * first), 2 * first
    else:
        times, features = FourierTime(width, c.flip_sin_to_cos), width
    return times, TimestepEmbedding(
        features, width, c.time_act, c.timestep_post_act, c.time_cond_proj_dim
    )


def _time_act(c: UNetConfig) -> nn.Module:
    """What the embedding passes once, before the activation that every block would give it."""
    return ACTIVATIONS[c.time_embedding_act_fn]() if c.time_embedding_act_fn else nn.Identity()


def _classes(c: UNetConfig, times: nn.Module, features: int) -> nn.Module:
    vectors = c.projection_class_embeddings_input_dim
    if c.class_embed_type == "timestep":
        return LabelTimes(times, features, c.time_channels, c.time_act)
    if c.class_embed_type == "identity":
        return LabelVectors(c.time_channels)
    if c.class_embed_type == "projection":
        return LabelFeatures(vectors, c.time_channels)
    if c.class_embed_type == "simple_projection":
        return LabelProjection(vectors, c.time_channels)
    if c.num_class_embeds is not None:
        return LabelTable(c.num_class_embeds, c.time_channels)
    return NoLabels()


def _numbers(c: UNetConfig) -> nn.Module:
    if c.addition_embed_type is None:
        return NoAddition()
    sinusoids = SinusoidalTime(c.addition_time_embed_dim, c.flip_sin_to_cos, c.freq_shift)
    return TextTime(sinusoids, c.projection_class_embeddings_input_dim, c.time_channels)


def _text(c: UNetConfig) -> nn.Module:
    if c.context_channels is None:
        return NoText()
    if c.encoder_hid_dim:
        return ProjectedText(c.encoder_hid_dim, c.context_channels)
    return Text(c.context_channels)


def _written(c: UNetConfig) -> Config:
    """The configuration as config.json has it: `dims` is minidiff's own, so only where not 2."""
    config = Config(asdict(c))
    if c.dims == 2:
        del config["dims"]
    return config
