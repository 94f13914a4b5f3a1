"""Exercises on DDPM's step (notebook 05)."""

import math
from itertools import pairwise

import torch

from minidiff.schedule import CLEAN
from minidiff.schedulers import DDIMScheduler, DDPMScheduler, Scheduler
from minidiff.teach.exercise import LEVELS, Bug, Exercise, Wrong, noise, steps
from minidiff.teach.ring import TRUTH

SMALL = DDPMScheduler(clip_sample=False, compat="exact")
LARGE = DDPMScheduler(clip_sample=False, compat="exact", variance_type="fixed_large")


def step_of(scheduler, x, x0, now, nxt, z):
    """Return the step that a scheduler of minidiff takes with the noise z."""
    eps = (x - now.alpha * x0) / now.sigma
    return scheduler.update(x, x0, eps, now, nxt, lambda: z, interpolation=None)


def stepped(answer, x, x0, now, nxt, z):
    """Return the step of a class with the method `update`: the measure of planted samplers."""
    eps = (x - now.alpha * x0) / now.sigma
    return answer().update(x, x0, eps, now, nxt, lambda: z)


def noisy_steps():
    """Yield (x, x0, now, nxt, z), the last step included."""
    for seed, case in enumerate(steps()):
        yield *case, noise(*case[0].shape, seed=100 + seed)
    yield case[0], case[1], LEVELS[-1], CLEAN, noise(*case[0].shape, seed=99)


def posterior_mean(x, x0, now, nxt):
    kept = now.alpha / nxt.alpha  # of the signal, in one step forward
    beta = 1 - kept**2
    return (nxt.alpha * beta * x0 + kept * nxt.sigma**2 * x) / now.sigma**2


MEAN = Exercise(
    "ddpm-mean",
    5,
    "Write posterior_mean(x, x0, now, nxt): the mean of q(x' | x, x0), DDPM eq. 7. One step "
    "forward, from nxt to now, keeps √(1 − β) = α/α' of the signal.",
    lambda x, x0, now, nxt: step_of(SMALL, x, x0, now, nxt, torch.zeros_like(x)),
    steps,
    posterior_mean,
    "Multiply two Gaussians in x': around α'·x0 with variance σ'², and around x·α'/α with "
    "variance β·(α'/α)².",
    (
        Wrong(
            lambda x, x0, now, nxt: nxt.alpha * x0,
            "That is the mean of q(x' | x0): it forgets x.",
        ),
        Wrong(
            lambda x, x0, now, nxt: (
                (
                    nxt.alpha * (1 - (now.alpha / nxt.alpha) ** 2) * x
                    + now.alpha / nxt.alpha * nxt.sigma**2 * x0
                )
                / now.sigma**2
            ),
            "The two weights are exchanged: near the data, x has nearly all of it.",
        ),
        Wrong(
            lambda x, x0, now, nxt: (
                nxt.alpha * (1 - (now.alpha / nxt.alpha) ** 2) * x0
                + now.alpha / nxt.alpha * nxt.sigma**2 * x
            ),
            "Divide by 1 − ᾱ = σ² of the noisier level, by which both terms are scaled.",
            "diffusion-models-tutorial PR 1",
        ),
        Wrong(
            lambda x, x0, now, nxt: (
                (
                    nxt.alpha * (1 - now.alpha / nxt.alpha) * x0
                    + now.alpha / nxt.alpha * nxt.sigma**2 * x
                )
                / now.sigma**2
            ),
            "β = 1 − (α/α')²: the ratio of ᾱ, not of its root.",
        ),
    ),
)


def variance(now, nxt):
    beta = 1 - (now.alpha / nxt.alpha) ** 2
    return nxt.sigma**2 / now.sigma**2 * beta


def _variance(now, nxt):
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    return step_of(SMALL, zero, zero, now, nxt, one).item() ** 2


VARIANCE = Exercise(
    "ddpm-variance",
    5,
    "Write variance(now, nxt): β̃, the variance of q(x' | x, x0), DDPM eq. 7.",
    _variance,
    lambda: list(pairwise(LEVELS)),
    variance,
    "Precisions add: 1/β̃ = 1/σ'² + (1 − β)/β.",
    (
        Wrong(
            lambda now, nxt: 1 - (now.alpha / nxt.alpha) ** 2,
            "That is β, of the step forward. Knowing x0 leaves less: σ'²/σ²·β. DDPM section 3.2 "
            "finds both usable; with many steps they agree.",
            "PhysicsInformedDiffusionModels#4",
        ),
        Wrong(
            lambda now, nxt: nxt.sigma**2 * (1 - (now.alpha / nxt.alpha) ** 2),
            "The division by σ² = 1 − ᾱ is missing.",
            "diffusion-models-tutorial PR 1",
        ),
        Wrong(
            lambda now, nxt: nxt.sigma / now.sigma * math.sqrt(1 - (now.alpha / nxt.alpha) ** 2),
            "That is the standard deviation; the variance is its square.",
        ),
        Wrong(
            lambda now, nxt: now.sigma**2 / nxt.sigma**2 * (1 - (now.alpha / nxt.alpha) ** 2),
            "The fraction is upside down: knowing x0 makes the variance smaller than β.",
        ),
    ),
)


def ddpm_step(x, x0, now, nxt, z):
    kept = now.alpha / nxt.alpha
    beta = 1 - kept**2
    mean = (nxt.alpha * beta * x0 + kept * nxt.sigma**2 * x) / now.sigma**2
    return mean + nxt.sigma / now.sigma * math.sqrt(beta) * z


def _mean_and_beta(x, x0, now, nxt):
    return posterior_mean(x, x0, now, nxt), 1 - (now.alpha / nxt.alpha) ** 2


def _with_variance_for_std(x, x0, now, nxt, z):
    mean, beta = _mean_and_beta(x, x0, now, nxt)
    return mean + nxt.sigma**2 / now.sigma**2 * beta * z


def _with_beta(x, x0, now, nxt, z):
    mean, beta = _mean_and_beta(x, x0, now, nxt)
    return mean + math.sqrt(beta) * z


def _with_beta_till_the_end(x, x0, now, nxt, z):
    mean, beta = _mean_and_beta(x, x0, now, nxt)
    return mean + math.sqrt(beta) * z * (nxt.sigma > 0)


STEP = Exercise(
    "ddpm-step",
    5,
    "Write ddpm_step(x, x0, now, nxt, z): a draw from q(x' | x, x0), mean + √β̃·z.",
    lambda x, x0, now, nxt, z: step_of(SMALL, x, x0, now, nxt, z),
    noisy_steps,
    ddpm_step,
    "Mean and variance are the two exercises before. In the last step nxt.sigma is 0.",
    (
        Wrong(
            _with_variance_for_std,
            "z is multiplied by the variance: take the root. The samples look perfect, but each "
            "mode is too narrow.",
        ),
        Wrong(
            _with_beta,
            "√β instead of √β̃, and noise in the last step too, which nothing removes again.",
            "UDL notebooks 18.2 and 18.3",
        ),
        Wrong(
            _with_beta_till_the_end,
            "That is the larger variance β. Also right (DDPM section 3.2), but the task is β̃.",
            "PhysicsInformedDiffusionModels#4",
        ),
        Wrong(
            lambda x, x0, now, nxt, z: posterior_mean(x, x0, now, nxt),
            "Without z every step shrinks the spread: samples fall towards the mean.",
        ),
        Wrong(
            lambda x, x0, now, nxt, z: nxt.alpha * x0 + nxt.sigma * z,
            "That draws from q(x' | x0) and forgets x: consistency models sample like this.",
        ),
    ),
)


# --- planted bugs --------------------------------------------------------------------------------


class B3(Scheduler):
    """Ancestral sampling with the variance β."""

    def update(self, x, x0, eps, now, nxt, noise):
        beta = now.variance_since(nxt)
        weight_x0 = nxt.alpha * beta / now.sigma**2
        weight_x = now.alpha / nxt.alpha * nxt.sigma**2 / now.sigma**2
        mean = weight_x0 * x0 + weight_x * x
        if now.sigma > 0:
            return mean + math.sqrt(beta) * noise()
        return mean


class B3Solution(B3):
    """Ancestral sampling with the variance β, and none at the end."""

    def update(self, x, x0, eps, now, nxt, noise):
        if nxt.sigma == 0:
            return x0
        return super().update(x, x0, eps, now, nxt, noise)


class B9(Scheduler):
    """Ancestral sampling with the posterior's variance."""

    def update(self, x, x0, eps, now, nxt, noise):
        beta = now.variance_since(nxt)
        weight_x0 = nxt.alpha * beta / now.sigma**2
        weight_x = now.alpha / nxt.alpha * nxt.sigma**2 / now.sigma**2
        posterior_variance = nxt.sigma**2 / now.sigma**2 * beta
        return weight_x0 * x0 + weight_x * x + posterior_variance * noise()


class B9Solution(Scheduler):
    """Ancestral sampling with the posterior's variance."""

    def update(self, x, x0, eps, now, nxt, noise):
        return ddpm_step(x, x0, now, nxt, noise())


class B14(Scheduler):
    """Ancestral sampling."""

    def update(self, x, x0, eps, now, nxt, noise):
        beta = now.variance_since(nxt)
        weight_x0 = nxt.alpha * beta / now.sigma**2
        weight_x = now.alpha / nxt.alpha * nxt.sigma**2 / now.sigma**2
        return weight_x0 * x0 + weight_x * x


class HalfNoise(Scheduler):
    """Ancestral sampling with half of the noise."""

    def update(self, x, x0, eps, now, nxt, noise):
        return ddpm_step(x, x0, now, nxt, 0.5 * noise())


class DDIM(Scheduler):
    """DDIM without noise."""

    def update(self, x, x0, eps, now, nxt, noise):
        return nxt.alpha * x0 + nxt.sigma * eps


def sample_loop(denoise, levels, x):
    for now, nxt in pairwise(levels):
        x0 = denoise(x, now)
        eps = (x - now.alpha * x0) / now.sigma
        x = nxt.alpha * x0 + nxt.sigma * eps
    return denoise(x, levels[-1])


def backwards(denoise, levels, x):
    for now, nxt in pairwise(reversed(levels)):
        x0 = denoise(x, now)
        eps = (x - now.alpha * x0) / now.sigma
        x = nxt.alpha * x0 + nxt.sigma * eps
    return denoise(x, levels[0])


def _descend(denoise, levels, x):
    """Return the result of DDIM over rising levels, read from the noisiest down."""
    scheduler = DDIMScheduler(clip_sample=False, compat="exact")
    for now, nxt in pairwise([*levels[::-1], CLEAN]):
        x0 = denoise(x, now)
        eps = (x - now.alpha * x0) / now.sigma
        x = scheduler.update(x, x0, eps, now, nxt, None, eta=0.0, eps_from_x0=False)
    return x


BUGS = (
    Bug(
        Exercise(
            "B3",
            5,
            "A DDPM sampler with the variance β (keep it), from two course notebooks.",
            lambda *case: step_of(LARGE, *case),
            noisy_steps,
            B3Solution,
            "Which value does the condition test in the last step?",
            (
                Wrong(
                    B3,
                    "The last step still adds noise: `now.sigma > 0` is always true, the test is "
                    "about nxt.",
                    "UDL notebooks 18.2 and 18.3",
                ),
                Wrong(
                    B9Solution,
                    "A right sampler, but with β̃. Keep β, which is what the notebooks chose.",
                ),
                Wrong(B14, "Without noise at all the samples fall towards the mean."),
            ),
            measure=stepped,
        ),
        "noise in the last step",
        "noisy",
        "The noise of the last step is never removed.",
        "`minidiff explain`: the last step must leave no noise; spread within a mode.",
        "Add noise only where the next level has σ > 0.",
        "96.9 % near a mode instead of 98.9 %, spread 0.109; a faint grain on digits.",
    ),
    Bug(
        Exercise(
            "B9",
            5,
            "A DDPM sampler with the variance β̃. Its samples look perfect.",
            lambda *case: step_of(SMALL, *case),
            noisy_steps,
            B9Solution,
            "Measure the spread within a mode: ring.judge(ring.sampled(…)).",
            (
                Wrong(
                    B9, "z is still multiplied by a variance: take the root.", "DDPM from memory"
                ),
                Wrong(B14, "Without noise at all the spread gets even smaller."),
                Wrong(B3, "Now the variance is β, with noise in the last step."),
            ),
            measure=stepped,
        ),
        "variance taken for the standard deviation",
        "fine",
        "Too little noise in every step: samples gather in the middle of each mode.",
        "Spread within a mode; Fréchet distance and coverage, not the eye.",
        "Multiply the noise by √β̃.",
        "99.9 % near a mode, but spread 0.036 instead of 0.10; digits look perfect.",
    ),
    Bug(
        Exercise(
            "B14",
            5,
            "A DDPM sampler with the variance β̃. Its samples are a little too smooth.",
            lambda *case: step_of(SMALL, *case),
            noisy_steps,
            B9Solution,
            "Which term of DDPM's algorithm 2 is not here?",
            (
                Wrong(B14, "The noise √β̃·z is still missing.", "DDPM without z"),
                Wrong(HalfNoise, "Half of the noise is not enough: its variance is β̃."),
                Wrong(DDIM, "That is DDIM, the right way to have no noise. The task is DDPM."),
            ),
            measure=stepped,
        ),
        "no noise at all",
        "blurred",
        "DDPM's mean shrinks the spread in every step, and the noise should restore it.",
        "Radius, or standard deviation, of the samples.",
        "Add √β̃·z, or use DDIM, whose step keeps the spread.",
        "Radius 1.16 instead of 1.41; digits are smooth.",
    ),
    Bug(
        Exercise(
            "B10",
            5,
            "sample_loop(denoise, levels, x) of a small project. levels is the schedule from t = 0 "
            "up; denoise(x, level) returns x̂0.",
            _descend,
            lambda: [(TRUTH.denoise, list(LEVELS[::-1]), noise(32, 2))],
            backwards,
            "Print the levels in the order in which the loop visits them.",
            (
                Wrong(
                    sample_loop,
                    "The loop still runs from the data to the noise: reverse the levels.",
                    "tiny-diffusion#2, improved-diffusion#80",
                ),
                Wrong(
                    lambda denoise, levels, x: denoise(x, levels[-1]),
                    "One step from noise gives the mean of all data: take all levels.",
                ),
                Wrong(
                    lambda denoise, levels, x: denoise(x, levels[0]),
                    "Pure noise, denoised as if it were nearly clean, stays noise.",
                ),
            ),
        ),
        "time reversed",
        "blurred",
        "Pure noise is taken for a nearly clean image, and then averaged.",
        "Any measure; print the timesteps.",
        "Visit the levels from noise to data.",
        "0.1 % near a mode; digits are blurred means.",
    ),
)
EXERCISES = (MEAN, VARIANCE, STEP)
