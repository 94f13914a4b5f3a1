"""DDPM, DDIM and DPM-Solver against diffusers' own; see `parity.py` for how they are compared."""

import inspect
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

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
    diffusers,
    dtypes,
    falling_timesteps,
    number_of_steps,
    our_scheduler,
    sample_or_refuse,
    schedule_options,
    their_scheduler,
    thresholds,
    visited_levels,
)

import minidiff.schedulers as ours
from minidiff.errors import InvalidArgument
from minidiff.schedulers import SCHEDULERS

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.algorithm_types dpmsolver:FutureWarning"),
]

SHAPE = (2, 2, 3, 3)
FORMULAS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
)


@st.composite
def cases(draw: st.DrawFn, name: str) -> Case:
    """Draw from the full product of options."""
    flag = st.booleans()
    kinds = ["linear", "scaled_linear", "squaredcos_cap_v2"]
    options = draw(schedule_options(kinds + ["sigmoid", "laplace"] * (name == "DDPM")))
    train_steps = options["num_train_timesteps"]
    options["prediction_type"] = draw(st.sampled_from(["epsilon", "sample", "v_prediction"]))
    options["timestep_spacing"] = draw(st.sampled_from(["linspace", "leading", "trailing"]))
    options["steps_offset"] = draw(st.sampled_from([0, 0, 1, 2]))
    options |= draw(thresholds())
    step_options = {}
    if name != "DPMSolverMultistep":
        options["clip_sample"] = draw(flag)
        options["clip_sample_range"] = draw(st.sampled_from([0.5, 1.0, 3.0]))
    if name == "DDPM":
        kinds = ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"]
        options["variance_type"] = draw(st.sampled_from(kinds))
    elif name == "DDIM":
        options["set_alpha_to_one"] = draw(flag)
        step_options["eta"] = draw(st.sampled_from([0.0, 0.3, 1.0]))
        step_options["use_clipped_model_output"] = draw(flag)
    else:
        options |= draw(solver_options())
    formula = any(options.get(name) for name in FORMULAS)
    if name != "DDIM" and not formula and draw(st.integers(0, 7)) == 0:
        grid = {"timesteps": draw(falling_timesteps(train_steps))}
    else:
        grid = {"num_inference_steps": draw(number_of_steps(train_steps))}
    if options.get("use_flow_sigmas") and draw(flag):
        options["use_dynamic_shifting"] = True
        grid |= draw(st.sampled_from([{}, {"mu": 0.5}, {"mu": 1.15}]))
    return Case(name, options, grid, step_options, draw(dtypes))


@st.composite
def solver_options(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the options that only DPM-Solver has."""
    flag = st.booleans()
    options: dict[str, Any] = {
        "algorithm_type": draw(
            st.sampled_from(["dpmsolver++", "sde-dpmsolver++"] * 2 + ["dpmsolver", "sde-dpmsolver"])
        ),
        "solver_type": draw(st.sampled_from(["midpoint", "heun"])),
        "solver_order": draw(st.sampled_from([1, 2, 2, 3, 3])),
        "lower_order_final": draw(flag),
        "euler_at_final": draw(flag),
        "final_sigmas_type": draw(st.sampled_from(["zero", "sigma_min"])),
        "lambda_min_clipped": draw(st.sampled_from([-float("inf"), -9.0, -5.1, -1.0])),
        "variance_type": draw(st.sampled_from([None, None, "learned", "learned_range"])),
    }
    if options["algorithm_type"] == "sde-dpmsolver":
        options["solver_order"] = min(options["solver_order"], 2)
    if not options["algorithm_type"].endswith("++"):
        options["final_sigmas_type"] = "sigma_min"
    if draw(flag):
        formula = draw(st.sampled_from(FORMULAS))
        options[formula] = True
        if formula == "use_flow_sigmas":
            options["flow_shift"] = draw(st.sampled_from([1.0, 3.0]))
            if options["algorithm_type"].endswith("++") and draw(flag):
                options["prediction_type"] = "flow_prediction"
    return options


def multistep(case: Case) -> bool:
    return case.name == "DPMSolverMultistep"


def stretch(case: Case) -> float:
    """Return the largest ratio of a step to the one before it."""
    steps = [b.lam - a.lam for a, b in pairwise(visited_levels(case)[:-1])]
    return max([b / a for a, b in pairwise(steps)], default=1)


ROUNDINGS = [
    Rounding("every sample is cast to float32", multistep, lambda c: 2e-5, cap=2e-5),
    Rounding(
        "(alpha'/alpha) x - ... eps: from almost no signal two terms of that size cancel",
        lambda c: multistep(c) and not c.options["algorithm_type"].endswith("++"),
        lambda c: 2**-22 * max(b.alpha / a.alpha for a, b in pairwise(visited_levels(c))),
        cap=1e-2,
    ),
    Rounding(
        "(1 - exp(-2h) - 2h)/(2h)^2 in float32, the worse the smaller the steps",
        lambda c: (
            multistep(c)
            and c.options["solver_order"] == 3
            and c.options["algorithm_type"] == "sde-dpmsolver++"
        ),
        lambda c: 2e-4 * max(1, (c.n or 0) / 200),
        cap=1e-3,
    ),
    Rounding(
        "an uneven grid: a slope is extrapolated over many times the distance it was measured on",
        lambda c: multistep(c) and c.timesteps is not None and c.options["solver_order"] > 1,
        lambda c: 2e-5 * (stretch(c) / 10) ** (c.options["solver_order"] - 1),
        cap=1e-2,
    ),
]


def first_alpha_bar(case: Case) -> float:
    theirs = their_scheduler(case)
    theirs.set_timesteps(**case.grid)
    return float(theirs.alphas_cumprod[theirs.timesteps[0]])


def first_timesteps_are_equal(case: Case) -> bool:
    theirs = their_scheduler(case)
    theirs.set_timesteps(**case.grid)
    return len(theirs.timesteps) > 1 and bool(theirs.timesteps[0] == theirs.timesteps[1])


def last_step_is_empty(case: Case) -> bool:
    theirs = their_scheduler(case)
    theirs.set_timesteps(**case.grid)
    to_sigma_min = case.options.get("final_sigmas_type") == "sigma_min"
    return to_sigma_min and int(theirs.timesteps[-1]) == 0


def the_sde_steps_back(case: Case) -> bool:
    """Return whether some σ rises by more than rounding, so that an SDE's variance is below 0."""
    if not case.options.get("algorithm_type", "").startswith("sde"):
        return False
    theirs = their_scheduler(case)
    theirs.set_timesteps(**case.grid)
    return bool((theirs.sigmas[1:] > theirs.sigmas[:-1] * (1 + 1e-5)).any())


CORNERS = [
    *(
        Corner(
            failure,
            "can go back towards noise",
            "a first step from alpha_bar = 2^-24, or a last one to a flow's sigma_min, goes back "
            "towards noise: the variance of what it adds is < 0",
            the_sde_steps_back,
        )
        for failure in ("divides by zero", "raises IndexError", "raises RuntimeError")
    ),
    Corner(
        "raises RuntimeError",
        None,
        "a learned variance is cut off for prediction_type epsilon alone; ours for every one",
        lambda c: (
            c.options.get("variance_type") in ("learned", "learned_range")
            and c.options["prediction_type"] != "epsilon"
        ),
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
    Corner(
        "repeats timesteps",
        "repeats timesteps",
        "DPM-Solver places n + 1 points, and there are fewer training steps (above lambda_min)",
        lambda c: c.name == "DPMSolverMultistep" and c.options["timestep_spacing"] != "trailing",
    ),
    Corner(
        "divides by zero",
        "zero terminal SNR",
        "x0 = (x - eps)/0; clipping only hides the infinity",
        lambda c: (
            c.name != "DPMSolverMultistep"
            and c.options["prediction_type"] == "epsilon"
            and first_alpha_bar(c) == 0
        ),
    ),
    Corner(
        "divides by zero",
        None,
        "DDIM, eta = 1 from almost no signal: the root of a rounding error below 0; ours is 0",
        lambda c: c.step_options.get("eta") == 1 and first_alpha_bar(c) < 1e-5,
    ),
    Corner(
        "raises IndexError",
        None,
        "the first two timesteps round to one: diffusers begins at the second and runs off the end",
        first_timesteps_are_equal,
    ),
    Corner(
        "divides by zero",
        None,
        "the last step has h = 0, and order 3 and heun divide by it; ours returns x",
        last_step_is_empty,
    ),
]


NAMES = ["DDPM", "DDIM", "DPMSolverMultistep"]


def compare_case(case: Case) -> None:
    compare(case, CORNERS, ROUNDINGS)


@pytest.mark.parametrize("name", NAMES)
def test_every_step_of_a_trajectory_equals_diffusers(name: str) -> None:
    QUICK(given(cases(name))(compare_case))()


@pytest.mark.parametrize("name", NAMES)
def test_the_exact_reading_samples_or_refuses_whatever_the_options(name: str) -> None:
    def check(case: Case) -> None:
        sample_or_refuse(case, "zero terminal SNR|steps_offset|lambda_min_clipped")

    settings(QUICK, max_examples=100)(given(cases(name))(check))()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_step_of_a_trajectory_equals_diffusers_at_length(name: str) -> None:
    settings(QUICK, max_examples=4000, derandomize=False)(given(cases(name))(compare_case))()


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("name", NAMES)
def test_timesteps_equal_diffusers_or_refused_for_every_number_of_steps(
    name: str, spacing: str
) -> None:
    case = Case(name, {"timestep_spacing": spacing}, {}, {}, torch.float32)
    mine, theirs = our_scheduler(case), their_scheduler(case)
    refused = []
    for n in range(1, 1001):
        theirs.set_timesteps(n)
        expected = theirs.timesteps.tolist()
        try:
            mine.set_timesteps(n)
        except InvalidArgument:
            refused.append(n)
            assert expected[-1] < 0 or len(set(expected)) < len(expected)
        else:
            assert mine.timesteps.tolist() == mine.grid == expected
    per_spacing = {"trailing": 62, "linspace": 0, "leading": 0}
    if name == "DPMSolverMultistep":
        per_spacing = {"trailing": 62, "linspace": 1, "leading": 1}  # n = T
    assert len(refused) == per_spacing[spacing]


# --- forward noising ----------------------------------------------------------------------------


@QUICK
@given(st.sampled_from(["DDPM", "DDIM"]).flatmap(cases), st.integers(0, 2**31))
def test_noising_and_velocity_equal_diffusers(case: Case, seed: int) -> None:
    mine, theirs = our_scheduler(case), their_scheduler(case)
    rng = np.random.default_rng(seed)
    t = torch.from_numpy(rng.choice(theirs.timesteps.numpy(), SHAPE[0]))
    x0 = torch.from_numpy(rng.standard_normal(SHAPE)).to(case.dtype)
    eps = torch.from_numpy(rng.standard_normal(SHAPE)).to(case.dtype)
    assert difference(mine.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t)) < 1e-6
    assert difference(mine.get_velocity(x0, eps, t), theirs.get_velocity(x0, eps, t)) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_one_timestep_noises_a_whole_batch(name: str) -> None:
    scheduler = SCHEDULERS[f"{name}Scheduler"]()
    x0, eps = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    assert torch.equal(
        scheduler.add_noise(x0, eps, torch.tensor([500])),
        scheduler.add_noise(x0, eps, torch.full((4,), 500)),
    )


# --- options and files --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_constructor_takes_diffusers_arguments_with_its_defaults_and_compat(name: str) -> None:
    mine = inspect.signature(SCHEDULERS[f"{name}Scheduler"]).parameters
    theirs = inspect.signature(getattr(diffusers, f"{name}Scheduler")).parameters
    assert {k: p.default for k, p in mine.items() if k != "compat"} == {
        k: p.default for k, p in theirs.items()
    }
    assert list(mine) == [*theirs, "compat"]
    assert mine["compat"].default == "diffusers"


@pytest.mark.parametrize("name", NAMES)
def test_the_config_has_diffusers_keys_and_values(name: str) -> None:
    mine, theirs = SCHEDULERS[f"{name}Scheduler"](), getattr(diffusers, f"{name}Scheduler")()
    expected = {k: v for k, v in theirs.config.items() if not k.startswith("_")}
    got = {k: v for k, v in mine.config.items() if not k.startswith("_")}
    assert got == expected | {"compat": "diffusers"}
    assert all(getattr(mine.config, k) == v for k, v in expected.items())
    for attribute in ("betas", "alphas", "alphas_cumprod", "timesteps"):
        assert torch.equal(getattr(mine, attribute).float(), getattr(theirs, attribute).float()), (
            attribute
        )
    assert (mine.order, len(mine)) == (theirs.order, len(theirs))


@settings(QUICK, max_examples=100)
@given(case=st.sampled_from(NAMES).flatmap(cases))
def test_scheduler_config_json_reads_in_either_library(
    case: Case, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("scheduler")
    mine, theirs = our_scheduler(case), their_scheduler(case)
    mine.save_pretrained(folder / "mine")
    theirs.save_pretrained(folder / "theirs")
    read_by_us = type(mine).from_pretrained(folder / "theirs")
    read_by_them = type(theirs).from_pretrained(folder / "mine")
    options = {k: v for k, v in mine.config.items() if not k.startswith("_")}
    assert {k: read_by_us.config[k] for k in options} == options
    assert {k: read_by_them.config[k] for k in options if k != "compat"} | {
        "compat": "diffusers"
    } == options
    again = type(mine).from_pretrained(folder / "mine").config
    assert {k: again[k] for k in options} == options


def test_the_exact_reading_is_saved_and_absent_from_a_file_of_diffusers(tmp_path: Path) -> None:
    for compat in ("exact", "diffusers"):
        ours.DDIMScheduler(compat=compat).save_pretrained(tmp_path / compat)
        content = json.loads((tmp_path / compat / "scheduler_config.json").read_text())
        assert content.get("compat") == ("exact" if compat == "exact" else None)
        assert ours.DDIMScheduler.from_pretrained(tmp_path / compat).config.compat == compat


def test_an_option_given_at_its_default_moves_to_another_class_too(tmp_path: Path) -> None:
    given = ours.DDIMScheduler(timestep_spacing="leading")
    given.save_pretrained(tmp_path)  # a file spells every option out
    for source in (given, ours.DDIMScheduler.from_pretrained(tmp_path)):
        moved = ours.DPMSolverMultistepScheduler.from_config(source.config)
        assert moved.config.timestep_spacing == "leading"
    moved = ours.DPMSolverMultistepScheduler.from_config(ours.DDIMScheduler().config)
    assert moved.config.timestep_spacing == "linspace"  # its own default


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_a_config_moves_to_another_class_as_it_does_in_diffusers(source: str, target: str) -> None:
    options = {"num_train_timesteps": 500, "beta_schedule": "scaled_linear", "steps_offset": 1}
    options |= {"prediction_type": "v_prediction"}
    theirs = getattr(diffusers, f"{source}Scheduler")(**options)
    expected = getattr(diffusers, f"{target}Scheduler").from_config(theirs.config).config
    for config in (theirs.config, SCHEDULERS[f"{source}Scheduler"](**options).config):
        got = SCHEDULERS[f"{target}Scheduler"].from_config(config).config
        for key, value in expected.items():
            if not key.startswith("_"):
                assert got[key] == value, key


# --- used as diffusers' own tests and pipelines use theirs --------------------------------------


@pytest.mark.parametrize("t", [0, 1, 37, 999])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_steps_from_timesteps_off_its_grid_as_diffusers_does(t: int, eta: float) -> None:
    mine, theirs = ours.DDIMScheduler(), diffusers.DDIMScheduler()
    x, out, z = (torch.randn(SHAPE) for _ in range(3))
    results = []
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(50)
        results.append(scheduler.step(out, t, x, eta=eta, variance_noise=z))
    assert difference(results[0].prev_sample, results[1].prev_sample) < 2e-6
    assert difference(results[0].pred_original_sample, results[1].pred_original_sample) < 2e-6


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_ddpm_steps_through_all_training_steps_without_set_timesteps(t: int) -> None:
    x, out = torch.randn(SHAPE), torch.randn(SHAPE)
    with pytest.warns(UserWarning, match="step before set_timesteps visits all 1000 entries"):
        a, b = (
            s.step(out, t, x, generator=torch.Generator().manual_seed(0), return_dict=False)
            for s in (ours.DDPMScheduler(), diffusers.DDPMScheduler())
        )
    assert difference(a[0], b[0]) < 2e-6
    assert difference(a[1], b[1]) < 2e-6


def test_trained_betas_are_kept_as_given() -> None:
    for name in NAMES:
        options = {"num_train_timesteps": 2, "trained_betas": [0.1, 0.3]}
        scheduler = SCHEDULERS[f"{name}Scheduler"](**options)
        assert torch.equal(scheduler.betas, torch.tensor([0.1, 0.3]))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_before_set_timesteps_or_without_a_number_is_refused(name: str) -> None:
    scheduler = SCHEDULERS[f"{name}Scheduler"]()
    with pytest.raises(InvalidArgument, match="num_inference_steps or timesteps"):
        scheduler.set_timesteps()
    with pytest.raises(InvalidArgument, match="not both"):
        scheduler.set_timesteps(10, timesteps=[5, 1])
    x = torch.zeros(SHAPE)
    if name != "DDPM":  # it walks all training steps by default, in diffusers too
        with pytest.raises(InvalidArgument, match="set_timesteps"):
            scheduler.step(x, 5, x)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"variance_type": "fixed_large_log"}, "variance_type"),
        ({"variance_type": "learned"}, "variance_type"),
        ({"beta_schedule": "quadratic"}, "beta_schedule"),
        ({"prediction_type": "noise"}, "prediction_type"),
        ({"timestep_spacing": "karras"}, "timestep_spacing"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"beta_end": 1.5}, "beta_end"),
        ({"clip_sample_range": float("nan")}, "clip_sample_range"),
        ({"thresholding": 1}, "thresholding"),
        ({"steps_offset": -1}, "steps_offset"),
        ({"compat": "paper"}, "compat"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(options: dict, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        ours.DDPMScheduler(**options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"algorithm_type": "dpmsolver"}, "final_sigmas_type"),
        ({"algorithm_type": "sde-dpmsolver", "solver_order": 3}, "solver_order"),
        ({"solver_type": "bh2"}, "solver_type"),
        ({"solver_order": 4}, "solver_order"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas and use_beta"),
        ({"use_lu_lambdas": True, "use_flow_sigmas": True}, "use_lu_lambdas and use_flow"),
        ({"prediction_type": "flow_prediction"}, "use_flow_sigmas"),
        ({"flow_shift": 0.0}, "flow_shift"),
        ({"variance_type": "fixed_small"}, "variance_type"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type"),
    ],
)
def test_options_that_dpm_solver_does_not_support_are_refused_by_name(
    options: dict, named: str
) -> None:
    with pytest.raises(InvalidArgument, match=named):
        ours.DPMSolverMultistepScheduler(**options)


def test_a_multistep_solver_refuses_a_step_too_many_and_one_off_its_grid() -> None:
    scheduler, x = ours.DPMSolverMultistepScheduler(), torch.zeros(SHAPE)
    scheduler.set_timesteps(3)
    with pytest.raises(InvalidArgument, match="998 is not among"):
        scheduler.step(x, 998, x)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(InvalidArgument, match="all 3 steps are done"):
        scheduler.step(x, 0, x)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_do_not_fit_are_refused_by_name(name: str) -> None:
    scheduler, x = SCHEDULERS[f"{name}Scheduler"](), torch.zeros(SHAPE)
    scheduler.set_timesteps(3)
    t = scheduler.grid[0]
    with pytest.raises(InvalidArgument, match="model_output must have the shape of sample"):
        scheduler.step(x[:1], t, x)
    with pytest.raises(InvalidArgument, match="floating point"):
        scheduler.step(x.long(), t, x.long())
    if name != "DDPM":
        with pytest.raises(
            InvalidArgument, match="variance_noise must be floating point of the shape"
        ):
            scheduler.step(x, t, x, variance_noise=x[:1])
        with pytest.raises(InvalidArgument, match="either variance_noise or generator"):
            scheduler.step(x, t, x, generator=torch.Generator(), variance_noise=x)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_eta_out_of_range_is_refused(eta: float) -> None:
    scheduler = ours.DDIMScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(InvalidArgument, match="eta"):
        scheduler.step(torch.zeros(SHAPE), 900, torch.zeros(SHAPE), eta=eta)
