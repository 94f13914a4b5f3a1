"""The arguments of a U-Net in diffusers' two vocabularies.

diffusers has two classes, `UNet2DModel` and `UNet2DConditionModel`. Most of their arguments share
names, some of these share no meaning: `attention_head_dim` is the width of a head in the first and
the *number* of heads wherever the second looks at a text. Here each vocabulary is a dataclass with
diffusers' names and defaults, checked when it is made; `down_stages`, `middle` and `up_stages` are
the plan it stands for, and the network is built from that alone.

Sources: https://huggingface.co/docs/diffusers/api/models/unet2d and …/unet2d-cond (0.42.1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar

from minidiff.errors import InvalidArgument, listed, one_of, true_or_false, whole_number
from minidiff.nn.blocks.layers import ACTIVATIONS
from minidiff.nn.configs.unet_plan import (
    PictureAttention,
    Stage,
    TextAttention,
    UNetConfig,
    check_shift,
)
from minidiff.nn.model import options_of

MAX_DEPTH = 64  # transformer blocks in one place; SDXL has 10


@dataclass(frozen=True, kw_only=True)
class UNet2DModelConfig(UNetConfig):
    """A network without text, diffusers' `UNet2DModel`."""

    class_name: ClassVar[str] = "UNet2DModel"
    down_blocks: ClassVar = {
        "DownBlock2D": (None, "conv"),
        "AttnDownBlock2D": ("picture", "option"),
        "ResnetDownsampleBlock2D": (None, "resnet"),
    }
    up_blocks: ClassVar = {
        "UpBlock2D": (None, "conv"),
        "AttnUpBlock2D": ("picture", "option"),
        "ResnetUpsampleBlock2D": (None, "resnet"),
    }

    down_block_types: Sequence[str] = ("DownBlock2D",) + 3 * ("AttnDownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: Sequence[str] = (*3 * ("AttnUpBlock2D",), "UpBlock2D")
    block_out_channels: Sequence[int] = (224, 448, 672, 896)
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    attn_norm_num_groups: int | None = None
    add_attention: bool = True
    num_train_timesteps: int | None = None  # only for learned time embeddings, not built here

    # What the other vocabulary leaves to the user.
    last_act: ClassVar[str] = "silu"  # before the last convolution, whatever act_fn is
    time_act: ClassVar[str] = "silu"  # within the embedding of time, likewise
    told_noise_levels: ClassVar[bool] = True  # in place of steps, with Fourier features
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
        if self.mid_block_type is None:
            return None
        width = self.block_out_channels[-1]
        groups = self.norm_num_groups if self.resnet_time_scale_shift == "default" else None
        plan = PictureAttention(
            self.attention_head_dim or width, self.attn_norm_num_groups or groups
        )
        return Stage(width, (plan if self.add_attention else None,), None)

    def _resize(self, kind: str, up: bool = False) -> str:
        option = self.upsample_type if up else self.downsample_type
        return option if kind == "option" else kind

    def _check_values(self) -> None:
        super()._check_values()
        one_of("mid_block_type", self.mid_block_type, ("UNetMidBlock2D", None))
        one_of("downsample_type", self.downsample_type, ("conv", "resnet"))
        one_of("upsample_type", self.upsample_type, ("conv", "resnet"))
        whole_number("layers_per_block", self.layers_per_block, 1, 16)  # one for all levels
        if self.attention_head_dim is not None:
            whole_number("attention_head_dim", self.attention_head_dim, 1)
        if self.num_train_timesteps is not None:
            raise InvalidArgument(
                "num_train_timesteps must be None (it belongs to learned time embeddings, which "
                f"are not supported), got {self.num_train_timesteps!r}"
            )

    def _check_levels(self) -> None:
        super()._check_levels()
        if self.attn_norm_num_groups is not None:
            last = self.block_out_channels[-1]
            whole_number("attn_norm_num_groups", self.attn_norm_num_groups, 1)
            if last % self.attn_norm_num_groups:
                raise InvalidArgument(
                    f"attn_norm_num_groups must divide the last of block_out_channels ({last}), "
                    f"got {self.attn_norm_num_groups}"
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
    """A network that can look at a text, diffusers' `UNet2DConditionModel`.

    `attention_head_dim` is the *number* of heads where a block looks at a text, and the width of
    a head in AttnDownBlock2D and AttnUpBlock2D: diffusers keeps the wrong name for the sake of the
    published configurations. `upcast_attention` changes nothing: the softmax is float32 always.
    """

    class_name: ClassVar[str] = "UNet2DConditionModel"
    down_blocks: ClassVar = {
        **UNet2DModelConfig.down_blocks,
        "CrossAttnDownBlock2D": ("text", "conv"),
    }
    up_blocks: ClassVar = {**UNet2DModelConfig.up_blocks, "CrossAttnUpBlock2D": ("text", "conv")}
    # Options of networks that are not built here, and the values that mean "without".
    without: ClassVar = {
        "num_attention_heads": (None,),
        "dual_cross_attention": (False,),
        "attention_type": ("default",),
        "cross_attention_norm": (None,),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1.0,),
        "mid_block_only_cross_attention": (None, False),
        "addition_embed_type_num_heads": (64,),
    }

    told_noise_levels: ClassVar[bool] = False

    in_channels: int = 4
    out_channels: int = 4
    down_block_types: Sequence[str] = (*3 * ("CrossAttnDownBlock2D",), "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: Sequence[str] = ("UpBlock2D", *3 * ("CrossAttnUpBlock2D",))
    block_out_channels: Sequence[int] = (320, 640, 1280, 1280)
    only_cross_attention: bool | Sequence[bool] = False
    cross_attention_dim: int | Sequence[int] = 1280
    transformer_layers_per_block: int | Sequence = 1
    reverse_transformer_layers_per_block: Sequence | None = None
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    num_attention_heads: int | None = None
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    upcast_attention: bool = False
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    projection_class_embeddings_input_dim: int | None = None
    attention_type: str = "default"
    class_embeddings_concat: bool = False
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: str | None = None
    addition_embed_type_num_heads: int = 64

    @property
    def last_act(self) -> str:
        """The activation before the last convolution."""
        return self.act_fn

    time_act = last_act  # and the one within the embedding of time

    @property
    def middle(self) -> Stage | None:
        if self.mid_block_type is None:
            return None
        level, width = self.levels[-1], self.block_out_channels[-1]
        if self.mid_block_type == "UNetMidBlock2D":  # here without attention: one residual block
            return Stage(width, (), None)
        heads = self.head_sizes[level]
        depth = self._spread(self._per_level("transformer_layers_per_block")[level], 1)[0]
        return Stage(width, (TextAttention(heads, depth, False),), None)

    @property
    def told_channels(self) -> int:
        return self.time_channels * (2 if self.class_embeddings_concat else 1)

    @property
    def time_channels(self) -> int:
        if self.time_embedding_type == "fourier" and not self.time_embedding_dim:
            return 2 * self.block_out_channels[0]
        return super().time_channels

    @cached_property
    def context_channels(self) -> int | None:
        """Channels of the tokens that attention reads; None for a network that reads none."""
        if not any(isinstance(plan, TextAttention) for _, plan in self._places()):
            return None
        return self._per_level("cross_attention_dim")[0]

    @property
    def text_channels(self) -> int | None:
        """Channels of the tokens as the network is given them."""
        return self.encoder_hid_dim or self.context_channels

    def crosses_only(self, level: int) -> bool:
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
        # diffusers turns its list round for the transformers of the way up, but not for this.
        return self.head_sizes[-1 - level if kind == "picture" else level]

    @staticmethod
    def _spread(depth: int | Sequence[int], places: int) -> tuple[int, ...]:
        return tuple(depth)[:places] if isinstance(depth, list | tuple) else places * (depth,)

    def _check_values(self) -> None:
        super()._check_values()
        kinds = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
        one_of("mid_block_type", self.mid_block_type, kinds)
        for name, allowed in self.without.items():
            value = getattr(self, name)
            if not any(
                value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed
            ):
                raise InvalidArgument(
                    f"{name}={value!r} is not supported; leave it at {allowed[0]!r}"
                )
        for name in ("time_embedding_act_fn", "timestep_post_act"):
            one_of(name, getattr(self, name), (None, *ACTIVATIONS))
        for name in ("conv_in_kernel", "conv_out_kernel"):
            if whole_number(name, getattr(self, name), 1, 31) % 2 == 0:
                raise InvalidArgument(f"{name} must be odd, got {getattr(self, name)}")
        for name in (
            "time_cond_proj_dim",
            "projection_class_embeddings_input_dim",
            "addition_time_embed_dim",
            "encoder_hid_dim",
        ):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), 1, 1 << 16)

    def _check_levels(self) -> None:
        for only in self._listed("only_cross_attention"):
            true_or_false("only_cross_attention", only)
        widths = self._listed("cross_attention_dim")
        for width in widths:
            whole_number("cross_attention_dim", width, 1, 1 << 16)
        self._check_depths()
        super()._check_levels()
        levels = zip(self.down_stages, self._per_level("cross_attention_dim"), strict=True)
        read = {w for stage, w in levels if isinstance(stage.attentions[0], TextAttention)}
        if len(read | {widths[-1]}) > 1:
            raise InvalidArgument(
                "cross_attention_dim must be one number: all levels read the same tokens, "
                f"got {list(widths)}"
            )

    def _check_depths(self) -> None:
        levels = len(listed("block_out_channels", self.block_out_channels))
        down, up = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
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
        one_of("encoder_hid_dim_type", self.encoder_hid_dim_type, (None, "text_proj"))
        if self.encoder_hid_dim_type and self.encoder_hid_dim is None:
            raise InvalidArgument("encoder_hid_dim must be given for encoder_hid_dim_type")
        if self.encoder_hid_dim and self.context_channels is None:
            raise InvalidArgument(
                "encoder_hid_dim must be None: no block of this network looks at a text"
            )
        self._check_added()

    def _check_added(self) -> None:
        """What is embedded besides the time, and what each kind of it needs."""
        one_of("addition_embed_type", self.addition_embed_type, (None, "text_time"))
        classes = (self.class_embed_type, self.num_class_embeds) != (None, None)
        needs = {
            "projection_class_embeddings_input_dim": self.addition_embed_type == "text_time"
            or self.class_embed_type in ("projection", "simple_projection"),
            "addition_time_embed_dim": self.addition_embed_type == "text_time",
        }
        for name, needed in needs.items():
            if needed and getattr(self, name) is None:
                raise InvalidArgument(f"{name} must be given for the embeddings asked for")
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
    """Read arguments in the vocabulary that they are written in.

    Args:
        given: names and values; `_class_name` says which vocabulary, and where it is missing a
            name or a block type that only UNet2DConditionModel knows does.
    Raises:
        InvalidArgument: an unknown name or class, or as the class of the vocabulary.
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
    return options_of(cls, options)


def _as_list(value: object) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]
