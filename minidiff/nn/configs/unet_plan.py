"""The plan of a U-Net, and the arguments that diffusers' two vocabularies share.

A plan is a `Stage` for each level of the down path, for the middle, and for each level of the up
path. The network is built from these alone; what the arguments mean is decided here and in
`nn.configs.unet`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

from minidiff.errors import InvalidArgument, listed, real_number, whole_number
from minidiff.nn.blocks.layers import ACTIVATIONS, RESNET_BLOCKS
from minidiff.nn.configs.checks import IMAGE_CHANNELS, SIDE, WIDTH, check_levels
from minidiff.runtime.checks import (
    Check,
    check_fields,
    choice,
    flag,
    one_or_each,
    option,
    optional,
    real,
    whole,
)


class SelfAttentionPlan(NamedTuple):
    """Self-attention over the positions of an image: channels of a head, groups of its norm."""

    head_dim: int
    groups: int | None


class CrossAttentionPlan(NamedTuple):
    """A transformer with cross-attention: heads, blocks, and whether it has no self-attention."""

    heads: int
    depth: int
    only_cross: bool


AttentionPlan = SelfAttentionPlan | CrossAttentionPlan | None


class Stage(NamedTuple):
    """One level of the down or up path, or the middle.

    Attributes:
        width: channels of its results.
        attentions: attention after each residual block; in the middle, after each but the first.
        resize: resizing at the end: "conv", "resnet", or None.
    """

    width: int
    attentions: tuple[AttentionPlan, ...]
    resize: str | None


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The arguments that both vocabularies share; see the subclasses.

    Raises:
        InvalidArgument: a value is not allowed, or two contradict each other.
    """

    class_name: ClassVar[str]
    # Block type → its attention ("self", "cross" or None) and its resizing ("conv" or "resnet";
    # "option" for that of downsample_type and upsample_type).
    down_blocks: ClassVar[Mapping[str, tuple[str | None, str]]]
    up_blocks: ClassVar[Mapping[str, tuple[str | None, str]]]

    sample_size: int | Sequence[int] | None = None  # side, or one per axis of space
    in_channels: int = option(3, "channels of the input", IMAGE_CHANNELS)
    out_channels: int = option(3, "channels of the output", IMAGE_CHANNELS)
    center_input_sample: bool = option(False, "input in [0, 1] moved to [−1, 1]", flag)
    time_embedding_type: str = option(
        "positional", "features of the time", choice("positional", "fourier")
    )
    time_embedding_dim: int | None = option(None, "time embedding's channels", optional(WIDTH))
    freq_shift: float = 0  # see SinusoidalTime
    flip_sin_to_cos: bool = option(True, "cosines before sines", flag)
    down_block_types: Sequence[str] = ()  # keys of down_blocks
    mid_block_type: str | None = None
    up_block_types: Sequence[str] = ()  # keys of up_blocks
    block_out_channels: Sequence[int] = ()
    layers_per_block: int | Sequence[int] = 2
    mid_block_scale_factor: float = option(1, "divisor of residual sums", real(1e-6, 1e6))
    downsample_padding: int = option(1, "padding of downsampling convolutions", whole(0, 1))
    dropout: float = option(0.0, "dropout within residual blocks", real(0, 1))
    act_fn: str = option("silu", "activation of the residual blocks", choice(*ACTIVATIONS))
    attention_head_dim: int | Sequence[int] | None = 8
    norm_num_groups: int = option(32, "groups of every norm", whole(1))
    norm_eps: float = option(1e-5, "epsilon of every norm", real(1e-12, 1))
    resnet_time_scale_shift: str = option(
        "default", "conditioning of residual blocks on time", choice(*RESNET_BLOCKS)
    )
    class_embed_type: str | None = None
    num_class_embeds: int | None = option(None, "number of labels", optional(whole(1, 1 << 20)))
    dims: int = option(2, "axes of space; not an option of diffusers", whole(1, 3))

    def __post_init__(self) -> None:
        check_fields(self)
        optional(one_or_each(SIDE, length=self.dims))("sample_size", self.sample_size)
        self._check_levels()
        self._check_time_and_classes()

    # --- the plan --------------------------------------------------------------------------

    @property
    def levels(self) -> range:
        """Indices of the levels."""
        return range(len(self.block_out_channels))

    @property
    def layers(self) -> tuple[int, ...]:
        """Residual blocks of every level of the down path; the up path has one more."""
        return self._per_level("layers_per_block")

    @cached_property
    def down_stages(self) -> tuple[Stage, ...]:
        """Levels of the down path, from the largest to the smallest."""
        return tuple(self._down(level) for level in self.levels)

    @cached_property
    def up_stages(self) -> tuple[Stage, ...]:
        """Levels of the up path, from the smallest to the largest."""
        return tuple(self._up(level) for level in reversed(self.levels))

    def _down(self, level: int) -> Stage:
        kind, resize = self.down_blocks[self.down_block_types[level]]
        plans = self._attentions(kind, level, self.head_sizes[level], self.down_depths(level))
        last = level == self.levels[-1]
        return Stage(self.block_out_channels[level], plans, None if last else self._resize(resize))

    def _up(self, level: int) -> Stage:
        kind, resize = self.up_blocks[self.up_block_types[-1 - level]]
        plans = self._attentions(
            kind, level, self._up_head_size(kind, level), self.up_depths(level)
        )
        return Stage(
            self.block_out_channels[level],
            plans,
            None if level == 0 else self._resize(resize, up=True),
        )

    def _attentions(
        self, kind: str | None, level: int, size: int | None, depths: Sequence[int]
    ) -> tuple[AttentionPlan, ...]:
        """Return one plan per residual block of a level; there are len(depths)."""
        if kind is None:
            return len(depths) * (None,)
        if kind == "self":
            size = size or self.block_out_channels[level]
            return len(depths) * (SelfAttentionPlan(size, self.norm_num_groups),)
        return tuple(CrossAttentionPlan(size, depth, self.only_cross(level)) for depth in depths)

    @property
    def head_sizes(self) -> tuple[int | None, ...]:
        """`attention_head_dim` of every level."""
        return self._per_level("attention_head_dim")

    def _up_head_size(self, kind: str | None, level: int) -> int | None:
        return self.head_sizes[level]

    def _resize(self, kind: str, up: bool = False) -> str:
        return "conv" if kind == "option" else kind

    def down_depths(self, level: int) -> Sequence[int]:
        """Return the transformer blocks after each residual block of a level of the down path."""
        return self.layers[level] * (1,)

    def up_depths(self, level: int) -> Sequence[int]:
        """Return the transformer blocks after each residual block of a level of the up path."""
        return (self.layers[level] + 1) * (1,)

    def only_cross(self, level: int) -> bool:
        """Return True if the transformers of a level have no self-attention."""
        return False

    def _per_level(self, name: str) -> tuple:
        value = getattr(self, name)
        several = isinstance(value, list | tuple)
        return tuple(value) if several else len(self.block_out_channels) * (value,)

    @property
    def time_channels(self) -> int:
        """Channels of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def embedding_channels(self) -> int:
        """Channels of the embedding that conditions every residual block."""
        return self.time_channels

    @property
    def smallest_side(self) -> int:
        """Smallest side of the input that the levels can halve.

        Convolutions with padding 1 round up and can halve a side of 1. Other ways of halving
        round down and need one position left at the last level.
        """
        halvings = self.down_stages[:-1]
        if self.downsample_padding == 1 and all(stage.resize == "conv" for stage in halvings):
            return 1
        return 2 ** len(halvings)

    @property
    def min_tensors(self) -> int:
        """Lower bound on the tensors of a checkpoint, known without building the network."""
        stages = [*self.down_stages, *self.up_stages]
        places = [plan for stage in stages for plan in stage.attentions]
        depths = [plan.depth for plan in places if isinstance(plan, CrossAttentionPlan)]
        return 10 * len(places) + 20 * sum(depths)

    # --- checks ----------------------------------------------------------------------------

    def _check_levels(self) -> None:
        check_levels(self, self.down_blocks, self.up_blocks)
        self._check_each("layers_per_block", whole(1, 16))
        self._check_each("attention_head_dim", optional(whole(1)))
        for width, plan in self._attention_places():
            size = plan.head_dim if isinstance(plan, SelfAttentionPlan) else plan.heads
            whole_number("attention_head_dim", size, 1, width)

    def _check_each(self, name: str, check: Check) -> None:
        """Check an option that has one value for all levels or a list of one per level."""
        for value in self._listed(name):
            check(name, value)

    def _listed(self, name: str) -> tuple:
        """Return the values of such an option, one or one per level."""
        value = getattr(self, name)
        if isinstance(value, list | tuple):
            return listed(name, value, len(self.block_out_channels))
        return (value,)

    def _attention_places(self) -> list[tuple[int, AttentionPlan]]:
        """Return channels and plan of every place that has attention."""
        middle = [self.middle] if self.middle else []
        return [
            (stage.width, plan)
            for stage in (*self.down_stages, *middle, *self.up_stages)
            for plan in stage.attentions
            if plan is not None
        ]

    def _check_time_and_classes(self) -> None:
        if self.time_embedding_type == "positional":
            whole_number("block_out_channels[0]", self.block_out_channels[0], 2)
            check_shift("block_out_channels[0]", self.block_out_channels[0], self.freq_shift)
        if self.num_class_embeds is not None and self.class_embed_type is not None:
            raise InvalidArgument(
                f"class_embed_type must be None where num_class_embeds is given, "
                f"got {self.class_embed_type!r}"
            )


def check_shift(name: str, features: int, shift: float) -> None:
    """Refuse a shift that leaves no frequency for this many features. Raises InvalidArgument."""
    if real_number("freq_shift", shift, 0) >= features // 2:
        raise InvalidArgument(
            f"freq_shift must be below half of {name} ({features // 2}), got {shift}"
        )
