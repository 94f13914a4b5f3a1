"""Euler, ancestral Euler and Heun beside diffusers' own, and beside what they must equal."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import (
    QUICK,
    Case,
    Corner,
    compare,
    difference,
    dtypes,
    falling_timesteps,
    number_of_steps,
    ours_of,
    schedule_options,
    theirs_of,
    tolerance_of_dtype,
    trajectory,
)
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.order import FINE, GAUSSIAN, MIXTURE, order, variance_error
from minidiff.prediction import PREDICTION_TYPES
from minidiff.schedule import Level
from minidiff.schedulers import (
    SCHEDULERS,
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    Scheduler,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NAMES = ["EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete"]
FORMULAS = ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]
SPACINGS = ["linspace", "leading", "trailing"]
SHAPE = (2, 2, 3, 3)

# --- every option, every step --------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn, name: str) -> Case:
    """A draw from the full product of options."""
    heun = name == "HeunDiscrete"
    kinds = ["linear", "scaled_linear", "squaredcos_cap_v2"]
    options = draw(schedule_options(kinds + ["exp"] * heun, rescale=not heun))
    options["prediction_type"] = draw(st.sampled_from(["epsilon", "sample", "v_prediction"]))
    options["timestep_spacing"] = draw(st.sampled_from(SPACINGS))
    options["steps_offset"] = draw(st.sampled_from([0, 0, 1, 2]))
    formula = None
    if name != "EulerAncestralDiscrete":
        formula = draw(st.sampled_from([None, None, None, *FORMULAS]))
        if formula is not None:
            options[formula] = True
    if heun:
        options["clip_sample"] = draw(st.booleans())
        options["clip_sample_range"] = draw(st.sampled_from([0.5, 1.0, 3.0]))
    step_options = {}
    if name == "EulerDiscrete":
        options |= draw(euler_options(options["prediction_type"], formula))
        step_options = draw(churn_options())
    grid = draw(grids(name, options, formula))
    return Case(name, options, grid, step_options, draw(dtypes))


@st.composite
def euler_options(draw: st.DrawFn, prediction_type: str, formula: str | None) -> dict[str, Any]:
    """What only EulerDiscreteScheduler has."""
    options = {
        "interpolation_type": draw(st.sampled_from(["linear", "linear", "log_linear"])),
        "final_sigmas_type": draw(st.sampled_from(["zero", "sigma_min"])),
    }
    if prediction_type == "v_prediction":
        options["timestep_type"] = draw(st.sampled_from(["discrete", "continuous"]))
    if formula is not None:
        options["sigma_min"] = draw(st.sampled_from([None, 0.002, 0.1]))
        options["sigma_max"] = draw(st.sampled_from([None, 30.0, 200.0]))
    return options


@st.composite
def churn_options(draw: st.DrawFn) -> dict[str, float]:
    """The noise that a step adds and removes, half of the time."""
    if not draw(st.booleans()):
        return {}
    return {
        "s_churn": draw(st.sampled_from([0.5, 3.0, 40.0])),
        "s_tmin": draw(st.sampled_from([0.0, 0.05])),
        "s_tmax": draw(st.sampled_from([math.inf, 50.0])),
        "s_noise": draw(st.sampled_from([1.0, 1.007])),
    }


@st.composite
def grids(
    draw: st.DrawFn, name: str, options: dict[str, Any], formula: str | None
) -> dict[str, Any]:
    """The arguments of set_timesteps: mostly a number."""
    train_steps = options["num_train_timesteps"]
    kind = draw(st.integers(0, 9))
    continuous = options.get("timestep_type") == "continuous"
    if kind == 0 and name == "EulerDiscrete":
        return {"sigmas": draw(falling_sigmas())}
    if kind <= 1 and name != "EulerAncestralDiscrete" and formula is None and not continuous:
        whole = draw(falling_timesteps(train_steps))
        return {"timesteps": [t + 0.25 if t < train_steps - 1 else t for t in whole]}
    if kind == 2 and name == "HeunDiscrete":
        fewer = draw(st.integers(1, train_steps))
        return {
            "num_inference_steps": draw(number_of_steps(fewer)),
            "num_train_timesteps": fewer,
        }
    return {"num_inference_steps": draw(number_of_steps(train_steps))}


@st.composite
def falling_sigmas(draw: st.DrawFn) -> list[float]:
    """σ's of one's own choice, the end included."""
    exponents = draw(st.sets(st.integers(-40, 50), min_size=2, max_size=15))
    sigmas = [float(np.float32(math.exp(e / 10))) for e in sorted(exponents, reverse=True)]
    return sigmas[:-1] + [draw(st.sampled_from([0.0, sigmas[-1]]))]


def tolerance(case: Case) -> float:
    """How far apart two correct trajectories may be, relative to max(1, |x|).

    diffusers rounds Euler's samples to float32, so float64 agrees no better. In every class it adds
    (σ' − σ)·d to x, with both in float32: what is rounded off x at σ stays in x at σ', be that
    thousands of times smaller.
    """
    allowed = tolerance_of_dtype(case) if case.name == "HeunDiscrete" else 2e-5
    sigmas = sigmas_of(case)
    return max([allowed, *(2**-22 * a / max(b, 1) for a, b in itertools.pairwise(sigmas))])


def sigmas_of(case: Case) -> list[float]:
    theirs = theirs_of(case)
    theirs.set_timesteps(**case.grid)
    return theirs.sigmas.tolist()


def formula_of(case: Case) -> str | None:
    if "sigmas" in case.grid:
        return None
    return next((f for f in FORMULAS if case.options.get(f)), None)


def begins_twice(case: Case) -> bool:
    theirs = theirs_of(case)
    theirs.set_timesteps(**case.grid)
    return len(theirs.timesteps) > 1 and bool(theirs.timesteps[0] == theirs.timesteps[1])


def leaps(case: Case) -> bool:
    """Whether some step of an ancestral trajectory divides σ by more than a thousand."""
    return any(a > 1000 * b > 0 for a, b in itertools.pairwise(sigmas_of(case)))


CORNERS = [
    *(
        Corner(
            failure,
            "prediction_type 'sample'",
            "ancestral Euler has no line for prediction_type sample",
            lambda c: (
                c.name == "EulerAncestralDiscrete" and c.options["prediction_type"] == "sample"
            ),
        )
        for failure in ("raises NotImplementedError", "outside 0..T-1")
    ),
    Corner(
        "outside 0..T-1",
        "trailing",
        "np.arange(T, 0, -T/n) overshoots for some n: n + 1 entries, the last of them 0 - 1",
        lambda c: c.options["timestep_spacing"] == "trailing" and formula_of(c) is None,
    ),
    Corner(
        "outside 0..T-1",
        "steps_offset",
        "leading spacing adds steps_offset to a grid that has no room for it",
        lambda c: c.options["timestep_spacing"] == "leading" and c.options["steps_offset"] > 0,
    ),
    Corner(
        "raises IndexError",
        None,
        "sigmas above the trained ones share a timestep: diffusers begins at the second of them",
        begins_twice,
    ),
    Corner(
        "divides by zero",
        "cannot step back",
        "alpha_bar = 2^-24 at T-1 exceeds the one before it: the variance of the first step is < 0",
        lambda c: c.name == "EulerAncestralDiscrete" and sigmas_of(c)[0] < sigmas_of(c)[1],
    ),
    Corner(
        "divides by zero",
        None,
        "the variance down to which an ancestral step goes is rounded below 0; ours is 0",
        lambda c: c.name == "EulerAncestralDiscrete" and leaps(c),
    ),
]


def compare_case(case: Case) -> None:
    compare(case, CORNERS, tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_every_step_of_a_trajectory_is_that_of_diffusers(name: str) -> None:
    QUICK(given(cases(name))(compare_case))()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_step_of_a_trajectory_is_that_of_diffusers_at_length(name: str) -> None:
    settings(QUICK, max_examples=4000, derandomize=False)(given(cases(name))(compare_case))()


@pytest.mark.parametrize("name", NAMES)
def test_the_exact_reading_samples_or_refuses_whatever_the_options(name: str) -> None:
    def check(case: Case) -> None:
        scheduler = ours_of(case, compat="exact")
        try:
            scheduler.set_timesteps(**case.grid)
        except InvalidArgument as error:
            assert any(w in str(error) for w in ("zero terminal SNR", "steps_offset")), error
            return
        stages = 2 if name == "HeunDiscrete" else 1
        assert case.n is None or len(scheduler.timesteps) == stages * case.n - (stages - 1)
        assert all(torch.isfinite(x).all() for x in trajectory(scheduler, case))

    settings(QUICK, max_examples=100)(given(cases(name))(check))()
