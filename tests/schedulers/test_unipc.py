"""UniPC against diffusers' own, and its exact reading against mathematics."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixture_runs import assert_same, run
from parity import (
    QUICK,
    Case,
    Corner,
    compare,
    difference,
    diffusers,
    dtypes,
    initial_sample,
    network,
    number_of_steps,
    our_scheduler,
    sample_or_refuse,
    schedule_options,
    their_scheduler,
    thresholds,
)

from minidiff.errors import InvalidArgument
from minidiff.lab.order import FINE, flow_error, order
from minidiff.prediction import PREDICTION_TYPES
from minidiff.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FORMULAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw from the full product of options."""
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
    """Return whether the grid is one of training steps."""
    return not any(case.options.get(formula) for formula in FORMULAS)


def to_zero(case: Case) -> bool:
    return case.options["final_sigmas_type"] == "zero"


def extrapolates(case: Case) -> bool:
    """No lower order at the end, and more than one step to have an order."""
    return not case.options["lower_order_final"] and case.options["solver_order"] > 1


def begins_twice(case: Case) -> bool:
    """Return whether the first two timesteps are cut to the same whole step."""
    theirs = their_scheduler(case)
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


def test_every_step_of_a_trajectory_equals_diffusers() -> None:
    settings(QUICK, max_examples=200)(given(cases())(compare_case))()


@pytest.mark.slow
def test_every_step_of_a_trajectory_equals_diffusers_at_length() -> None:
    settings(QUICK, max_examples=4000, derandomize=False)(given(cases())(compare_case))()


def test_the_exact_reading_samples_or_refuses_whatever_the_options() -> None:
    def check(case: Case) -> None:
        sample_or_refuse(case, "zero terminal SNR|steps_offset|lower_order_final|last below 1")

    settings(QUICK, max_examples=100)(given(cases())(check))()


@pytest.mark.parametrize("solver_order", [1, 2, 3])
@pytest.mark.parametrize("begin", [0, 1, 4, 9])
def test_sampling_from_the_middle_of_the_grid_and_once_more_equals_diffusers(
    solver_order: int, begin: int
) -> None:
    """As image-to-image does: noise up to an entry, then step from there."""
    case = Case("UniPCMultistep", {"solver_order": solver_order}, {}, {}, torch.float64)
    mine, theirs, f = our_scheduler(case), their_scheduler(case), network(case)
    image, noise = initial_sample(case, mine), initial_sample(case, mine).flip(2)
    for n in (10, 13):  # the second time as if there had been no first
        results = []
        for scheduler in (mine, theirs):
            scheduler.set_timesteps(n)
            scheduler.set_begin_index(begin)
            x = scheduler.add_noise(image, noise, scheduler.timesteps[begin : begin + 1])
            results.append([x])
            for t in scheduler.timesteps[begin:]:
                x = scheduler.step(f(x, t), t, x).prev_sample
                results[-1].append(x)
                if t != scheduler.timesteps[-1]:
                    results[-1].append(scheduler.add_noise(image, noise, t[None]))
        assert len(results[0]) == 2 * (n - begin)
        assert max(map(difference, *results)) < 1e-6


def test_constructor_and_methods_take_diffusers_arguments_with_its_defaults() -> None:
    for name, added in (("__init__", ["compat"]), ("set_timesteps", []), ("step", ["generator"])):
        mine, theirs = (
            inspect.signature(getattr(cls, name)).parameters
            for cls in (UniPCMultistepScheduler, diffusers.UniPCMultistepScheduler)
        )
        assert list(mine) == [*theirs, *added]
        assert all(mine[key].default == theirs[key].default for key in theirs)


def test_the_list_of_uncorrected_steps_is_not_shared() -> None:
    given = [3]
    one, two = UniPCMultistepScheduler(), UniPCMultistepScheduler()
    three = UniPCMultistepScheduler(disable_corrector=given)
    one.disable_corrector.append(1)
    given.append(4)
    assert (two.disable_corrector, three.disable_corrector) == ([], [3])


# --- mathematics --------------------------------------------------------------------------------

SAMPLE = FINE | {"prediction_type": "sample"}
NOISE = FINE | {"predict_x0": False, "final_sigmas_type": "sigma_min"}
NEVER = {"disable_corrector": list(range(1000))}


@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("integrand", [SAMPLE, NOISE], ids=["x0", "noise"])
@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("corrected", [False, True])
def test_the_predictor_has_order_p_and_the_corrector_one_more(
    p: int, corrected: bool, integrand: dict, solver_type: str
) -> None:
    options = integrand | {"solver_order": p, "solver_type": solver_type, "compat": "exact"}
    expected, starts = (p + 1, p) if corrected else (p, p - 1)
    scheduler = UniPCMultistepScheduler(**options, **({} if corrected else NEVER))
    measured = order(lambda n: flow_error(scheduler, n, exact_starts=starts), 80)
    assert measured == pytest.approx(expected, abs=0.15)


EXACT = {"compat": "exact", "prediction_type": "v_prediction"}


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("n", [2, 7, 14, 50])
def test_the_predictor_of_order_1_is_ddim_and_of_2_and_3_dpm_solver(n: int, schedule: str) -> None:
    """With bh2, 2M's "midpoint" is UniP-2; UniP-3 and 3M integrate one polynomial exactly."""
    options = EXACT | {"beta_schedule": schedule}
    others = [
        DDIMScheduler(**options, clip_sample=False),
        DPMSolverMultistepScheduler(**options, solver_order=2),
        DPMSolverMultistepScheduler(**options, solver_order=3),
    ]
    for p, other in enumerate(others, 1):
        if p == 3 and n >= 15:  # there 3M does not shorten its last step but one
            continue
        mine = UniPCMultistepScheduler(**options, **NEVER, solver_order=p)
        mine.set_timesteps(n)
        same_grid = {"timesteps": mine.grid}
        states = run(mine, "v_prediction", {"num_inference_steps": n})
        assert_same(states, run(other, "v_prediction", same_grid))


@pytest.mark.parametrize("n", [3, 20, 200])
def test_the_choice_of_b_matters_only_where_one_point_makes_the_slope(n: int) -> None:
    """B(h) cancels where ρ solves the whole system; ρ = ½ of a single point does not know it."""
    shared = EXACT | {"solver_order": 3, "lower_order_final": False, "disable_corrector": [0, 1]}
    pair = [
        UniPCMultistepScheduler(**shared, solver_type=kind, final_sigmas_type="sigma_min")
        for kind in ("bh1", "bh2")
    ]
    for scheduler in pair:
        scheduler.set_timesteps(n)
    agree, generator = [], torch.Generator().manual_seed(0)
    for t in pair[0].grid:
        x, out = torch.randn(2, 1, 50, generator=generator, dtype=torch.float64)
        first, second = (scheduler.step(out, t, x).prev_sample for scheduler in pair)
        agree.append(difference(first, second) < 1e-10)
    assert agree == [True, False] + [True] * (n - 2)


@pytest.mark.parametrize("predict_x0", [True, False])
def test_prediction_types_agree_when_fed_converted_outputs(predict_x0: bool) -> None:
    shared = {"compat": "exact", "predict_x0": predict_x0, "final_sigmas_type": "sigma_min"}
    results = [
        run(
            UniPCMultistepScheduler(**shared, prediction_type=kind, solver_order=3),
            kind,
            {"num_inference_steps": 12},
        )
        for kind in PREDICTION_TYPES
    ]
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("options", [{}, {"solver_order": 3}, {"solver_type": "bh1"}, NEVER])
@pytest.mark.parametrize("n", [1, 2, 13, 30])
def test_the_last_step_lands_on_the_prediction_of_the_clean_sample(options: dict, n: int) -> None:
    scheduler = UniPCMultistepScheduler(**options, compat="exact")
    scheduler.set_timesteps(n)
    x = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
    for t in scheduler.grid:
        x, x0 = scheduler.step(torch.tanh(x), t, x, return_dict=False)
    torch.testing.assert_close(x, x0, rtol=1e-14, atol=1e-14)


def test_pure_noise_has_no_weight_in_the_steps_after_it() -> None:
    """At zero terminal SNR λ = −∞: order 3 takes its second step with order 1, like order 1."""
    runs = []
    for p in (1, 2, 3):
        scheduler = UniPCMultistepScheduler(**EXACT, rescale_betas_zero_snr=True, solver_order=p)
        runs.append(run(scheduler, "v_prediction", {"num_inference_steps": 8}))
        assert scheduler.levels[0].alpha == 0
    for i in (0, 1):
        assert torch.equal(runs[0][i], runs[1][i])
        assert torch.equal(runs[0][i], runs[2][i])
    assert difference(runs[0][2], runs[1][2]) > 1e-4
    assert difference(runs[1][3], runs[2][3]) > 1e-4


# --- bad input ----------------------------------------------------------------------------------

FLOW = {"use_flow_sigmas": True}
DYNAMIC = FLOW | {"use_dynamic_shifting": True}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"solver_p": DDIMScheduler()}, "solver_p"),
        ({"solver_order": 4}, "solver_order"),
        ({"solver_order": 0}, "solver_order"),
        ({"solver_type": "midpoint"}, "solver_type"),
        ({"solver_type": "bh1"}, "solver_type 'bh1' with final_sigmas_type 'zero'"),
        ({"predict_x0": False}, "predict_x0=False cannot step to sigma 0"),
        (
            {"predict_x0": False, "final_sigmas_type": "sigma_min", "thresholding": True},
            "thresholding acts on x0",
        ),
        ({"predict_x0": 1}, "predict_x0"),
        ({"disable_corrector": 3}, "disable_corrector"),
        ({"disable_corrector": [-1]}, "disable_corrector"),
        ({"disable_corrector": [0.5]}, "disable_corrector"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "exclude each other"),
        ({"use_exponential_sigmas": True, "use_flow_sigmas": True}, "exclude each other"),
        ({"use_beta_sigmas": True, "use_flow_sigmas": True}, "exclude each other"),
        ({"sigma_min": 0.1}, "sigma_min=0.1 needs one of"),
        ({"sigma_max": 80.0}, "sigma_max=80.0 needs one of"),
        ({"sigma_max": 80.0} | FLOW, "sigma_max=80.0 needs one of"),
        ({"sigma_max": 0.0, "use_karras_sigmas": True}, "sigma_max"),
        ({"shift_terminal": 0.1}, "shift_terminal=0.1 needs use_flow_sigmas"),
        ({"shift_terminal": 1.0} | FLOW, "shift_terminal"),
        ({"shift_terminal": 0.1, "use_karras_sigmas": True} | FLOW, "shift_terminal"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting=True needs use_flow_sigmas"),
        ({"time_shift_type": "quadratic"}, "time_shift_type"),
        ({"flow_shift": 0}, "flow_shift"),
        ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
        ({"solver": "bh2"}, "solver"),
    ],
)
def test_an_option_that_cannot_work_is_refused_by_name(options: dict, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        UniPCMultistepScheduler(**options)


@pytest.mark.parametrize(
    ("options", "grid", "named"),
    [
        ({}, {}, "num_inference_steps"),
        ({}, {"num_inference_steps": 0}, "num_inference_steps"),
        ({}, {"num_inference_steps": 1001}, "num_inference_steps"),
        ({}, {"num_inference_steps": 2.5}, "num_inference_steps"),
        ({}, {"num_inference_steps": 5, "mu": 1.0}, "mu=1.0 needs use_dynamic_shifting"),
        ({}, {"sigmas": [0.9, 0.5]}, "sigmas need use_flow_sigmas"),
        ({"use_karras_sigmas": True} | FLOW, {"sigmas": [0.9, 0.5]}, "sigmas need use_flow_sigmas"),
        (FLOW, {"num_inference_steps": 2, "sigmas": [0.9, 0.5]}, "not both"),
        (FLOW, {"sigmas": []}, "sigmas"),
        (FLOW, {"sigmas": [0.5, 0.9]}, "sigmas must be strictly falling"),
        (FLOW, {"sigmas": [0.5, 0.5]}, "sigmas must be strictly falling"),
        (FLOW, {"sigmas": [0.5 + 1e-12, 0.5]}, "sigmas must be strictly falling"),
        (FLOW, {"sigmas": [0.5, 0.0]}, "sigmas must be above 0"),
        (FLOW, {"sigmas": [1.5, 0.5]}, "sigmas"),
        (FLOW, {"sigmas": [0.5, float("nan")]}, "sigmas"),
        (DYNAMIC, {"num_inference_steps": 5}, "mu must be given"),
        (DYNAMIC, {"num_inference_steps": 5, "mu": float("nan")}, "mu"),
        (DYNAMIC | {"time_shift_type": "linear"}, {"num_inference_steps": 5, "mu": 0.0}, "mu"),
        (DYNAMIC | {"time_shift_type": "linear"}, {"num_inference_steps": 5, "mu": -1.0}, "mu"),
        ({"lower_order_final": False}, {"num_inference_steps": 5}, "lower_order_final=False"),
        ({"sigma_min": 1e3, "use_karras_sigmas": True}, {"num_inference_steps": 5}, "sigma_min"),
    ],
)
def test_an_impossible_sampling_grid_is_refused_by_name(
    options: dict, grid: dict, named: str
) -> None:
    scheduler = UniPCMultistepScheduler(**options)
    with pytest.raises(InvalidArgument, match=named):
        scheduler.set_timesteps(**grid)


def test_noise_cannot_be_integrated_from_pure_noise() -> None:
    scheduler = UniPCMultistepScheduler(
        **EXACT, predict_x0=False, final_sigmas_type="sigma_min", rescale_betas_zero_snr=True
    )
    with pytest.raises(InvalidArgument, match="predict_x0=False cannot start"):
        scheduler.set_timesteps(5)


def test_the_exact_reading_samples_to_the_end_with_bh1_too() -> None:
    scheduler = UniPCMultistepScheduler(solver_type="bh1", compat="exact")
    states = run(scheduler, "epsilon", {"num_inference_steps": 5})
    assert all(torch.isfinite(x).all() for x in states)


@pytest.mark.parametrize("foreign", ["midpoint", "heun", "logrho"])
def test_a_solver_type_that_unipc_lacks_becomes_bh2(foreign: str) -> None:
    config = {"solver_type": foreign}
    assert UniPCMultistepScheduler.from_config(config).config.solver_type == "bh2"
    theirs = diffusers.UniPCMultistepScheduler.from_config(config)
    assert theirs.config.solver_type == "bh2"
