"""The arguments of a U-Net in diffusers' two vocabularies.

diffusers has two classes, `UNet2DModel` and `UNet2DConditionModel`. Most of their arguments share
names, and some of these differ in meaning: `attention_head_dim` is the width of a head in the
first and the *number* of heads in the cross-attention of the second. Here each vocabulary is a
dataclass with diffusers' names and defaults. `down_stages`, `middle` and `up_stages` are the plan
that it describes, and the network is built from that alone.

Sources: https://huggingface.co/docs/diffusers/api/models/unet2d and …/unet2d-cond (0.42.1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

from minidiff.errors import InvalidArgument, listed, one_of, whole_number
from minidiff.nn.blocks.layers import ACTIVATIONS
from minidiff.nn.configs.checks import IMAGE_CHANNELS, WIDTH
from minidiff.nn.configs.unet_plan import (
    CrossAttentionPlan,
    SelfAttentionPlan,
    Stage,
    UNetConfig,
    check_shift,
)
from minidiff.nn.model import parse_options
from minidiff.runtime.checks import Check, choice, flag, option, optional, whole

MAX_DEPTH = 64  # transformer blocks in one place; SDXL has 10
RESIZE = choice("conv", "resnet")
ACTIVATION = choice(None, *ACTIVATIONS)


def unsupported(*allowed: Any) -> Check:
    """Allow the values that mean "without"; the first of them is diffusers' default."""

    def check(name: str, value: Any) -> Any:
        if any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed
        ):
            return value
        raise InvalidArgument(f"{name}={value!r} is not supported; leave it at {allowed[0]!r}")

    return check


def odd_kernel(name: str, value: Any) -> int:
    """Allow odd kernel sizes."""
    if whole_number(name, value, 1, 31) % 2 == 0:
        raise InvalidArgument(f"{name} must be odd, got {value}")
    return value


def no_training_steps(name: str, value: Any) -> None:
    """Allow None for num_train_timesteps."""
    if value is not None:
        raise InvalidArgument(
            f"{name} must be None (it belongs to learned time embeddings, which are not "
            f"supported), got {value!r}"
        )


@dataclass(frozen=True, kw_only=True)
class UNet2DModelConfig(UNetConfig):
    """A network without text, diffusers' `UNet2DModel`."""

    class_name: ClassVar[str] = "UNet2DModel"
    down_blocks: ClassVar = {
        "DownBlock2D": (None, "conv"),
        "AttnDownBlock2D": ("self", "option"),
        "ResnetDownsampleBlock2D": (None, "resnet"),
    }
    up_blocks: ClassVar = {
        "UpBlock2D": (None, "conv"),
        "AttnUpBlock2D": ("self", "option"),
        "ResnetUpsampleBlock2D": (None, "resnet"),
    }

    down_block_types: Sequence[str] = ("DownBlock2D",) + 3 * ("AttnDownBlock2D",)
    mid_block_type: str | None = option(
        "UNetMidBlock2D", "block in the middle", choice("UNetMidBlock2D", None)
    )
    up_block_types: Sequence[str] = (*3 * ("AttnUpBlock2D",), "UpBlock2D")
    block_out_channels: Sequence[int] = (224, 448, 672, 896)
    layers_per_block: int = option(2, "residual blocks per level", whole(1, 16))
    attention_head_dim: int | None = option(8, "channels of a head", optional(whole(1)))
    downsample_type: str = option("conv", "downsampling after self-attention", RESIZE)
    upsample_type: str = option("conv", "upsampling after self-attention", RESIZE)
    attn_norm_num_groups: int | None = option(
        None, "groups of the norm of the middle's attention", optional(whole(1))
    )
    add_attention: bool = option(True, "attention in the middle", flag)
    num_train_timesteps: int | None = option(None, "not supported", no_training_steps)

    # Options of the other vocabulary, at the values that they have here.
    last_act: ClassVar[str] = "silu"  # before the last convolution, whatever act_fn is
    time_act: ClassVar[str] = "silu"  # within the time embedding, likewise
    takes_sigma: ClassVar[bool] = True  # noise levels instead of steps, with Fourier features
    conv_in_kernel: ClassVar[int] = 3
    conv_out_kernel: ClassVar[int] = 3
    timestep_post_act: ClassVar[None] = None
    time_embedding_act_fn: ClassVar[None] = None
    time_cond_proj_dim: ClassVar[None] = None
    projection_class_embeddings_input_dim: ClassVar[None] = None
    addition_embed_type: ClassVar[None] = None
    context_channels: ClassVar[None] = None
    text_channels: ClassVar[None] = None

    @property
    def middle(self) -> Stage | None:
        """The middle; None for a network without one."""
        if self.mid_block_type is None:
            return None
        width = self.block_out_channels[-1]
        groups = self.norm_num_groups if self.resnet_time_scale_shift == "default" else None
        plan = SelfAttentionPlan(
            self.attention_head_dim or width, self.attn_norm_num_groups or groups
        )
        return Stage(width, (plan if self.add_attention else None,), None)

    def _resize(self, kind: str, up: bool = False) -> str:
        option = self.upsample_type if up else self.downsample_type
        return option if kind == "option" else kind

    def _check_levels(self) -> None:
        super()._check_levels()
        last, groups = self.block_out_channels[-1], self.attn_norm_num_groups
        if groups is not None and last % groups:
            raise InvalidArgument(
                f"attn_norm_num_groups must divide the last of block_out_channels ({last}), "
                f"got {groups}"
            )

    def _check_time_and_classes(self) -> None:
        super()._check_time_and_classes()
        one_of("class_embed_type", self.class_embed_type, (None, "timestep", "identity"))
        if (self.class_embed_type, self.time_embedding_type) == ("timestep", "fourier"):
            raise InvalidArgument(
                "class_embed_type 'timestep' must go with time_embedding_type 'positional', "
                "got 'fourier'"
            )


@dataclass(frozen=True, kw_only=True)
class UNet2DConditionModelConfig(UNetConfig):
    """A network with optional cross-attention to a text, diffusers' `UNet2DConditionModel`.

    `attention_head_dim` is the *number* of heads in cross-attention blocks, and the width of a
    head in AttnDownBlock2D and AttnUpBlock2D: diffusers keeps the wrong name for the sake of the
    published configurations. `upcast_attention` has no effect: the softmax is always float32.
    """

    class_name: ClassVar[str] = "UNet2DConditionModel"
    down_blocks: ClassVar = {
        **UNet2DModelConfig.down_blocks,
        "CrossAttnDownBlock2D": ("cross", "conv"),
    }
    up_blocks: ClassVar = {**UNet2DModelConfig.up_blocks, "CrossAttnUpBlock2D": ("cross", "conv")}
    takes_sigma: ClassVar[bool] = False

    in_channels: int = option(4, "channels of the input", IMAGE_CHANNELS)
    out_channels: int = option(4, "channels of the output", IMAGE_CHANNELS)
    down_block_types: Sequence[str] = (*3 * ("CrossAttnDownBlock2D",), "DownBlock2D")
    mid_block_type: str | None = option(
        "UNetMidBlock2DCrossAttn",
        "block in the middle",
        choice("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    )
    up_block_types: Sequence[str] = ("UpBlock2D", *3 * ("CrossAttnUpBlock2D",))
    block_out_channels: Sequence[int] = (320, 640, 1280, 1280)
    only_cross_attention: bool | Sequence[bool] = False
    cross_attention_dim: int | Sequence[int] = 1280
    transformer_layers_per_block: int | Sequence = 1
    reverse_transformer_layers_per_block: Sequence | None = None
    encoder_hid_dim: int | None = option(None, "channels of a token given", optional(WIDTH))
    encoder_hid_dim_type: str | None = option(
        None, "projection of the tokens", choice(None, "text_proj")
    )
    num_attention_heads: int | None = option(None, "not supported", unsupported(None))
    dual_cross_attention: bool = option(False, "not supported", unsupported(False))
    use_linear_projection: bool = option(False, "linear layers, not 1×1 convolutions", flag)
    addition_embed_type: str | None = option(
        None, "additional embedding", choice(None, "text_time")
    )
    addition_time_embed_dim: int | None = option(None, "features per number", optional(WIDTH))
    upcast_attention: bool = option(False, "no effect", flag)
    resnet_skip_time_act: bool = option(False, "not supported", unsupported(False))
    resnet_out_scale_factor: float = option(1.0, "not supported", unsupported(1.0))
    time_embedding_act_fn: str | None = option(None, "activation of the embedding", ACTIVATION)
    timestep_post_act: str | None = option(None, "activation of the time embedding", ACTIVATION)
    time_cond_proj_dim: int | None = option(None, "channels of timestep_cond", optional(WIDTH))
    conv_in_kernel: int = option(3, "kernel size of the first convolution", odd_kernel)
    conv_out_kernel: int = option(3, "kernel size of the last convolution", odd_kernel)
    projection_class_embeddings_input_dim: int | None = option(
        None, "features of a class, or of the additional embedding", optional(WIDTH)
    )
    attention_type: str = option("default", "not supported", unsupported("default"))
    class_embeddings_concat: bool = option(False, "class beside time embedding", flag)
    mid_block_only_cross_attention: bool | None = option(
        None, "not supported", unsupported(None, False)
    )
    cross_attention_norm: str | None = option(None, "not supported", unsupported(None))
    addition_embed_type_num_heads: int = option(64, "not supported", unsupported(64))

    @property
    def last_act(self) -> str:
        """The activation before the last convolution."""
        return self.act_fn

    time_act = last_act  # and the one within the time embedding

    @property
    def middle(self) -> Stage | None:
        """The middle; None for a network without one."""
        if self.mid_block_type is None:
            return None
        level, width = self.levels[-1], self.block_out_channels[-1]
        if self.mid_block_type == "UNetMidBlock2D":  # here without attention: one residual block
            return Stage(width, (), None)
        heads = self.head_sizes[level]
        depth = self._spread(self._per_level("transformer_layers_per_block")[level], 1)[0]
        return Stage(width, (CrossAttentionPlan(heads, depth, False),), None)

    @property
    def embedding_channels(self) -> int:
        """Channels of the embedding that conditions every residual block."""
        return self.time_channels * (2 if self.class_embeddings_concat else 1)

    @property
    def time_channels(self) -> int:
        """Channels of the time embedding."""
        if self.time_embedding_type == "fourier" and not self.time_embedding_dim:
            return 2 * self.block_out_channels[0]
        return super().time_channels

    @cached_property
    def context_channels(self) -> int | None:
        """Channels of the tokens that cross-attention reads; None without cross-attention."""
        if not any(isinstance(plan, CrossAttentionPlan) for _, plan in self._attention_places()):
            return None
        return self._per_level("cross_attention_dim")[0]

    @property
    def text_channels(self) -> int | None:
        """Channels of the tokens that the network takes as input."""
        return self.encoder_hid_dim or self.context_channels

    def only_cross(self, level: int) -> bool:
        return self._per_level("only_cross_attention")[level]

    def down_depths(self, level: int) -> Sequence[int]:
        depth = self._per_level("transformer_layers_per_block")[level]
        return self._spread(depth, self.layers[level])

    def up_depths(self, level: int) -> Sequence[int]:
        places = self.layers[level] + 1
        if self.reverse_transformer_layers_per_block is not None:
            return self._spread(self.reverse_transformer_layers_per_block[-1 - level], places)
        return self._spread(self._per_level("transformer_layers_per_block")[level], places)

    def _up_head_size(self, kind: str | None, level: int) -> int | None:
        # diffusers reverses its list for the transformers of the up path, but not for this.
        return self.head_sizes[-1 - level if kind == "self" else level]

    @staticmethod
    def _spread(depth: int | Sequence[int], places: int) -> tuple[int, ...]:
        return tuple(depth)[:places] if isinstance(depth, list | tuple) else places * (depth,)

    def _check_levels(self) -> None:
        self._check_each("only_cross_attention", flag)
        self._check_each("cross_attention_dim", WIDTH)
        self._check_depths()
        super()._check_levels()
        levels = zip(self.down_stages, self._per_level("cross_attention_dim"), strict=True)
        read = {w for stage, w in levels if isinstance(stage.attentions[0], CrossAttentionPlan)}
        widths = self._listed("cross_attention_dim")
        if len(read | {widths[-1]}) > 1:
            raise InvalidArgument(
                "cross_attention_dim must be one number: all levels read the same tokens, "
                f"got {list(widths)}"
            )

    def _check_depths(self) -> None:
        levels = len(listed("block_out_channels", self.block_out_channels))
        down, up = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
        if self.reverse_transformer_layers_per_block is not None:
            listed(up, self.reverse_transformer_layers_per_block)
        extra = {down: 0, up: 1}
        for name in (down, up):
            for level, depth in enumerate(self._listed(name)):
                if depth is None and name == up:
                    continue
                several = isinstance(depth, list | tuple)
                if several and name == down and self.reverse_transformer_layers_per_block is None:
                    raise InvalidArgument(
                        f"{up} must be given where {down} lists numbers within a level, got None"
                    )
                if several:
                    layers = self._listed("layers_per_block")
                    index = levels - 1 - level if name == up else level
                    places = layers[index if len(layers) > 1 else 0] + extra[name]
                    listed(f"{name}[{level}]", depth, places)
                for one in depth if several else (depth,):
                    whole_number(name, one, 1, MAX_DEPTH)

    def _check_time_and_classes(self) -> None:
        super()._check_time_and_classes()
        kinds = (None, "timestep", "identity", "projection", "simple_projection")
        one_of("class_embed_type", self.class_embed_type, kinds)
        if self.time_embedding_type == "fourier" and self.time_channels % 2:
            raise InvalidArgument(
                f"time_embedding_dim must be even for 'fourier', got {self.time_embedding_dim}"
            )
        if self.encoder_hid_dim_type and self.encoder_hid_dim is None:
            raise InvalidArgument("encoder_hid_dim must be given for encoder_hid_dim_type")
        if self.encoder_hid_dim and self.context_channels is None:
            raise InvalidArgument(
                "encoder_hid_dim must be None: this network has no cross-attention"
            )
        self._check_added()

    def _check_added(self) -> None:
        """Check the class and additional embeddings and the options that they need."""
        classes = (self.class_embed_type, self.num_class_embeds) != (None, None)
        needs = {
            "projection_class_embeddings_input_dim": self.addition_embed_type == "text_time"
            or self.class_embed_type in ("projection", "simple_projection"),
            "addition_time_embed_dim": self.addition_embed_type == "text_time",
        }
        for name, needed in needs.items():
            if needed and getattr(self, name) is None:
                raise InvalidArgument(f"{name} must be given for these embeddings")
        if self.addition_embed_type == "text_time":
            whole_number("addition_time_embed_dim", self.addition_time_embed_dim, 2)
            check_shift("addition_time_embed_dim", self.addition_time_embed_dim, self.freq_shift)
        if self.class_embeddings_concat and (not classes or self.addition_embed_type):
            raise InvalidArgument(
                "class_embeddings_concat must be False without classes, and beside "
                f"addition_embed_type; got {self.class_embed_type!r}, {self.addition_embed_type!r}"
            )


VOCABULARIES = (UNet2DModelConfig, UNet2DConditionModelConfig)


def unet_config(given: Mapping[str, object]) -> UNetConfig:
    """Return arguments as a config of the vocabulary that they are written in.

    Args:
        given: names and values; `_class_name` names the vocabulary. Without it, a name or a block
            type that only UNet2DConditionModel has selects that class.
    Raises:
        InvalidArgument: an unknown name or class, or an error of the vocabulary's class.
    """
    plain, conditional = VOCABULARIES
    options = {name: value for name, value in given.items() if not name.startswith("_")}
    own = {field.name for field in fields(conditional)} - {field.name for field in fields(plain)}
    types = [
        kind
        for name in ("down_block_types", "up_block_types", "mid_block_type")
        for kind in _as_list(options.get(name))
    ]
    reads = bool(own & options.keys()) or any("CrossAttn" in str(kind) for kind in types)
    guess = conditional if reads else plain
    name = given.get("_class_name", guess.class_name)
    one_of("_class_name", name, [cls.class_name for cls in VOCABULARIES])
    cls = plain if name == plain.class_name else conditional
    return parse_options(cls, options, cls.class_name)


def _as_list(value: object) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]
