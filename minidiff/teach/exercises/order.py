"""Exercises on the order of solvers (notebook 07)."""

import math

from minidiff.lab.order import FINE, flow_end, order
from minidiff.schedule import NoiseSchedule
from minidiff.schedulers import DPMSolverMultistepScheduler, Scheduler
from minidiff.teach.exercise import Exercise, Wrong, noise


def measured(error, error_of_half):
    return math.log2(error / error_of_half)


MEASURED = Exercise(
    "measured-order",
    7,
    "Write measured(error, error_of_half): the order p of a solver from its error, and from its "
    "error with steps of half the size. An error of order p falls 2ᵖ-fold.",
    lambda error, half: order({1: error, 2: half}.__getitem__, 1),
    lambda: [(0.1, 0.05), (1e-2, 2.6e-3), (3e-5, 3.6e-6)],
    measured,
    "Solve 2ᵖ = error / error_of_half for p.",
    (
        Wrong(lambda error, half: error / half, "That is 2ᵖ: take log₂."),
        Wrong(lambda error, half: math.log(error / half), "The logarithm to base 2, not e."),
        Wrong(
            lambda error, half: math.log2(half / error),
            "The fraction is upside down: the order of a solver that converges is positive.",
        ),
    ),
)


def two_m(x, x0, before, past, now, nxt):
    step, last = nxt.lam - now.lam, now.lam - past.lam
    ahead = x0 + step / last / 2 * (x0 - before)
    return nxt.sigma / now.sigma * x - nxt.alpha * math.expm1(-step) * ahead


def _two_m(x, x0, before, past, now, nxt):
    """Return DPM-Solver++'s second step on a grid of these levels."""
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="sample", lower_order_final=False,
        final_sigmas_type="zero", compat="exact",
    )  # fmt: skip
    known = scheduler.schedule.levels()
    times = [known.index(at) for at in (past, now, nxt)]
    scheduler.set_timesteps(timesteps=times)
    scheduler.step(before, times[0], x)
    return scheduler.step(x0, times[1], x).prev_sample


def _two_steps():
    known = NoiseSchedule.named("squaredcos_cap_v2").levels()
    for seed, times in enumerate(((900, 700, 600), (600, 450, 200), (300, 280, 100))):
        yield *(noise(6, 2, seed=3 * seed + i) for i in range(3)), *(known[t] for t in times)


def _extrapolated(weight):
    """Return 2M with another weight of the difference, a function of step and last step."""

    def answer(x, x0, before, past, now, nxt):
        step, last = nxt.lam - now.lam, now.lam - past.lam
        ahead = x0 + weight(step, last) * (x0 - before)
        return nxt.sigma / now.sigma * x - nxt.alpha * math.expm1(-step) * ahead

    return answer


TWO_M = Exercise(
    "2m",
    7,
    "Write two_m(x, x0, before, past, now, nxt): a step of DPM-Solver++ (2M). x0 was predicted at "
    "now, before at the level past; λ is level.lam. x' = σ'/σ·x − α'·(e^−h − 1)·D with h = λ' − λ; "
    "D is x̂0 extrapolated to the middle of the step.",
    _two_m,
    _two_steps,
    two_m,
    "The slope of x̂0 in λ is (x0 − before)/(λ − λ_past). Half a step further, it adds h/2 of it.",
    (
        Wrong(
            _extrapolated(lambda step, last: last / step / 2),
            "The two steps are exchanged: h belongs above, the last step below. Neighbouring steps "
            "become equal on a fine grid, so the order is still 2 and no slope shows it.",
            "k-diffusion#56",
        ),
        Wrong(
            _extrapolated(lambda step, last: step / last),
            "That extrapolates to the end of the step; the mean over it is at the middle.",
        ),
        Wrong(_extrapolated(lambda step, last: 0.0), "That is first order: before is not used."),
        Wrong(
            _extrapolated(lambda step, last: -step / last / 2),
            "The sign: the newer prediction minus the older one.",
        ),
        Wrong(
            _extrapolated(lambda step, last: 0.5),
            "Right only where both steps are equally long in λ.",
        ),
    ),
)


class Second(Scheduler):
    history = 1

    def update(self, x, x0, eps, now, nxt, noise):
        if self.past:
            r0, r1, r2 = (at.sigma / at.alpha for at in (self.past[-1].level, now, nxt))
            eps = eps + (eps - self.past[-1].eps) * (r2 - r1) / (r1 - r0) / 2
        x0 = (x - now.sigma * eps) / now.alpha
        return nxt.alpha * x0 + nxt.sigma * eps


class First(Scheduler):
    def update(self, x, x0, eps, now, nxt, noise):
        return nxt.alpha * x0 + nxt.sigma * eps


class FullStep(Second):
    def update(self, x, x0, eps, now, nxt, noise):
        if self.past:
            r0, r1, r2 = (at.sigma / at.alpha for at in (self.past[-1].level, now, nxt))
            eps = eps + (eps - self.past[-1].eps) * (r2 - r1) / (r1 - r0)
        x0 = (x - now.sigma * eps) / now.alpha
        return nxt.alpha * x0 + nxt.sigma * eps


class OldImage(Second):
    def update(self, x, x0, eps, now, nxt, noise):
        if self.past:
            r0, r1, r2 = (at.sigma / at.alpha for at in (self.past[-1].level, now, nxt))
            eps = eps + (eps - self.past[-1].eps) * (r2 - r1) / (r1 - r0) / 2
        return nxt.alpha * x0 + nxt.sigma * eps


def slope(answer, n):
    """Return the order of a scheduler class between n and 2n steps."""

    def error(count):
        end, truth = flow_end(answer(**FINE), count)
        return (end - truth).abs().max().item()

    return order(error, n)


def ends(answer, n):
    """Return the ends of paths by a scheduler class, to recognize it."""
    return flow_end(answer(**FINE), 30)[0]


SECOND = Exercise(
    "second-order",
    7,
    "Write a Scheduler with history = 1 whose order is 2, measured between 120 and 240 steps. "
    "self.past[-1] has the eps and the level of the evaluation before.",
    lambda n: 2.0,
    lambda: [(120,)],
    Second,
    "Adams and Bashforth: extrapolate ε̂, along r = σ/α, to the middle of the step.",
    (
        Wrong(First, "That is DDIM, of first order: use self.past."),
        Wrong(FullStep, "You extrapolate to the end of the step; the mean is at its middle."),
        Wrong(
            OldImage,
            "x̂0 still belongs to the old ε̂: compute it again from x and the new one.",
        ),
    ),
    close=0.1,
    measure=slope,
    trace=ends,
)

BUGS = ()
EXERCISES = (MEASURED, TWO_M, SECOND)
