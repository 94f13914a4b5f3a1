"""Space to depth: a picture as a smaller picture with more channels.

A b×b block of pixels becomes b²·C channels of one pixel (Shi et al. 2016, arXiv:1609.05158, the
inverse of "pixel shuffle"). Nothing is computed: the map is a permutation, so white noise stays
white noise, and diffusion in either space is the same process. The network sees a quarter of the
positions with four times the channels (b = 2), which a small computer does three times sooner.

It stands where a latent model has its autoencoder: `to_latents` before the loop, `from_latents`
after it.
"""

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.errors import CheckpointError, InvalidArgument, whole_number
from minidiff.runtime.files import read_json, write_json


class SpaceToDepth(nn.Module):
    """The permutation (B, C, H·b, W·b) ↔ (B, C·b², H, W).

    Args:
        block: b, at least 1; 1 is the identity.
    """

    def __init__(self, block: int = 2) -> None:
        super().__init__()
        self.block = whole_number("block", block, 1, 64)

    @property
    def divisor(self) -> int:
        """Pixels a side of what becomes one position."""
        return self.block

    def image_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """(C, H, W) of the picture that (C·b², h, w) comes from."""
        channels, *sides = latent_shape
        return (channels // self.block**2, *(side * self.block for side in sides))

    def check_channels(self, channels: int) -> None:
        """Refuse a network whose channels this cannot make pictures of. Raises InvalidArgument."""
        if channels % self.block**2:
            raise InvalidArgument(
                f"block must divide the network's {channels} channels into blocks of block² "
                f"pixels, got {self.block}"
            )

    def to_latents(self, x: Tensor) -> Tensor:
        """(B, C, H·b, W·b) → (B, C·b², H, W). Raises InvalidArgument for other sizes."""
        if x.shape[-2] % self.block or x.shape[-1] % self.block:
            raise InvalidArgument(
                f"image height and width must be multiples of {self.block}, got {tuple(x.shape)}"
            )
        return F.pixel_unshuffle(x, self.block)

    def from_latents(self, z: Tensor) -> Tensor:
        """(B, C·b², H, W) → (B, C, H·b, W·b)."""
        return F.pixel_shuffle(z, self.block)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`; there are no weights."""
        write_json(
            Path(folder) / "config.json", {"_class_name": "SpaceToDepth", "block": self.block}
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SpaceToDepth":
        """Read what `save_pretrained` wrote. Raises CheckpointError."""
        config = read_json(Path(folder) / "config.json")
        if config.keys() != {"_class_name", "block"} or config["_class_name"] != "SpaceToDepth":
            raise CheckpointError(f"{folder}: not the config of a SpaceToDepth: {config}")
        try:
            return cls(config["block"])
        except InvalidArgument as error:
            raise CheckpointError(f"{Path(folder) / 'config.json'}: {error}") from error
