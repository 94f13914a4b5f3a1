"""Exercises on flow matching, as a change of clock (notebook 08)."""

import torch

from minidiff.schedule import Level
from minidiff.schedulers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from minidiff.teach.exercise import Exercise, Wrong, noise

FLOW = FlowMatchEulerDiscreteScheduler(compat="exact")
VE = EulerDiscreteScheduler(compat="exact")


def _line(sigma):
    return Level(1 - sigma, sigma)


def flow_step(x, velocity, sigma, sigma_next):
    return x + (sigma_next - sigma) * velocity


def _flow_step(x, velocity, sigma, sigma_next):
    x0, eps = FLOW.split(velocity, x, _line(sigma))
    return FLOW.update(x, x0, eps, _line(sigma), _line(sigma_next), None, tokens=None)


def _moves():
    for seed, (sigma, sigma_next) in enumerate(((1.0, 0.7), (0.7, 0.2), (0.2, 0.0))):
        yield noise(5, 2, seed=2 * seed), noise(5, 2, seed=2 * seed + 1), sigma, sigma_next


STEP = Exercise(
    "flow-step",
    8,
    "Write flow_step(x, velocity, sigma, sigma_next): Euler's step along dx/dσ = velocity, from "
    "σ to the smaller σ'. The velocity is ε − x0.",
    _flow_step,
    _moves,
    flow_step,
    "The change of x is the velocity times the change of σ. Which sign has that?",
    (
        Wrong(
            lambda x, velocity, sigma, sigma_next: x + (sigma - sigma_next) * velocity,
            "The direction is turned around: σ falls, so σ' − σ is negative.",
            "rectified-flow-pytorch#14, splitmeanflow#2",
        ),
        Wrong(
            lambda x, velocity, sigma, sigma_next: x - velocity,
            "The size of the step is missing: this jumps over a length of 1.",
        ),
        Wrong(
            lambda x, velocity, sigma, sigma_next: x - sigma * velocity,
            "That goes to σ = 0 at once: it is x̂0.",
        ),
        Wrong(
            lambda x, velocity, sigma, sigma_next: x + sigma_next * velocity,
            "σ' is a place; the step is a difference.",
        ),
    ),
)


def to_preserving(x, sigma):
    return x / ((1 - sigma) ** 2 + sigma**2) ** 0.5


def _to_preserving(x, sigma):
    exploding = x / (1 - sigma)
    return VE.scaled_input(exploding, Level(1.0, sigma / (1 - sigma)))


def _places():
    for seed, sigma in enumerate((0.05, 0.3, 0.5, 0.9)):
        yield noise(5, 2, seed=seed), sigma


CLOCK = Exercise(
    "flow-to-vp",
    8,
    "Write to_preserving(x, sigma): the variance-preserving sample with the image and the noise "
    "of x = (1 − σ)·x0 + σ·ε, so that α² + σ² = 1.",
    _to_preserving,
    _places,
    to_preserving,
    "Divide by the length of (1 − σ, σ).",
    (
        Wrong(
            lambda x, sigma: x / (1 - sigma),
            "That is the exploding sample x0 + σ/(1 − σ)·ε.",
        ),
        Wrong(
            lambda x, sigma: x / ((1 - sigma) + sigma),
            "The weights already add to 1; it is their squares that should.",
        ),
        Wrong(
            lambda x, sigma: x / ((1 - sigma) ** 2 + sigma**2),
            "The root is missing: the length of (1 − σ, σ), not its square.",
        ),
        Wrong(
            lambda x, sigma: x * ((1 - sigma) ** 2 + sigma**2) ** 0.5,
            "Divide; the sample on the line is too short, not too long.",
        ),
    ),
)


def ratio_of(sigma):
    return sigma / (1 - sigma)


def _ratio(sigma):
    """Return σ/α where the flow's sample has the log-SNR λ: e^−λ."""
    return torch.tensor(-_line(sigma).lam, dtype=torch.float64).exp().item()


RATIO = Exercise(
    "flow-ratio",
    8,
    "Write ratio_of(sigma): σ/α of the flow's level, the clock that all noise schedules share.",
    _ratio,
    lambda: [(sigma,) for sigma in (0.05, 0.3, 0.5, 0.9)],
    ratio_of,
    "What are the scale of the noise and that of the image at σ?",
    (
        Wrong(lambda sigma: sigma, "The image has the scale 1 − σ, not 1."),
        Wrong(
            lambda sigma: (1 - sigma) / sigma,
            "Upside down: this is signal to noise.",
        ),
        Wrong(
            lambda sigma: sigma / (1 - sigma**2) ** 0.5,
            "That is for variance-preserving levels; on the line α = 1 − σ.",
        ),
    ),
)

BUGS = ()
EXERCISES = (STEP, CLOCK, RATIO)
