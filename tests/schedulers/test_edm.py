"""EDM's Euler and DPM-Solver against diffusers' own, and against identities."""

import inspect
import itertools
import json
import math
from collections.abc import Sequence
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
    our_scheduler,
    seldom_many_steps,
    their_scheduler,
    thresholds,
    trajectory,
)
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.lab.order import MIXTURE, flow_error, order, variance_error
from minidiff.prediction import edm_row, solve
from minidiff.schedule import Level
from minidiff.schedulers import (
    SCHEDULERS,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    Scheduler,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NAMES = ["EDMEuler", "EDMDPMSolverMultistep"]
SHAPE = (2, 2, 3, 3)

# --- every option, every step --------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn, name: str) -> Case:
    """Draw from the full product of options."""
    flag = st.booleans()
    options: dict[str, Any] = {
        "sigma_min": draw(st.sampled_from([0.002, 0.02, 0.5])),
        "sigma_max": draw(st.sampled_from([80.0, 5.0, 700.0])),
        "sigma_data": draw(st.sampled_from([0.5, 1.0, 0.1])),
        "sigma_schedule": draw(st.sampled_from(["karras", "exponential"])),
        "num_train_timesteps": draw(st.sampled_from([1000, 100])),
        "prediction_type": draw(st.sampled_from(["epsilon", "v_prediction"])),
        "rho": draw(st.sampled_from([7.0, 3.0, 1.0])),
        "final_sigmas_type": draw(st.sampled_from(["zero", "sigma_min"])),
    }
    step_options = {}
    if name == "EDMEuler":
        if draw(flag):
            step_options = {
                "s_churn": draw(st.sampled_from([0.5, 3.0, 40.0])),
                "s_tmin": draw(st.sampled_from([0.0, 0.05])),
                "s_tmax": draw(st.sampled_from([math.inf, 50.0])),
                "s_noise": draw(st.sampled_from([1.0, 1.007])),
            }
    else:
        options |= draw(thresholds())
        options["solver_order"] = draw(st.sampled_from([1, 2, 2, 3, 3]))
        options["algorithm_type"] = draw(st.sampled_from(["dpmsolver++", "sde-dpmsolver++"]))
        if options["algorithm_type"] == "sde-dpmsolver++":  # it has no order 3: refused, see below
            options["solver_order"] = min(options["solver_order"], 2)
        options["solver_type"] = draw(st.sampled_from(["midpoint", "heun"]))
        options["lower_order_final"] = draw(flag)
        options["euler_at_final"] = draw(flag)
    grid = {"num_inference_steps": draw(seldom_many_steps(1000))}
    return Case(name, options, grid, step_options, draw(dtypes))


def sigmas_of(case: Case) -> list[float]:
    theirs = their_scheduler(case)
    theirs.set_timesteps(**case.grid)
    return theirs.sigmas.tolist()


def is_euler(case: Case) -> bool:
    return case.name == "EDMEuler"


ROUNDINGS = [
    Rounding("every sample is cast to float32", is_euler, lambda c: 2e-5, cap=2e-5),
    Rounding(
        "x + (sigma' - sigma) d: where sigma' is thousands of times smaller, what float32 leaves "
        "of sigma is large beside x'",
        is_euler,
        lambda c: 2**-21 * max(a / max(b, 1) for a, b in itertools.pairwise(sigmas_of(c))),
        cap=1e-2,
    ),
]


def last_step_is_empty(case: Case) -> bool:
    sigmas = sigmas_of(case)
    return sigmas[-1] > 0 and abs(sigmas[-2] / sigmas[-1] - 1) < 1e-3


CORNERS = [
    Corner(
        "divides by zero",
        None,
        "the last step has h = 0, or less by rounding: order 3 and heun divide by it, the noise of "
        "the SDE has its root; ours returns x",
        last_step_is_empty,
    ),
]


def compare_case(case: Case) -> None:
    compare(case, CORNERS, ROUNDINGS)


@pytest.mark.parametrize("name", NAMES)
def test_every_step_of_a_trajectory_equals_diffusers(name: str) -> None:
    settings(QUICK, max_examples=100)(given(cases(name))(compare_case))()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_step_of_a_trajectory_equals_diffusers_at_length(name: str) -> None:
    settings(QUICK, max_examples=4000, derandomize=False)(given(cases(name))(compare_case))()


@pytest.mark.parametrize("name", NAMES)
def test_the_exact_reading_samples_whatever_the_options(name: str) -> None:
    def check(case: Case) -> None:
        scheduler = our_scheduler(case, compat="exact")
        scheduler.set_timesteps(**case.grid)
        assert len(scheduler.timesteps) == case.n
        assert bool((scheduler.timesteps.diff() < 0).all())
        states = trajectory(scheduler, case)
        assert all(torch.isfinite(x).all() for x in states)

    settings(QUICK, max_examples=100)(given(cases(name))(check))()


@pytest.mark.parametrize("n", [1, 2, 9])
def test_euler_steps_from_a_given_clean_sample_as_diffusers_does(n: int) -> None:
    x, x0 = torch.randn(2, *SHAPE)
    walks = []
    for scheduler in (EDMEulerScheduler(), diffusers.EDMEulerScheduler()):
        scheduler.set_timesteps(n)
        scheduler.scale_model_input(x, scheduler.timesteps[0])
        result = scheduler.step(x, scheduler.timesteps[0], x, pred_original_sample=x0)
        walks.append(result.prev_sample)
        assert torch.equal(result.pred_original_sample, x0)
    assert difference(*walks) < 2e-5


# --- the preconditioning --------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.002, 80.0, torch.tensor([0.002, 1.0])[:, None, None, None]])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", NAMES)
def test_preconditioning_equals_diffusers(name: str, kind: str, sigma: Any) -> None:
    x, out = torch.randn(2, *SHAPE, dtype=torch.float64)
    case = Case(name, {"prediction_type": kind, "sigma_data": 0.7}, {}, {}, torch.float64)
    mine, theirs = our_scheduler(case), their_scheduler(case)
    pairs = [
        [s.precondition_inputs(x, sigma), s.precondition_outputs(x, out, sigma)]
        for s in (mine, theirs)
    ]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(mine.precondition_noise(sigma), theirs.precondition_noise(sigma))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_target_of_a_network_is_read_back_as_the_mixed_sample_and_noise(
    name: str, kind: str
) -> None:
    """`target` and `precondition_outputs` come from table 1 on two ways, by p and q and by c."""
    scheduler = SCHEDULERS[f"{name}Scheduler"](prediction_type=kind, compat="exact")
    x0, eps = torch.randn(2, *SHAPE, dtype=torch.float64)
    for sigma in (0.002, 0.5, 80.0):
        level = Level(1.0, sigma)
        out, x = scheduler.target(x0, eps, level), x0 + sigma * eps
        read = scheduler.precondition_outputs(x, out, sigma)
        torch.testing.assert_close(read, x0, rtol=1e-9, atol=1e-9)
        row = [r if kind == "epsilon" else -r for r in edm_row(level, 0.5)]
        torch.testing.assert_close(solve(out, x, level, tuple(row))[0], x0, rtol=1e-9, atol=1e-9)
    t = scheduler.timesteps[[3, 800]]
    sigma = torch.exp(4 * t)[:, None, None, None]
    out = scheduler.get_velocity(x0, eps, t)
    torch.testing.assert_close(scheduler.precondition_outputs(x0 + sigma * eps, out, sigma), x0)


def test_input_and_target_of_the_network_have_variance_1_at_every_level() -> None:
    """What the preconditioning is for: Karras et al. 2022, appendix B.6."""
    scheduler = EDMEulerScheduler(compat="exact")
    data, eps = torch.eye(2, dtype=torch.float64) * torch.tensor([0.5, 1.0])
    for sigma in (0.002, 0.5, 80.0):
        for signal in (
            scheduler.precondition_inputs(data + sigma * eps, sigma),
            scheduler.target(data, eps, Level(1.0, sigma)),
        ):
            assert signal.square().sum().item() == pytest.approx(1, rel=1e-12)


# --- the exact reading ----------------------------------------------------------------------------


def run(scheduler: Scheduler, **step_options: Any) -> list[Tensor]:
    """Return x/√(α² + σ²) after every step on the mixture, which does not depend on the scaling."""
    x = math.hypot(*scheduler.levels[0]) * torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
    states = []
    for i, t in enumerate(scheduler.grid):
        level = scheduler.levels[i]
        out = scheduler.target(MIXTURE.denoise(x, level), MIXTURE.noise(x, level), level)
        x = scheduler.step(
            out, t, x, generator=torch.Generator().manual_seed(i), **step_options
        ).prev_sample
        states.append(x / math.hypot(*scheduler.levels[i + 1]))
    return states


def assert_same(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("churn", [{}, {"s_churn": 3.0}])
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_edm_euler_is_euler_on_converted_outputs(kind: str, schedule: str, churn: dict) -> None:
    edm = EDMEulerScheduler(prediction_type=kind, sigma_schedule=schedule, compat="exact")
    edm.set_timesteps(9)
    euler = EulerDiscreteScheduler(compat="exact")
    euler.set_timesteps(sigmas=edm.sigmas.tolist())
    assert_same(run(edm, **churn), run(euler, **churn))


def test_first_order_dpm_solver_is_euler() -> None:
    walks = []
    for scheduler in (
        EDMEulerScheduler(compat="exact"),
        EDMDPMSolverMultistepScheduler(solver_order=1, compat="exact"),
    ):
        scheduler.set_timesteps(9)
        walks.append(run(scheduler))
    assert_same(*walks)


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_variance_preserving_and_exploding_levels_give_the_same_trajectory(
    p: int, algorithm: str, solver_type: str
) -> None:
    """VP = VE: the multistep solver in both scalings, between the same two σ."""
    options = {"solver_order": p, "algorithm_type": algorithm, "solver_type": solver_type}
    options |= {"prediction_type": "v_prediction", "compat": "exact"}
    preserving = DPMSolverMultistepScheduler(**options, use_karras_sigmas=True)
    preserving.set_timesteps(16)
    high, low = preserving.sigmas[[0, -2]].tolist()
    exploding = EDMDPMSolverMultistepScheduler(**options, sigma_min=low, sigma_max=high)
    exploding.set_timesteps(16)
    assert_same(run(preserving), run(exploding))


def test_sigmas_that_are_custom_sample_as_those_of_the_formula() -> None:
    formula, given_ones = EDMEulerScheduler(compat="exact"), EDMEulerScheduler(compat="exact")
    formula.set_timesteps(9)
    given_ones.set_timesteps(sigmas=formula.sigmas[:-1].tolist())
    assert_same(run(formula), run(given_ones))


@pytest.mark.parametrize(
    ("options", "measured", "error"),
    [
        ({"solver_order": 1}, 1, flow_error),
        ({"solver_order": 2}, 2, flow_error),
        ({"solver_order": 2, "solver_type": "heun"}, 2, flow_error),
        ({"solver_order": 2, "sigma_schedule": "exponential"}, 2, flow_error),
        ({"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}, 1, variance_error),
        ({"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}, 2, variance_error),
    ],
)
def test_dpm_solver_converges_at_its_order(options: dict, measured: int, error: Any) -> None:
    options = {"lower_order_final": False, "compat": "exact"} | options
    scheduler = EDMDPMSolverMultistepScheduler(**options)
    assert order(lambda n: error(scheduler, n, part=0.6), 120) == pytest.approx(measured, abs=0.15)


@pytest.mark.parametrize("n", [1, 2, 13])
@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(compat="exact"),
        EDMEulerScheduler(compat="exact", prediction_type="v_prediction"),
        *(
            EDMDPMSolverMultistepScheduler(compat="exact", solver_order=p, algorithm_type=a)
            for p in (1, 2, 3)
            for a in ("dpmsolver++", "sde-dpmsolver++")
        ),
    ],
    ids=repr,
)
def test_the_last_step_lands_on_the_prediction_of_the_clean_sample(
    scheduler: Scheduler, n: int
) -> None:
    scheduler.set_timesteps(n)
    x = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
    for t in scheduler.grid:
        x, x0 = scheduler.step(torch.tanh(x), t, x, return_dict=False)
    torch.testing.assert_close(x, x0, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("name", NAMES)
def test_exact_grids_run_from_sigma_max_to_sigma_min(name: str, schedule: str) -> None:
    cls = SCHEDULERS[f"{name}Scheduler"]
    for n in (1, 2, 37):
        scheduler = cls(sigma_schedule=schedule, final_sigmas_type="sigma_min", compat="exact")
        scheduler.set_timesteps(n)
        sigmas = scheduler.sigmas.tolist()
        assert len(sigmas) == n + 1
        assert sigmas[0] == pytest.approx(80, rel=1e-12)
        assert sigmas[-1] == pytest.approx(0.002, rel=1e-12)
        np.testing.assert_allclose(np.exp(4 * np.array(scheduler.grid)), sigmas[:-1], rtol=1e-12)


# --- the contract of all five classes of x = x0 + σ·ε ---------------------------------------------

EXPLODING = ["EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", *NAMES]


@pytest.mark.parametrize("name", EXPLODING)
def test_the_constructor_takes_diffusers_arguments_with_its_defaults_and_compat(name: str) -> None:
    mine = inspect.signature(SCHEDULERS[f"{name}Scheduler"]).parameters
    theirs = inspect.signature(getattr(diffusers, f"{name}Scheduler")).parameters
    assert list(mine) == [*theirs, "compat"]
    assert all(mine[k].default == p.default for k, p in theirs.items())
    assert mine["compat"].default == "diffusers"


@pytest.mark.parametrize("method", ["set_timesteps", "step", "scale_model_input", "add_noise"])
@pytest.mark.parametrize("name", EXPLODING)
def test_methods_take_diffusers_arguments_in_its_order(name: str, method: str) -> None:
    mine, theirs = (
        inspect.signature(getattr(cls, method)).parameters
        for cls in (SCHEDULERS[f"{name}Scheduler"], getattr(diffusers, f"{name}Scheduler"))
    )
    more = ["variance_noise"] if method == "step" and name != "HeunDiscrete" else []
    assert list(mine) == [*theirs, *more]
    assert all(mine[k].default == p.default for k, p in theirs.items())


@pytest.mark.parametrize("name", EXPLODING)
def test_the_config_and_the_attributes_are_diffusers_own(name: str) -> None:
    mine, theirs = SCHEDULERS[f"{name}Scheduler"](), getattr(diffusers, f"{name}Scheduler")()
    expected = {k: v for k, v in theirs.config.items() if not k.startswith("_")}
    got = {k: v for k, v in mine.config.items() if not k.startswith("_")}
    assert got == expected | {"compat": "diffusers"}
    assert (mine.order, len(mine)) == (theirs.order, len(theirs))
    for attribute in ("betas", "alphas", "alphas_cumprod"):
        assert hasattr(mine, attribute) == hasattr(theirs, attribute)
        if hasattr(theirs, attribute):
            assert torch.equal(getattr(mine, attribute), getattr(theirs, attribute))
    torch.testing.assert_close(
        mine.timesteps, theirs.timesteps.to(mine.timesteps), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(mine.sigmas, theirs.sigmas, rtol=1e-6, atol=0)
    assert mine.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    assert (mine.step_index, mine.begin_index) == (None, None)


@pytest.mark.parametrize("name", EXPLODING)
def test_scheduler_config_json_reads_in_either_library(name: str, tmp_path: Path) -> None:
    cls, theirs = SCHEDULERS[f"{name}Scheduler"], getattr(diffusers, f"{name}Scheduler")
    options = {"num_train_timesteps": 500, "prediction_type": "v_prediction"}
    cls(**options).save_pretrained(tmp_path / "mine")
    theirs(**options).save_pretrained(tmp_path / "theirs")
    assert "compat" not in json.loads((tmp_path / "mine/scheduler_config.json").read_text())
    ours_of_theirs = cls.from_pretrained(tmp_path / "theirs").config
    theirs_of_ours = theirs.from_pretrained(tmp_path / "mine").config
    plain = {k: v for k, v in theirs(**options).config.items() if not k.startswith("_")}
    for config in (ours_of_theirs, theirs_of_ours):
        assert {k: config[k] for k in plain} == plain


@pytest.mark.parametrize("source", ["DDIM", *EXPLODING])
@pytest.mark.parametrize("target", EXPLODING)
def test_a_config_moves_to_another_class_as_it_does_in_diffusers(source: str, target: str) -> None:
    options = {"num_train_timesteps": 500, "prediction_type": "v_prediction"}
    if "EDM" not in source:
        options |= {"beta_schedule": "scaled_linear", "steps_offset": 1}
    theirs = getattr(diffusers, f"{source}Scheduler")(**options)
    expected = getattr(diffusers, f"{target}Scheduler").from_config(theirs.config).config
    for config in (theirs.config, SCHEDULERS[f"{source}Scheduler"](**options).config):
        got = SCHEDULERS[f"{target}Scheduler"].from_config(config).config
        options = inspect.signature(SCHEDULERS[f"{target}Scheduler"]).parameters
        assert all(got[k] == expected[k] for k in options if k != "compat")


@pytest.mark.parametrize("name", EXPLODING)
def test_half_precision_samples_keep_their_dtype(name: str) -> None:
    case = Case(name, {}, {"num_inference_steps": 4}, {}, torch.bfloat16)
    walks = []
    for scheduler in (our_scheduler(case), their_scheduler(case)):
        scheduler.set_timesteps(4)
        walks.append(trajectory(scheduler, case))
    for a, b in zip(*walks, strict=True):
        assert a.dtype == torch.bfloat16
        assert difference(a, b) < 0.05


# --- used as diffusers' pipelines use them --------------------------------------------------------


@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_noising_follows_the_begin_index_and_then_the_step_as_in_diffusers(
    name: str, begin: int
) -> None:
    case = Case(name, {}, {"num_inference_steps": 10}, {}, torch.float64)
    x0, eps = torch.randn(2, *SHAPE, dtype=torch.float64)
    noised = []
    for scheduler in (our_scheduler(case), their_scheduler(case)):
        scheduler.set_timesteps(10)
        scheduler.set_begin_index(begin)
        t, off_grid = scheduler.timesteps[begin], torch.tensor([0.1])
        x = scheduler.add_noise(x0, eps, off_grid)
        out = scheduler.scale_model_input(x, t)
        y = scheduler.step(out, t, x).prev_sample
        noised.append((x, out, y, scheduler.add_noise(x0, eps, off_grid)))
        assert (scheduler.begin_index, scheduler.step_index) == (begin, begin + 1)
    for a, b in zip(*noised, strict=True):
        assert difference(a, b) < 1e-6


# --- refusals -------------------------------------------------------------------------------------

EULER, SOLVER = EDMEulerScheduler, EDMDPMSolverMultistepScheduler


@pytest.mark.parametrize(
    ("cls", "options", "named"),
    [
        (EULER, {"sigma_min": 90.0}, "sigma_min"),
        (EULER, {"sigma_min": 0.0}, "sigma_min"),
        (EULER, {"sigma_max": -1.0}, "sigma_max"),
        (EULER, {"sigma_max": None}, "sigma_max"),
        (SOLVER, {"sigma_min": None}, "sigma_min"),
        (EULER, {"sigma_data": 0.0}, "sigma_data"),
        (EULER, {"rho": 0.5}, "rho"),
        (EULER, {"sigma_schedule": "linear"}, "sigma_schedule"),
        (EULER, {"prediction_type": "sample"}, "prediction_type"),
        (SOLVER, {"prediction_type": "sample"}, "prediction_type"),
        (EULER, {"num_train_timesteps": 0}, "num_train_timesteps"),
        (EULER, {"final_sigmas_type": "none"}, "final_sigmas_type"),
        (SOLVER, {"algorithm_type": "dpmsolver"}, "algorithm_type"),
        (SOLVER, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "solver_order 3"),
        (SOLVER, {"solver_order": 4}, "solver_order"),
        (SOLVER, {"solver_type": "bh2"}, "solver_type"),
        (SOLVER, {"beta_start": 0.1}, "beta_start"),
    ],
)
def test_an_option_that_cannot_work_is_refused_by_name(
    cls: type[Scheduler], options: dict, named: str
) -> None:
    with pytest.raises(InvalidArgument, match=named):
        cls(**options)


@pytest.mark.parametrize(
    ("scheduler", "grid", "named"),
    [
        (EULER(), {}, "num_inference_steps or sigmas"),
        (EULER(compat="exact"), {"num_inference_steps": 3, "sigmas": [3.0]}, "num_inference_steps"),
        (EULER(), {"sigmas": [3.0, 1.0]}, "sigmas are taken by diffusers"),
        (EULER(compat="exact"), {"sigmas": [1.0, 3.0]}, "sigmas must be strictly falling"),
        (EULER(compat="exact"), {"sigmas": [3.0, 0.0]}, "sigmas must be above 0"),
        (EULER(compat="exact"), {"sigmas": [math.nan]}, "sigmas must be"),
        (EULER(compat="exact"), {"sigmas": 3.0}, "sigmas must be a list"),
        (SOLVER(), {"num_inference_steps": None}, "num_inference_steps"),
        (SOLVER(), {"num_inference_steps": 0}, "num_inference_steps"),
        (EULER(), {"num_inference_steps": 1.5}, "num_inference_steps"),
    ],
    ids=repr,
)
def test_a_grid_that_cannot_work_is_refused_by_name(
    scheduler: Scheduler, grid: dict, named: str
) -> None:
    with pytest.raises(InvalidArgument, match=named):
        scheduler.set_timesteps(**grid)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_off_the_grid_or_too_many_is_refused(name: str) -> None:
    scheduler, x = SCHEDULERS[f"{name}Scheduler"](), torch.zeros(SHAPE)
    first = scheduler.grid[0]
    scheduler.set_timesteps(3)
    with pytest.raises(InvalidArgument, match=r"0\.5 is not among"):
        scheduler.step(x, 0.5, x)
    for t in scheduler.grid:
        scheduler.step(x, t, x)
    with pytest.raises(InvalidArgument, match="steps are done"):
        scheduler.scale_model_input(x, first)
