"""Exercises on image-to-image, inpainting and negative prompts (notebook 12)."""

import torch

from minidiff.guidance import extrapolated
from minidiff.images.pixels import Original, blend
from minidiff.pipeline.request import first_step
from minidiff.schedule import add_noise
from minidiff.schedulers import DDIMScheduler
from minidiff.teach.exercise import Exercise, Wrong, images_at_levels, noise


def first(steps, strength):
    return steps - int(steps * strength)


def _first(steps, strength):
    scheduler = DDIMScheduler(compat="exact")
    scheduler.set_timesteps(steps)
    return first_step(scheduler, strength, Original(torch.zeros(1, 1, 1, 1)))


FIRST = Exercise(
    "first-step",
    12,
    "Write first(steps, strength): the entry of the grid of steps at which image-to-image begins, "
    "if ⌊strength · steps⌋ steps are taken. Strength 1 begins at 0.",
    _first,
    lambda: [(50, 0.8), (20, 0.25), (10, 0.77), (30, 1.0)],
    first,
    "How many steps are taken, and how many are left out?",
    (
        Wrong(
            lambda steps, strength: int(steps * strength),
            "That is the number of steps that are taken; the others, before them, are left out.",
            "mflux#86 names its strength the other way round",
        ),
        Wrong(
            lambda steps, strength: int(steps * (1 - strength)),
            "⌊steps·(1 − strength)⌋ rounds the wrong part: 10 steps at 0.77 take 7, so begin at 3.",
            "flux#36",
        ),
        Wrong(
            lambda steps, strength: 0,
            "Strength is not used: every step is taken.",
        ),
        Wrong(
            lambda steps, strength: steps - round(steps * strength),
            "Rounded, not cut off: 10 steps at 0.77 take 7.",
        ),
    ),
)


def keep(x0, eps, sampled, mask, level):
    return mask * sampled + (1 - mask) * (level.alpha * x0 + level.sigma * eps)


def _holes():
    for seed, (x0, eps, at) in enumerate(images_at_levels()):
        mask = (torch.arange(4).view(1, 1, 2, 2) < 2).to(x0)
        yield x0, eps, noise(*x0.shape, seed=40 + seed), mask, at


KEEP = Exercise(
    "keep-known",
    12,
    "Write keep(x0, eps, sampled, mask, level): the sample after a step of inpainting. mask is 1 "
    "where the image is replaced; elsewhere the given x0 is kept, at the level of the sample.",
    lambda x0, eps, sampled, mask, level: blend(add_noise(x0, eps, level), sampled, mask),
    _holes,
    keep,
    "The network expects a whole image at one noise level.",
    (
        Wrong(
            lambda x0, eps, sampled, mask, level: blend(sampled, add_noise(x0, eps, level), mask),
            "The mask is inverted: RePaint's m is 1 where the image is known, diffusers' where it "
            "is replaced.",
        ),
        Wrong(
            lambda x0, eps, sampled, mask, level: blend(x0, sampled, mask),
            "The kept part has no noise, so the two parts are at different levels and do not meet.",
        ),
        Wrong(
            lambda x0, eps, sampled, mask, level: blend(x0 + level.sigma * eps, sampled, mask),
            "The kept part is not at the sample's level: it is α·x0 + σ·ε.",
            "diffusers PR 328",
        ),
        Wrong(
            lambda x0, eps, sampled, mask, level: sampled,
            "Nothing is kept.",
            "denoising-diffusion-pytorch PR 322, in its last step",
        ),
    ),
)


def negative(c, n, u, w):
    return n + w * (c - n)


def _three():
    for seed, w in enumerate((1.0, 3.0, 7.5)):
        yield *(noise(2, 1, 3, 3, seed=3 * seed + i) for i in range(3)), w


NEGATIVE = Exercise(
    "negative-prompt",
    12,
    "Write negative(c, n, u, w): guidance towards the output c of a prompt, away from the output "
    "n of a negative prompt, as diffusers does it. u is the output without a prompt.",
    lambda c, n, u, w: extrapolated(lambda x, t: (c, n), w)(None, 0),
    _three,
    negative,
    "A negative prompt takes the place of 'no prompt'. Is u still needed?",
    (
        Wrong(
            lambda c, n, u, w: u + w * (c - u),
            "n is not used.",
        ),
        Wrong(
            lambda c, n, u, w: u + w * (c - n),
            "The line starts at u but its direction is from n: at w = 1 it should give c.",
        ),
        Wrong(
            lambda c, n, u, w: n + w * (u - n),
            "That leaves n, but for no prompt at all: c is not used.",
        ),
        Wrong(
            lambda c, n, u, w: c + w * (c - n),
            "w starts at 0 here; diffusers' starts at 1.",
            "diffusers#5882",
        ),
    ),
)

BUGS = ()
EXERCISES = (FIRST, KEEP, NEGATIVE)
