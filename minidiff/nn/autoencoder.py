"""The VAE of latent diffusion, between images and small latents with few channels.

    image ─ conv_in ─ down₀ ─ down₁ ─ … ─ mid ─ norm, act, conv_out ─ quant_conv ─ (μ, ln σ²)
                                                                                      │ sample
    image ─ conv_out, act, norm ─ … ─ up₁ ─ up₀ ─ mid ─ conv_in ─ post_quant_conv ─── z

A level is a few residual blocks without time; all but the last halve or double each side.
Diffusion works on z normalised to zero mean and unit variance, (z − mean)·scaling_factor / std.
`to_latents` and `from_latents` include this normalisation, `encode` and `decode` do not. Submodule
names are those of diffusers' checkpoints, so that weights load without renaming.

Sources: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models",
https://arxiv.org/abs/2112.10752, section 3.1 and appendix G; Kingma & Welling 2014,
"Auto-Encoding Variational Bayes", https://arxiv.org/abs/1312.6114. The arguments and what they
mean are those of diffusers' `AutoencoderKL`.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from minidiff.errors import InvalidArgument
from minidiff.nn.blocks.attention import Attention, rename_old_attention
from minidiff.nn.blocks.embeddings import check_floating
from minidiff.nn.blocks.gaussian import DiagonalGaussian
from minidiff.nn.blocks.layers import Downsample, GroupNorm, PlainResnetBlock, Upsample
from minidiff.nn.blocks.tiling import ImageMap, sliced, tiled
from minidiff.nn.configs.autoencoder import DOWN_BLOCKS, UP_BLOCKS, AutoencoderConfig
from minidiff.nn.model import Model, parse_options
from minidiff.runtime.files import Config
from minidiff.runtime.shapes import append_dims, readable
from minidiff.runtime.tensors import Stored

MAX_PIXEL = 16  # values of pixels beyond it are bytes, not in [−1, 1] and not noise
EPS = 1e-6  # epsilon of every norm; not an option in diffusers


class AutoencoderKL(Model):
    """A variational autoencoder of images, equal to diffusers' `AutoencoderKL`.

    Args:
        config: fields of AutoencoderConfig, with diffusers' defaults.
    Raises:
        InvalidArgument: an unknown name, a value that is not allowed, or two that contradict
            each other.

    `vae.config` holds all arguments. An image side not divisible by `divisor` is rounded
    down as in diffusers, with a warning.

    Large batches and images: `enable_slicing()` processes one image at a time. `enable_tiling()`
    processes images larger than `tile_sample_min_size` (latents larger than `tile_latent_min_size`)
    in tiles of that size that overlap by `tile_overlap_factor`; see `nn.blocks.tiling`. As in
    diffusers these are attributes, not part of the configuration.

    Number types: norms and softmax work in float32 for all weights. bfloat16 holds any activation;
    float16 ends at 65504, which the published SDXL weights exceed. `force_upcast` marks such a
    checkpoint, and `working_dtype` gives the dtype to convert the network to.
    """

    class_name = "AutoencoderKL"
    class_names = (class_name,)

    def __init__(self, **config: object):
        super().__init__()
        c = parse_options(AutoencoderConfig, config, self.class_name)
        self.config, self.divisor = Config(asdict(c)), c.divisor
        self.latents_mean, self.latents_std = c.mean, c.std

        latents, moments = c.latent_channels, 2 * c.latent_channels
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if c.use_quant_conv else nn.Identity()
        self.post_quant_conv = (
            nn.Conv2d(latents, latents, 1) if c.use_post_quant_conv else nn.Identity()
        )

        one_side = not isinstance(c.sample_size, list | tuple)
        self.use_slicing = self.use_tiling = False
        self.tile_sample_min_size = c.sample_size if one_side else c.sample_size[0]
        self.tile_latent_min_size = self.tile_sample_min_size // self.divisor
        self.tile_overlap_factor = 0.25

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Encode images and decode them again, (B, in_channels, H, W) -> (B, out_channels, H, W).

        Args:
            sample: images, in [−1, 1] for the published weights.
            sample_posterior: decode a sample of the encoder's distribution, not its mode.
            generator: source of that sample's noise; by default torch's global random state.
        """
        posterior = self.encode(sample)
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode())

    # ------------------------------------------------------------------ images and latents

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Map images (B, in_channels, H, W) to a distribution over z.

        Returns:
            A distribution over (B, latent_channels, H // divisor, W // divisor).
        Raises:
            InvalidArgument: another shape or type, or a side below `divisor`.
        """
        self._check_images("x", x, self.config.in_channels, self.divisor)
        if any(side % self.divisor for side in x.shape[2:]):
            warnings.warn(
                f"x has sides {tuple(x.shape[2:])}, not divisible by {self.divisor}: its last rows "
                "or columns are lost",
                stacklevel=2,
            )
        if readable(x) and x.abs().max() > MAX_PIXEL:
            warnings.warn(f"x reaches {x.abs().max():g}, pixels must be in [−1, 1]", stacklevel=2)
        sides = self.tile_sample_min_size, self.tile_latent_min_size
        return DiagonalGaussian(self._in_parts(self._moments, *sides)(x))

    def decode(self, z: Tensor) -> Tensor:
        """Map z (B, latent_channels, h, w) to images (B, out_channels, h·divisor, w·divisor).

        Raises:
            InvalidArgument: another shape or type.
        """
        self._check_images("z", z, self.config.latent_channels, 1)
        sides = self.tile_latent_min_size, self.tile_sample_min_size
        return self._in_parts(self._pixels, *sides)(z)

    def to_latents(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Sample the latents of a diffusion network from images: `scaled(encode(x).sample())`."""
        return self.scaled(self.encode(x).sample(generator))

    def from_latents(self, latents: Tensor) -> Tensor:
        """Decode the latents of a diffusion network to images: `decode(unscaled(latents))`."""
        return self.decode(self.unscaled(latents))

    def scaled(self, z: Tensor) -> Tensor:
        """Return (z − mean)·scaling_factor / std, the latents of the diffusion network.

        The mean is shift_factor or latents_mean, or else 0; std is latents_std, or else 1.
        """
        mean, std = _per_channel(self.latents_mean, z), _per_channel(self.latents_std, z)
        return (z - mean) * self.config.scaling_factor / std

    def unscaled(self, latents: Tensor) -> Tensor:
        """Return latents·std / scaling_factor + mean, the inverse of `scaled`."""
        mean, std = (_per_channel(v, latents) for v in (self.latents_mean, self.latents_std))
        return latents * std / self.config.scaling_factor + mean

    def working_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype for this network beside others in `dtype`.

        It is float32 instead of float16 if `force_upcast` is set, as diffusers does for SDXL, and
        otherwise `dtype`.
        """
        return torch.float32 if self.config.force_upcast and dtype == torch.float16 else dtype

    def image_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (C, H, W) of the image decoded from (latent_channels, h, w)."""
        return (self.config.out_channels, *(side * self.divisor for side in latent_shape[1:]))

    def check_channels(self, channels: int) -> None:
        """Refuse a network for latents of other channels. Raises InvalidArgument."""
        if channels != self.config.latent_channels:
            raise InvalidArgument(
                f"the network must have as many in_channels as the vae latent_channels "
                f"({self.config.latent_channels}), got {channels}"
            )

    def _check_images(self, name: str, x: Tensor, channels: int, smallest: int) -> None:
        """Refuse anything but a batch of images with `channels` and sides of `smallest` or more."""
        check_floating(name, x)
        if x.dim() != 4 or x.shape[1] != channels or not x.shape[0]:
            raise InvalidArgument(
                f"{name} must have shape (B, {channels}, height, width), got {tuple(x.shape)}"
            )
        if min(x.shape[2:]) < smallest:
            raise InvalidArgument(f"{name} must have sides >= {smallest}, got {tuple(x.shape[2:])}")
        self.check_inputs(**{name: x})

    def _moments(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def _pixels(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    # ------------------------------------------------------------------- slices and tiles

    def enable_slicing(self) -> None:
        """Encode and decode one image at a time."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode whole batches."""
        self.use_slicing = False

    def enable_tiling(self) -> None:
        """Encode and decode large images in tiles."""
        self.use_tiling = True

    def disable_tiling(self) -> None:
        """Encode and decode whole images."""
        self.use_tiling = False

    def _in_parts(self, f: ImageMap, size: int, out_size: int) -> ImageMap:
        """Return f in slices and tiles, if enabled; `size` and `out_size` are sides of tiles."""
        if self.use_tiling:
            if self.tile_sample_min_size != self.divisor * self.tile_latent_min_size:
                raise InvalidArgument(
                    f"tile_sample_min_size must be {self.divisor} times tile_latent_min_size "
                    f"({self.tile_latent_min_size}), got {self.tile_sample_min_size}"
                )
            f = tiled(f, size, out_size, self.tile_overlap_factor)
        return sliced(f) if self.use_slicing else f

    # ------------------------------------------------------------------------- checkpoints

    @classmethod
    def translate_names(cls, stored: Mapping[str, Stored]) -> dict[str, Stored]:
        return rename_old_attention(stored)

    @classmethod
    def min_tensors(cls, config: Mapping) -> int:
        options = {name: value for name, value in config.items() if not name.startswith("_")}
        c = parse_options(AutoencoderConfig, options, cls.class_name)
        return 8 * len(c.block_out_channels) * (2 * c.layers_per_block + 1)


# ------------------------------------------------------------------------------- the two halves


class Encoder(nn.Module):
    """Images (B, in_channels, H, W) to moments (B, 2·latent_channels, H/divisor, W/divisor)."""

    def __init__(self, c: AutoencoderConfig):
        super().__init__()
        channels = c.block_out_channels
        self.conv_in = nn.Conv2d(c.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(DownBlock(c, level) for level in range(len(channels)))
        self.mid_block = MidBlock(c)
        self.conv_norm_out = GroupNorm(c.norm_num_groups, channels[-1], EPS, nn.SiLU())
        self.conv_out = nn.Conv2d(channels[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder(nn.Module):
    """Latents (B, latent_channels, h, w) to images (B, out_channels, h·divisor, w·divisor)."""

    def __init__(self, c: AutoencoderConfig):
        super().__init__()
        channels = c.block_out_channels
        self.conv_in = nn.Conv2d(c.latent_channels, channels[-1], 3, padding=1)
        self.mid_block = MidBlock(c)
        levels = reversed(range(len(channels)))
        self.up_blocks = nn.ModuleList(UpBlock(c, level) for level in levels)
        self.conv_norm_out = GroupNorm(c.norm_num_groups, channels[0], EPS, nn.SiLU())
        self.conv_out = nn.Conv2d(channels[0], c.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            z = block(z)
        return self.conv_out(self.conv_norm_out(z))


class Level(nn.Module):
    """Residual blocks at one size, each followed by attention if the block type has it."""

    def __init__(
        self, c: AutoencoderConfig, in_channels: int, width: int, layers: int, attends: bool
    ):
        super().__init__()
        inputs = [in_channels] + (layers - 1) * [width]
        self.resnets = nn.ModuleList(_resnet(c, channels, width) for channels in inputs)
        self.attentions = nn.ModuleList(_attention(c, width, attends) for _ in inputs)

    def forward(self, x: Tensor) -> Tensor:
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x, None))
        return x


class DownBlock(Level):
    """One level of the encoder, then downsampling."""

    def __init__(self, c: AutoencoderConfig, level: int):
        channels, attends = c.block_out_channels, DOWN_BLOCKS[c.down_block_types[level]]
        super().__init__(
            c, channels[max(level - 1, 0)], channels[level], c.layers_per_block, attends
        )
        self.downsamplers = nn.ModuleList()
        if level < len(channels) - 1:
            self.downsamplers.append(Downsample(2, channels[level], padding=0))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for downsample in self.downsamplers:
            x = downsample(x, None)
        return x


class UpBlock(Level):
    """One level of the decoder, with one layer more than the encoder's, then upsampling."""

    def __init__(self, c: AutoencoderConfig, level: int):
        channels, attends = c.block_out_channels, UP_BLOCKS[c.up_block_types[-1 - level]]
        in_channels = channels[min(level + 1, len(channels) - 1)]
        super().__init__(c, in_channels, channels[level], c.layers_per_block + 1, attends)
        self.upsamplers = nn.ModuleList()
        if level > 0:
            self.upsamplers.append(Upsample(2, channels[level]))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for upsample in self.upsamplers:
            x = upsample(x, None, [2 * side for side in x.shape[2:]])
        return x


class MidBlock(nn.Module):
    """The middle, at the smallest size: residual block, attention, residual block."""

    def __init__(self, c: AutoencoderConfig):
        super().__init__()
        width = c.block_out_channels[-1]
        self.resnets = nn.ModuleList(_resnet(c, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([_attention(c, width, c.mid_block_add_attention)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, None))
        return self.resnets[1](x, None)


def _resnet(c: AutoencoderConfig, entering: int, width: int) -> PlainResnetBlock:
    return PlainResnetBlock(
        2, entering, width, None, groups=c.norm_num_groups, eps=EPS, act=c.act_fn
    )


def _attention(c: AutoencoderConfig, width: int, attends: bool) -> nn.Module:
    return Attention(width, width, c.norm_num_groups, EPS) if attends else nn.Identity()


# -------------------------------------------------------------------------------------- helpers


def _per_channel(value: float | Sequence[float], z: Tensor) -> float | Tensor:
    """Return one number unchanged, and one per channel as a tensor (1, C, 1, 1) like z."""
    if isinstance(value, Sequence):
        return append_dims(torch.tensor([value], dtype=z.dtype, device=z.device), z.ndim)
    return value
