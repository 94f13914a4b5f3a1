"""The plan of a U-Net, and the arguments that diffusers' two vocabularies share.

A plan is a `Stage` for each level of the way down, for the middle, and for each level of the way
up. The network is built from these alone; what the arguments mean is settled here and in
`unet_config.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar, NamedTuple

from minidiff.errors import (
    InvalidArgument,
    listed,
    one_of,
    real_number,
    true_or_false,
    whole_number,
)
from minidiff.nn.blocks.layers import ACTIVATIONS, RESNET_BLOCKS
from minidiff.nn.configs.checks import check_levels


class PictureAttention(NamedTuple):
    """Self-attention over the positions of a picture: width of a head, groups of its norm."""

    head_dim: int
    groups: int | None


class TextAttention(NamedTuple):
    """A transformer that also looks at a text: number of heads, of blocks, and what they see."""

    heads: int
    depth: int
    only_cross: bool


AttentionPlan = PictureAttention | TextAttention | None


class Stage(NamedTuple):
    """One level of the down or up path, or the middle.

    Attributes:
        width: channels of its results.
        attentions: what follows each residual block; in the middle, each but the first.
        resize: what changes the size after them: "conv", "resnet", or None for nothing.
    """

    width: int
    attentions: tuple[AttentionPlan, ...]
    resize: str | None


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The arguments that both vocabularies share; see the subclasses.

    The bounds on sizes are far above any network in use; they keep a damaged or hostile
    config.json from taking memory or time.

    Raises:
        InvalidArgument: a value that is not allowed, or two that do not go together.
    """

    class_name: ClassVar[str]
    # What a block type says: is there attention ("picture" or "text"), and does a residual block
    # do the resizing? "option" leaves the latter to downsample_type and upsample_type.
    down_blocks: ClassVar[Mapping[str, tuple[str | None, str]]]
    up_blocks: ClassVar[Mapping[str, tuple[str | None, str]]]

    sample_size: int | Sequence[int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: Sequence[str] = ()
    mid_block_type: str | None = None
    up_block_types: Sequence[str] = ()
    block_out_channels: Sequence[int] = ()
    layers_per_block: int | Sequence[int] = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | Sequence[int] | None = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    dims: int = 2  # axes of space: minidiff's own

    def __post_init__(self) -> None:
        self._check_values()
        self._check_levels()
        self._check_time_and_classes()

    # --- the plan --------------------------------------------------------------------------

    @property
    def levels(self) -> range:
        return range(len(self.block_out_channels))

    @property
    def layers(self) -> tuple[int, ...]:
        """Residual blocks of every level on the way down; there is one more on the way up."""
        return self._per_level("layers_per_block")

    @cached_property
    def down_stages(self) -> tuple[Stage, ...]:
        """The way down, from the largest pictures to the smallest."""
        return tuple(self._down(level) for level in self.levels)

    @cached_property
    def up_stages(self) -> tuple[Stage, ...]:
        """The way up, from the smallest pictures to the largest."""
        return tuple(self._up(level) for level in reversed(self.levels))

    def _down(self, level: int) -> Stage:
        kind, resize = self.down_blocks[self.down_block_types[level]]
        size = self.head_sizes[level]
        plans = self._attentions(kind, level, size, self.down_depths(level))
        last = level == self.levels[-1]
        return Stage(self.block_out_channels[level], plans, None if last else self._resize(resize))

    def _up(self, level: int) -> Stage:
        kind, resize = self.up_blocks[self.up_block_types[-1 - level]]
        size = self._up_head_size(kind, level)
        plans = self._attentions(kind, level, size, self.up_depths(level))
        last = level == 0
        return Stage(
            self.block_out_channels[level], plans, None if last else self._resize(resize, up=True)
        )

    def _attentions(
        self, kind: str | None, level: int, size: int | None, depths: Sequence[int]
    ) -> tuple[AttentionPlan, ...]:
        """A plan for every place of a level, of which there are as many as `depths`."""
        if kind is None:
            return len(depths) * (None,)
        if kind == "picture":
            size = size or self.block_out_channels[level]
            return len(depths) * (PictureAttention(size, self.norm_num_groups),)
        return tuple(TextAttention(size, depth, self.crosses_only(level)) for depth in depths)

    @property
    def head_sizes(self) -> tuple[int | None, ...]:
        """`attention_head_dim` of every level."""
        return self._per_level("attention_head_dim")

    def _up_head_size(self, kind: str | None, level: int) -> int | None:
        return self.head_sizes[level]

    def _resize(self, kind: str, up: bool = False) -> str:
        return "conv" if kind == "option" else kind

    def down_depths(self, level: int) -> Sequence[int]:
        """Blocks of the transformer after each residual block of a level on the way down."""
        return self.layers[level] * (1,)

    def up_depths(self, level: int) -> Sequence[int]:
        """The same on the way up."""
        return (self.layers[level] + 1) * (1,)

    def crosses_only(self, level: int) -> bool:
        """Whether the positions of a level look at the text alone."""
        return False

    def _per_level(self, name: str) -> tuple:
        value = getattr(self, name)
        several = isinstance(value, list | tuple)
        return tuple(value) if several else len(self.block_out_channels) * (value,)

    @property
    def time_channels(self) -> int:
        """Width of the embedding of time."""
        if self.time_embedding_dim:
            return self.time_embedding_dim
        return 4 * self.block_out_channels[0]

    @property
    def told_channels(self) -> int:
        """Width of what every residual block is told."""
        return self.time_channels

    @property
    def smallest_side(self) -> int:
        """The least side that the levels can halve.

        Convolutions with padding 1 round up and can halve a side of 1; whatever rounds down
        needs something left at the last level.
        """
        halvings = self.down_stages[:-1]
        if self.downsample_padding == 1 and all(stage.resize == "conv" for stage in halvings):
            return 1
        return 2 ** len(halvings)

    @property
    def least_tensors(self) -> int:
        """How many tensors a checkpoint has at least, known without building the network."""
        stages = [*self.down_stages, *self.up_stages]
        places = [plan for stage in stages for plan in stage.attentions]
        depths = [plan.depth for plan in places if isinstance(plan, TextAttention)]
        return 10 * len(places) + 20 * sum(depths)

    # --- checks ----------------------------------------------------------------------------

    def _check_values(self) -> None:
        whole_number("dims", self.dims, 1, 3)
        whole_number("in_channels", self.in_channels, 1, 4096)
        whole_number("out_channels", self.out_channels, 1, 4096)
        whole_number("downsample_padding", self.downsample_padding, 0, 1)
        whole_number("norm_num_groups", self.norm_num_groups, 1)
        one_of("act_fn", self.act_fn, ACTIVATIONS)
        one_of("resnet_time_scale_shift", self.resnet_time_scale_shift, RESNET_BLOCKS)
        real_number("dropout", self.dropout, 0, 1)
        real_number("norm_eps", self.norm_eps, 1e-12, 1)
        real_number("mid_block_scale_factor", self.mid_block_scale_factor, 1e-6, 1e6)
        for field in fields(self):
            if field.type is bool:
                true_or_false(field.name, getattr(self, field.name))
        if self.sample_size is not None:
            several = isinstance(self.sample_size, list | tuple)
            sides = self.sample_size if several else self.dims * (self.sample_size,)
            for side in listed("sample_size", sides, self.dims):
                whole_number("sample_size", side, 1, 1 << 14)

    def _check_levels(self) -> None:
        check_levels(self, self.down_blocks, self.up_blocks)
        for layers in self._listed("layers_per_block"):
            whole_number("layers_per_block", layers, 1, 16)
        for heads in self._listed("attention_head_dim"):
            if heads is not None:
                whole_number("attention_head_dim", heads, 1)
        for width, plan in self._places():
            size = plan.head_dim if isinstance(plan, PictureAttention) else plan.heads
            whole_number("attention_head_dim", size, 1, width)

    def _listed(self, name: str) -> tuple:
        """The values of an argument that is one for all levels or a list of one a level."""
        value = getattr(self, name)
        if isinstance(value, list | tuple):
            return listed(name, value, len(self.block_out_channels))
        return (value,)

    def _places(self) -> list[tuple[int, AttentionPlan]]:
        """Channels and plan of every place that has attention."""
        middle = [self.middle] if self.middle else []
        return [
            (stage.width, plan)
            for stage in (*self.down_stages, *middle, *self.up_stages)
            for plan in stage.attentions
            if plan is not None
        ]

    def _check_time_and_classes(self) -> None:
        one_of("time_embedding_type", self.time_embedding_type, ("positional", "fourier"))
        if self.time_embedding_dim is not None:
            whole_number("time_embedding_dim", self.time_embedding_dim, 1, 1 << 16)
        if self.time_embedding_type == "positional":
            whole_number("block_out_channels[0]", self.block_out_channels[0], 2)
            check_shift("block_out_channels[0]", self.block_out_channels[0], self.freq_shift)
        if self.num_class_embeds is not None:
            whole_number("num_class_embeds", self.num_class_embeds, 1, 1 << 20)
            if self.class_embed_type is not None:
                raise InvalidArgument(
                    f"class_embed_type must be None where num_class_embeds is given, "
                    f"got {self.class_embed_type!r}"
                )


def check_shift(name: str, features: int, shift: float) -> None:
    if real_number("freq_shift", shift, 0) >= features // 2:
        raise InvalidArgument(
            f"freq_shift must be below half of {name} ({features // 2}), got {shift}"
        )
