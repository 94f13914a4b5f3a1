"""Exercises on a sampler of your making (notebook 14)."""

import torch

from minidiff.exact import GaussianMixture
from minidiff.lab.order import FINE, flow_end, flow_error
from minidiff.schedulers import DDIMScheduler, Scheduler
from minidiff.teach.exercise import Exercise, Wrong, noise, steps
from minidiff.teach.exercises.order import First, OldImage, Second


def table_row(now, nxt):
    kept = nxt.sigma / now.sigma
    return kept, nxt.alpha - kept * now.alpha


def _row(now, nxt):
    """Return the weights of x and x̂0 in DDIM's step, by probing it with basis vectors."""
    scheduler = DDIMScheduler(clip_sample=False, compat="exact")
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    found = []
    for x, x0 in ((one, zero), (zero, one)):
        eps = (x - now.alpha * x0) / now.sigma
        end = scheduler.update(x, x0, eps, now, nxt, None, eta=0.0, eps_from_x0=False)
        found.append(end.item())
    return tuple(found)


ROW = Exercise(
    "table-row",
    14,
    "Write table_row(now, nxt): the pair (A, B) with x' = A·x + B·x̂0 for DDIM without noise. Every "
    "linear sampler is such a table.",
    _row,
    lambda: [case[2:] for case in steps()],
    table_row,
    "Put ε̂ = (x − α·x̂0)/σ into x' = α'·x̂0 + σ'·ε̂, and collect terms.",
    (
        Wrong(
            lambda now, nxt: (nxt.sigma / now.sigma, nxt.alpha),
            "ε̂ contains x̂0 as well: subtract its part, (σ'/σ)·α.",
        ),
        Wrong(
            lambda now, nxt: (nxt.alpha, nxt.sigma),
            "Those are the weights of x̂0 and ε̂; the table has x and x̂0.",
        ),
        Wrong(
            lambda now, nxt: (nxt.alpha - nxt.sigma / now.sigma * now.alpha, nxt.sigma / now.sigma),
            "The two are exchanged: A is the weight of x.",
        ),
    ),
)


def better(answer, n):
    """Return True if a scheduler class has less than half of DDIM's error in n steps."""
    return flow_error(answer(**FINE), n) < flow_error(First(**FINE), n) / 2


def ends(answer, n):
    """Return the ends of paths by a scheduler class."""
    return flow_end(answer(**FINE), n)[0]


class Damped(Scheduler):
    def update(self, x, x0, eps, now, nxt, noise):
        return nxt.alpha * x0 + nxt.sigma * 0.99 * eps


OWN = Exercise(
    "own-sampler",
    14,
    "Write a Scheduler with less than half of DDIM's error on the exact mixture in 40 steps, with "
    "one evaluation per step.",
    lambda n: True,
    lambda: [(40,)],
    Second,
    "Earlier evaluations are in self.past, if you set history. README and notebook 07 have one.",
    (
        Wrong(First, "That is DDIM itself: use what it forgets, earlier evaluations."),
        Wrong(
            OldImage,
            "With ε̂ extrapolated, x̂0 has to be computed again: α·x̂0 + σ·ε̂ must be x.",
        ),
        Wrong(
            Damped,
            "DDIM with a little less noise may look cleaner; its error is larger.",
        ),
    ),
    measure=better,
    trace=ends,
)


def preserved(x, now, nxt, std):
    kept = (nxt.alpha**2 * std**2 + nxt.sigma**2) / (now.alpha**2 * std**2 + now.sigma**2)
    return kept**0.5 * x


def _preserved(x, now, nxt, std):
    return GaussianMixture([1.0], [[0.0]], [std]).flow(x, now, nxt)


FLOW = Exercise(
    "exact-flow",
    14,
    "Write preserved(x, now, nxt, std): where the probability flow carries x from now to nxt, for "
    "data N(0, std²). The exact solution that samplers are measured with.",
    _preserved,
    lambda: [(noise(7, 1, seed=i), *case[2:], 0.5) for i, case in enumerate(steps())],
    preserved,
    "x_t is Gaussian at every level. The flow stretches it: from which standard deviation to "
    "which?",
    (
        Wrong(
            lambda x, now, nxt, std: (
                (nxt.alpha**2 * std**2 + nxt.sigma**2) / (now.alpha**2 * std**2 + now.sigma**2) * x
            ),
            "That is the ratio of variances; x stretches with the standard deviations.",
        ),
        Wrong(
            lambda x, now, nxt, std: nxt.alpha / now.alpha * x,
            "That scales the image only: the noise part scales with σ'/σ.",
        ),
        Wrong(
            lambda x, now, nxt, std: (
                ((nxt.alpha * std + nxt.sigma) / (now.alpha * std + now.sigma)) * x
            ),
            "Variances of independent parts add, not standard deviations.",
        ),
    ),
)

BUGS = ()
EXERCISES = (ROW, OWN, FLOW)
