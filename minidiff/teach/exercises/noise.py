"""Exercises on noise and pixels (notebooks 00 and 01)."""

import math

import torch

from minidiff.images.pixels import to_float, to_uint8
from minidiff.schedule import NoiseSchedule
from minidiff.schedule import add_noise as reference_noise
from minidiff.teach.exercise import LEVELS, Bug, Exercise, Wrong, images_at_levels, level, noise


def to_bytes(x):
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


TO_BYTES = Exercise(
    "to-bytes",
    0,
    "Write to_bytes(x): floats in [−1, 1], possibly a little outside, to bytes 0…255.",
    to_uint8,
    lambda: [(torch.linspace(-1.2, 1.2, 41, dtype=torch.float64),)],
    to_bytes,
    "−1 is black (0) and 1 is white (255). What do 0, and 1.2, become?",
    (
        Wrong(
            lambda x: (x.clamp(0, 1) * 255).round().to(torch.uint8),
            "Values from −1 to 0 all became black: undo x = u/127.5 − 1, so add 1 first.",
            "DDPM-Pytorch#3, guided-diffusion#61",
        ),
        Wrong(
            lambda x: ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8),
            "The conversion to bytes cuts the fraction off: everything is up to one grey level too "
            "dark. Round first.",
        ),
        Wrong(
            lambda x: ((x + 1) * 127.5).round().long().remainder(256).to(torch.uint8),
            "What lies outside [−1, 1] wraps around: too bright became black. Clamp first.",
        ),
        Wrong(
            lambda x: (x * 127.5).round().clamp(0, 255).to(torch.uint8),
            "0 is middle grey, not black: add 1 before the multiplication.",
        ),
    ),
)


def to_range(u):
    return u.float() / 127.5 - 1


TO_RANGE = Exercise(
    "to-range",
    1,
    "Write to_range(u): bytes 0…255 to floats in [−1, 1], the range that the noise fits.",
    to_float,
    lambda: [(torch.arange(256, dtype=torch.uint8),)],
    to_range,
    "0 goes to −1 and 255 to 1, along a straight line.",
    (
        Wrong(
            lambda u: u.float() / 255,
            "That is [0, 1]: the data have a mean that noise does not have. Use 2·x − 1.",
            "OCT_DDPM#3",
        ),
        Wrong(lambda u: u.float() / 255 - 1, "That is [−1, 0]: divide by half of 255."),
        Wrong(
            lambda u: u.float() / 128 - 1,
            "255 does not reach 1: divide by 127.5. The error is at most 0.008, below what any "
            "picture shows.",
        ),
    ),
)


def add_noise(x0, eps, level):
    return level.alpha * x0 + level.sigma * eps


ADD_NOISE = Exercise(
    "add-noise",
    1,
    "Write add_noise(x0, eps, level): x = α·x0 + σ·ε (DDPM eq. 4). "
    "The level has the fields alpha and sigma.",
    reference_noise,
    images_at_levels,
    add_noise,
    "Where data and noise have variance 1, x has variance α² + σ² = 1.",
    (
        Wrong(
            lambda x0, eps, level: level.alpha * x0 + level.sigma**2 * eps,
            "The noise enters with σ = √(1 − ᾱ), not with 1 − ᾱ: take the root.",
            "How-Diffusion-Models-Work#1, acids-ircam/diffusion_models#1",
        ),
        Wrong(
            lambda x0, eps, level: level.alpha**2 * x0 + level.sigma * eps,
            "The image enters with α = √ᾱ, not with ᾱ: take the root.",
        ),
        Wrong(
            lambda x0, eps, level: level.alpha * x0 + level.alpha * eps,
            "The noise has the scale of the image: `1 −` was forgotten under the root.",
            "labml annotated_deep_learning#152",
        ),
        Wrong(
            lambda x0, eps, level: x0 + level.sigma * eps,
            "The image does not shrink, so x explodes. Networks trained with α expect α·x0.",
        ),
        Wrong(
            lambda x0, eps, level: level.sigma * x0 + level.alpha * eps,
            "α belongs to the image and σ to the noise; you exchanged them.",
        ),
    ),
)


def alpha_bar(betas):
    return torch.cumprod(1 - betas, dim=0)


ALPHA_BAR = Exercise(
    "alpha-bar",
    1,
    "Write alpha_bar(betas): ᾱ_t = ∏_{s ≤ t} (1 − β_s) of every step (DDPM eq. 4), (T,).",
    lambda betas: NoiseSchedule(betas).alpha_bar,
    lambda: [(NoiseSchedule.named(name, 50).betas,) for name in ("linear", "squaredcos_cap_v2")],
    alpha_bar,
    "Each step keeps the fraction 1 − β of the signal's variance. Fractions multiply.",
    (
        Wrong(
            lambda betas: torch.cumprod(betas, dim=0),
            "The product is of 1 − β, what each step keeps, not of β.",
            "dpm-solver#13",
        ),
        Wrong(
            lambda betas: 1 - betas,
            "That is α_t of a single step; ᾱ_t is the product of all steps up to t.",
            "score_sde_pytorch#73",
        ),
        Wrong(
            lambda betas: 1 - torch.cumsum(betas, dim=0),
            "Fractions multiply; a sum is right only where β is tiny, and falls below 0.",
        ),
        Wrong(
            lambda betas: torch.cat([betas.new_ones(1), torch.cumprod(1 - betas, 0)[:-1]]),
            "Shifted by one: the first entry belongs to the first step, which already has noise.",
            "denoising-diffusion-pytorch#81",
        ),
    ),
)


def log_snr(level):
    return math.log(level.alpha / level.sigma)


LOG_SNR = Exercise(
    "log-snr",
    1,
    "Write log_snr(level): λ = ln(α/σ), half the log signal-to-noise ratio.",
    lambda level: level.lam,
    lambda: [(at,) for at in LEVELS],
    log_snr,
    "λ = 0 where signal and noise are equally strong.",
    (
        Wrong(
            lambda level: math.log(level.alpha**2 / level.sigma**2),
            "That is ln SNR, as in Kingma et al. 2021; here, and in DPM-Solver, λ is half of it.",
        ),
        Wrong(
            lambda level: math.log(level.sigma / level.alpha),
            "The sign is turned around: λ grows towards the data.",
        ),
        Wrong(lambda level: math.log10(level.alpha / level.sigma), "Use the natural logarithm."),
    ),
)


# --- planted bugs --------------------------------------------------------------------------------


def add_noise_of_a_course(x0, eps, alpha_bar):
    return alpha_bar**0.5 * x0 + (1 - alpha_bar) * eps


def add_noise_of_a_sampler(x0, eps, alpha_bar):
    signal = alpha_bar**0.5
    rest = alpha_bar**0.5
    return signal * x0 + rest * eps


def _noised(x0, eps, alpha_bar):
    return alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * eps


def _from_alpha_bar(x0, eps, alpha_bar):
    return reference_noise(x0, eps, level(alpha_bar**0.5))


def _alpha_bars():
    for seed, at in enumerate(LEVELS):
        yield noise(64, 2, seed=seed), noise(64, 2, seed=seed + 9), at.alpha**2


def to_floats(u):
    return u.float() / 255


BUGS = (
    Bug(
        Exercise(
            "B1",
            1,
            "add_noise(x0, eps, alpha_bar) of a course. The moments of x give the bug away.",
            _from_alpha_bar,
            _alpha_bars,
            _noised,
            "Measure the standard deviation of x for x0 = 0. It should be √(1 − ᾱ).",
            (
                Wrong(
                    add_noise_of_a_course,
                    "The noise still enters with 1 − ᾱ: take the root.",
                    "How-Diffusion-Models-Work#1, acids-ircam/diffusion_models#1",
                ),
                Wrong(
                    lambda x0, eps, alpha_bar: alpha_bar * x0 + (1 - alpha_bar) * eps,
                    "Now neither has its root: the weights add to 1, but their squares do not.",
                ),
            ),
        ),
        "root missing: (1 − ᾱ)·ε",
        "broken",
        "The network learns levels with too little noise, and the sampler starts with more.",
        "Moments of x_t: its variance is not α² + σ².",
        "Take the root of 1 − ᾱ.",
        "At ᾱ = 0.5 the noise has the standard deviation 0.50 instead of 0.71. With the bug only "
        "in the sampler, digits look right; with both roots missing they are white blocks.",
    ),
    Bug(
        Exercise(
            "B7",
            1,
            "to_range(u): the preprocessing of a project. Its digits looked fine.",
            to_float,
            lambda: [(torch.arange(256, dtype=torch.uint8),)],
            to_range,
            "Look at the smallest value, and at the mean of the noise.",
            (
                Wrong(to_floats, "The range is still [0, 1]: use 2·x − 1.", "OCT_DDPM#3"),
                Wrong(
                    lambda u: u.float() / 255 - 0.5,
                    "Centred, but [−0.5, 0.5]: half of the contrast that samplers clip to.",
                ),
            ),
        ),
        "data in [0, 1]",
        "fine",
        "The network learns the range that it is given; clipping and saving assume another.",
        "`minidiff check`: the data range.",
        "x = u/127.5 − 1.",
        "The check of the data range fails; the digits look fine.",
    ),
    Bug(
        Exercise(
            "B13",
            1,
            "add_noise(x0, eps, alpha_bar), as it was in an annotated sampler.",
            _from_alpha_bar,
            _alpha_bars,
            _noised,
            "What is the standard deviation of x at the last step, where ᾱ is nearly 0?",
            (
                Wrong(
                    add_noise_of_a_sampler,
                    "The noise still has the scale of the image: √(1 − ᾱ).",
                    "labml annotated_deep_learning#152",
                ),
                Wrong(
                    lambda x0, eps, alpha_bar: alpha_bar**0.5 * x0 + (1 - alpha_bar**0.5) * eps,
                    "1 − √ᾱ is not √(1 − ᾱ): subtract first, then take the root.",
                ),
            ),
        ),
        "√ᾱ where √(1 − ᾱ) belongs",
        "broken",
        "Noise fades together with the image, so the last step holds nothing at all.",
        "Moments of x_t: its variance is not α² + σ².",
        "√(1 − ᾱ).",
        "At ᾱ = 0.01 the noise has the standard deviation 0.10 instead of 0.99.",
    ),
    Bug(
        Exercise(
            "B15",
            0,
            "to_bytes(x): how a project saved its samples. They looked fine, only thin.",
            to_uint8,
            lambda: [(torch.linspace(-1.2, 1.2, 41, dtype=torch.float64),)],
            to_bytes,
            "Which grey level does x = 0 become?",
            (
                Wrong(
                    lambda x: (x.clamp(0, 1) * 255).round().to(torch.uint8),
                    "Everything below 0 is still black: (x + 1)/2 comes first.",
                    "DDPM-Pytorch#3, guided-diffusion#61",
                ),
                Wrong(
                    lambda x: ((x.clamp(0, 1) + 1) * 127.5).round().to(torch.uint8),
                    "You clamp to [0, 1] before adding 1: black became grey. Clamp to [−1, 1].",
                ),
            ),
        ),
        "saved without (x + 1)/2",
        "fine",
        "Every value below 0 becomes black, so strokes lose their grey edges.",
        "Compare mean and histogram of saved images with the data's.",
        "Add 1 and divide by 2 before saving.",
        "Ten digits look right, with thinner strokes.",
    ),
)
EXERCISES = (TO_BYTES, TO_RANGE, ADD_NOISE, ALPHA_BAR, LOG_SNR)
