"""Exercises on DDIM and inversion (notebook 06)."""

import math
from itertools import pairwise

import torch

from minidiff.schedulers import DDIMInverseScheduler, DDIMScheduler, Scheduler
from minidiff.teach.exercise import LEVELS, Bug, Exercise, Wrong, noise, steps
from minidiff.teach.exercises.ddpm import noisy_steps, stepped
from minidiff.teach.ring import TRUTH

EXACT = DDIMScheduler(clip_sample=False, compat="exact")
UP = DDIMInverseScheduler(clip_sample=False, compat="exact")


def _update(x, x0, eps, now, nxt, z=None, eta=0.0, eps_from_x0=False):
    return EXACT.update(x, x0, eps, now, nxt, lambda: z, eta=eta, eps_from_x0=eps_from_x0)


def _eps(x, x0, now):
    return (x - now.alpha * x0) / now.sigma


def ddim_step(x, x0, now, nxt):
    eps = (x - now.alpha * x0) / now.sigma
    return nxt.alpha * x0 + nxt.sigma * eps


STEP = Exercise(
    "ddim-step",
    6,
    "Write ddim_step(x, x0, now, nxt): x' without noise, from x, x̂0 and two levels (DDIM eq. 12).",
    lambda x, x0, now, nxt: _update(x, x0, _eps(x, x0, now), now, nxt),
    steps,
    ddim_step,
    "First the noise that x and x̂0 imply, then the same image with the same noise at the next "
    "level.",
    (
        Wrong(
            lambda x, x0, now, nxt: nxt.alpha * x0 + nxt.sigma * (x - x0) / now.sigma,
            "ε̂ = (x − α·x̂0)/σ: x̂0 is scaled by α before it is subtracted.",
        ),
        Wrong(
            lambda x, x0, now, nxt: nxt.alpha * x0 + nxt.sigma**2 * _eps(x, x0, now),
            "The noise enters with σ', not with σ'² = 1 − ᾱ': take the root.",
            "How-Diffusion-Models-Work#1",
        ),
        Wrong(
            lambda x, x0, now, nxt: now.alpha * x0 + now.sigma * _eps(x, x0, now),
            "That is x again: the new level has to appear.",
        ),
        Wrong(
            lambda x, x0, now, nxt: x0,
            "That jumps to the end at once; the step has to stop at the next level.",
        ),
        Wrong(
            lambda x, x0, now, nxt: nxt.alpha * x0 + nxt.sigma * (x - now.alpha * x0),
            "x − α·x̂0 is σ·ε̂: divide by σ.",
        ),
        Wrong(
            lambda x, x0, now, nxt: nxt.alpha * x0 + nxt.sigma * torch.randn_like(x),
            "DDIM keeps the noise that x and x̂0 imply; with fresh noise no path is followed.",
        ),
        Wrong(
            lambda x, x0, now, nxt: x0 + nxt.sigma * _eps(x, x0, now),
            "At the next level the image is scaled too: α'·x̂0.",
        ),
        Wrong(
            lambda x, x0, now, nxt: now.alpha * x0 + nxt.sigma * _eps(x, x0, now),
            "The image is scaled by α' of the next level, not by α of the present one.",
        ),
    ),
)


def ddim_std(now, nxt, eta):
    return eta * nxt.sigma / now.sigma * math.sqrt(1 - (now.alpha / nxt.alpha) ** 2)


def _std(now, nxt, eta):
    zero = torch.zeros(1, 1, dtype=torch.float64)
    return _update(zero, zero, zero, now, nxt, torch.ones_like(zero), eta).item()


STD = Exercise(
    "ddim-std",
    6,
    "Write ddim_std(now, nxt, eta): the standard deviation of the noise that DDIM adds (eq. 16).",
    _std,
    lambda: [(now, nxt, eta) for now, nxt in pairwise(LEVELS) for eta in (0.5, 1.0)],
    ddim_std,
    "With η = 1 it is that of DDPM's posterior.",
    (
        Wrong(
            lambda now, nxt, eta: eta * now.sigma,
            "That depends on the present level alone and is too large: a clamp under the other "
            "root would hide it.",
            "CoursIA PR 16158",
        ),
        Wrong(
            lambda now, nxt, eta: (
                eta**2 * (nxt.sigma / now.sigma) ** 2 * (1 - (now.alpha / nxt.alpha) ** 2)
            ),
            "That is the variance; take the root.",
        ),
        Wrong(
            lambda now, nxt, eta: (
                eta * now.sigma / nxt.sigma * math.sqrt(1 - (now.alpha / nxt.alpha) ** 2)
            ),
            "σ'/σ is upside down.",
        ),
        Wrong(
            lambda now, nxt, eta: eta * nxt.sigma,
            "Then nothing of ε̂ would be left at η = 1.",
        ),
    ),
)


def invert(denoise, levels, x):
    for now, nxt in pairwise(levels):
        x0 = denoise(x, now)
        eps = (x - now.alpha * x0) / now.sigma
        x = nxt.alpha * x0 + nxt.sigma * eps
    return x


def _invert(denoise, levels, x):
    for now, nxt in pairwise(levels):
        x0 = denoise(x, now)
        x = UP.update(x, x0, _eps(x, x0, now), now, nxt, None)
    return x


def _at_the_next_level(denoise, levels, x):
    for now, nxt in pairwise(levels):
        x0 = denoise(x, nxt)
        x = nxt.alpha * x0 + nxt.sigma * (x - now.alpha * x0) / now.sigma
    return x


def _with_one_prediction(denoise, levels, x):
    x0 = denoise(x, levels[0])
    return levels[-1].alpha * x0 + levels[-1].sigma * _eps(x, x0, levels[0])


def _after_the_first_step(denoise, levels, x):
    return invert(denoise, levels[:2], x)


def _without_the_last(denoise, levels, x):
    return invert(denoise, levels[:-1], x)


def _at_the_same_level(denoise, levels, x):
    for now in levels:
        x0 = denoise(x, now)
        x = now.alpha * x0 + now.sigma * _eps(x, x0, now)
    return x


def _with_added_noise(denoise, levels, x):
    for now, nxt in pairwise(levels):
        x = nxt.alpha * denoise(x, now) + nxt.sigma * torch.randn_like(x)
    return x


INVERT = Exercise(
    "invert",
    6,
    "Write invert(denoise, levels, x): the noise from which DDIM generates x. levels rise from "
    "the nearly clean level of x to the noisiest; denoise(x, level) returns x̂0.",
    _invert,
    lambda: [(TRUTH.denoise, list(LEVELS[::-1]), noise(16, 2))],
    invert,
    "DDIM's step has no direction: it also goes from a level to a noisier one.",
    (
        Wrong(
            _at_the_next_level,
            "The network is evaluated at the level where x is going, but x is not there yet.",
            "stablediffusion PR 226",
        ),
        Wrong(
            lambda denoise, levels, x: invert(denoise, levels[::-1], x),
            "That goes down, from noise to data: the levels already rise.",
        ),
        Wrong(
            _with_one_prediction,
            "Evaluate the network at every level: one prediction for all of them is one big step.",
        ),
        Wrong(
            lambda denoise, levels, x: (
                levels[-1].alpha * x + levels[-1].sigma * noise(*x.shape, seed=3)
            ),
            "Fresh noise hides the image: inversion computes the noise from it.",
        ),
        Wrong(
            _after_the_first_step,
            "The result is that of the first step: `return` stands inside the loop. Move it one "
            "level to the left.",
        ),
        Wrong(
            _without_the_last,
            "The last level is missing: n levels have n − 1 steps, as pairwise(levels) gives them.",
        ),
        Wrong(
            _at_the_same_level,
            "The same level stands on both sides, so x stays where it is: the result needs the "
            "next level.",
        ),
        Wrong(
            _with_added_noise,
            "Every step adds fresh noise: what inversion looks for is the noise ε̂ that x has.",
        ),
    ),
)


# --- planted bugs --------------------------------------------------------------------------------


class B4(Scheduler):
    """DDIM with x̂0 kept in the range of pixels."""

    def update(self, x, x0, eps, now, nxt, noise):
        x0 = x0.clamp(-1, 1)
        return nxt.alpha * x0 + nxt.sigma * eps


class B4Solution(Scheduler):
    """DDIM with x̂0 kept in the range of pixels, and the noise that follows from it."""

    def update(self, x, x0, eps, now, nxt, noise):
        x0 = x0.clamp(-1, 1)
        eps = (x - now.alpha * x0) / now.sigma
        return nxt.alpha * x0 + nxt.sigma * eps


class NoClip(Scheduler):
    """DDIM."""

    def update(self, x, x0, eps, now, nxt, noise):
        return nxt.alpha * x0 + nxt.sigma * eps


class B11(Scheduler):
    """DDIM with η = 1."""

    eta = 1.0

    def update(self, x, x0, eps, now, nxt, noise):
        std = self.eta * now.sigma if nxt.sigma else 0.0
        direction = math.sqrt(max(0.0, nxt.sigma**2 - std**2))
        return nxt.alpha * x0 + direction * eps + std * noise()


class B11Solution(Scheduler):
    """DDIM with η = 1."""

    eta = 1.0

    def update(self, x, x0, eps, now, nxt, noise):
        std = self.eta * nxt.sigma / now.sigma * math.sqrt(now.variance_since(nxt))
        direction = math.sqrt(nxt.sigma**2 - std**2)
        return nxt.alpha * x0 + direction * eps + std * noise()


class AllFresh(Scheduler):
    """DDIM with all noise fresh."""

    def update(self, x, x0, eps, now, nxt, noise):
        return nxt.alpha * x0 + nxt.sigma * noise()


class _ClipsNoiseToo(Scheduler):
    def update(self, x, x0, eps, now, nxt, noise):
        x0 = x0.clamp(-1, 1)
        eps = (x - now.alpha * x0) / now.sigma
        return nxt.alpha * x0 + nxt.sigma * eps.clamp(-1, 1)


class _NoiseAtTheNextLevel(Scheduler):
    def update(self, x, x0, eps, now, nxt, noise):
        x0 = x0.clamp(-1, 1)
        return nxt.alpha * x0 + nxt.sigma * (x - nxt.alpha * x0) / nxt.sigma


class _NoiseWithoutAlpha(Scheduler):
    def update(self, x, x0, eps, now, nxt, noise):
        x0 = x0.clamp(-1, 1)
        return nxt.alpha * x0 + nxt.sigma * (x - x0) / now.sigma


class _ClipsTheResult(Scheduler):
    def update(self, x, x0, eps, now, nxt, noise):
        return (nxt.alpha * x0 + nxt.sigma * eps).clamp(-1, 1)


def _with_std(std_of, direction_of=lambda nxt, std: math.sqrt(max(0.0, nxt.sigma**2 - std**2))):
    """Return a class of DDIM with another standard deviation, or another weight of ε̂."""

    class Mine(Scheduler):
        def update(self, x, x0, eps, now, nxt, noise):
            std = std_of(now, nxt)
            return nxt.alpha * x0 + direction_of(nxt, std) * eps + std * noise()

    return Mine


def _eq16(now, nxt):
    return nxt.sigma / now.sigma * math.sqrt(now.variance_since(nxt))


BUGS = (
    Bug(
        Exercise(
            "B4",
            6,
            "DDIM with x̂0 clipped to [−1, 1] (keep the clipping). Half of its digits are damaged.",
            lambda x, x0, now, nxt, z: _update(
                x, x0.clamp(-1, 1), _eps(x, x0, now), now, nxt, eps_from_x0=True
            ),
            noisy_steps,
            B4Solution,
            "After the clipping, is x still α·x̂0 + σ·ε̂?",
            (
                Wrong(
                    B4,
                    "ε̂ is still that of the unclipped x̂0: x = α·x̂0 + σ·ε̂ no longer holds.",
                    "denoising-diffusion-pytorch PR 84, hojonathanho/diffusion#5",
                ),
                Wrong(
                    NoClip,
                    "Consistent again, but without clipping, which the task keeps.",
                ),
                Wrong(
                    _ClipsNoiseToo,
                    "ε̂ is clipped as well, but noise has no range: x = α·x̂0 + σ·ε̂ fails again.",
                ),
                Wrong(
                    _NoiseAtTheNextLevel,
                    "x is at the present level: compute ε̂ with α and σ of `now`, not of `nxt`.",
                ),
                Wrong(
                    _NoiseWithoutAlpha,
                    "x̂0 is scaled by α before it is subtracted: ε̂ = (x − α·x̂0)/σ.",
                ),
                Wrong(
                    _ClipsTheResult,
                    "It is x̂0 that has the range of pixels; x' is noisy and has no such range.",
                ),
            ),
            measure=stepped,
        ),
        "x̂0 clipped, ε̂ kept",
        "missing",
        "Where x̂0 is clipped, image and noise no longer add up to x.",
        "x = α·x̂0 + σ·ε̂ does not hold.",
        "Compute ε̂ from the clipped x̂0 (`use_clipped_model_output=True`), or do not clip.",
        "89.9 % near a mode and 4 of 8 modes on the ring, which clipping at ±1 cuts; "
        "5 of 10 digits are damaged.",
    ),
    Bug(
        Exercise(
            "B11",
            6,
            "DDIM with η = 1. With a perfect network its samples are as good as the right ones.",
            lambda x, x0, now, nxt, z: _update(x, x0, _eps(x, x0, now), now, nxt, z, 1.0),
            noisy_steps,
            B11Solution,
            "direction² + std² should be σ'². How often does max(0, …) act?",
            (
                Wrong(
                    B11,
                    "std is too large for every step, and the clamp hides it: use eq. 16.",
                    "CoursIA PR 16158",
                ),
                Wrong(
                    AllFresh,
                    "Now direction is 0: all noise is fresh, which is more than η = 1 means.",
                ),
                Wrong(NoClip, "That is η = 0. The task keeps η = 1."),
                Wrong(
                    _with_std(lambda now, nxt: _eq16(now, nxt) ** 2),
                    "That std is the variance: eq. 16 has a root over each factor.",
                ),
                Wrong(
                    _with_std(_eq16, lambda nxt, std: nxt.sigma),
                    "direction is σ' itself, and z comes on top: the two variances add up to more "
                    "than σ'².",
                ),
                Wrong(
                    _with_std(_eq16, lambda nxt, std: nxt.sigma - std),
                    "Variances add, not standard deviations: direction = √(σ'² − std²).",
                ),
                Wrong(
                    _with_std(
                        lambda now, nxt: (
                            nxt.sigma / now.sigma * math.sqrt(1 - now.alpha / nxt.alpha)
                        )
                    ),
                    "α/α' is not squared: eq. 16 has ᾱ = α² under its root.",
                ),
            ),
            measure=stepped,
        ),
        "a clamp hides a wrong η",
        "fine",
        "More noise is added than the level has, and a perfect network removes it again.",
        "The squared weights of ε̂ and z do not add up to σ'²; count how often the clamp acts.",
        "DDIM eq. 16; then the clamp never acts.",
        "99.2 % near a mode with a perfect network; a trained one lost 9 of 10 classes.",
    ),
)
EXERCISES = (STEP, STD, INVERT)
