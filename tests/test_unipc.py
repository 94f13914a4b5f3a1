"""UniPC beside diffusers' own, beside the mathematics, and beside what it must equal."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import (
    QUICK,
    Case,
    Corner,
    compare,
    dtypes,
    number_of_steps,
    schedule_options,
    theirs_of,
    thresholds,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FORMULAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A draw from the full product of options."""
    flag = st.booleans()
    options = draw(schedule_options())
    options["prediction_type"] = draw(st.sampled_from(["epsilon", "sample", "v_prediction"]))
    options["timestep_spacing"] = draw(st.sampled_from(["linspace", "leading", "trailing"]))
    options["steps_offset"] = draw(st.sampled_from([0, 0, 1, 2]))
    options["solver_order"] = draw(st.sampled_from([1, 2, 2, 3, 3]))
    options["lower_order_final"] = draw(st.sampled_from([True, True, False]))
    options["final_sigmas_type"] = draw(st.sampled_from(["zero", "sigma_min"]))
    types = ["bh2"] * (6 if options["final_sigmas_type"] == "zero" else 1) + [
        "bh1"
    ]  # bh1 to zero is refused
    options["solver_type"] = draw(st.sampled_from(types))
    options["predict_x0"] = draw(st.sampled_from([True, True, False]))
    if options["predict_x0"]:
        options |= draw(thresholds())
    else:
        options["final_sigmas_type"] = "sigma_min"
    if draw(flag):
        options["disable_corrector"] = draw(st.lists(st.integers(0, 30), max_size=6))
    formula = draw(st.sampled_from([None, *FORMULAS, "use_flow_sigmas"]))
    grid: dict[str, Any] = {
        "num_inference_steps": draw(number_of_steps(options["num_train_timesteps"]))
    }
    if formula is not None:
        options[formula] = True
    if formula == "use_flow_sigmas":
        grid = draw(flow_options(options, grid))
        if draw(flag):
            options["prediction_type"] = "flow_prediction"
    elif formula is not None and draw(flag):
        options["sigma_min"] = draw(st.sampled_from([None, 0.002, 0.1]))
        options["sigma_max"] = draw(st.sampled_from([None, 3.0, 200.0]))
    if formula == "use_karras_sigmas" and draw(flag):
        options["use_flow_sigmas"] = True
        if draw(flag):
            options["prediction_type"] = "flow_prediction"
    return Case("UniPCMultistep", options, grid, {}, draw(dtypes))


@st.composite
def flow_options(draw: st.DrawFn, options: dict[str, Any], grid: dict[str, Any]) -> dict[str, Any]:
    """Adds what only a flow has to the options; the arguments of set_timesteps."""
    flag = st.booleans()
    options["flow_shift"] = draw(st.sampled_from([1.0, 3.0, 0.7]))
    options["shift_terminal"] = draw(st.sampled_from([None, None, 0.1, 0.02]))
    if draw(flag):
        percent = draw(st.sets(st.integers(2, 100), min_size=1, max_size=12))
        grid = {"sigmas": np.array(sorted(percent, reverse=True)) / 100}
    if draw(flag):
        options["use_dynamic_shifting"] = True
        options["time_shift_type"] = draw(st.sampled_from(["exponential", "linear"]))
        grid = grid | {"mu": draw(st.sampled_from([0.5, 1.0, 1.15]))}
    return grid


def plain(case: Case) -> bool:
    """Whether the grid is one of training steps."""
    return not any(case.options.get(formula) for formula in FORMULAS)


def to_zero(case: Case) -> bool:
    return case.options["final_sigmas_type"] == "zero"


def extrapolates(case: Case) -> bool:
    """No lower order at the end, and more than one step to have an order."""
    return not case.options["lower_order_final"] and case.options["solver_order"] > 1


def begins_twice(case: Case) -> bool:
    """Whether the first two timesteps are cut to the same whole step."""
    theirs = theirs_of(case)
    theirs.set_timesteps(**case.grid)
    return len(theirs.timesteps) > 1 and bool(theirs.timesteps[0] == theirs.timesteps[1])


FAILURES = (
    "divides by zero",
    "raises AssertionError",
    "raises IndexError",
    "raises _LinAlgError",
    "outside 0..T-1",
    "repeats timesteps",
)
CORNERS = [
    *(
        Corner(
            failure,
            "solver_type 'bh1'",
            "the last step multiplies B(h), infinite for bh1, by the empty sum of order 1",
            lambda c: to_zero(c) and c.options["solver_type"] == "bh1",
        )
        for failure in FAILURES
    ),
    Corner(
        "outside 0..T-1",
        "sigmas must be",
        "one step of a flow starts at sigma 1, which cannot be stretched to end at shift_terminal",
        lambda c: c.options.get("shift_terminal") is not None and c.n == 1,
    ),
    Corner(
        "outside 0..T-1",
        "trailing",
        "np.arange(T, 0, -T/n) overshoots for some n: n + 1 entries, the last of them 0 - 1",
        lambda c: c.options["timestep_spacing"] == "trailing" and plain(c),
    ),
    Corner(
        "outside 0..T-1",
        "steps_offset",
        "leading spacing adds steps_offset to a grid that has no room for it",
        lambda c: c.options["timestep_spacing"] == "leading" and c.options["steps_offset"] > 0,
    ),
    Corner(
        "repeats timesteps",
        "repeats timesteps",
        "n + 1 points, and there are n training steps",
        lambda c: c.n == c.options["num_train_timesteps"],
    ),
    *(
        Corner(
            failure,
            "lower_order_final",
            "a slope is extrapolated to sigma 0, infinitely far in log-SNR",
            lambda c: to_zero(c) and extrapolates(c) and c.n != 1,
        )
        for failure in FAILURES
    ),
    *(
        Corner(
            failure,
            None,
            "the first two timesteps are one: diffusers begins at the second and runs off the end",
            begins_twice,
        )
        for failure in ("raises AssertionError", "raises IndexError")
    ),
    Corner(
        "divides by zero",
        None,
        "the last step has h = 0, and order 3 divides by it; ours returns x",
        lambda c: not to_zero(c) and extrapolates(c) and c.options["solver_order"] == 3,
    ),
    Corner(
        "raises ValueError",
        None,
        "the noise that a flow_prediction implies is not written down; ours is solved for",
        lambda c: c.options["prediction_type"] == "flow_prediction" and not c.options["predict_x0"],
    ),
]


def compare_case(case: Case) -> None:
    compare(case, CORNERS)


def test_every_step_of_a_trajectory_is_that_of_diffusers() -> None:
    settings(QUICK, max_examples=300)(given(cases())(compare_case))()


@pytest.mark.slow
def test_every_step_of_a_trajectory_is_that_of_diffusers_at_length() -> None:
    settings(QUICK, max_examples=4000, derandomize=False)(given(cases())(compare_case))()
