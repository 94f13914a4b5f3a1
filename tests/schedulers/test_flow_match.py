"""Flow matching: diffusers' trajectory, Euler's order, and DDIM in other coordinates."""

import math
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
    Rounding,
    compare,
    difference,
    dtypes,
    network,
    our_scheduler,
    trajectory,
)

from minidiff.errors import InvalidArgument
from minidiff.lab.order import MIXTURE, flow_error, order, output_of
from minidiff.schedule import Level
from minidiff.schedulers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from minidiff.schedulers.core.quirks import departing

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning:diffusers")

SHAPE = (2, 2, 3, 3)
FORMULAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


# --- beside diffusers ---------------------------------------------------------------------------


@st.composite
def falling(draw: st.DrawFn, low: int, high: float) -> list[float]:
    """Draw up to 20 custom numbers in [0, high], thousandths of it, from `low` on."""
    chosen = draw(st.sets(st.integers(low, 1000), min_size=1, max_size=20))
    return [high * k / 1000 for k in sorted(chosen, reverse=True)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A draw from the full product of options and ways to choose the grid.

    Not drawn, because refused: timesteps with invert_sigmas, which in diffusers overwrites them;
    a last σ of 0 with a formula, where Karras' and Beta's grids would end at the data twice and an
    exponential one raises.
    """
    flag = st.booleans()
    options: dict[str, Any] = {
        "num_train_timesteps": draw(st.sampled_from([1000, 1000, 100, 37])),
        "shift": draw(st.sampled_from([1.0, 3.0, 0.5, 12.0])),
        "use_dynamic_shifting": draw(flag),
        "time_shift_type": draw(st.sampled_from(["exponential", "linear"])),
        "invert_sigmas": draw(flag),
        "shift_terminal": draw(st.sampled_from([None, None, 0.1, 0.02])),
        "stochastic_sampling": draw(flag),
    }
    low = 0
    if draw(flag):
        options[draw(st.sampled_from(FORMULAS))] = True
        low = 1
    grid: dict[str, Any] = {}
    ways = ["n"] * 5 + ["sigmas"] * 2
    if not options["invert_sigmas"]:
        ways += ["timesteps", "both"]
    way = draw(st.sampled_from(ways))
    if way == "n":
        n = st.integers(1, 20) if draw(st.integers(0, 3)) else st.sampled_from([31, 64, 100, 333])
        grid["num_inference_steps"] = draw(n)
    if way in ("sigmas", "both"):
        grid["sigmas"] = draw(falling(low, 1.0))
        if draw(flag):
            grid["num_inference_steps"] = len(grid["sigmas"])
    if way == "timesteps":
        grid["timesteps"] = draw(falling(low, options["num_train_timesteps"]))
    elif way == "both":
        grid["timesteps"] = np.linspace(
            options["num_train_timesteps"], 1, len(grid["sigmas"])
        ).tolist()
    if options["use_dynamic_shifting"] or draw(st.integers(0, 4)) == 0:
        grid["mu"] = draw(st.sampled_from([0.5, 0.9, 1.15]))
    return Case("FlowMatchEulerDiscrete", options, grid, {}, draw(dtypes))


def only_sigma_is_one(case: Case) -> bool:
    sigmas = case.grid.get("sigmas")
    if sigmas is None and case.timesteps is not None:
        sigmas = [t / case.options["num_train_timesteps"] for t in case.timesteps]
    return sigmas == [1.0] if sigmas is not None else case.n == 1


CORNERS = [
    Corner(
        failure,
        "shift_terminal",
        "the only sigma is 1, without signal to stretch: NaN, which is not even found in the grid",
        lambda c: c.options["shift_terminal"] is not None and only_sigma_is_one(c),
    )
    for failure in ("raises IndexError", "divides by zero")
]


ROUNDINGS = [
    Rounding("every sample is cast to float32", lambda c: True, lambda c: 2e-5, cap=2e-5),
]


def compare_case(case: Case) -> None:
    compare(case, CORNERS, ROUNDINGS)


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
def test_the_exact_reading_samples_or_refuses_whatever_the_options(case: Case) -> None:
    scheduler = our_scheduler(case, compat="exact")
    if any(c.applies(case) for c in CORNERS) and case.timesteps is None:
        with pytest.raises(InvalidArgument, match="shift_terminal"):
            scheduler.set_timesteps(**case.grid)
        return
    scheduler.set_timesteps(**case.grid)
    assert scheduler.timesteps.dtype == scheduler.sigmas.dtype == torch.float64
    sigmas = scheduler.sigmas[:-1].diff()
    assert bool((sigmas > 0 if case.options["invert_sigmas"] else sigmas < 0).all())
    assert all(torch.isfinite(x).all() for x in trajectory(scheduler, case))


@pytest.mark.parametrize(
    "options",
    [{}, {"shift": 3.0}, {"shift": 3.0, "use_dynamic_shifting": True}, {"num_train_timesteps": 37}],
)
def test_the_tables_before_set_timesteps_equal_diffusers(options: dict) -> None:
    mine = FlowMatchEulerDiscreteScheduler(**options)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    assert torch.equal(mine.sigmas, theirs.sigmas)
    assert torch.equal(mine.timesteps, theirs.timesteps)
    for name in ("sigma_min", "sigma_max", "shift", "step_index", "begin_index", "order"):
        assert getattr(mine, name) == getattr(theirs, name)
    assert len(mine) == len(theirs)


def test_another_shift_holds_from_the_next_grid_on() -> None:
    mine, theirs = FlowMatchEulerDiscreteScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(9)
        scheduler.set_shift(7.0)
    assert torch.equal(mine.sigmas, theirs.sigmas)
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(9)
    assert torch.equal(mine.sigmas, theirs.sigmas)
    assert mine.shift == 7.0


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"invert_sigmas": True}])
@pytest.mark.parametrize("state", ["fresh", "placed", "begun", "under way", "done"])
def test_noising_equals_diffusers_in_every_state(state: str, options: dict) -> None:
    mine = FlowMatchEulerDiscreteScheduler(**options)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    x0, eps = torch.randn(SHAPE), torch.randn(SHAPE)
    if state == "fresh" and options.get("invert_sigmas"):
        with pytest.raises(InvalidArgument, match="set_timesteps"):
            mine.scale_noise(x0, mine.timesteps[[3, 9]], eps)
        return
    noised = []
    for scheduler in (mine, theirs):
        if state != "fresh":
            scheduler.set_timesteps(9)
        if state not in ("fresh", "placed"):
            scheduler.set_begin_index(4)
        for t in scheduler.timesteps[4:] if state == "done" else scheduler.timesteps[4:6]:
            if state in ("under way", "done"):
                scheduler.step(eps, t, x0)
        noised.append(scheduler.scale_noise(x0, scheduler.timesteps[[3, 8]], eps))
        one = scheduler.scale_noise(x0, scheduler.timesteps[[3]].expand(2), eps)
        noised.append(one)
    assert difference(noised[0], noised[2]) < 1e-6
    assert difference(noised[1], noised[3]) < 1e-6
    assert torch.equal(mine.scale_noise(x0, mine.timesteps[3], eps), noised[1])


@pytest.mark.parametrize("begin", [0, 1, 5])
def test_a_start_in_the_middle_equals_diffusers(begin: int) -> None:
    case = Case("FlowMatchEulerDiscrete", {}, {}, {}, torch.float32)
    f, states = network(case), []
    for scheduler in (
        FlowMatchEulerDiscreteScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(),
    ):
        for way in ("looked up", "set", "set again"):
            scheduler.set_timesteps(8)
            if way != "looked up":
                scheduler.set_begin_index(begin)
            x = torch.linspace(-1, 1, 36).reshape(SHAPE)
            for t in scheduler.timesteps[begin:]:
                x = scheduler.step(f(x, t), t, x).prev_sample
            states.append(x)
    assert all(difference(state, states[-1]) < 2e-6 for state in states)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_with_a_timestep_for_every_token_equal_diffusers(
    dtype: torch.dtype, stochastic: bool
) -> None:
    states = []
    for cls in (FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        scheduler = cls(shift=3.0, stochastic_sampling=stochastic)
        scheduler.set_timesteps(6)
        x = torch.linspace(-1, 1, 40, dtype=dtype).reshape(2, 4, 5)
        kept = torch.tensor(
            [[1.0, 0.7, 0.3, 0.0], [0.0, 0.5, 1.0, 1.0]]
        )  # fraction of each timestep
        generator = torch.Generator().manual_seed(2)
        for t in scheduler.timesteps:
            output = scheduler.step(
                torch.tanh(x), t, x, per_token_timesteps=kept * t, generator=generator
            )
            x = output.prev_sample.to(dtype)  # theirs leaves a half-precision sample in float32
        states.append(x)
    assert difference(*states) < 2e-5


# --- beside the mathematics ---------------------------------------------------------------------


def exact(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**options, compat="exact")


def run(scheduler: FlowMatchEulerDiscreteScheduler, x: torch.Tensor) -> list[torch.Tensor]:
    """Return x after every step on the mixture."""
    generator, states = torch.Generator().manual_seed(3), []
    for t, level in zip(scheduler.grid, scheduler.levels, strict=False):
        out = output_of(scheduler, MIXTURE, x, level)
        x = scheduler.step(out, t, x, generator=generator).prev_sample
        states.append(x)
    return states


POINTS = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]


@pytest.mark.parametrize(
    "options", [{"shift": 3.0}, {"invert_sigmas": True}, {"shift_terminal": 0.1}]
)
def test_the_order_is_1_on_every_grid(options: dict) -> None:
    scheduler = exact(**options)
    assert order(lambda n: flow_error(scheduler, n), 240) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("n", [1, 7, 50])
def test_flow_euler_is_ddim_in_other_coordinates(n: int, shift: float) -> None:
    """Divided by √((1−σ)² + σ²) the levels preserve variance, and Euler's step is DDIM's."""
    flow = exact(shift=shift)
    flow.set_timesteps(n)
    norms = [math.hypot(*level) for level in flow.levels]
    ddim = DDIMScheduler(clip_sample=False, prediction_type="sample", compat="exact")
    levels = [Level(a / norm, s / norm) for (a, s), norm in zip(flow.levels, norms, strict=True)]
    ddim._place(flow.grid, levels, None)
    x = POINTS
    for i, after in enumerate(run(flow, POINTS)):
        x = ddim.step(MIXTURE.denoise(x, levels[i]), ddim.grid[i], x).prev_sample
        torch.testing.assert_close(x, after / norms[i + 1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stochastic", [False, True])
def test_inverted_sigmas_change_only_the_meaning_of_sigma(
    stochastic: bool,
) -> None:
    states, timesteps = [], []
    for inverted in (False, True):
        scheduler = exact(shift=3.0, invert_sigmas=inverted, stochastic_sampling=stochastic)
        scheduler.set_timesteps(12)
        states.append(run(scheduler, POINTS))
        timesteps.append(scheduler.timesteps)
    torch.testing.assert_close(timesteps[0], 1000 - timesteps[1])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_diffusers_takes_noise_for_data_where_sigmas_are_inverted() -> None:
    """Both readings of scale_noise at the first level, and of the end of a stochastic walk."""
    x0, eps = torch.full((1, 4), 0.5), torch.full((1, 4), -3.0)
    for compat, first in (("exact", eps), ("diffusers", x0)):
        options = {"invert_sigmas": True, "stochastic_sampling": True, "compat": compat}
        scheduler = FlowMatchEulerDiscreteScheduler(**options)
        scheduler.set_timesteps(5)
        assert torch.equal(scheduler.scale_noise(x0, scheduler.timesteps[:1], eps), first)
        x = eps
        for t, level in zip(scheduler.grid, scheduler.sigmas.tolist(), strict=False):
            out = (x0 - x) / (1 - level)  # the data is x0 for sure: this is x0 − ε̂
            x = scheduler.step(out, t, x).prev_sample
        assert torch.allclose(x, x0) == (compat == "exact")


def test_a_stochastic_step_renoises_the_predicted_clean_sample() -> None:
    scheduler = exact(stochastic_sampling=True)
    scheduler.set_timesteps(5)
    x, level = POINTS, scheduler.levels[0]
    x0 = MIXTURE.denoise(x, level)
    generator = torch.Generator().manual_seed(3)
    after = run(scheduler, x)[0]
    z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    expected = scheduler.scale_noise(x0, scheduler.timesteps[1], z)
    torch.testing.assert_close(after, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("n", [1, 2, 13])
def test_the_last_step_lands_on_the_prediction_of_the_clean_sample(
    n: int, stochastic: bool
) -> None:
    for options in ({}, {"invert_sigmas": True}, {"use_karras_sigmas": True}):
        scheduler = exact(**options, stochastic_sampling=stochastic)
        scheduler.set_timesteps(n)
        x = POINTS
        for t in scheduler.grid:
            x, x0 = scheduler.step(torch.tanh(x), t, x, return_dict=False)
        assert torch.equal(x, x0)


@pytest.mark.parametrize("stochastic", [False, True])
def test_tokens_at_the_timestep_of_the_grid_step_as_the_sample_does(stochastic: bool) -> None:
    ends = []
    for tokens in (False, True):
        scheduler = exact(shift=3.0, stochastic_sampling=stochastic)
        scheduler.set_timesteps(6)
        x = torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(2, 4, 5)
        generator = torch.Generator().manual_seed(2)
        for t in scheduler.grid:
            per_token = torch.full((2, 4), t, dtype=torch.float64) if tokens else None
            x, x0 = scheduler.step(
                torch.tanh(x), t, x, generator=generator,
                per_token_timesteps=per_token, return_dict=False,
            )  # fmt: skip
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x, x0, rtol=1e-10, atol=1e-10)


def test_clean_tokens_do_not_change() -> None:
    """A token at timestep 0 is a condition: there is nothing below it on the grid."""
    for compat in ("exact", "diffusers"):
        scheduler = FlowMatchEulerDiscreteScheduler(compat=compat)
        scheduler.set_timesteps(4)
        x = torch.linspace(-1, 1, 40).reshape(2, 4, 5)
        t = scheduler.grid[0]
        tokens = torch.tensor([[t, 0, t, 0]]).expand(2, 4)
        after = scheduler.step(torch.tanh(x), t, x, per_token_timesteps=tokens).prev_sample
        assert torch.equal(after[:, 1::2], x[:, 1::2])
        assert not torch.isclose(after[:, ::2], x[:, ::2]).any()


def test_the_exact_grid_is_shifted_once_and_diffusers_end_twice() -> None:
    scheduler = exact(shift=3.0)
    scheduler.set_timesteps(10)
    once = np.linspace(1, 0.001, 10)
    np.testing.assert_allclose(scheduler.sigmas[:-1], 3 * once / (1 + 2 * once), rtol=1e-12)
    twice = scheduler.reread(departing("flow_line"))
    twice.set_timesteps(10)
    ratio = [float(s.sigmas[-2] / (1 - s.sigmas[-2])) for s in (twice, scheduler)]
    assert ratio[0] / ratio[1] == pytest.approx(3, rel=1e-9)


def test_given_timesteps_are_the_noise_of_the_sample_and_in_diffusers_are_not() -> None:
    for compat, expected in (("exact", [0.8, 0.2, 0.0]), ("diffusers", [12 / 13, 3 / 7, 0.0])):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, compat=compat)
        scheduler.set_timesteps(timesteps=[800.0, 200.0])
        assert scheduler.timesteps.tolist() == [800.0, 200.0]
        assert scheduler.sigmas.tolist() == pytest.approx(expected)


def test_dynamic_shifting_is_the_fixed_shift_of_the_same_size() -> None:
    fixed = exact(shift=math.exp(0.8))
    fixed.set_timesteps(9)
    for kind, mu in (("exponential", 0.8), ("linear", math.exp(0.8))):
        dynamic = exact(use_dynamic_shifting=True, time_shift_type=kind)
        dynamic.set_timesteps(9, mu=mu)
        torch.testing.assert_close(dynamic.sigmas, fixed.sigmas, rtol=1e-12, atol=0)


def test_mu_lies_on_the_line_through_the_two_sizes_that_options_name() -> None:
    scheduler = exact()
    assert [scheduler.mu_of(n) for n in (256, 4096, 2176)] == pytest.approx([0.5, 1.15, 0.825])


@pytest.mark.parametrize("inverted", [False, True])
def test_the_velocity_is_the_slope_of_the_noising_line(inverted: bool) -> None:
    scheduler = exact(invert_sigmas=inverted)
    scheduler.set_timesteps(10)
    x0, eps = torch.randn(2, *SHAPE, dtype=torch.float64)
    a, b = (scheduler.scale_noise(x0, t, eps) for t in scheduler.timesteps[[2, 6]])
    slope = (b - a) / (scheduler.sigmas[6] - scheduler.sigmas[2])
    velocity = scheduler.get_velocity(x0, eps, scheduler.timesteps[2])
    torch.testing.assert_close(velocity, slope, rtol=1e-10, atol=1e-10)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"shift": 0.0}, "shift"),
        ({"shift": float("nan")}, "shift"),
        ({"shift_terminal": 1.0}, "shift_terminal"),
        ({"shift_terminal": 0.0}, "shift_terminal"),
        ({"time_shift_type": "cubic"}, "time_shift_type"),
        ({"use_dynamic_shifting": None}, "use_dynamic_shifting"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas and use_beta"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"prediction_type": "epsilon"}, "prediction_type"),
        ({"stochastic_sampling": 0.5}, "stochastic_sampling"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(options: dict, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        FlowMatchEulerDiscreteScheduler(**options)


@pytest.mark.parametrize(
    ("options", "grid", "named"),
    [
        ({}, {}, "num_inference_steps, sigmas or timesteps"),
        ({}, {"num_inference_steps": 0}, "num_inference_steps"),
        ({}, {"num_inference_steps": 2.0}, "num_inference_steps"),
        (
            {},
            {"num_inference_steps": 3, "sigmas": [0.5, 0.1]},
            "num_inference_steps for 3 and sigma",
        ),
        ({}, {"sigmas": [0.5, 0.1], "timesteps": [500.0]}, "sigmas for 2 and timesteps for 1"),
        ({}, {"sigmas": []}, "sigmas must be strictly falling"),
        ({}, {"sigmas": [0.5, 0.5]}, "sigmas must be strictly falling"),
        ({}, {"sigmas": [0.1, 0.5]}, "sigmas must be strictly falling"),
        ({}, {"sigmas": [1.5, 0.5]}, "sigmas"),
        ({}, {"sigmas": [0.5, -0.5]}, "sigmas"),
        ({}, {"sigmas": [float("nan")]}, "sigmas"),
        ({}, {"timesteps": [1001.0]}, "timesteps"),
        ({}, {"timesteps": [1.0, 2.0]}, "timesteps must be strictly falling"),
        ({"invert_sigmas": True}, {"timesteps": [900.0, 2.0]}, "timesteps cannot be given"),
        ({"use_dynamic_shifting": True}, {"num_inference_steps": 4}, "mu"),
        ({"use_dynamic_shifting": True}, {"num_inference_steps": 4, "mu": "big"}, "mu"),
        ({"use_dynamic_shifting": True}, {"num_inference_steps": 4, "mu": 800.0}, "mu"),
        (
            {"use_dynamic_shifting": True, "time_shift_type": "linear"},
            {"num_inference_steps": 4, "mu": 0.0},
            "mu must be in",
        ),
        ({"shift_terminal": 0.1}, {"num_inference_steps": 1}, "shift_terminal"),
        ({"use_karras_sigmas": True}, {"sigmas": [0.9, 0.0]}, "use_karras_sigmas=True needs"),
        ({"use_beta_sigmas": True}, {"sigmas": [0.9, 0.0]}, "use_beta_sigmas=True needs"),
        ({"shift": 1e4}, {"num_inference_steps": 4000}, "too many"),
    ],
)
def test_a_grid_out_of_range_is_refused_by_name(options: dict, grid: dict, named: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    with pytest.raises(InvalidArgument, match=named):
        scheduler.set_timesteps(**grid)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"s_churn": 0.1}, "s_churn"),
        ({"s_tmin": 1.0}, "s_tmin"),
        ({"s_tmax": 10.0}, "s_tmax"),
        ({"s_noise": 1.1}, "s_noise"),
        ({"timestep": 1}, "timestep must be an entry of timesteps"),
        ({"timestep": torch.tensor(1000)}, "timestep must be an entry of timesteps"),
        ({"timestep": 999.5}, "999.5 is not among"),
        ({"per_token_timesteps": torch.zeros(2, 3)}, "per_token_timesteps"),
        ({"sample": torch.zeros(2, 3, 5)}, "model_output must have the shape of sample"),
        ({"model_output": torch.full((2, 4, 5), torch.nan)}, "NaN"),
    ],
)
def test_a_step_that_cannot_be_taken_is_refused_by_name(arguments: dict, named: str) -> None:
    scheduler, x = FlowMatchEulerDiscreteScheduler(), torch.zeros(2, 4, 5)
    scheduler.set_timesteps(4)
    with pytest.raises(InvalidArgument, match=named):
        scheduler.step(**({"model_output": x, "timestep": 1000.0, "sample": x} | arguments))


def test_options_without_meaning_for_inverted_or_flat_samples_are_refused_by_name() -> None:
    scheduler, x = FlowMatchEulerDiscreteScheduler(invert_sigmas=True), torch.zeros(2, 4, 5)
    scheduler.set_timesteps(4)
    with pytest.raises(InvalidArgument, match="per_token_timesteps cannot be combined with invert"):
        scheduler.step(x, 0.0, x, per_token_timesteps=torch.zeros(2, 4))
    with pytest.raises(InvalidArgument, match="shift"):
        scheduler.set_shift(-1.0)
    with pytest.raises(InvalidArgument, match="image_seq_len"):
        scheduler.mu_of(0)
    for options in ({"base_shift": None}, {"max_image_seq_len": 256}):
        with pytest.raises(InvalidArgument, match="base_shift"):
            FlowMatchEulerDiscreteScheduler(**options).mu_of(256)
