"""The arguments of a VAE: names and defaults of diffusers' `AutoencoderKL`, checked by name.

Source: https://huggingface.co/docs/diffusers/api/models/autoencoderkl
"""

from collections.abc import Sequence
from dataclasses import dataclass

from minidiff.errors import (
    InvalidArgument,
    listed,
    one_of,
    real_number,
    true_or_false,
    whole_number,
)
from minidiff.nn.blocks.layers import ACTIVATIONS
from minidiff.nn.configs.checks import check_levels

# What a block type says: is there attention behind every residual block?
DOWN_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP_BLOCKS = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


@dataclass(frozen=True)
class AutoencoderConfig:
    """The arguments of an AutoencoderKL, with diffusers' names and defaults, checked when made.

    The bounds on sizes are far above any network in use; they keep a damaged or hostile
    config.json from taking memory or time.

    Raises:
        InvalidArgument: a value that is not allowed, or two that do not go together.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: Sequence[str] = ("DownEncoderBlock2D",)
    up_block_types: Sequence[str] = ("UpDecoderBlock2D",)
    block_out_channels: Sequence[int] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | Sequence[int] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: Sequence[float] | None = None
    latents_std: Sequence[float] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        self._check_values()
        check_levels(self, DOWN_BLOCKS, UP_BLOCKS)
        self._check_statistics()

    @property
    def divisor(self) -> int:
        """Positions of the image along each axis for one of the latent space."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def mean(self) -> float | Sequence[float]:
        """Mean of the latent space, one number or one a channel."""
        return self.latents_mean or self.shift_factor or 0.0

    @property
    def std(self) -> float | Sequence[float]:
        """Spread of the latent space beside scaling_factor, one number or one a channel."""
        return self.latents_std or 1.0

    def _check_values(self) -> None:
        for name in ("in_channels", "out_channels", "latent_channels"):
            whole_number(name, getattr(self, name), 1, 4096)
        whole_number("layers_per_block", self.layers_per_block, 1, 16)
        whole_number("norm_num_groups", self.norm_num_groups, 1)
        one_of("act_fn", self.act_fn, ACTIVATIONS)
        for name in (
            "force_upcast",
            "use_quant_conv",
            "use_post_quant_conv",
            "mid_block_add_attention",
        ):
            true_or_false(name, getattr(self, name))
        several = isinstance(self.sample_size, list | tuple)
        for side in listed("sample_size", self.sample_size, 2) if several else [self.sample_size]:
            whole_number("sample_size", side, 1, 1 << 14)

    def _check_statistics(self) -> None:
        real_number("scaling_factor", self.scaling_factor, 1e-6, 1e6)
        if self.shift_factor is not None:
            real_number("shift_factor", self.shift_factor, -1e6, 1e6)
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
        for name, low in (("latents_mean", -1e6), ("latents_std", 1e-6)):
            for value in listed(name, getattr(self, name), self.latent_channels):
                real_number(name, value, low, 1e6)
