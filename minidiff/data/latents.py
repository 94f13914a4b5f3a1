"""Images as the latents of an autoencoder: encoded once, drawn anew whenever they are asked for.

What an encoder says of an image is a normal distribution over z, a mean and a variance for each
element. These moments are cached; every pass over the data draws other latents from them, which
costs one multiply-add and shows the diffusion model all that the decoder was trained on:

    latents = scaled(μ + σ·n),   n ~ N(0, 1)

Sources: Rombach et al. 2022, https://arxiv.org/abs/2112.10752, section 3.1 and appendix G (unit
variance); the code of Karras et al. 2024, https://arxiv.org/abs/2312.02696, which stores mean and
deviation, and draws a sample a step.
"""

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from minidiff.data import ImageData
from minidiff.data.protocol import Data, Purpose, random_words
from minidiff.data.stream import MEASURED_IMAGES, evenly_spaced
from minidiff.errors import InvalidArgument, TrainingError, whole_number
from minidiff.nn import AutoencoderKL
from minidiff.nn.blocks.gaussian import DiagonalGaussian
from minidiff.noise import MAX_SEED

BATCH = 256  # images that are encoded at once
_WORDS = 4  # that a random number generator's counter stands for


class LatentData(Data):
    """Images as latents of an autoencoder, as `minidiff.data.protocol` has it.

    They are encoded when they are first moved or asked for, on the device where they then are: so
    a training is refused before that work, if at all, and its clock starts after it.

    Args:
        vae: maps images to latents, and latents back to images.
        images: what is encoded.
        seed: of what is drawn: the latents of an item depend on it and on the position alone.
    Raises:
        InvalidArgument: the autoencoder is for images of other channels, their sides cannot be
            halved so often, there are none, or they are not stored.
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
        """Of the latents of one image: (C, h, w)."""
        _, *sides = self.images.shape
        return (self.vae.config.latent_channels, *(side // self.vae.divisor for side in sides))

    @property
    def decoder(self) -> AutoencoderKL:
        """Autoencoder whose latents these are."""
        return self.vae

    @cached_property
    def moments(self) -> Tensor:
        """Means and logarithms of variances of all z, float32 (N, 2·C, h, w)."""
        return moments_of(self.vae, self.images)

    def to(self, device: torch.device | str) -> "LatentData":
        """The same data on `device`, encoded; the autoencoder moves there."""
        moved = LatentData(self.vae.to(device), self.images.to(device), self.seed)
        encoded = self if "moments" in vars(self) else moved  # nothing is encoded twice
        moved.moments = encoded.moments.to(device)
        return moved

    def batch(self, index: Tensor, position: int = 0) -> tuple[Tensor, Tensor | None]:
        """Latents of the images at `index`, of about zero mean and unit variance.

        Args:
            index: int64 (B,), on any device.
            position: of the first of them in the stream, see `minidiff.data.protocol.Data`.
        Returns:
            float32 (B, C, h, w) and the labels int64 (B,) or None, both on the device of the data.
        """
        index = index.to(self.moments.device, non_blocking=True)
        posterior = DiagonalGaussian(self.moments[index])
        noise = normals(self.seed, position, posterior.mean.shape, index.device)
        labels = None if self.images.labels is None else self.images.labels[index]
        return self.vae.scaled(posterior.at(noise)), labels


def normals(seed: int, position: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal numbers (B, …), those of item i by (seed, position + i) alone.

    Two numbers u, v in (0, 1) become two normal ones, √(−2 ln u)·(cos 2πv, sin 2πv) (Box & Muller
    1958). They have 23 bits, which float32 holds to the bit with a half added, and no normal number
    is above 5.8 then. Words are drawn on the host, all else is done on the device.
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
    """Refuse what is no stored images, or none of them. Raises InvalidArgument."""
    if not isinstance(data, ImageData):
        raise InvalidArgument(f"data must be stored images to be encoded, {data.name} are not")
    if not len(data):
        raise InvalidArgument(f"data {data.name} must hold at least one image, got none")


def check_fit(vae: AutoencoderKL, data: ImageData) -> None:
    """Refuse images that an autoencoder cannot take and give back whole. Raises InvalidArgument."""
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
def moments_of(vae: AutoencoderKL, data: ImageData, most: int | None = None) -> Tensor:
    """What an encoder says of all images, or of at most so many: float32 (N, 2·C, h, w)."""
    chosen = evenly_spaced(len(data), len(data) if most is None else most)
    said = (vae.encode(data.batch(index)[0]) for index in chosen.split(BATCH))
    return torch.cat([torch.cat([one.mean, one.logvar], dim=1) for one in said])


def with_unit_latents(vae: AutoencoderKL, data: ImageData) -> AutoencoderKL:
    """The same autoencoder, with shift and scale by which its latents have zero mean and unit
    variance: those of samples for up to 10,000 images.

    Raises:
        TrainingError: the spread is zero or not finite.
    """
    posterior = DiagonalGaussian(moments_of(vae, data, MEASURED_IMAGES).cpu().double())
    # Of a mixture: the mean of the variances, and the variance of the means.
    mean = float(posterior.mean.mean())
    std = math.sqrt(float(posterior.var.mean() + (posterior.mean - mean).square().mean()))
    if not (std > 0 and math.isfinite(std)):
        raise TrainingError(f"the latents of {data.name} have a standard deviation of {std}")
    config = {**vae.config, "shift_factor": mean, "scaling_factor": 1 / std}
    with torch.device("meta"):
        result = AutoencoderKL(**config)
    result.load_state_dict(vae.state_dict(), assign=True)
    return result.eval().requires_grad_(False)
