"""The arguments of a U-Net: names and defaults of diffusers' `UNet2DModel`, checked by name.

Source: https://huggingface.co/docs/diffusers/api/models/unet2d
"""

from collections.abc import Sequence
from dataclasses import dataclass

from minidiff.errors import InvalidArgument, one_of, real_number, whole_number
from minidiff.nn.layers import ACTIVATIONS, RESNET_BLOCKS

# What a block type says: is there attention, and does a residual block do the resizing? "option"
# leaves the latter to downsample_type and upsample_type, which the other types do not read.
DOWN_BLOCKS = {
    "DownBlock2D": (False, "conv"),
    "AttnDownBlock2D": (True, "option"),
    "ResnetDownsampleBlock2D": (False, "resnet"),
}
UP_BLOCKS = {
    "UpBlock2D": (False, "conv"),
    "AttnUpBlock2D": (True, "option"),
    "ResnetUpsampleBlock2D": (False, "resnet"),
}


@dataclass(frozen=True)
class UNetConfig:
    """The arguments of a UNet, with diffusers' names and defaults, checked when it is made.

    The bounds on sizes are far above any network in use; they keep a damaged or hostile
    config.json from taking memory or time.

    Raises:
        InvalidArgument: a value that is not allowed, or two that do not go together.
    """

    sample_size: int | Sequence[int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: Sequence[str] = ("DownBlock2D",) + 3 * ("AttnDownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: Sequence[str] = (*3 * ("AttnUpBlock2D",), "UpBlock2D")
    block_out_channels: Sequence[int] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None  # only for learned time embeddings, not built here
    dims: int = 2

    def __post_init__(self) -> None:
        self._check_values()
        self._check_levels()
        self._check_time_and_classes()

    @property
    def time_channels(self) -> int:
        """Width of the embedding that every block is told."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    def down_level(self, level: int) -> tuple[bool, str]:
        """Whether a level of the down path has attention, and what halves it: conv or resnet."""
        attends, resize = DOWN_BLOCKS[self.down_block_types[level]]
        return attends, self.downsample_type if resize == "option" else resize

    def up_level(self, level: int) -> tuple[bool, str]:
        """The same of the up path, whose block types are listed from the smallest size up."""
        attends, resize = UP_BLOCKS[self.up_block_types[-1 - level]]
        return attends, self.upsample_type if resize == "option" else resize

    @property
    def smallest_side(self) -> int:
        """The least side that the levels can halve.

        Convolutions with padding 1 round up and can halve a side of 1; whatever rounds down
        needs something left at the last level.
        """
        halvings = range(len(self.block_out_channels) - 1)
        rounds_up = self.downsample_padding == 1
        if rounds_up and all(self.down_level(level)[1] == "conv" for level in halvings):
            return 1
        return 2 ** len(halvings)

    def _check_values(self) -> None:
        whole_number("dims", self.dims, 1, 3)
        whole_number("in_channels", self.in_channels, 1, 4096)
        whole_number("out_channels", self.out_channels, 1, 4096)
        whole_number("layers_per_block", self.layers_per_block, 1, 16)
        whole_number("downsample_padding", self.downsample_padding, 0, 1)
        whole_number("norm_num_groups", self.norm_num_groups, 1)
        one_of("mid_block_type", self.mid_block_type, ("UNetMidBlock2D", None))
        one_of("downsample_type", self.downsample_type, ("conv", "resnet"))
        one_of("upsample_type", self.upsample_type, ("conv", "resnet"))
        one_of("act_fn", self.act_fn, ACTIVATIONS)
        one_of("resnet_time_scale_shift", self.resnet_time_scale_shift, RESNET_BLOCKS)
        real_number("dropout", self.dropout, 0, 1)
        real_number("norm_eps", self.norm_eps, 1e-12, 1)
        real_number("mid_block_scale_factor", self.mid_block_scale_factor, 1e-6, 1e6)
        for name in ("center_input_sample", "flip_sin_to_cos", "add_attention"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgument(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.sample_size is not None:
            several = isinstance(self.sample_size, list | tuple)
            sides = self.sample_size if several else self.dims * (self.sample_size,)
            for side in _as_tuple("sample_size", sides, self.dims):
                whole_number("sample_size", side, 1, 1 << 14)

    def _check_levels(self) -> None:
        _as_tuple("block_out_channels", self.block_out_channels)
        levels = len(self.block_out_channels)
        whole_number("the number of block_out_channels", levels, 1, 8)
        for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            for block_type in _as_tuple(name, getattr(self, name), levels):
                one_of(name, block_type, known)
        for channels in self.block_out_channels:
            whole_number("block_out_channels", channels, 1, 16384)
            if channels % self.norm_num_groups:
                raise InvalidArgument(
                    f"block_out_channels must be multiples of norm_num_groups "
                    f"({self.norm_num_groups}), got {channels}"
                )
        last = self.block_out_channels[-1]
        if self.attn_norm_num_groups is not None:
            whole_number("attn_norm_num_groups", self.attn_norm_num_groups, 1)
            if last % self.attn_norm_num_groups:
                raise InvalidArgument(
                    f"attn_norm_num_groups must divide the last of block_out_channels ({last}), "
                    f"got {self.attn_norm_num_groups}"
                )
        if self.attention_head_dim is not None:
            whole_number("attention_head_dim", self.attention_head_dim, 1)
            if (smallest := min(self._attended(), default=None)) is not None:
                whole_number("attention_head_dim", self.attention_head_dim, 1, smallest)

    def _attended(self) -> list[int]:
        """Channels of every place that has attention."""
        attended = [
            channels
            for level, channels in enumerate(self.block_out_channels)
            if self.down_level(level)[0] or self.up_level(level)[0]
        ]
        if self.mid_block_type and self.add_attention:
            attended.append(self.block_out_channels[-1])
        return attended

    def _check_time_and_classes(self) -> None:
        one_of("time_embedding_type", self.time_embedding_type, ("positional", "fourier"))
        if self.num_train_timesteps is not None:
            raise InvalidArgument(
                "num_train_timesteps must be None (it belongs to learned time embeddings, which "
                f"are not supported), got {self.num_train_timesteps!r}"
            )
        if self.time_embedding_dim is not None:
            whole_number("time_embedding_dim", self.time_embedding_dim, 1, 1 << 16)
        half = self.block_out_channels[0] // 2
        if self.time_embedding_type == "positional":
            whole_number("block_out_channels[0]", self.block_out_channels[0], 2)
            if real_number("freq_shift", self.freq_shift, 0) >= half:
                raise InvalidArgument(
                    f"freq_shift must be below half of block_out_channels[0] ({half}), "
                    f"got {self.freq_shift}"
                )
        one_of("class_embed_type", self.class_embed_type, (None, "timestep", "identity"))
        if self.num_class_embeds is not None:
            whole_number("num_class_embeds", self.num_class_embeds, 1, 1 << 20)
            if self.class_embed_type is not None:
                raise InvalidArgument(
                    f"class_embed_type must be None where num_class_embeds is given, "
                    f"got {self.class_embed_type!r}"
                )
        if (self.class_embed_type, self.time_embedding_type) == ("timestep", "fourier"):
            raise InvalidArgument(
                "class_embed_type 'timestep' must go with time_embedding_type 'positional', "
                "got 'fourier'"
            )


def _as_tuple(name: str, value: object, length: int | None = None) -> tuple:
    if not isinstance(value, list | tuple):
        raise InvalidArgument(f"{name} must be a list or a tuple, got {value!r}")
    if length is not None and len(value) != length:
        raise InvalidArgument(f"{name} must have {length} entries, got {len(value)}: {value!r}")
    return tuple(value)
