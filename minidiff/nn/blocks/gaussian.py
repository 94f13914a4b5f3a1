"""The output of an encoder: a normal distribution over latents with diagonal covariance.

    q(z|x) = N(μ(x), diag σ²(x))
    KL(q ‖ p) = ½ Σ (μ − μₚ)²/σₚ² + σ²/σₚ² − 1 − ln(σ²/σₚ²)

Source: Kingma & Welling 2014, "Auto-Encoding Variational Bayes",
https://arxiv.org/abs/1312.6114, section 3 and appendix B.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument


class DiagonalGaussian:
    """One normal distribution per image, over latents (B, C, *space).

    Args:
        moments: means, then logarithms of variances, (B, 2·C, *space). The latter are clamped to
            [−30, 20] as in diffusers, which keeps σ in [3e-7, 22026].
    Raises:
        InvalidArgument: anything but a floating-point tensor with an even number of channels.

    Attributes:
        mean, logvar: (B, C, *space).
    """

    def __init__(self, moments: Tensor):
        is_tensor = isinstance(moments, Tensor) and moments.is_floating_point()
        if not is_tensor or moments.dim() < 2 or moments.shape[1] % 2:
            got = tuple(moments.shape) if isinstance(moments, Tensor) else moments
            raise InvalidArgument(
                f"moments must be a floating-point tensor (B, 2·C, *space), got {got!r}"
            )
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        """σ, (B, C, *space)."""
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """σ², (B, C, *space)."""
        return torch.exp(self.logvar)

    @property
    def latent_dist(self) -> "DiagonalGaussian":
        """The distribution itself, so that `vae.encode(x).latent_dist` works as in diffusers."""
        return self

    def mode(self) -> Tensor:
        """Return the most likely latents, which are the means."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents, (B, C, *space); the noise is drawn on the generator's device.

        For noise from elsewhere, such as one generator per image, use `at`.

        Raises:
            InvalidArgument: generator is not a torch.Generator.
        """
        if not isinstance(generator, torch.Generator | None):
            raise InvalidArgument(f"generator must be a torch.Generator or None, got {generator!r}")
        source = self.mean.device if generator is None else generator.device
        noise = torch.randn(
            self.mean.shape, generator=generator, device=source, dtype=self.mean.dtype
        )
        return self.at(noise.to(self.mean.device))

    def at(self, noise: Tensor) -> Tensor:
        """Return μ + σ·noise for standard normal noise (B, C, *space). Raises InvalidArgument."""
        if noise.shape != self.mean.shape:
            raise InvalidArgument(
                f"noise must have shape {tuple(self.mean.shape)}, got {tuple(noise.shape)}"
            )
        return self.mean + self.std * noise

    def kl(self, other: "DiagonalGaussian | None" = None) -> Tensor:
        """Return KL(self ‖ other) in nats, (B,); other is the standard normal by default."""
        mean, logvar = _wide(self.mean), _wide(self.logvar)
        if other is not None:
            mean = (mean - _wide(other.mean)) * torch.exp(-0.5 * _wide(other.logvar))
            logvar = logvar - _wide(other.logvar)
        # expm1: for nearly equal variances the difference eˣ − 1 would be all rounding error.
        return 0.5 * (mean.square() + torch.expm1(logvar) - logvar).flatten(1).sum(1)

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Return −ln q(sample) in nats, summed over `dims`: (B,) for images (B, C, H, W)."""
        logvar = _wide(self.logvar)
        squares = (_wide(sample) - _wide(self.mean)).square() * torch.exp(-logvar)
        return 0.5 * (math.log(2 * math.pi) + logvar + squares).sum(tuple(dims))


def _wide(x: Tensor) -> Tensor:
    """Return x in at least float32: sums over an image overflow in float16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
