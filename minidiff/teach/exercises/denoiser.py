"""Exercises on the perfect denoiser and the score (notebook 02)."""

import torch

from minidiff.exact import GaussianMixture
from minidiff.teach.exercise import LEVELS, Exercise, Wrong, noise

RING = GaussianMixture(
    torch.ones(3), [[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]], torch.tensor([0.1, 0.2, 0.3])
)


def denoise(x, level, data):
    squares = torch.cdist(x, level.alpha * data).square()
    weights = torch.softmax(-squares / (2 * level.sigma**2), dim=1)
    return weights @ data


def _finite(x, level, data):
    """Return E[x0|x] for equally likely points."""
    points = GaussianMixture(torch.ones(len(data)), data, torch.zeros(len(data)))
    return points.denoise(x, level)


def _points():
    for seed, at in enumerate(LEVELS):
        yield noise(6, 2, seed=seed), at, noise(5, 2, seed=50 + seed)


def _weighted(x, data, logits, dim=1):
    return torch.softmax(logits, dim=dim) @ data


def _squares(x, level, data):
    return torch.cdist(x, level.alpha * data).square()


POSTERIOR_MEAN = Exercise(
    "posterior-mean",
    2,
    "Write denoise(x, level, data): E[x0 | x] where x0 is one of the rows of data, all equally "
    "likely. x (B, D) at the level α, σ; data (K, D).",
    _finite,
    _points,
    denoise,
    "Bayes: the weight of a point is N(x; α·x0, σ²·I), divided by the sum over all points. "
    "torch.softmax does the division.",
    (
        Wrong(
            lambda x, level, data: data[_squares(x, level, data).argmin(dim=1)],
            "That is the most likely point, not the mean of all: the answer with least squared "
            "error is the mean.",
        ),
        Wrong(
            lambda x, level, data: _weighted(
                x, data, -_squares(x, level, data) / (2 * level.sigma)
            ),
            "The Gaussian has the variance σ², not σ.",
        ),
        Wrong(
            lambda x, level, data: _weighted(x, data, -_squares(x, level, data) / level.sigma**2),
            "The exponent is −‖x − α·x0‖²/(2σ²): the 2 is missing.",
        ),
        Wrong(
            lambda x, level, data: _weighted(
                x, data, -torch.cdist(x, data).square() / (2 * level.sigma**2)
            ),
            "A noisy point scatters around α·x0, not around x0: scale the data first.",
        ),
        Wrong(
            lambda x, level, data: _weighted(
                x, data, _squares(x, level, data) / (2 * level.sigma**2)
            ),
            "The exponent is negative: as it is, the farthest point weighs most.",
        ),
        Wrong(
            lambda x, level, data: data.mean(dim=0).expand_as(x),
            "That ignores x: it is right only for pure noise.",
        ),
        Wrong(
            lambda x, level, data: _weighted(
                x, data, -_squares(x, level, data) / (2 * level.sigma**2), dim=0
            ),
            "The weights add to 1 over the data (dim=1), not over the noisy points.",
        ),
        Wrong(
            lambda x, level, data: _weighted(
                x, data, -torch.cdist(x, level.alpha * data) / (2 * level.sigma**2)
            ),
            "torch.cdist gives distances; the exponent needs their squares.",
        ),
    ),
    close=1e-9,
)


def score(x, x0, level):
    return (level.alpha * x0 - x) / level.sigma**2


def _means():
    for seed, at in enumerate(LEVELS):
        x = noise(8, 2, seed=seed)
        yield x, RING.denoise(x, at), at


SCORE = Exercise(
    "score",
    2,
    "Write score(x, x0, level): ∇ ln p_t(x) from the posterior mean x0 = E[x0 | x] (Tweedie).",
    lambda x, x0, level: RING.score(x, level),
    _means,
    score,
    "For a single clean point, ln p is −‖x − α·x0‖²/(2σ²) and a constant. Take its gradient.",
    (
        Wrong(
            lambda x, x0, level: (x - level.alpha * x0) / level.sigma**2,
            "The sign is turned around: the score points towards the data.",
            "acids-ircam/diffusion_models#7",
        ),
        Wrong(
            lambda x, x0, level: (level.alpha * x0 - x) / level.sigma,
            "That is −ε̂. The score is −ε̂/σ, so divide by σ².",
            "score_sde_pytorch#26",
        ),
        Wrong(
            lambda x, x0, level: (x0 - x) / level.sigma**2,
            "x scatters around α·x0, not around x0.",
        ),
        Wrong(
            lambda x, x0, level: level.alpha * (x0 - x) / level.sigma**2,
            "α belongs to x0 alone: (α·x0 − x)/σ².",
        ),
        Wrong(
            lambda x, x0, level: level.alpha * x0 - x,
            "That is −σ·ε̂. The score is −ε̂/σ: the division by σ² is missing.",
        ),
    ),
    close=1e-9,
)


def from_score(x, score, level):
    return (x + level.sigma**2 * score) / level.alpha


def _scores():
    for x, _, at in _means():
        yield x, RING.score(x, at), at


FROM_SCORE = Exercise(
    "from-score",
    2,
    "Write from_score(x, score, level): the posterior mean E[x0 | x] from the score ∇ ln p_t(x).",
    lambda x, score, level: RING.denoise(x, level),
    _scores,
    from_score,
    "Solve score = (α·x0 − x)/σ² for x0.",
    (
        Wrong(
            lambda x, score, level: x + level.sigma**2 * score,
            "That is α·x0: divide by α. The form without it is for exploding noise, α = 1.",
        ),
        Wrong(
            lambda x, score, level: (x - level.sigma**2 * score) / level.alpha,
            "The score points towards the data, so it is added.",
        ),
        Wrong(
            lambda x, score, level: (x + level.sigma * score) / level.alpha,
            "One σ turns the score into −ε̂, a second one scales the noise: σ².",
        ),
    ),
    close=1e-9,
)

BUGS = ()
EXERCISES = (POSTERIOR_MEAN, SCORE, FROM_SCORE)
