"""DPM-Solver singlestep beside diffusers' own, the mathematics, and what it must equal."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import (
    QUICK,
    Case,
    Corner,
    compare,
    dtypes,
    falling_timesteps,
    number_of_steps,
    schedule_options,
    theirs_of,
    thresholds,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.algorithm_types=dpmsolver:FutureWarning"),
]

FORMULAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A draw from the full product of options."""
    flag = st.booleans()
    options = draw(schedule_options(rescale=False))
    train_steps = options["num_train_timesteps"]
    options["prediction_type"] = draw(st.sampled_from(["epsilon", "sample", "v_prediction"]))
    options["solver_order"] = draw(st.sampled_from([1, 2, 2, 3, 3]))
    options["solver_type"] = draw(st.sampled_from(["midpoint", "heun"]))
    algorithms = ["dpmsolver++", "dpmsolver++", "sde-dpmsolver++", "dpmsolver"]
    options["algorithm_type"] = draw(st.sampled_from(algorithms))
    options["lower_order_final"] = draw(flag)
    ends = ["zero", "sigma_min"] if options["algorithm_type"] != "dpmsolver" else ["sigma_min"]
    options["final_sigmas_type"] = draw(st.sampled_from(ends))
    options["lambda_min_clipped"] = draw(st.sampled_from([-float("inf"), -9.0, -5.1, -1.0]))
    options["variance_type"] = draw(st.sampled_from([None] * 4 + ["learned", "learned_range"]))
    options |= draw(thresholds())
    formula = draw(st.sampled_from([None, None, *FORMULAS]))
    grid: dict[str, Any] = {"num_inference_steps": draw(number_of_steps(train_steps))}
    if formula is not None:
        options[formula] = True
    elif draw(st.integers(0, 3)) == 0:
        grid = {"timesteps": draw(falling_timesteps(train_steps))}
    if formula == "use_flow_sigmas":
        options["flow_shift"] = draw(st.sampled_from([1.0, 3.0, 0.7]))
        if draw(flag):
            options["prediction_type"] = "flow_prediction"
        if draw(flag):
            options["use_dynamic_shifting"] = True
            grid["mu"] = draw(st.sampled_from([0.5, 1.15]))
    return Case("DPMSolverSinglestep", options, grid, {}, draw(dtypes))


def begins_twice(case: Case) -> bool:
    """Whether the first two timesteps are cut to the same whole step."""
    theirs = theirs_of(case)
    theirs.set_timesteps(**case.grid)
    return len(theirs.timesteps) > 1 and bool(theirs.timesteps[0] == theirs.timesteps[1])


def to_zero(case: Case) -> bool:
    return case.options["final_sigmas_type"] == "zero"


def integrates_noise(case: Case) -> bool:
    return case.options["algorithm_type"] == "dpmsolver"


CORNERS = [
    Corner(
        "raises RuntimeError",
        None,
        "a learned variance is cut off for prediction_type epsilon alone; ours for every one",
        lambda c: (
            c.options["variance_type"] is not None and c.options["prediction_type"] != "epsilon"
        ),
    ),
    Corner(
        "raises RuntimeError",
        None,
        "thresholding the noise looks up the levels of timestep None; ours takes the present one",
        lambda c: integrates_noise(c) and c.options.get("thresholding", False),
    ),
    Corner(
        "raises ValueError",
        None,
        "the noise that a flow_prediction implies is not written down; ours is solved for",
        lambda c: integrates_noise(c) and c.options["prediction_type"] == "flow_prediction",
    ),
    Corner(
        "divides by zero",
        "cannot step back",
        "sigma_min is that of the beta schedule, and can lie above the last sigma of a flow",
        lambda c: c.options.get("use_flow_sigmas") and not to_zero(c),
    ),
    Corner(
        "repeats timesteps",
        "repeats timesteps",
        "n + 1 points, and there are fewer training steps (above lambda_min)",
        lambda c: c.timesteps is None,
    ),
    Corner(
        "raises IndexError",
        None,
        "the first two timesteps are one: diffusers begins at the second and runs off the end",
        begins_twice,
    ),
]


def compare_case(case: Case) -> None:
    compare(case, CORNERS)


def test_every_step_of_a_trajectory_is_that_of_diffusers() -> None:
    settings(QUICK, max_examples=300)(given(cases())(compare_case))()


@pytest.mark.slow
def test_every_step_of_a_trajectory_is_that_of_diffusers_at_length() -> None:
    settings(QUICK, max_examples=4000, derandomize=False)(given(cases())(compare_case))()
