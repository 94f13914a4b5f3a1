"""Exercises on training (notebook 04)."""

import math

import numpy as np
import torch
from torch import nn

from minidiff.objective import Levels
from minidiff.prediction import row
from minidiff.teach.exercise import LEVELS, Bug, Exercise, Wrong, images_at_levels, noise
from minidiff.training.objectives import make
from minidiff.training.optim import EMA

STEPS = 1000


def timesteps(u):
    return np.floor(u * STEPS)


def _drawn():
    yield (np.concatenate([np.linspace(0, 1, 4001)[:-1], [1 - 2**-53]]),)


DRAW = Exercise(
    "draw-timesteps",
    4,
    "Write timesteps(u): training steps 0…999, equally often, from uniform numbers u in [0, 1), "
    "a NumPy array.",
    lambda u: make("epsilon").levels(u).t,
    _drawn,
    timesteps,
    "How many different results are there, and which u give the last one?",
    (
        Wrong(
            lambda u: np.floor(u * (STEPS - 1)),
            "The step 999 is never drawn, although sampling starts there. Samples do not show it, "
            "because its neighbour is nearly the same.",
            "diffusion-models-class, unit 2",
            harmless=True,
        ),
        Wrong(
            lambda u: 1 + np.floor(u * (STEPS - 1)),
            "The step 0 is never drawn: randint(1, T) was meant to be randint(0, T).",
            "Diffusion-GAN#29",
        ),
        Wrong(
            lambda u: np.round(u * STEPS),
            "Rounding reaches 1000, one beyond the table: an error once in two thousand images.",
        ),
        Wrong(lambda u: u * STEPS, "Whole steps are wanted: the table has no others."),
    ),
)


def averaged(average, weights, beta):
    return beta * average + (1 - beta) * weights


def _ema(average, weights, beta):
    """Return the average after an update of `EMA` whose β_n is beta."""
    old, new = (nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in range(2))
    old.weight.data, new.weight.data = average.clone(), weights.clone()
    ema = EMA(old, half_life=0.5)
    ema.updates, ema.exponent = 1, -math.log2(beta)  # β_2 = (1 − ½)^k
    ema.update(new)
    return ema.model.weight.detach()


AVERAGE = Exercise(
    "ema",
    4,
    "Write averaged(average, weights, beta): the exponential moving average of the weights after "
    "one update; beta is near 1.",
    _ema,
    lambda: [(noise(3, 4, seed=1), noise(3, 4, seed=2), beta) for beta in (0.9, 0.999)],
    averaged,
    "A lot of the old average, a little of the new weights.",
    (
        Wrong(
            lambda average, weights, beta: beta * weights + (1 - beta) * average,
            "β is turned around: this forgets nearly everything in one step.",
            "levanter#883, Diffusion-Models-pytorch#38",
        ),
        Wrong(
            lambda average, weights, beta: beta * average + weights,
            "The factors must add to 1, or the average grows without limit.",
        ),
        Wrong(
            lambda average, weights, beta: (average + weights) / 2,
            "β is not used: this is an average over two steps or so.",
        ),
    ),
)


def loss(network, x0, eps, level, t):
    x = level.alpha * x0 + level.sigma * eps
    return (network(x, t) - eps).square().mean()


def _loss(network, x0, eps, level, t):
    shape = (len(x0), *(1,) * (x0.ndim - 1))
    alpha, sigma = (torch.full(shape, float(v), dtype=x0.dtype) for v in level)
    levels = Levels(alpha, sigma, t, torch.ones(len(x0)))
    return make("epsilon").loss(network, x0, eps, levels).mean()


def _curved(x, t):
    return torch.tanh(x) + t.view(-1, 1, 1, 1) / STEPS


def _losses():
    for i, (x0, eps, at) in enumerate(images_at_levels()):
        yield _curved, x0, eps, at, torch.full((len(x0),), 100.0 * i)


LOSS = Exercise(
    "loss",
    4,
    "Write loss(network, x0, eps, level, t): the mean squared error of a network that predicts ε "
    "(DDPM eq. 14). network(x, t) returns its prediction.",
    _loss,
    _losses,
    loss,
    "Add the noise, let the network look, compare with what it should find.",
    (
        Wrong(
            lambda network, x0, eps, level, t: (network(x0, t) - eps).square().mean(),
            "The network sees the clean image, which does not contain the noise it should find.",
        ),
        Wrong(
            lambda network, x0, eps, level, t: (
                (network(level.alpha * x0 + level.sigma * eps, t) - x0).square().mean()
            ),
            "You compare with x0: that trains prediction type 'sample'. Fine, if the sampler "
            "knows it.",
        ),
        Wrong(
            lambda network, x0, eps, level, t: (
                (network(level.alpha * x0 + level.sigma * eps, t) - eps).square().sum()
            ),
            "A sum depends on size and number of the images, and so does the best learning rate: "
            "take the mean.",
        ),
        Wrong(
            lambda network, x0, eps, level, t: (
                (network(level.alpha * x0 + level.sigma * eps, t) - level.sigma * eps)
                .square()
                .mean()
            ),
            "The target is ε of unit variance, not the noise as it was added, σ·ε.",
            "DiffusionDepth#18",
        ),
        Wrong(
            lambda network, x0, eps, level, t: (
                (network(level.alpha * x0 + level.sigma * eps, t) - eps).abs().mean()
            ),
            "The absolute error has the median as its optimum, not the mean: E[ε|x] needs squares.",
        ),
    ),
)


def weight(level, gamma):
    snr = level.alpha**2 / level.sigma**2
    return min(snr, gamma) / snr


def _weight(level, gamma):
    objective = make("epsilon", loss_weight="min_snr", min_snr_gamma=gamma)
    return float(objective.weight(level, row("epsilon", level)))


MIN_SNR = Exercise(
    "min-snr",
    4,
    "Write weight(level, gamma): the weight of the error of ε under min-SNR "
    "(Hang et al. 2023): min(SNR, γ) for the error of x0, with SNR = α²/σ².",
    _weight,
    lambda: [(at, gamma) for at in LEVELS for gamma in (1.0, 5.0)],
    weight,
    "An error of ε is σ/α times as large in x0: ‖Δx0‖² = ‖Δε‖²/SNR.",
    (
        Wrong(
            lambda level, gamma: (
                max(level.alpha**2 / level.sigma**2, gamma) * level.sigma**2 / level.alpha**2
            ),
            "max for min: the low noise levels, which should be limited, get the most weight.",
            "recurrent-interface-network-pytorch#11",
        ),
        Wrong(
            lambda level, gamma: min(level.alpha**2 / level.sigma**2, gamma),
            "That is the weight of the error of x0; an ε network's error is divided by SNR.",
        ),
        Wrong(
            lambda level, gamma: (
                min(level.alpha**2 / level.sigma**2, gamma) / (level.alpha**2 / level.sigma**2 + 1)
            ),
            "SNR + 1 is for v-prediction.",
            "Min-SNR-Diffusion-Training#3",
        ),
        Wrong(
            lambda level, gamma: (
                min(level.alpha / level.sigma, gamma) / (level.alpha / level.sigma)
            ),
            "SNR is a ratio of variances: α²/σ².",
        ),
    ),
)


# --- planted bugs --------------------------------------------------------------------------------


class RunningAverage:
    def __init__(self, weights, updates):
        self.average, self.decay = weights, 0.9999

    def update(self, weights):
        self.average = self.decay * self.average + (1 - self.decay) * weights


class _Average:
    """`EMA` with a tenth of the run as half-life, for one tensor."""

    def __init__(self, weights, updates):
        self.holder = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        self.holder.weight.data = weights
        self.ema = EMA(self.holder, half_life=0.1)

    def update(self, weights):
        self.holder.weight.data = weights
        self.ema.update(self.holder)
        self.average = self.ema.model.weight.detach()


class ShortAverage:
    def __init__(self, weights, updates):
        self.average, self.decay = weights, 0.5 ** (1 / (0.1 * updates))

    def update(self, weights):
        self.average = self.decay * self.average + (1 - self.decay) * weights


class BackwardsAverage(ShortAverage):
    def update(self, weights):
        self.average = self.decay * weights + (1 - self.decay) * self.average


def forgotten(answer, updates):
    """Return the fraction of the start that an average still holds after a run."""
    average = answer(torch.ones(1, 1, dtype=torch.float64), updates)
    for _ in range(updates):
        average.update(torch.zeros(1, 1, dtype=torch.float64))
    return average.average.item()


def _half(answer, updates):
    """Return True if the start is forgotten, and the average is one."""
    one = answer(torch.ones(1, 1, dtype=torch.float64), updates)
    for i in range(updates):
        one.update(torch.full((1, 1), float(i == updates - 1), dtype=torch.float64))
    return forgotten(answer, updates) < 0.05 and one.average.item() < 0.1


def conditioned(denoise):
    def asked(x, t):
        return denoise(x, max(t - 1, 0))

    return asked


def same_step(denoise):
    def asked(x, t):
        return denoise(x, t)

    return asked


def _visited(answer, t):
    """Return the step that a wrapped network is conditioned on."""
    return answer(lambda x, step: step)(0.0, t)


BUGS = (
    Bug(
        Exercise(
            "B2",
            4,
            "A class that averages the weights of a run of this many updates. Its samples are "
            "noise, although the loss is 0.03.",
            lambda updates: _half(_Average, updates),
            lambda: [(300,), (2000,)],
            ShortAverage,
            "How much of the untrained network does the average still hold after 2,000 updates?",
            (
                Wrong(
                    RunningAverage,
                    "The average holds 82 % of the untrained weights after 2,000 updates: its "
                    "memory must be short against the run.",
                    "improved-diffusion#59, diffae#16",
                ),
                Wrong(
                    BackwardsAverage,
                    "β is turned around now: this is the latest network, not an average.",
                    "levanter#883",
                ),
            ),
            measure=_half,
            trace=forgotten,
        ),
        "EMA slower than the run",
        "noise",
        "Sampling uses averaged weights that are still mostly those of the untrained network.",
        "`minidiff check`: compare the errors with averaged and with raw weights.",
        "A memory that is a fraction of the run: `ema_half_life`.",
        "0.9999 keeps 82 % of the start after 2,000 updates; the loss is that of the raw weights.",
    ),
    Bug(
        Exercise(
            "B8",
            4,
            "A wrapper of the network, as some loops have it: find what it does to t, then "
            "whether it matters.",
            lambda t: t,
            lambda: [(t,) for t in (0, 1, 500, 999)],
            same_step,
            "Print t inside and outside.",
            (
                Wrong(
                    conditioned,
                    "The network is conditioned on t − 1. In the exact test 99.5 % of the samples "
                    "are near a mode, as without it; the digits look right.",
                    "diffusion-models-class, unit 2; stablediffusion#226 has a larger shift",
                    harmless=True,
                ),
                Wrong(
                    lambda denoise: lambda x, t: denoise(x, t + 1),
                    "Now it is t + 1, which the table does not have at the end.",
                ),
            ),
            measure=_visited,
        ),
        "network conditioned on t − 1",
        "fine",
        "Neighbouring levels are nearly equal.",
        "None on samples. A test that the drawn steps are 0…T − 1.",
        "Pass t. Look elsewhere for the cause of bad samples.",
        "99.5 % near a mode, as with the right t.",
    ),
)
EXERCISES = (DRAW, AVERAGE, LOSS, MIN_SNR)
