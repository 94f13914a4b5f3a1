"""DDIM inversion: diffusers' trajectory, and sampling back."""

import diffusers
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
    network,
    number_of_steps,
    our_scheduler,
    schedule_options,
    their_scheduler,
    trajectory,
)

from minidiff.errors import InvalidArgument
from minidiff.lab.order import FINE, MIXTURE, order
from minidiff.prediction import PREDICTION_TYPES
from minidiff.schedule import CLEAN
from minidiff.schedulers import DDIMInverseScheduler, DDIMScheduler

SHAPE = (2, 2, 3, 3)


# --- beside diffusers ---------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw from the full product of options."""
    options = draw(schedule_options())
    train_steps = options["num_train_timesteps"]
    options["clip_sample"] = draw(st.booleans())
    options["clip_sample_range"] = draw(st.sampled_from([0.5, 1.0, 3.0]))
    options["set_alpha_to_one"] = draw(st.booleans())
    options["prediction_type"] = draw(st.sampled_from(["epsilon", "sample", "v_prediction"]))
    options["timestep_spacing"] = draw(st.sampled_from(["leading", "trailing"]))
    options["steps_offset"] = draw(st.sampled_from([0, 0, 1, 2]))
    grid = {"num_inference_steps": draw(number_of_steps(train_steps))}
    return Case("DDIMInverse", options, grid, {}, draw(dtypes))


CORNERS = [
    Corner(
        "outside 0..T-1",
        "trailing",
        "np.arange(T, 0, -T/n) overshoots for some n: n + 1 entries, the first of them 0 - 1",
        lambda c: c.options["timestep_spacing"] == "trailing",
    ),
    Corner(
        "outside 0..T-1",
        "steps_offset",
        "leading spacing adds steps_offset to a grid that has no room for it",
        lambda c: c.options["timestep_spacing"] == "leading" and c.options["steps_offset"] > 0,
    ),
    Corner(
        "divides by zero",
        "set_alpha_to_one",
        "eps = (x - x0)/0 in a clean sample",
        lambda c: c.options["prediction_type"] == "sample" and c.options["set_alpha_to_one"],
    ),
]


def compare_case(case: Case) -> None:
    compare(case, CORNERS)


@QUICK
@given(cases())
def test_every_step_of_a_trajectory_equals_diffusers(case: Case) -> None:
    compare_case(case)


@pytest.mark.slow
@settings(QUICK, max_examples=4000, derandomize=False)
@given(cases())
def test_every_step_of_a_trajectory_equals_diffusers_at_length(case: Case) -> None:
    compare_case(case)


@settings(QUICK, max_examples=100)
@given(cases())
def test_the_exact_reading_inverts_or_refuses_whatever_the_options(case: Case) -> None:
    scheduler = our_scheduler(case, compat="exact")
    refusal = ""
    try:
        scheduler.set_timesteps(**case.grid)
    except InvalidArgument as error:
        refusal = str(error)
    if refusal:
        assert "steps_offset" in refusal or "set_alpha_to_one" in refusal
        return
    assert len(scheduler.timesteps) == case.n
    assert bool((scheduler.timesteps.diff() >= 0).all())
    assert all(torch.isfinite(x).all() for x in trajectory(scheduler, case))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_timesteps_equal_diffusers_or_refused_for_every_number_of_steps(
    spacing: str,
) -> None:
    mine = DDIMInverseScheduler(timestep_spacing=spacing)
    theirs = diffusers.DDIMInverseScheduler(timestep_spacing=spacing)
    assert mine.timesteps.tolist() == theirs.timesteps.tolist()
    refused = 0
    for n in range(1, 1001):
        theirs.set_timesteps(n)
        try:
            mine.set_timesteps(n)
        except InvalidArgument:
            refused += 1
            assert theirs.timesteps[0] < 0
        else:
            assert mine.timesteps.tolist() == mine.grid == theirs.timesteps.tolist()
    assert refused == (62 if spacing == "trailing" else 0)


def test_any_part_of_an_inversion_can_be_repeated_as_in_diffusers() -> None:
    """It keeps no count: an edit may go up halfway, and up again, without set_timesteps."""
    case = Case("DDIMInverse", {}, {"num_inference_steps": 20}, {}, torch.float64)
    f, states = network(case), []
    for scheduler in (our_scheduler(case), their_scheduler(case)):
        scheduler.set_timesteps(20)
        x = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(SHAPE)
        for t in [*scheduler.timesteps[:12], *scheduler.timesteps[3:9]]:
            x = scheduler.step(f(x, t), t, x).prev_sample
        states.append(x)
    assert difference(*states) < 1e-6


def test_the_predicted_clean_sample_equals_diffusers() -> None:
    x, out = torch.randn(SHAPE), torch.randn(SHAPE)
    predicted = []
    for scheduler in (DDIMInverseScheduler(), diffusers.DDIMInverseScheduler()):
        scheduler.set_timesteps(20)
        predicted.append(scheduler.step(out, 500, x).pred_original_sample)
        assert torch.equal(scheduler.step(out, 500, x, return_dict=False)[1], predicted[-1])
    assert difference(*predicted) < 1e-6


# --- beside the mathematics ---------------------------------------------------------------------


def pair(**options: object) -> tuple[DDIMScheduler, DDIMInverseScheduler]:
    """Return DDIM and its inverse under the exact reading."""
    options = {"clip_sample": False, "compat": "exact"} | options
    return DDIMScheduler(**options), DDIMInverseScheduler(**options)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("n", [1, 2, 7, 50, 333])
def test_inversion_after_generation_returns_exactly_for_a_constant_eps(
    n: int, set_alpha_to_one: bool, spacing: str
) -> None:
    down, up = pair(timestep_spacing=spacing, set_alpha_to_one=set_alpha_to_one)
    start = torch.linspace(-2, 2, 36, dtype=torch.float64).reshape(SHAPE)
    eps = torch.randn(SHAPE, dtype=torch.float64)
    x, there, back = start, [start], []
    for scheduler, states in ((down, there), (up, back)):
        scheduler.set_timesteps(n)
        for t in scheduler.grid:
            x = scheduler.step(eps, t, x).prev_sample
            states.append(x)
    for a, b in zip(there[:-1], back[::-1], strict=True):  # not only the ends
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_inversion_converges_to_the_flow_with_order_1(kind: str) -> None:
    """It is Euler's method for the same equation, from the other end."""
    _, up = pair(**FINE, prediction_type=kind, timestep_spacing="trailing")
    data = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]

    def error(n: int) -> float:
        up.set_timesteps(n)
        x = data
        for t, level in zip(up.grid, up.levels, strict=False):
            out = up.target(MIXTURE.denoise(x, level), MIXTURE.noise(x, level), level)
            x = up.step(out, t, x).prev_sample
        return (x - MIXTURE.flow(data, up.levels[0], up.levels[-1])).abs().max().item()

    assert order(error, 500) == pytest.approx(1, abs=0.15)


def test_prediction_types_agree_when_fed_converted_outputs() -> None:
    results = []
    for kind in PREDICTION_TYPES:
        _, up = pair(prediction_type=kind, set_alpha_to_one=False)
        up.set_timesteps(20)
        x = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
        for t, level in zip(up.grid, up.levels, strict=False):
            out = up.target(MIXTURE.denoise(x, level), MIXTURE.noise(x, level), level)
            x = up.step(out, t, x).prev_sample
        results.append(x)
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [20, 50, 60])
def test_evaluating_the_network_at_the_level_of_x_stays_closer_to_the_flow(n: int) -> None:
    """In the root mean square over the data; diffusers evaluates it at the next noisier level.

    Not everywhere: beyond two standard deviations diffusers' result is closer.
    """
    missed = {}
    for compat in ("exact", "diffusers"):
        _, up = pair(compat=compat, timestep_spacing="trailing")
        up.set_timesteps(n)
        x = data = MIXTURE.sample(1000, torch.Generator().manual_seed(0))
        for t, exact in zip(up.grid, up.levels, strict=False):
            level = exact if compat == "exact" else up.level(t)
            x = up.step(MIXTURE.noise(x, level), t, x).prev_sample
        error = x - MIXTURE.flow(data, CLEAN, up.levels[-1])
        missed[compat] = error.square().mean().sqrt().item()
    assert missed["diffusers"] > 1.7 * missed["exact"]


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"timestep_spacing": "linspace"}, "timestep_spacing"),
        ({"prediction_type": "noise"}, "prediction_type"),
        ({"clip_sample_range": -1.0}, "clip_sample_range"),
        ({"clip_sample": "yes"}, "clip_sample"),
        ({"steps_offset": 0.5}, "steps_offset"),
        ({"set_alpha_to_zero": True}, "set_alpha_to_zero"),  # deprecated in diffusers
        ({"thresholding": True}, "thresholding"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(options: dict, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        DDIMInverseScheduler(**options)


@pytest.mark.parametrize("compat", ["exact", "diffusers"])
@pytest.mark.parametrize(
    ("options", "n", "named"),
    [
        ({}, 0, "num_inference_steps"),
        ({}, 1001, "num_inference_steps"),
        ({}, 2.5, "num_inference_steps"),
        ({}, None, "num_inference_steps"),
        ({"steps_offset": 1}, 1000, "steps_offset"),
        ({"prediction_type": "sample"}, 10, "set_alpha_to_one"),
    ],
)
def test_a_grid_out_of_range_is_refused_by_name(
    options: dict, n: object, named: str, compat: str
) -> None:
    with pytest.raises(InvalidArgument, match=named):
        DDIMInverseScheduler(**options, compat=compat).set_timesteps(n)


@pytest.mark.parametrize("compat", ["exact", "diffusers"])
def test_steps_that_cannot_be_taken_are_refused(compat: str) -> None:
    scheduler, x = DDIMInverseScheduler(compat=compat), torch.zeros(SHAPE)
    with pytest.raises(InvalidArgument, match="call set_timesteps"):
        scheduler.step(x, 0, x)
    scheduler.set_timesteps(10)
    with pytest.raises(InvalidArgument, match="timestep"):
        scheduler.step(x, 1000, x)
    with pytest.raises(InvalidArgument, match="model_output must have the shape of sample"):
        scheduler.step(x[:1], 0, x)
