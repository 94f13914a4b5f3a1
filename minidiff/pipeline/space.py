"""Where a network works: on pixels, on blocks of pixels, or on the latents of an autoencoder."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.errors import InvalidArgument, whole_number
from minidiff.nn import AutoencoderKL, SpaceToDepth
from minidiff.nn.blocks.gaussian import DiagonalGaussian
from minidiff.noise import Generators, randn
from minidiff.runtime.files import Config

MAX_SIDE = 1 << 14


class Space(NamedTuple):
    """Shapes of what a network denoises, and the way there and back.

    Attributes:
        config: of the network.
        vae: what maps pictures there; None for pixels.
    """

    config: Config
    vae: SpaceToDepth | AutoencoderKL | None

    @property
    def is_told_mask(self) -> bool:
        """Whether the network was trained for inpainting: it is shown the mask and what is left."""
        return self.config.in_channels == 2 * self.config.out_channels + 1

    @property
    def channels(self) -> int:
        """Channels of what is denoised."""
        return self.config.out_channels if self.is_told_mask else self.config.in_channels

    @property
    def image_channels(self) -> int:
        """Channels of the pictures."""
        return self.channels if self.vae is None else self.vae.image_shape((self.channels, 1, 1))[0]

    def shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of pictures of this size, or of that which the network was trained for.

        Raises InvalidArgument: height or width is out of range or no multiple of what it must be.
        """
        usual = self.config.sample_size
        divisor = 1 if self.vae is None else self.vae.divisor
        if usual is None and None in (height, width):
            raise InvalidArgument(
                "height and width must be given: the network's config names no sample_size"
            )
        sides = list(usual) if isinstance(usual, list | tuple) else [usual, usual]
        for i, (name, pixels) in enumerate((("height", height), ("width", width))):
            if pixels is not None:
                if whole_number(name, pixels, 1, MAX_SIDE) % divisor:
                    raise InvalidArgument(f"{name} must be a multiple of {divisor}, got {pixels}")
                sides[i] = pixels // divisor
        return (self.channels, *sides)

    def image_size(self, shape: Sequence[int]) -> tuple[int, int]:
        """(height, width) in pixels of what (C, h, w) decodes to."""
        return tuple((shape if self.vae is None else self.vae.image_shape(shape))[-2:])

    def encode(self, pixels: Tensor, generator: Generators = None) -> Tensor:
        """From pictures (B, C, H, W) in [−1, 1] to (B, C, h, w).

        Args:
            generator: of a sample from what an autoencoder says, see `minidiff.noise.randn`.
        """
        if not isinstance(self.vae, AutoencoderKL):
            return self.mode(pixels)
        posterior = self._posterior(pixels)
        mean = posterior.mean
        noise = randn(mean.shape, generator, mean.device, mean.dtype)
        return self.vae.scaled(posterior.at(noise)).to(pixels.dtype)

    def mode(self, pixels: Tensor) -> Tensor:
        """The same without chance: what an autoencoder holds most likely."""
        if self.vae is None:
            return pixels
        if isinstance(self.vae, SpaceToDepth):
            return self.vae.to_latents(pixels)
        return self.vae.scaled(self._posterior(pixels).mode()).to(pixels.dtype)

    def _posterior(self, pixels: Tensor) -> DiagonalGaussian:
        return self.vae.encode(pixels.to(next(self.vae.parameters()).dtype))

    def decode(self, z: Tensor) -> Tensor:
        """From (B, C, h, w) to pictures (B, C, H, W), nominally in [−1, 1]."""
        if self.vae is None:
            return z
        weights = next(self.vae.parameters(), z)  # a permutation has none
        return self.vae.from_latents(z.to(weights.dtype)).to(z.dtype)

    def shrink(self, mask: Tensor) -> Tensor:
        """A mask (B, 1, H, W): exact where the space is pixels, (B, 1 or C, h, w); in latents that
        of the nearest pixel, (B, 1, h, w), as in diffusers.
        """
        if isinstance(self.vae, SpaceToDepth):
            return self.vae.to_latents(mask.expand(-1, self.image_channels, -1, -1))
        divisor = 1 if self.vae is None else self.vae.divisor
        return F.interpolate(mask, size=[side // divisor for side in mask.shape[-2:]])

    def with_hole(self, pixels: Tensor, mask: Tensor, generator: Generators) -> Tensor:
        """What a network that is told of masks is shown: the mask, and the picture without what
        is under it, (B, 1 + C, h, w).
        """
        hole = (mask >= 0.5).to(pixels.dtype)
        left = self.encode(pixels * (1 - hole), generator)
        return torch.cat([self.shrink(hole)[:, :1], left], dim=1)
