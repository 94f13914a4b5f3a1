"""The arguments of diffusion transformers, with diffusers' names and defaults."""

from collections.abc import Sequence
from dataclasses import dataclass

from minidiff.errors import InvalidArgument, whole_number
from minidiff.nn.configs.checks import IMAGE_CHANNELS, MAX_CHANNELS, SIDE, WIDTH
from minidiff.runtime.checks import check_fields, choice, each, flag, option, optional, real, whole


@dataclass(frozen=True)
class TransformerConfig:
    """The arguments that all transformers share.

    Raises:
        InvalidArgument: a value is not allowed, or two contradict each other.
    """

    sample_size: int = option(32, "side of the samples", SIDE)
    patch_size: int = option(2, "side of a patch", whole(1, 64))
    in_channels: int = option(4, "channels of the input", IMAGE_CHANNELS)
    out_channels: int | None = option(
        None, "channels of the output; those of the input by default", optional(IMAGE_CHANNELS)
    )
    num_layers: int = option(28, "blocks", whole(1, 256))
    num_attention_heads: int = option(16, "heads", whole(1, 1024))
    attention_head_dim: int = option(72, "channels of a head", whole(1, 4096))

    def __post_init__(self) -> None:
        check_fields(self)
        whole_number("num_attention_heads · attention_head_dim", self.width, 4, MAX_CHANNELS)
        if self.width % 4:
            raise InvalidArgument(
                "num_attention_heads · attention_head_dim must be a multiple of 4 for positions "
                f"in two dimensions, got {self.width}"
            )
        if self.sample_size % self.patch_size:
            raise InvalidArgument(
                f"sample_size must be a multiple of patch_size ({self.patch_size}), "
                f"got {self.sample_size}"
            )
        if self.out_channels is None:
            object.__setattr__(self, "out_channels", self.in_channels)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch_channels(self) -> int:
        """Numbers that the network predicts for a patch."""
        return self.patch_size**2 * (self.out_channels or self.in_channels)


@dataclass(frozen=True)
class DiTConfig(TransformerConfig):
    """The arguments of a `DiT`, diffusers' `DiTTransformer2DModel`.

    `upcast_attention` has no effect, because the softmax is always float32, and `norm_num_groups`
    has none in diffusers.
    """

    dropout: float = option(0.0, "dropout after attention and in the MLP", real(0, 1))
    norm_num_groups: int = option(32, "without effect", whole(1))
    attention_bias: bool = option(True, "biases of queries, keys and values", flag)
    activation_fn: str = option("gelu-approximate", "activation", choice("gelu-approximate"))
    num_embeds_ada_norm: int = option(1000, "classes, without 'no class'", whole(1, 1 << 20))
    upcast_attention: bool = option(False, "without effect", flag)
    norm_type: str = option("ada_norm_zero", "kind of the norms", choice("ada_norm_zero"))
    norm_elementwise_affine: bool = option(False, "weights of the norm before the MLP", flag)
    norm_eps: float = option(1e-5, "epsilon of the norm before the MLP", real(1e-12, 1))


@dataclass(frozen=True)
class MMDiTConfig(TransformerConfig):
    """The arguments of an `MMDiT`, diffusers' `SD3Transformer2DModel`."""

    sample_size: int = option(128, "side of the samples", SIDE)
    in_channels: int = option(16, "channels of the input", IMAGE_CHANNELS)
    out_channels: int | None = option(16, "channels of the output", optional(IMAGE_CHANNELS))
    num_layers: int = option(18, "blocks", whole(1, 256))
    num_attention_heads: int = option(18, "heads", whole(1, 1024))
    attention_head_dim: int = option(64, "channels of a head", whole(1, 4096))
    joint_attention_dim: int = option(4096, "channels of a token of the text", WIDTH)
    caption_projection_dim: int = option(1152, "those within the network", WIDTH)
    pooled_projection_dim: int = option(2048, "channels of the pooled text", WIDTH)
    pos_embed_max_size: int = option(96, "side of the table of positions", whole(1, 2048))
    dual_attention_layers: Sequence[int] = option(
        (), "blocks with a second attention, of the image alone", each(whole(0))
    )
    qk_norm: str | None = option(None, "norm of queries and keys", choice(None, "rms_norm"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.caption_projection_dim != self.width:
            raise InvalidArgument(
                "caption_projection_dim must be num_attention_heads · attention_head_dim "
                f"({self.width}), got {self.caption_projection_dim}"
            )
        for layer in self.dual_attention_layers:
            whole_number("dual_attention_layers", layer, 0, self.num_layers - 1)
        if self.sample_size > self.pos_embed_max_size * self.patch_size:
            raise InvalidArgument(
                f"pos_embed_max_size must be at least sample_size / patch_size "
                f"({self.sample_size // self.patch_size}), got {self.pos_embed_max_size}"
            )
