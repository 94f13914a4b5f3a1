"""Images as latents of an autoencoder: encoded once, sampled again for every batch.

An encoder outputs a normal distribution over z for each image, a mean and a variance per element.
These moments are cached. Every pass over the data samples other latents from them, which costs one
multiply-add and covers the distribution that the decoder was trained on:

    latents = scaled(μ + σ·n),   n ~ N(0, 1)

Sources: Rombach et al. 2022, https://arxiv.org/abs/2112.10752, section 3.1 and appendix G (unit
variance); the code of Karras et al. 2024, https://arxiv.org/abs/2312.02696, which stores mean and
deviation, and draws a sample at each step.
"""

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from minidiff.data import ImageData
from minidiff.data.protocol import Data, Purpose, check_data, digest, random_words
from minidiff.data.stream import MEASURED_IMAGES, evenly_spaced
from minidiff.errors import InvalidArgument, TrainingError, whole_number
from minidiff.nn import AutoencoderKL
from minidiff.nn.blocks.gaussian import DiagonalGaussian
from minidiff.noise import MAX_SEED
from minidiff.runtime.checks import instance

BATCH = 256  # images encoded at once
_WORDS = 4  # random words per counter of the generator


class LatentData(Data):
    """Images as latents of an autoencoder.

    They are encoded when they are first moved or used, on their device. So a training with bad
    arguments is refused before that work, and the clock of a training starts after it.

    Args:
        vae: autoencoder of the images.
        images: images to encode.
        seed: seed of the samples: the latents of an item depend on it and on the position alone.
    Raises:
        InvalidArgument: images with channels or sides that the autoencoder does not take, no
            images, or images that are not stored.
    """

    is_stored = True

    def __init__(self, vae: AutoencoderKL, images: ImageData, seed: int = 0) -> None:
        check_fit(vae, images)
        self.vae, self.images = vae.eval().requires_grad_(False), images
        self.seed = whole_number("seed", seed, 0, MAX_SEED)
        self.name, self.class_names = images.name, images.class_names

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the latents of one image: (C, h, w)."""
        _, *sides = self.images.shape
        return (self.vae.config.latent_channels, *(side // self.vae.divisor for side in sides))

    @property
    def decoder(self) -> AutoencoderKL:
        """Autoencoder whose latents these are."""
        return self.vae

    @cached_property
    def moments(self) -> Tensor:
        """Means and logarithms of variances of all z, float32 (N, 2·C, h, w)."""
        return encode_moments(self.vae, self.images)

    def to(self, device: torch.device | str) -> "LatentData":
        """Return the data on `device`, encoded; the autoencoder moves there."""
        moved = LatentData(self.vae.to(device), self.images.to(device), self.seed)
        encoded = self if "moments" in vars(self) else moved  # nothing is encoded twice
        moved.moments = encoded.moments.to(device)
        return moved

    def digests(self) -> dict[str, str]:
        """Return the digests of the images, and of the autoencoder's weights and scale."""
        weights, config = self.vae.state_dict(), self.vae.config
        known = self.images.digests() | {"seed": str(self.seed)}
        known["autoencoder's weights"] = digest(*(weights[name] for name in sorted(weights)))
        known["autoencoder's scale"] = repr((config.shift_factor, config.scaling_factor))
        return known

    def batch(self, index: Tensor, position: int = 0) -> tuple[Tensor, Tensor | None]:
        """Return latents of the images at `index`, of about zero mean and unit variance.

        Args:
            index: image numbers, int64 (B,), on any device.
            position: position of the first of them in the stream, see `minidiff.data.protocol`.
        Returns:
            float32 (B, C, h, w) and the labels int64 (B,) or None, both on the device of the data.
        """
        index = index.to(self.moments.device, non_blocking=True)
        posterior = DiagonalGaussian(self.moments[index])
        noise = normals(self.seed, position, posterior.mean.shape, index.device)
        labels = None if self.images.labels is None else self.images.labels[index]
        return self.vae.scaled(posterior.at(noise)), labels


def normals(seed: int, position: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Return standard normal numbers (B, …), for item i a function of (seed, position + i) alone.

    Two numbers u, v in (0, 1) become two normal ones, √(−2 ln u)·(cos 2πv, sin 2πv) (Box & Muller
    1958). They have 23 bits plus a half, exact in float32, so no normal number exceeds 5.8. Words
    are drawn on the host; all else is computed on the device.
    """
    count, size = shape[0], math.prod(shape[1:])
    counters = -(-size // (2 * _WORDS))  # a word gives two numbers
    words = random_words(seed, Purpose.LATENTS, position * counters, count * counters)
    bits = torch.from_numpy(words.reshape(count, -1).view(np.int32)).to(device, non_blocking=True)
    u, v = ((bits.bitwise_and(2**23 - 1).float() + 0.5) / 2**23).chunk(2, dim=1)
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return both[:, :size].reshape(shape)


def check_stored(data: Data) -> None:
    """Refuse anything but stored images, at least one. Raises InvalidArgument."""
    check_data(data)
    if not isinstance(data, ImageData):
        raise InvalidArgument(f"data must be stored images to be encoded, {data.name} are not")
    if not len(data):
        raise InvalidArgument(f"data {data.name} must hold at least one image, got none")


def check_fit(vae: AutoencoderKL, data: ImageData) -> None:
    """Refuse images that an autoencoder does not reproduce in shape. Raises InvalidArgument."""
    instance(AutoencoderKL)("vae", vae)
    check_stored(data)
    channels, *sides = data.shape
    if channels != vae.config.in_channels or channels != vae.config.out_channels:
        raise InvalidArgument(
            f"vae must be of images with {channels} channels like {data.name}, got "
            f"{vae.config.in_channels} in and {vae.config.out_channels} out"
        )
    if any(side % vae.divisor for side in sides):
        raise InvalidArgument(
            f"vae must divide images of {sides[0]}×{sides[1]} like {data.name} evenly, its latents "
            f"are smaller by {vae.divisor}"
        )


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, data: ImageData, max_images: int | None = None) -> Tensor:
    """Return the encoder's moments of all images or of `max_images`: float32 (N, 2·C, h, w)."""
    chosen = evenly_spaced(len(data), len(data) if max_images is None else max_images)
    posteriors = (vae.encode(data.batch(index)[0]) for index in chosen.split(BATCH))
    return torch.cat([torch.cat([p.mean, p.logvar], dim=1) for p in posteriors])


def with_unit_latents(vae: AutoencoderKL, data: ImageData) -> AutoencoderKL:
    """Return the autoencoder with the shift and scale that normalise its latents.

    Sampled latents then have zero mean and unit variance, estimated from up to 10,000 images.

    Raises:
        TrainingError: the standard deviation is zero or not finite.
    """
    posterior = DiagonalGaussian(encode_moments(vae, data, MEASURED_IMAGES).cpu().double())
    # Variance of a mixture: the mean of the variances plus the variance of the means.
    mean = float(posterior.mean.mean())
    std = math.sqrt(float(posterior.var.mean() + (posterior.mean - mean).square().mean()))
    if not (std > 0 and math.isfinite(std)):
        raise TrainingError(f"the latents of {data.name} have a standard deviation of {std}")
    config = {**vae.config, "shift_factor": mean, "scaling_factor": 1 / std}
    with torch.device("meta"):
        result = AutoencoderKL(**config)
    result.load_state_dict(vae.state_dict(), assign=True)
    return result.eval().requires_grad_(False)
