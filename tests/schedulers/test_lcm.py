"""LCM: diffusers' trajectory, and the properties of a consistency function."""

from typing import Any

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
    falling_timesteps,
    our_scheduler,
    schedule_options,
    their_scheduler,
    thresholds,
    trajectory,
)

from minidiff.errors import InvalidArgument
from minidiff.lab.order import MIXTURE
from minidiff.prediction import PREDICTION_TYPES, target
from minidiff.schedule import add_noise
from minidiff.schedulers import DDIMScheduler, LCMScheduler, PNDMScheduler

SHAPE = (2, 2, 3, 3)


# --- beside diffusers ---------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw from the full product of options."""
    options = draw(schedule_options())
    train_steps = options["num_train_timesteps"]
    options["timestep_spacing"] = draw(st.sampled_from(["linspace", "leading", "trailing"]))
    options["steps_offset"] = draw(st.sampled_from([0, 1]))
    options["set_alpha_to_one"] = draw(st.booleans())
    options["original_inference_steps"] = draw(st.integers(1, train_steps))
    options["timestep_scaling"] = draw(st.sampled_from([10.0, 10.0, 1.0, 0.003, 0.0]))
    options["prediction_type"] = draw(st.sampled_from(["epsilon", "sample", "v_prediction"]))
    options["clip_sample"] = draw(st.booleans())
    options["clip_sample_range"] = draw(st.sampled_from([0.5, 1.0, 3.0]))
    options |= draw(thresholds())
    grid: dict[str, Any] = {"strength": draw(st.sampled_from([1.0, 1.0, 0.8, 0.3]))}
    if draw(st.integers(0, 3)) == 0:
        chosen = grid["timesteps"] = draw(falling_timesteps(train_steps))
        if int(len(chosen) * grid["strength"]) == 0:
            grid["strength"] = 1.0  # less would leave none
    else:
        original = options["original_inference_steps"]
        if draw(st.booleans()):
            original = grid["original_inference_steps"] = draw(st.integers(1, train_steps))
        grid["num_inference_steps"] = draw(st.integers(1, min(original, 60)))
    return Case("LCM", options, grid, {}, draw(dtypes))


def reach(case: Case) -> int:
    """Return the number of distilled steps below the strength."""
    original = case.grid.get("original_inference_steps", case.options["original_inference_steps"])
    return int(original * case.grid["strength"])


def starts_without_signal(case: Case) -> bool:
    theirs = their_scheduler(case)
    theirs.set_timesteps(**case.grid)
    return float(theirs.alphas_cumprod[theirs.timesteps[0]]) == 0


CORNERS = [
    Corner(
        "raises ValueError",
        "at most",
        "fewer distilled steps below the strength than steps requested",
        lambda c: c.n is not None and c.n > reach(c),
    ),
    Corner(
        "divides by zero",
        "zero terminal SNR",
        "x0 = (x - eps)/0; clipping only hides the infinity",
        lambda c: c.options["prediction_type"] == "epsilon" and starts_without_signal(c),
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
def test_the_exact_reading_samples_or_refuses_whatever_the_options(case: Case) -> None:
    scheduler = our_scheduler(case, compat="exact")
    corner = next((c for c in CORNERS if c.applies(case)), None)
    if corner is not None:
        with pytest.raises(InvalidArgument, match=corner.message):
            scheduler.set_timesteps(**case.grid)
        return
    scheduler.set_timesteps(**case.grid)
    states = trajectory(scheduler, case)
    assert len(states) == len(scheduler.timesteps)
    assert all(torch.isfinite(x).all() for x in states)


@pytest.mark.parametrize("begin", [1, 3])
def test_a_start_in_the_middle_equals_diffusers(begin: int) -> None:
    states = []
    for scheduler in (LCMScheduler(), diffusers.LCMScheduler()):
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(begin)
        generator = torch.Generator().manual_seed(2)
        x = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(SHAPE)
        for t in scheduler.timesteps[begin:]:
            output = scheduler.step(torch.tanh(x), t, x, generator=generator)
            x = output.prev_sample
        states += [x, output.denoised]
    assert difference(states[0], states[2]) < 1e-6
    assert difference(states[1], states[3]) < 1e-6


def test_noising_and_velocity_equal_diffusers_before_and_after_a_step() -> None:
    mine, theirs = LCMScheduler(), diffusers.LCMScheduler()
    x0, eps, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([3, 700])
    for _ in range(2):
        assert difference(mine.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t)) < 1e-6
        assert difference(mine.get_velocity(x0, eps, t), theirs.get_velocity(x0, eps, t)) < 1e-6
        for scheduler in (mine, theirs):
            scheduler.set_timesteps(4)
            scheduler.step(x0, scheduler.timesteps[0], x0)


def test_a_step_gives_the_same_as_a_tuple_and_by_name() -> None:
    outputs = []
    for return_dict in (True, False):
        scheduler = LCMScheduler()
        scheduler.set_timesteps(4)
        x = torch.linspace(-1, 1, 36).reshape(SHAPE)
        generator = torch.Generator().manual_seed(2)
        outputs.append(scheduler.step(x, 999, x, generator, return_dict=return_dict))
    assert torch.equal(outputs[0].prev_sample, outputs[1][0])
    assert torch.equal(outputs[0].denoised, outputs[1][1])


IDLE = {"set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("compat", ["exact", "diffusers"])
def test_grid_options_that_an_lcm_ignores_change_nothing(compat: str) -> None:
    """diffusers has them without using them, and so every Stable Diffusion config."""
    grid = {"num_inference_steps": 5}
    cases = [Case("LCM", options, grid, {}, torch.float32) for options in ({}, IDLE)]
    states = []
    for scheduler, case in [(our_scheduler(case, compat=compat), case) for case in cases]:
        scheduler.set_timesteps(5)
        states.append(trajectory(scheduler, case))
    assert all(map(torch.equal, *states))


def test_a_stable_diffusion_config_passes_through_an_lcm_unharmed() -> None:
    source = PNDMScheduler(**IDLE, skip_prk_steps=True, num_train_timesteps=500)
    lcm = LCMScheduler.from_config(source.config)
    moved = DDIMScheduler.from_config(lcm.config)
    assert {name: moved.config[name] for name in IDLE} == IDLE
    theirs = diffusers.LCMScheduler.from_config(source.config)
    for scheduler in (lcm, theirs):
        scheduler.set_timesteps(5)
    assert lcm.timesteps.tolist() == theirs.timesteps.tolist()


# --- beside the mathematics ---------------------------------------------------------------------


def outputs(scheduler: LCMScheduler, kind: str = "epsilon") -> list[tuple]:
    """(x before, level, next level, x̂0 of the network, output of the step) of every step."""
    x = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
    generator, seen = torch.Generator().manual_seed(5), []
    for i, t in enumerate(scheduler.grid):
        now, nxt = scheduler.levels[i], scheduler.levels[i + 1]
        x0 = MIXTURE.denoise(x, now)
        out = target(x0, MIXTURE.noise(x, now), now, kind)
        step = scheduler.step(out, t, x, generator)
        seen.append((x, now, nxt, x0, step))
        x = step.prev_sample
    return seen


def test_with_a_large_timestep_scaling_each_step_renoises_the_predicted_clean_sample() -> None:
    """c_skip → 0 and c_out → 1, so f = x̂0: a jump to the data and fresh noise of the next level."""
    scheduler = LCMScheduler(timestep_scaling=1e8, compat="exact")
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(5)
    seen = outputs(scheduler)
    for x, _, nxt, x0, step in seen[:-1]:
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        torch.testing.assert_close(step.prev_sample, add_noise(x0, z, nxt), rtol=1e-10, atol=1e-10)
    x, _, _, x0, step = seen[-1]
    torch.testing.assert_close(step.prev_sample, x0, rtol=1e-10, atol=1e-10)


def test_with_timestep_scaling_0_it_is_the_identity() -> None:
    """c_skip = 1 and c_out = 0 at every t, as they must be at t = 0."""
    scheduler = LCMScheduler(timestep_scaling=0.0, compat="exact")
    scheduler.set_timesteps(3)
    for x, *_, step in outputs(scheduler):
        assert torch.equal(step.denoised, x)


def test_at_timestep_0_it_is_the_identity_whatever_the_output() -> None:
    for compat in ("exact", "diffusers"):
        scheduler = LCMScheduler(compat=compat)
        scheduler.set_timesteps(timesteps=[500, 0])
        scheduler.set_begin_index(1)
        x = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
        assert torch.equal(scheduler.step(torch.tanh(x), 0, x).denoised, x)


@pytest.mark.parametrize(
    "grid",
    [
        {"num_inference_steps": 1},
        {"num_inference_steps": 7},
        {"num_inference_steps": 4, "strength": 0.5},
        {"timesteps": [980, 400, 399, 3]},
        {"timesteps": [980, 400, 399, 3], "strength": 0.5},
    ],
)
def test_the_last_step_lands_on_the_denoised_sample(grid: dict) -> None:
    scheduler = LCMScheduler(compat="exact")
    scheduler.set_timesteps(**grid)
    *_, (_, _, _, _, step) = outputs(scheduler)
    assert torch.equal(step.prev_sample, step.denoised)


def test_diffusers_leaves_noise_where_strength_cuts_custom_timesteps() -> None:
    """Both readings; the noise left is that of the last level."""
    grid = {"timesteps": [980, 700, 400, 200], "strength": 0.5}
    scheduler = LCMScheduler()
    scheduler.set_timesteps(**grid)
    *_, (_, now, _, _, step) = outputs(scheduler)
    left = (step.prev_sample - now.alpha * step.denoised) / now.sigma
    assert left.std().item() == pytest.approx(1, abs=0.4)  # 20 standard normal numbers


def test_prediction_types_agree_when_fed_converted_outputs() -> None:
    results = []
    for kind in PREDICTION_TYPES:
        scheduler = LCMScheduler(prediction_type=kind, compat="exact")
        scheduler.set_timesteps(7)
        results.append([step.prev_sample for *_, step in outputs(scheduler, kind)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_one_step_of_a_consistency_model_is_one_step_of_ddim_to_the_data() -> None:
    """Both land on x̂0; what differs between one and many steps is the network's distillation."""
    lcm = LCMScheduler(timestep_scaling=1e8, beta_schedule="scaled_linear", compat="exact")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "trailing"}
    ddim = DDIMScheduler.from_config(lcm.config, clip_sample=False, **betas)
    x = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
    ends = []
    for scheduler in (lcm, ddim):
        scheduler.set_timesteps(1)
        assert scheduler.grid == [999]
        ends.append(scheduler.step(torch.tanh(x), 999, x).prev_sample)
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-10)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"set_alpha_to_one": 1}, "set_alpha_to_one"),
        ({"steps_offset": -1}, "steps_offset"),
        ({"timestep_spacing": "karras"}, "timestep_spacing"),
        ({"original_inference_steps": 0}, "original_inference_steps"),
        ({"original_inference_steps": 2.5}, "original_inference_steps"),
        ({"timestep_scaling": -1.0}, "timestep_scaling"),
        ({"timestep_scaling": float("nan")}, "timestep_scaling"),
        ({"prediction_type": "noise"}, "prediction_type"),
        ({"clip_sample": 1}, "clip_sample"),
        ({"dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio"),
        ({"sigma_data": 0.5}, "sigma_data"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(options: dict, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        LCMScheduler(**options)


@pytest.mark.parametrize(
    ("grid", "named"),
    [
        ({}, "num_inference_steps or timesteps"),
        ({"num_inference_steps": 4, "timesteps": [5, 4]}, "not both"),
        ({"num_inference_steps": 51}, "num_inference_steps must be at most 50"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 26, "strength": 0.5}, "num_inference_steps must be at most 25"),
        ({"num_inference_steps": 4, "strength": 0.0}, "strength"),
        ({"num_inference_steps": 4, "strength": 1.2}, "strength"),
        ({"num_inference_steps": 4, "original_inference_steps": 1001}, "original_inference_steps"),
        ({"num_inference_steps": 4, "original_inference_steps": 0}, "original_inference_steps"),
        ({"timesteps": [9, 4], "original_inference_steps": 10}, "original_inference_steps"),
        ({"timesteps": [4, 9]}, "strictly falling"),
        ({"timesteps": [9, 9]}, "strictly falling"),
        ({"timesteps": [1000, 9]}, "timesteps"),
        ({"timesteps": [9, -1]}, "timesteps"),
        ({"timesteps": [9.5]}, "timesteps"),
        ({"timesteps": [9, 4], "strength": 0.4}, "strength=0.4 leaves none"),
    ],
)
def test_a_grid_out_of_range_is_refused_by_name(grid: dict, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        LCMScheduler().set_timesteps(**grid)


def test_steps_out_of_order_are_refused() -> None:
    scheduler, x = LCMScheduler(), torch.zeros(SHAPE)
    with pytest.raises(InvalidArgument, match="call set_timesteps"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(2)
    with pytest.raises(InvalidArgument, match="998 is not among"):
        scheduler.step(x, 998, x)
    for t in scheduler.grid:
        scheduler.step(x, t, x)
    with pytest.raises(InvalidArgument, match="all 2 steps are done"):
        scheduler.step(x, 0, x)
