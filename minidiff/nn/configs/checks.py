"""What the levels of a U-Net and of a VAE may be: one check for both, with diffusers' names."""

from collections.abc import Collection
from typing import Protocol

from minidiff.errors import InvalidArgument, listed, one_of, whole_number

MAX_LEVELS = 8
MAX_CHANNELS = 16384


class Levels(Protocol):
    """The arguments that say what the levels are."""

    block_out_channels: object
    down_block_types: object
    up_block_types: object
    norm_num_groups: int


def check_levels(c: Levels, down_blocks: Collection[str], up_blocks: Collection[str]) -> None:
    """Refuse levels that cannot be built.

    Args:
        c: checked but for its levels.
        down_blocks, up_blocks: the block types that are known.
    Raises:
        InvalidArgument: not one type of block a level on each path, an unknown one, or channels
            that are out of range or no multiple of norm_num_groups.
    """
    channels = listed("block_out_channels", c.block_out_channels)
    levels = whole_number("the number of block_out_channels", len(channels), 1, MAX_LEVELS)
    for name, known in (("down_block_types", down_blocks), ("up_block_types", up_blocks)):
        for block_type in listed(name, getattr(c, name), levels):
            one_of(name, block_type, known)
    for width in channels:
        whole_number("block_out_channels", width, 1, MAX_CHANNELS)
        if width % c.norm_num_groups:
            raise InvalidArgument(
                f"block_out_channels must be multiples of norm_num_groups "
                f"({c.norm_num_groups}), got {width}"
            )
