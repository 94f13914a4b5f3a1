"""The U-Net: a down path to small images, a middle, and an up path with skip connections.

    sample ─ conv_in ─┬──────────────────── skips ───────────────────┬─ norm, act, conv_out ─ out
                      └ down₀ ──┬────────── skips ─────────┬── up₂ ──┘
                                └ down₁ ──┬─ skips ─┬─ up₁ ┘
                                          └ down₂ ─ mid ─ up₀

A level is a few residual blocks. By block type, each is followed by self-attention over the
positions of the image, or by a transformer with cross-attention to a text. The down path pushes
every result on a stack; the up path pops them in reverse order and concatenates them as extra
channels. All blocks are conditioned on one embedding of the time and, if there is one, the class.
Submodule names are those of diffusers' checkpoints, so that weights load without renaming.

Sources: Ronneberger et al. 2015, "U-Net", https://arxiv.org/abs/1505.04597; Ho et al. 2020,
"Denoising Diffusion Probabilistic Models", https://arxiv.org/abs/2006.11239, appendix B; with text
Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models",
https://arxiv.org/abs/2112.10752. The arguments and what they mean are those of diffusers'
`UNet2DModel` and `UNet2DConditionModel`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from minidiff.errors import InvalidArgument
from minidiff.nn.blocks.attention import Attention, Context, NoAttention, rename_old_attention
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
    NoTextContext,
    ProjectedTextContext,
    SinusoidalTime,
    TextContext,
    TextTime,
    TimestepEmbedding,
    check_floating,
    expand_times,
)
from minidiff.nn.blocks.layers import (
    ACTIVATIONS,
    CONVOLUTIONS,
    RESNET_BLOCKS,
    AveragePool,
    Center,
    Downsample,
    GroupNorm,
    NearestUpsample,
    ResnetBlock,
    Upsample,
)
from minidiff.nn.blocks.transformer import Transformer
from minidiff.nn.configs.unet import VOCABULARIES, unet_config
from minidiff.nn.configs.unet_plan import AttentionPlan, SelfAttentionPlan, Stage, UNetConfig
from minidiff.nn.model import DenoisingNetwork, describe_options
from minidiff.runtime.files import Config
from minidiff.runtime.tensors import Stored


class UNet(DenoisingNetwork):
    """A U-Net in one, two or three dimensions, with or without cross-attention to a text.

    Args:
        config: arguments of diffusers' `UNet2DModel` or `UNet2DConditionModel`, with diffusers'
            defaults. `_class_name` selects the class, or else an argument that only the latter
            has. `dims` is the number of axes of space (1, 2 or 3; default 2).
    Raises:
        InvalidArgument: an unknown name, a value that is not allowed, or two that contradict
            each other.

    `unet.config` holds all arguments, `unet.class_name` the class of diffusers.
    `unet.to(memory_format=torch.channels_last)` is the fast way for two dimensions.
    """

    class_names = tuple(cls.class_name for cls in VOCABULARIES)

    def __init__(self, **config: object):
        super().__init__()
        c = unet_config(config)
        self.config, self.class_name = _stored_config(c), c.class_name
        self.dims, self.smallest_side, self.text_channels = c.dims, c.smallest_side, c.text_channels

        # Conditioning
        self.time_proj, self.time_embedding = _time(c)
        features = self.time_embedding.linear_1.in_features
        self.class_embedding = _classes(c, self.time_proj, features)
        self.join = Concatenate() if c.embedding_channels > c.time_channels else Add()
        self.add_embedding = _addition(c)
        self.encoder_hid_proj = _text(c)
        acts = filter(None, (c.time_embedding_act_fn, c.act_fn))  # the latter is that of the blocks
        self.time_act = nn.Sequential(*(ACTIVATIONS[name]() for name in acts))

        # In and down
        width = c.block_out_channels[0]
        self.center = Center() if c.center_input_sample else nn.Identity()
        self.conv_in = _convolution(c, c.in_channels, width, c.conv_in_kernel)
        self.down_blocks = nn.ModuleList()
        skips = [width]  # channels of the entries on the stack
        for stage in c.down_stages:
            self.down_blocks.append(DownBlock(c, width, stage))
            width = stage.width
            skips += [width] * (len(stage.attentions) + bool(stage.resize))

        # Middle
        self.mid_block = MidBlock(c, c.middle) if c.middle else NoMidBlock()

        # Up and out
        self.up_blocks = nn.ModuleList()
        for stage in c.up_stages:
            popped = [skips.pop() for _ in stage.attentions]
            self.up_blocks.append(UpBlock(c, width, popped, stage))
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
        residuals: Sequence[Tensor] = (),
    ) -> Tensor:
        """Map a noisy sample and its time to the prediction.

        Conditioning that the network takes is required; conditioning that it does not take must
        be None.

        Args:
            sample: noisy sample (B, in_channels, *space) of any size. Odd sides are restored in
                the up path from the skip connections, as in diffusers' conditional U-Net.
            timestep: time of the batch (a number or a tensor ()), or one per image, (B,).
            encoder_hidden_states: tokens of a text, (B, L, cross_attention_dim), or
                (B, L, encoder_hid_dim) where the network projects them.
            class_labels: for num_class_embeds int64 (B,) below it, checked on the CPU (elsewhere
                it would wait for the device); numbers (B,) for class_embed_type "timestep";
                (B, time_channels) for "identity"; (B, projection_class_embeddings_input_dim) for
                the projections.
            timestep_cond: second input of the time embedding, (B, time_cond_proj_dim), or None.
            added_cond_kwargs: for addition_embed_type "text_time" `text_embeds` (B, D) and
                `time_ids` (B, n).
            encoder_attention_mask: (B, L), 1 or True for tokens to attend to; None for all.
            residuals: what a ControlNet adds to every result of the down path and to that of the
                middle, see `contract`; empty for nothing.
        Returns:
            (B, out_channels, *space), in the memory format of `sample`.
        Raises:
            InvalidArgument: a wrong shape or type, conditioning that is missing or unused, or on
                the CPU a timestep that is not finite. Of such a sample it warns there.
        """
        t, emb, text = self.embed(
            sample, timestep, encoder_hidden_states, class_labels, timestep_cond,
            added_cond_kwargs, encoder_attention_mask,
        )  # fmt: skip
        steps = self.contract(self.conv_in(self.center(sample)), emb, text)
        *skips, x = map(torch.add, steps, residuals) if residuals else steps
        for block in self.up_blocks:
            x = block(x, emb, text, skips)
        return self.time_proj.rescale_output(self.conv_out(self.conv_norm_out(x)), t)

    def embed(
        self, sample: Tensor, timestep: int | float | Tensor, tokens: Tensor | None,
        labels: Tensor | None, guidance: Tensor | None, added: Mapping[str, Tensor] | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Context | None]:  # fmt: skip
        """Check the inputs; return times (B,), embedding (B, embedding_channels), and context.

        The arguments and errors are those of `forward`, in its order.
        """
        t, batch = self._checked_times(sample, timestep), sample.shape[0]
        self.check_inputs(sample=sample, encoder_hidden_states=tokens, timestep_cond=guidance)
        text = self.encoder_hid_proj(tokens, mask, batch)
        emb = self.time_embedding(self.time_proj(t), guidance)
        emb = self.join(emb, self.class_embedding(labels, batch))
        return t, self.time_act(emb + self.add_embedding(added, batch)), text

    def contract(self, x: Tensor, emb: Tensor, text: Context | None) -> list[Tensor]:
        """Return x, (B, C, *space), every result of the down path, and that of the middle."""
        skips = [x]
        for block in self.down_blocks:
            x = block(x, emb, text, skips)
        return [*skips, self.mid_block(x, emb, text)]

    @classmethod
    def from_config(cls, config: Mapping) -> "UNet":
        """Build with fresh weights; `_class_name` selects the class. Raises InvalidArgument."""
        return cls(**config)

    @classmethod
    def translate_names(cls, stored: Mapping[str, Stored]) -> dict[str, Stored]:
        return rename_old_attention(stored)

    @classmethod
    def min_tensors(cls, config: Mapping) -> int:
        return unet_config(config).min_tensors

    def _checked_times(self, sample: Tensor, timestep: int | float | Tensor) -> Tensor:
        """Check the input and return the times, (B,) on the sample's device."""
        check_floating("sample", sample)
        channels, sides = self.config.in_channels, tuple(sample.shape[2:])
        if len(sides) != self.dims or sample.shape[1] != channels or not sample.shape[0]:
            raise InvalidArgument(
                f"sample must have shape (B, {channels}{', side' * self.dims}), "
                f"got {tuple(sample.shape)}"
            )
        if min(sides) < self.smallest_side:
            raise InvalidArgument(f"sample must have sides >= {self.smallest_side}, got {sides}")
        return expand_times(sample, timestep)


describe_options(UNet, *VOCABULARIES)


class DownBlock(nn.Module):
    """One level of the down path: residual blocks with attention, then downsampling."""

    def __init__(self, c: UNetConfig, in_channels: int, stage: Stage):
        super().__init__()
        width, places = stage.width, len(stage.attentions)
        inputs = [in_channels] + (places - 1) * [width]
        self.resnets = nn.ModuleList(_resnet(c, channels, width) for channels in inputs)
        self.attentions = nn.ModuleList(_attention(c, width, plan) for plan in stage.attentions)
        self.downsamplers = nn.ModuleList()
        if stage.resize == "conv":
            self.downsamplers.append(Downsample(c.dims, width, c.downsample_padding))
        elif stage.resize == "resnet":
            self.downsamplers.append(_resnet(c, width, width, resize=AveragePool(c.dims)))

    def forward(self, x: Tensor, emb: Tensor, text: Context | None, skips: list[Tensor]) -> Tensor:
        """Return the result of the level and push every step of it on `skips`."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x, emb), text)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x, emb)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    """The middle, at the smallest size: a residual block, attention, and a residual block."""

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
    """One level of the up path: residual blocks on skip connections, then upsampling."""

    def __init__(self, c: UNetConfig, in_channels: int, skips: list[int], stage: Stage):
        super().__init__()
        width = stage.width
        inputs = [in_channels] + (len(skips) - 1) * [width]
        self.resnets = nn.ModuleList(
            _resnet(c, x + skip, width) for x, skip in zip(inputs, skips, strict=True)
        )
        self.attentions = nn.ModuleList(_attention(c, width, plan) for plan in stage.attentions)
        self.upsamplers = nn.ModuleList()
        if stage.resize == "conv":
            self.upsamplers.append(Upsample(c.dims, width))
        elif stage.resize == "resnet":
            self.upsamplers.append(_resnet(c, width, width, resize=NearestUpsample()))

    def forward(self, x: Tensor, emb: Tensor, text: Context | None, skips: list[Tensor]) -> Tensor:
        """Return the result of the level; every residual block pops one entry of `skips`."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(torch.cat([x, skips.pop()], dim=1), emb), text)
        for upsample in self.upsamplers:
            x = upsample(x, emb, skips[-1].shape[2:])
        return x


# --------------------------------------------------- from options to modules, at construction


def _resnet(c: UNetConfig, in_channels: int, width: int, **options: object) -> ResnetBlock:
    return RESNET_BLOCKS[c.resnet_time_scale_shift](
        c.dims,
        in_channels,
        width,
        c.embedding_channels,
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
    if isinstance(plan, SelfAttentionPlan):
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


def _convolution(c: UNetConfig, in_channels: int, width: int, kernel: int) -> nn.Module:
    return CONVOLUTIONS[c.dims](in_channels, width, kernel, padding=kernel // 2)


def _time(c: UNetConfig) -> tuple[nn.Module, TimestepEmbedding]:
    width, first = c.time_channels, c.block_out_channels[0]
    if c.time_embedding_type == "positional":
        times, features = SinusoidalTime(first, c.flip_sin_to_cos, c.freq_shift), first
    elif c.takes_sigma:
        times, features = LogFourierTime(2 * first), 2 * first
    else:
        times, features = FourierTime(width, c.flip_sin_to_cos), width
    return times, TimestepEmbedding(
        features, width, c.time_act, c.timestep_post_act, c.time_cond_proj_dim
    )


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


def _addition(c: UNetConfig) -> nn.Module:
    if c.addition_embed_type is None:
        return NoAddition()
    sinusoids = SinusoidalTime(c.addition_time_embed_dim, c.flip_sin_to_cos, c.freq_shift)
    return TextTime(sinusoids, c.projection_class_embeddings_input_dim, c.time_channels)


def _text(c: UNetConfig) -> nn.Module:
    if c.context_channels is None:
        return NoTextContext()
    if c.encoder_hid_dim:
        return ProjectedTextContext(c.encoder_hid_dim, c.context_channels)
    return TextContext(c.context_channels)


def _stored_config(c: UNetConfig) -> Config:
    """Return the configuration for config.json; `dims`, unknown to diffusers, only if not 2."""
    config = Config(asdict(c))
    if c.dims == 2:
        del config["dims"]
    return config
