"""The space of a network: pixels, blocks of pixels, the latents of an autoencoder, or points.

`space_of` chooses, so that the pipeline knows no kinds of samples. Points are drawn as they are,
with nothing to encode or decode.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.errors import InvalidArgument, one_of, whole_number
from minidiff.images.pixels import Original, as_original, as_output, check_output
from minidiff.nn import MLP, AutoencoderKL, SpaceToDepth, UNet
from minidiff.nn.blocks.gaussian import DiagonalGaussian
from minidiff.noise import Generators, randn
from minidiff.runtime.files import Config

MAX_SIDE = 1 << 14
Vae = SpaceToDepth | AutoencoderKL


class LatentSpace(NamedTuple):
    """Shapes of a network's samples, and the maps between images and samples.

    Attributes:
        config: options of the network.
        vae: encoder and decoder; None for pixels.
    """

    config: Config
    vae: Vae | None
    sheet = None  # samples in a picture; None for as many as its rows and columns hold

    @property
    def takes_mask(self) -> bool:
        """Whether the network was trained for inpainting, with mask and kept pixels as input."""
        return self.config.in_channels == 2 * self.config.out_channels + 1

    @property
    def channels(self) -> int:
        """Channels of the samples: some inputs have more beside them, some outputs a variance."""
        return min(self.config.in_channels, self.config.out_channels)

    @property
    def image_channels(self) -> int:
        """Channels of the images."""
        return self.channels if self.vae is None else self.vae.image_shape((self.channels, 1, 1))[0]

    def shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Return (C, h, w) of the samples for an image size.

        Args:
            height, width: image size in pixels; None for the size that the network was trained on.
        Raises:
            InvalidArgument: height or width is out of range or not a multiple of the divisor.
        """
        usual = self.config.sample_size
        divisor = 1 if self.vae is None else self.vae.divisor
        multiple = divisor * self.config.get("patch_size", 1)  # of a transformer
        if usual is None and None in (height, width):
            raise InvalidArgument(
                "height and width must be given: the network's config names no sample_size"
            )
        sides = list(usual) if isinstance(usual, list | tuple) else [usual, usual]
        for i, (name, pixels) in enumerate((("height", height), ("width", width))):
            if pixels is not None:
                if whole_number(name, pixels, 1, self._largest_side(multiple)) % multiple:
                    raise InvalidArgument(f"{name} must be a multiple of {multiple}, got {pixels}")
                sides[i] = pixels // divisor
        return (self.channels, *sides)

    def _largest_side(self, multiple: int) -> int:
        """Return the largest side of an image in pixels."""
        return multiple * self.config.get("pos_embed_max_size", MAX_SIDE // multiple)

    def image_size(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return (height, width) in pixels of the image that (C, h, w) decodes to."""
        return tuple((shape if self.vae is None else self.vae.image_shape(shape))[-2:])

    def original(self, image: Any, mask: Any) -> Original | None:
        """Return the given images, see `as_original`. Raises InvalidArgument."""
        return as_original(image, mask, self.image_channels, needs_mask=self.takes_mask)

    def check_output(self, output_type: str) -> None:
        """Refuse an output type that these images do not have. Raises InvalidArgument."""
        check_output(output_type, self.image_channels)

    def output(self, images: Tensor, output_type: str) -> Any:
        """Return images (N, C, H, W) of an output type, see `as_output`."""
        return as_output(images, output_type)

    def encode(self, pixels: Tensor, generator: Generators = None) -> Tensor:
        """Map images (B, C, H, W) in [−1, 1] to samples (B, C, h, w).

        Args:
            pixels: images.
            generator: source of the noise of an autoencoder's posterior, see
                `minidiff.noise.randn`.
        """
        if not isinstance(self.vae, AutoencoderKL):
            return self.mode(pixels)
        posterior = self._posterior(pixels)
        mean = posterior.mean
        noise = randn(mean.shape, generator, mean.device, mean.dtype)
        return self.vae.scaled(posterior.at(noise)).to(pixels.dtype)

    def mode(self, pixels: Tensor) -> Tensor:
        """Map images to samples without noise: the mode of an autoencoder's posterior."""
        if self.vae is None:
            return pixels
        if isinstance(self.vae, SpaceToDepth):
            return self.vae.to_latents(pixels)
        return self.vae.scaled(self._posterior(pixels).mode()).to(pixels.dtype)

    def _posterior(self, pixels: Tensor) -> DiagonalGaussian:
        return self.vae.encode(pixels.to(next(self.vae.parameters()).dtype))

    def decode(self, z: Tensor) -> Tensor:
        """Map samples (B, C, h, w) to images (B, C, H, W), nominally in [−1, 1]."""
        if self.vae is None:
            return z
        weights = next(self.vae.parameters(), z)  # a permutation has none
        return self.vae.from_latents(z.to(weights.dtype)).to(z.dtype)

    def shrink(self, mask: Tensor) -> Tensor:
        """Map a mask (B, 1, H, W) to the network's space, (B, 1 or C, h, w).

        The result is exact for pixels. For latents it is the mask of the nearest pixel, as in
        diffusers.
        """
        if isinstance(self.vae, SpaceToDepth):
            return self.vae.to_latents(mask.expand(-1, self.image_channels, -1, -1))
        divisor = 1 if self.vae is None else self.vae.divisor
        return F.interpolate(mask, size=[side // divisor for side in mask.shape[-2:]])

    def masked_conditioning(self, pixels: Tensor, mask: Tensor, generator: Generators) -> Tensor:
        """Return the extra input of an inpainting network: mask and kept part, (B, 1 + C, h, w)."""
        hole = (mask >= 0.5).to(pixels.dtype)
        kept = self.encode(pixels * (1 - hole), generator)
        return torch.cat([self.shrink(hole)[:, :1], kept], dim=1)


class PointSpace(NamedTuple):
    """Samples that are points of D dimensions; the methods are those of `LatentSpace`.

    Attributes:
        config: options of the network.
    """

    config: Config
    takes_mask = False
    sheet = 2000  # samples in a picture: enough to show a density

    @property
    def channels(self) -> int:
        """Dimension D of the points."""
        return self.config.in_channels

    image_channels = channels

    def shape(self, height: int | None = None, width: int | None = None) -> tuple[int]:
        """Return (D,). Raises InvalidArgument where a height or width is given."""
        _refuse(height=height, width=width)
        return (self.channels,)

    def image_size(self, shape: Sequence[int]) -> tuple[()]:
        """Return (): points have no height and width."""
        return ()

    def original(self, image: Any, mask: Any) -> None:
        """Refuse images, which cannot become points. Raises InvalidArgument."""
        _refuse(image=image, mask_image=mask)

    def check_output(self, output_type: str) -> None:
        """Refuse an output type that points do not have. Raises InvalidArgument."""
        one_of("output_type of points", output_type, ("np", "pt", "latent"))

    def output(self, points: Tensor, output_type: str) -> Any:
        """Return points (N, D) as float32 array ("np") or as they are ("pt")."""
        return points.float().cpu().numpy() if output_type == "np" else points

    def encode(self, points: Tensor, generator: Any = None) -> Tensor:
        """Return the points."""
        return points

    mode = decode = encode


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise InvalidArgument(f"{name} must be None: this model draws points, got {value!r}")


def require_images(pipe: Any, what: str) -> None:
    """Refuse a pipeline of points for something that works on images only.

    Args:
        pipe: the pipeline.
        what: subject and verb of the message, such as "export is".
    Raises:
        InvalidArgument: its samples are points.
    """
    if isinstance(pipe.space, PointSpace):
        raise InvalidArgument(f"{what} for images, but this model draws points")


def space_of(network: UNet | MLP, vae: Vae | None) -> LatentSpace | PointSpace:
    """Return the space of a network. Raises InvalidArgument for points with a vae."""
    if not isinstance(network, MLP):
        return LatentSpace(network.config, vae)
    if vae is not None:
        raise InvalidArgument(f"vae must be None for points, got {type(vae).__name__}")
    return PointSpace(network.config)
