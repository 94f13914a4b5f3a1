"""Exercises on autoencoders and latents (notebook 11)."""

from functools import cache

import torch

from minidiff.nn import AutoencoderKL
from minidiff.nn.blocks.gaussian import DiagonalGaussian
from minidiff.teach.exercise import Bug, Exercise, Wrong, noise


@cache
def _autoencoder(factor, shift):
    return AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=2,
        scaling_factor=factor, shift_factor=shift,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip


def sample(mean, logvar, z):
    return mean + torch.exp(0.5 * logvar) * z


def _posteriors():
    for seed in range(2):
        yield tuple(noise(3, 2, 2, 2, seed=3 * seed + i) for i in range(3))


SAMPLE = Exercise(
    "reparameterize",
    11,
    "Write sample(mean, logvar, z): a draw from the encoder's N(mean, exp(logvar)) with the "
    "standard normal noise z (Kingma & Welling 2014).",
    lambda mean, logvar, z: DiagonalGaussian(torch.cat([mean, logvar], 1)).at(z),
    _posteriors,
    sample,
    "logvar is the logarithm of the variance. What multiplies z?",
    (
        Wrong(
            lambda mean, logvar, z: mean + torch.exp(logvar) * z,
            "exp(logvar) is the variance: its root is exp(logvar/2).",
            "BVAE-tf#7, keras#3283",
        ),
        Wrong(
            lambda mean, logvar, z: mean + logvar * z,
            "logvar is a logarithm: take exp(logvar/2).",
        ),
        Wrong(
            lambda mean, logvar, z: mean + torch.exp(-0.5 * logvar) * z,
            "The sign of the exponent: this divides by σ.",
        ),
    ),
)


def kl(mean, logvar):
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)


KL = Exercise(
    "kl",
    11,
    "Write kl(mean, logvar): KL(N(mean, exp(logvar)) ‖ N(0, 1)) in nats, summed over an image, "
    "(B,).",
    lambda mean, logvar: DiagonalGaussian(torch.cat([mean, logvar], 1)).kl(),
    lambda: [case[:2] for case in _posteriors()],
    kl,
    "½·(μ² + σ² − 1 − ln σ²) for each number. It is 0 at μ = 0, σ = 1.",
    (
        Wrong(
            lambda mean, logvar: 0.5 * (mean**2 + logvar.exp() - 1 - 2 * logvar).flatten(1).sum(1),
            "ln σ² is logvar itself; 2·logvar would fit if it were ln σ.",
            "rstudio/keras3#359",
        ),
        Wrong(
            lambda mean, logvar: 0.5 * (mean**2 + logvar.exp() - logvar).flatten(1).sum(1),
            "The constant −1, once for each number, is missing: it is not 0 at μ = 0, σ = 1.",
            "ericjang/draw#2",
        ),
        Wrong(
            lambda mean, logvar: 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).mean(1),
            "A mean, not a sum: the weight of the KL term then depends on the number of latents.",
        ),
        Wrong(
            lambda mean, logvar: -0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1),
            "The sign: a KL divergence is never negative.",
        ),
        Wrong(
            lambda mean, logvar: (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1),
            "The factor ½ is missing.",
        ),
    ),
)


def scaled(z, factor, shift):
    return (z - shift) * factor


def _scaled(z, factor, shift):
    return _autoencoder(factor, shift).scaled(z)


def _latents():
    for seed, (factor, shift) in enumerate(((0.18215, 0.0), (0.3611, 0.1159), (0.5, -1.0))):
        yield (noise(4, 2, 3, 3, seed=seed) + shift) / factor, factor, shift


SCALE = Exercise(
    "scale-latents",
    11,
    "Write scaled(z, factor, shift): the encoder's latents as the diffusion network gets them, "
    "with mean 0 and standard deviation 1. shift is the mean of z and 1/factor its deviation.",
    _scaled,
    _latents,
    scaled,
    "Subtract the mean, then change the unit. What is the standard deviation of the result?",
    (
        Wrong(
            lambda z, factor, shift: (z - shift) / factor,
            "Divided: that is the way back. The factor is 1/std already.",
            "GenerativeModels#212",
        ),
        Wrong(
            lambda z, factor, shift: z * factor,
            "The shift is missing: the mean is not 0.",
            "NewbieLoraTrainer#3",
        ),
        Wrong(
            lambda z, factor, shift: z * factor - shift,
            "The mean belongs to z before the change of unit: subtract it first.",
        ),
        Wrong(
            lambda z, factor, shift: z,
            "Not scaled: the noise schedule was made for a standard deviation of 1.",
            "StableDiffusion-PyTorch#33",
        ),
    ),
)


# --- planted bugs --------------------------------------------------------------------------------


def encode(z, factor):
    return z


def decoded(latents, factor, decode):
    return decode(latents) / factor


def _decoded(latents, factor, decode):
    return decode(_autoencoder(factor, None).unscaled(latents))


def _curved(z):
    return torch.tanh(z)


def _to_scale():
    for seed, factor in enumerate((0.18215, 0.13025)):
        yield noise(4, 2, 3, 3, seed=seed) / factor, factor


BUGS = (
    Bug(
        Exercise(
            "B6",
            11,
            "encode(z, factor) of a project: the latents as its diffusion network gets them.",
            lambda z, factor: _scaled(z, factor, None),
            _to_scale,
            lambda z, factor: z * factor,
            "What is the standard deviation of the latents?",
            (
                Wrong(
                    encode,
                    "They are still not scaled: their deviation is 1/factor, about 5.",
                    "StableDiffusion-PyTorch#33",
                ),
                Wrong(lambda z, factor: z / factor, "Multiply by the factor; now it is about 30."),
                Wrong(
                    lambda z, factor: z * 0.18215,
                    "0.18215 is Stable Diffusion 1's factor. Take that of this autoencoder.",
                    "Open-Sora#493",
                ),
            ),
        ),
        "latents not scaled",
        "washed out",
        "The noise schedule meets data of the wrong size, so its levels are the wrong ones.",
        "The standard deviation of the latents should be 1; `minidiff check`.",
        "Multiply by `scaling_factor`; take the factor of this autoencoder.",
        "Deviation 5.5 instead of 1 with Stable Diffusion's autoencoder.",
    ),
    Bug(
        Exercise(
            "B16",
            11,
            "decoded(latents, factor, decode): the last line of a sampler.",
            _decoded,
            lambda: [(noise(4, 2, 3, 3), 0.18215, _curved), (noise(2, 2, 3, 3), 0.5, _curved)],
            lambda latents, factor, decode: decode(latents / factor),
            "What range has the decoder's input, and what range had it in training?",
            (
                Wrong(
                    decoded,
                    "The factor still acts on the image: it belongs to the latents.",
                    "GenerativeModels#212, PyTorch-Adventures#4",
                ),
                Wrong(
                    lambda latents, factor, decode: decode(latents * factor),
                    "Divide: encoding multiplied by the factor.",
                ),
                Wrong(
                    lambda latents, factor, decode: decode(latents),
                    "The factor is missing: these latents are too small for the decoder.",
                    "diffusers#5166",
                ),
            ),
        ),
        "factor on the image instead of the latents",
        "dark",
        "The decoder gets latents that are too small, and draws something flat.",
        "A round trip: encode, scale, undo, decode.",
        "Divide the latents by the factor, then decode.",
        "With a factor near 1 it has no effect, so nobody noticed it.",
    ),
)
EXERCISES = (SAMPLE, KL, SCALE)
