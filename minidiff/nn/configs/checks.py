"""Checks that the configurations of networks share, with diffusers' names for the options."""

from collections.abc import Collection
from typing import Protocol

from minidiff.errors import InvalidArgument, listed, one_of, whole_number
from minidiff.runtime.checks import whole

MAX_LEVELS = 8
MAX_CHANNELS = 16384

# Far above any network in use: they keep a damaged or hostile config.json from taking memory.
IMAGE_CHANNELS = whole(1, 4096)
SIDE = whole(1, 1 << 14)
WIDTH = whole(1, 1 << 16)


class Levels(Protocol):
    """The options of a U-Net or a VAE that define its levels."""

    block_out_channels: object
    down_block_types: object
    up_block_types: object
    norm_num_groups: int


def check_levels(c: Levels, down_blocks: Collection[str], up_blocks: Collection[str]) -> None:
    """Check that every level has its channels and a known block on each path.

    Args:
        c: configuration whose other options are checked already.
        down_blocks: supported block types of the down path.
        up_blocks: supported block types of the up path.
    Raises:
        InvalidArgument: a list of another length than block_out_channels, an unknown block type,
            or channels that are out of range or no multiple of norm_num_groups.
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
