"""The arguments of a VAE: names and defaults of diffusers' `AutoencoderKL`, checked by name.

Source: https://huggingface.co/docs/diffusers/api/models/autoencoderkl
"""

from collections.abc import Sequence
from dataclasses import dataclass

from minidiff.errors import InvalidArgument, listed
from minidiff.nn.blocks.layers import ACTIVATIONS
from minidiff.nn.configs.checks import IMAGE_CHANNELS, SIDE, check_levels
from minidiff.runtime.checks import (
    check_fields,
    choice,
    each,
    flag,
    one_or_each,
    option,
    optional,
    real,
    whole,
)

# Block type → does attention follow every residual block?
DOWN_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP_BLOCKS = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}

_ANY_MEAN, _ANY_STD = real(-1e6, 1e6), real(1e-6, 1e6)


@dataclass(frozen=True)
class AutoencoderConfig:
    """The arguments of an AutoencoderKL, with diffusers' names and defaults.

    Raises:
        InvalidArgument: a value is not allowed, or two contradict each other.
    """

    in_channels: int = option(3, "channels of the images encoded", IMAGE_CHANNELS)
    out_channels: int = option(3, "channels of the images decoded", IMAGE_CHANNELS)
    down_block_types: Sequence[str] = ("DownEncoderBlock2D",)  # keys of DOWN_BLOCKS
    up_block_types: Sequence[str] = ("UpDecoderBlock2D",)  # keys of UP_BLOCKS
    block_out_channels: Sequence[int] = (64,)
    layers_per_block: int = option(1, "residual blocks per level of the encoder", whole(1, 16))
    act_fn: str = option("silu", "activation of the residual blocks", choice(*ACTIVATIONS))
    latent_channels: int = option(4, "channels of the latents", IMAGE_CHANNELS)
    norm_num_groups: int = option(32, "groups of every norm", whole(1))
    sample_size: int | Sequence[int] = option(
        32, "side of a tile, or height and width", one_or_each(SIDE, length=2)
    )
    scaling_factor: float = option(0.18215, "1/std of the latents", real(1e-6, 1e6))
    shift_factor: float | None = option(None, "mean of the latents", optional(_ANY_MEAN))
    latents_mean: Sequence[float] | None = option(
        None, "mean of each latent channel", optional(each(_ANY_MEAN))
    )
    latents_std: Sequence[float] | None = option(
        None, "standard deviation of each latent channel", optional(each(_ANY_STD))
    )
    force_upcast: bool = option(True, "float32 required instead of float16", flag)
    use_quant_conv: bool = option(True, "1×1 convolution after the encoder", flag)
    use_post_quant_conv: bool = option(True, "1×1 convolution before the decoder", flag)
    mid_block_add_attention: bool = option(True, "attention in the middle", flag)

    def __post_init__(self) -> None:
        check_fields(self)
        check_levels(self, DOWN_BLOCKS, UP_BLOCKS)
        if (self.latents_mean is None) != (self.latents_std is None):
            raise InvalidArgument(
                f"latents_mean and latents_std must be given together, got "
                f"{self.latents_mean!r} and {self.latents_std!r}"
            )
        if self.latents_mean is None:
            return
        if self.shift_factor is not None:
            raise InvalidArgument(
                f"shift_factor must be None where latents_mean is given, got {self.shift_factor}"
            )
        for name in ("latents_mean", "latents_std"):
            listed(name, getattr(self, name), self.latent_channels)

    @property
    def divisor(self) -> int:
        """Image pixels per latent position along each axis."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def mean(self) -> float | Sequence[float]:
        """Mean of the latents: one number, or one per channel."""
        return self.latents_mean or self.shift_factor or 0.0

    @property
    def std(self) -> float | Sequence[float]:
        """Standard deviation apart from scaling_factor: one number, or one per channel."""
        return self.latents_std or 1.0
