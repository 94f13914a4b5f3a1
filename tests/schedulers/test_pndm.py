"""PNDM: diffusers' trajectory, the order of its two warm-ups, and DDIM inside it."""

import math
from itertools import pairwise

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
    Rounding,
    compare,
    difference,
    dtypes,
    network,
    number_of_steps,
    our_scheduler,
    schedule_options,
    their_scheduler,
    trajectory,
    visited_levels,
)
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.lab.order import FINE, MIXTURE, order
from minidiff.prediction import PREDICTION_TYPES, target
from minidiff.schedule import Level
from minidiff.schedulers import DDIMScheduler, PNDMScheduler, Scheduler
from minidiff.schedulers.core.quirks import departing

SHAPE = (2, 2, 3, 3)


# --- beside diffusers ---------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw from the full product of options."""
    options = draw(schedule_options(rescale=False))
    train_steps = options["num_train_timesteps"]
    options["skip_prk_steps"] = draw(st.booleans())
    options["set_alpha_to_one"] = draw(st.booleans())
    options["prediction_type"] = draw(
        st.sampled_from(["epsilon"] * 3 + ["v_prediction"] * 3 + ["sample"])
    )
    options["timestep_spacing"] = draw(st.sampled_from(["linspace", "leading", "trailing"]))
    options["steps_offset"] = draw(st.sampled_from([0, 0, 1, 2]))
    grid = {"num_inference_steps": draw(number_of_steps(train_steps))}
    return Case("PNDM", options, grid, {}, draw(dtypes))


def too_few_for_runge_kutta(case: Case) -> bool:
    return not case.options["skip_prk_steps"] and case.n < 4


CORNERS = [
    Corner(
        "raises ValueError",
        "at least 4",
        "three Runge-Kutta steps need four points: diffusers adds arrays of different lengths",
        too_few_for_runge_kutta,
    ),
    Corner(
        "raises ValueError",
        None,
        "prediction_type 'sample' is not implemented by diffusers; ours averages the noise",
        lambda c: c.options["prediction_type"] == "sample",
    ),
    Corner(
        "outside 0..T-1",
        "trailing",
        "np.arange(T, 0, -T/n) overshoots for some n: n + 1 entries, the last of them 0 - 1",
        lambda c: c.options["timestep_spacing"] == "trailing",
    ),
    Corner(
        "outside 0..T-1",
        "steps_offset",
        "leading spacing adds steps_offset to a grid that has no room for it",
        lambda c: c.options["timestep_spacing"] == "leading" and c.options["steps_offset"] > 0,
    ),
]


def rise(case: Case) -> float:
    """Return the largest factor by which the signal grows within one step."""
    levels = visited_levels(case)
    steps = list(pairwise(levels))
    if not case.options["skip_prk_steps"]:
        steps += [(levels[i], levels[i + 3]) for i in (0, 4, 8)]  # begin and end of Runge-Kutta's
    return max(b.alpha / a.alpha for a, b in steps)


ROUNDINGS = [
    Rounding(
        "(alpha'/alpha) x - ... eps: from almost no signal two terms of that size cancel",
        lambda c: c.dtype == torch.float32,
        lambda c: 2**-22 * rise(c),
        cap=1e-2,
    ),
]


def compare_case(case: Case) -> None:
    compare(case, CORNERS, ROUNDINGS)


@QUICK
@given(cases())
def test_every_step_of_a_trajectory_equals_diffusers(case: Case) -> None:
    compare_case(case)


def test_a_step_from_almost_no_signal_stays_within_the_listed_error() -> None:
    options = {"skip_prk_steps": False, "beta_schedule": "squaredcos_cap_v2"}
    options |= {"timestep_spacing": "linspace", "prediction_type": "v_prediction"}
    case = Case("PNDM", options, {"num_inference_steps": 4}, {}, torch.float32)
    compare_case(case)
    compare_case(case._replace(dtype=torch.float64))


@pytest.mark.slow
@settings(QUICK, max_examples=4000, derandomize=False)
@given(cases())
def test_every_step_of_a_trajectory_equals_diffusers_at_length(case: Case) -> None:
    compare_case(case)


@settings(QUICK, max_examples=100)
@given(cases())
def test_the_exact_reading_samples_or_refuses_whatever_the_options(case: Case) -> None:
    scheduler = our_scheduler(case, compat="exact")
    try:
        scheduler.set_timesteps(**case.grid)
    except InvalidArgument as error:
        refusal = str(error)
        assert "steps_offset" in refusal or (
            "at least 4" in refusal and too_few_for_runge_kutta(case)
        )
        return
    extra = 9 if not case.options["skip_prk_steps"] else int(case.n > 1)
    assert scheduler.num_inference_steps == case.n
    assert len(scheduler.timesteps) == case.n + extra
    assert bool((scheduler.timesteps.diff() <= 0).all())
    assert all(torch.isfinite(x).all() for x in trajectory(scheduler, case))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("begin", [1, 2, 9, 14, 19])
def test_a_start_in_the_middle_equals_diffusers(kind: str, skip: bool, begin: int) -> None:
    """Wrong as it is: diffusers counts its calls from the first one. It has no set_begin_index."""
    options = {"skip_prk_steps": skip, "prediction_type": kind}
    case = Case("PNDM", options, {"num_inference_steps": 20}, {}, torch.float64)
    f, states = network(case), []
    for scheduler in (our_scheduler(case), their_scheduler(case)):
        scheduler.set_timesteps(20)
        if isinstance(scheduler, PNDMScheduler):
            scheduler.set_begin_index(begin)
        x = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(SHAPE)
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(f(x, t), t, x).prev_sample
        states.append(x)
    assert difference(*states) < 1e-6


def test_a_start_near_the_end_steps_past_timestep_0_as_diffusers_does() -> None:
    """Its Runge-Kutta stages go down by half a stride from wherever sampling begins."""
    case = Case("PNDM", {}, {"num_inference_steps": 7}, {}, torch.float64)
    f, states = network(case), []
    for scheduler in (our_scheduler(case), their_scheduler(case)):
        scheduler.set_timesteps(7)
        x = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(SHAPE)
        if isinstance(scheduler, PNDMScheduler):
            scheduler.set_begin_index(15)
        for t in scheduler.timesteps[15:]:
            x = scheduler.step(f(x, t), t, x).prev_sample
        states.append(x)
    assert int(scheduler.timesteps[15]) == 0
    assert difference(*states) < 1e-6


def test_sampling_again_starts_from_the_beginning() -> None:
    case = Case("PNDM", {"skip_prk_steps": True}, {"num_inference_steps": 7}, {}, torch.float64)
    scheduler = our_scheduler(case)
    runs = []
    for stop in (None, 3, None):  # the second is given up after three steps
        scheduler.set_timesteps(7)
        runs.append(trajectory(scheduler, case, steps=stop))
    assert all(map(torch.equal, runs[0], runs[2]))


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("n", [4, 10])
def test_a_loop_over_both_kinds_of_steps_equals_diffusers(n: int, skip: bool) -> None:
    """As diffusers' own tests drive it: all of step_prk's timesteps, then all of step_plms'."""
    ends = []
    for cls in (PNDMScheduler, diffusers.PNDMScheduler):
        scheduler = cls(skip_prk_steps=skip)
        assert scheduler.prk_timesteps is scheduler.plms_timesteps is None
        scheduler.set_timesteps(n)
        x = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(SHAPE)
        for t in scheduler.prk_timesteps:
            x = scheduler.step_prk(torch.tanh(x + t / 999), t, x).prev_sample
        for t in scheduler.plms_timesteps:
            x = scheduler.step_plms(torch.tanh(x + t / 999), t, x).prev_sample
        ends.append((x, scheduler.prk_timesteps.tolist(), scheduler.plms_timesteps.tolist()))
    assert difference(ends[0][0], ends[1][0]) < 1e-6
    assert ends[0][1:] == ends[1][1:]


def test_a_step_of_the_other_kind_is_refused_by_name() -> None:
    x = torch.zeros(SHAPE)
    for skip, name in ((True, "step_prk"), (False, "step_plms")):
        scheduler = PNDMScheduler(skip_prk_steps=skip)
        scheduler.set_timesteps(6)
        with pytest.raises(InvalidArgument, match=name):
            getattr(scheduler, name)(x, scheduler.grid[0], x)


@pytest.mark.parametrize("stop", [0, 5])
def test_noising_does_not_depend_on_the_steps_taken(stop: int) -> None:
    mine, theirs = PNDMScheduler(), diffusers.PNDMScheduler()
    x0, eps, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([3, 700])
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(10)
        for step in scheduler.timesteps[:stop]:
            scheduler.step(torch.zeros(SHAPE), step, x0)
    assert difference(mine.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t)) < 1e-6


# --- beside the mathematics ---------------------------------------------------------------------


def run(scheduler: Scheduler, kind: str, begin: int = 0) -> list[Tensor]:
    """Return x after every step on the mixture, the network predicting `kind`."""
    x = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
    states = []
    for i in range(begin, len(scheduler.grid)):
        level = scheduler.levels[i]
        out = target(MIXTURE.denoise(x, level), MIXTURE.noise(x, level), level, kind)
        x = scheduler.step(out, scheduler.grid[i], x).prev_sample
        states.append(x)
    return states


def interior_error(scheduler: Scheduler) -> float:
    """Return the error along the mixture's flow, from the first level to the last entry's."""
    begin, end = scheduler.levels[0], scheduler.levels[-2]
    x = start = begin.sigma * torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]
    for t, level in zip(scheduler.grid[:-1], scheduler.levels, strict=False):
        out = scheduler.target(MIXTURE.denoise(x, level), MIXTURE.noise(x, level), level)
        x = scheduler.step(out, t, x).prev_sample
    return (x - MIXTURE.flow(start, begin, end)).abs().max().item()


@pytest.mark.parametrize("skip", [True, False])
def test_on_even_timesteps_the_order_is_2_as_the_paper_claims(skip: bool) -> None:
    """The average is that of a noise even in t, the step DDIM's, which is even in σ/α."""

    def error(n: int) -> float:
        scheduler = PNDMScheduler(**FINE, skip_prk_steps=skip, compat="exact")
        scheduler.set_timesteps(timesteps=np.linspace(80_000, 10_000, n + 1).astype(int).tolist())
        return interior_error(scheduler)

    assert order(error, 140) == pytest.approx(2, abs=0.15)


def test_on_a_grid_even_in_the_noise_to_signal_ratio_the_order_is_4() -> None:
    """Adams and Bashforth's, begun with the Runge-Kutta method of the same order."""

    def error(n: int) -> float:
        scheduler = PNDMScheduler(compat="exact")
        scheduler.set_timesteps(timesteps=range(2 * n, -1, -2))  # labels; odd ones are middles
        ratios = [0.5 + 1.5 * t / (2 * n) for t in scheduler.grid]
        levels = [Level(1 / math.hypot(1, r), r / math.hypot(1, r)) for r in ratios]
        scheduler._place(scheduler.grid, [*levels, scheduler.final_level], None)
        return interior_error(scheduler)

    assert order(error, 160) == pytest.approx(4, abs=0.15)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("n", [4, 5, 31])
def test_pndm_is_ddim_for_constant_noise(n: int, skip: bool) -> None:
    """The transfer of PNDM is DDIM's step, and the weights of every average sum to one."""
    shared = {"timestep_spacing": "linspace", "compat": "exact"}
    pndm = PNDMScheduler(skip_prk_steps=skip, set_alpha_to_one=True, **shared)
    ddim = DDIMScheduler(clip_sample=False, **shared)
    eps = torch.randn(SHAPE, dtype=torch.float64)
    ends = []
    for scheduler in (pndm, ddim):
        x = torch.ones(SHAPE, dtype=torch.float64)
        scheduler.set_timesteps(n)
        for t in scheduler.grid:
            x = scheduler.step(eps, t, x).prev_sample
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("skip", [True, False])
def test_prediction_types_agree_when_fed_converted_outputs(skip: bool) -> None:
    results = []
    for kind in PREDICTION_TYPES:
        scheduler = PNDMScheduler(skip_prk_steps=skip, prediction_type=kind, compat="exact")
        scheduler.set_timesteps(13)
        results.append(run(scheduler, kind))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def error_from(scheduler: Scheduler, begin: int) -> float:
    """Return the error at the data when sampling begins at an entry of the grid."""
    scheduler.set_timesteps(40)
    scheduler.set_begin_index(begin)
    level = scheduler.levels[begin]
    x = start = level.sigma * torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
    for t, now in zip(scheduler.grid[begin:], scheduler.levels[begin:], strict=False):
        x = scheduler.step(MIXTURE.noise(x, now), t, x).prev_sample
    return (x - MIXTURE.flow(start, level, Level(1.0, 1e-9))).abs().max().item()


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("begin", [1, 2, 5, 11, 14])
def test_the_exact_reading_may_begin_in_the_middle(skip: bool, begin: int) -> None:
    """Even between the stages of a step."""
    scheduler = PNDMScheduler(skip_prk_steps=skip, set_alpha_to_one=True, compat="exact")
    assert error_from(scheduler, begin) < 0.004


def test_diffusers_loses_an_interval_where_sampling_begins_in_the_middle() -> None:
    options = {"skip_prk_steps": True, "set_alpha_to_one": True}
    assert error_from(PNDMScheduler(**options), 14) > 20 * error_from(
        PNDMScheduler(**options, compat="exact"), 14
    )


@pytest.mark.parametrize("skip", [True, False])
def test_the_last_step_lands_on_the_prediction_of_the_averaged_noise(skip: bool) -> None:
    scheduler = PNDMScheduler(skip_prk_steps=skip, set_alpha_to_one=True, compat="exact")
    scheduler.set_timesteps(9)
    x = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
    for t in scheduler.grid:
        before, x = x, scheduler.step(torch.tanh(x), t, x).prev_sample
    newest = [e.eps for e in scheduler.past][::-1]
    average = sum(w * e for w, e in zip((55, -59, 37, -9), newest, strict=True)) / 24
    now = scheduler.levels[-2]
    torch.testing.assert_close(
        x, (before - now.sigma * average) / now.alpha, rtol=1e-12, atol=1e-12
    )


def test_averaging_v_instead_of_noise_costs_the_second_order() -> None:
    """Σ w·v is v within the step, but diffusers turns it into noise with x at the start of it."""
    options = {"skip_prk_steps": True, "prediction_type": "v_prediction", "compat": "exact"}
    exact = PNDMScheduler(**FINE, **options)
    mixed = exact.reread(departing("average_noise"))

    def error(scheduler: Scheduler, n: int) -> float:
        scheduler.set_timesteps(timesteps=np.linspace(80_000, 10_000, n + 1).astype(int).tolist())
        return interior_error(scheduler)

    assert order(lambda n: error(exact, n), 140) == pytest.approx(2, abs=0.15)
    assert order(lambda n: error(mixed, n), 140) == pytest.approx(1, abs=0.15)
    assert error(mixed, 70) > 50 * error(exact, 70)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prediction_type": "noise"}, "prediction_type"),
        ({"timestep_spacing": "karras"}, "timestep_spacing"),
        ({"steps_offset": -1}, "steps_offset"),
        ({"skip_prk_steps": 1}, "skip_prk_steps"),
        ({"set_alpha_to_one": None}, "set_alpha_to_one"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"clip_sample": True}, "clip_sample"),
        ({"compat": "paper"}, "compat"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(options: dict, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        PNDMScheduler(**options)


@pytest.mark.parametrize(
    ("options", "grid", "named"),
    [
        ({}, {"num_inference_steps": 3}, "at least 4"),
        ({}, {"timesteps": [900, 500, 100]}, "at least 4"),
        ({}, {"num_inference_steps": 1001}, "num_inference_steps"),
        ({}, {"num_inference_steps": 0}, "num_inference_steps"),
        ({}, {"num_inference_steps": 5.0}, "num_inference_steps"),
        ({}, {}, "num_inference_steps or timesteps"),
        ({}, {"num_inference_steps": 5, "timesteps": [5, 4]}, "not both"),
        ({}, {"timesteps": [5, 5, 4, 3, 2]}, "strictly falling"),
        ({}, {"timesteps": [1000, 5, 4, 3]}, "timesteps"),
        ({"steps_offset": 2}, {"num_inference_steps": 1000}, "steps_offset"),
    ],
)
def test_a_grid_out_of_range_is_refused_by_name(options: dict, grid: dict, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        PNDMScheduler(**options).set_timesteps(**grid)


@pytest.mark.parametrize("compat", ["exact", "diffusers"])
def test_steps_out_of_order_are_refused(compat: str) -> None:
    scheduler, x = PNDMScheduler(skip_prk_steps=True, compat=compat), torch.zeros(SHAPE)
    with pytest.raises(InvalidArgument, match="call set_timesteps"):
        scheduler.step(x, 900, x)
    scheduler.set_timesteps(3)
    for t in scheduler.grid:
        scheduler.step(x, t, x)
    with pytest.raises(InvalidArgument, match="all 4 steps are done"):
        scheduler.step(x, 0, x)
    with pytest.raises(InvalidArgument, match="begin_index"):
        scheduler.set_begin_index(4)


def test_a_timestep_other_than_the_next_is_refused_in_the_exact_reading() -> None:
    scheduler, x = PNDMScheduler(skip_prk_steps=True, compat="exact"), torch.zeros(SHAPE)
    scheduler.set_timesteps(5)
    scheduler.step(x, scheduler.grid[0], x)
    with pytest.raises(InvalidArgument, match="timestep must be 600"):
        scheduler.step(x, scheduler.grid[3], x)
