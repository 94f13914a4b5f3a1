"""Euler, ancestral Euler and Heun against diffusers' own, and against identities."""

import math
from collections.abc import Sequence
from itertools import pairwise
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
    our_scheduler,
    schedule_options,
    seldom_many_steps,
    their_scheduler,
    trajectory,
)
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.lab.order import FINE, MIXTURE, order, variance_error
from minidiff.prediction import PREDICTION_TYPES
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
    """Draw from the full product of options."""
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
    """Draw the options that only EulerDiscreteScheduler has."""
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
    """Draw the options of churn, half of the time."""
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
    """Draw the arguments of set_timesteps: mostly a number."""
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
            "num_inference_steps": draw(seldom_many_steps(fewer)),
            "num_train_timesteps": fewer,
        }
    return {"num_inference_steps": draw(seldom_many_steps(train_steps))}


@st.composite
def falling_sigmas(draw: st.DrawFn) -> list[float]:
    """Draw custom σ, the end included."""
    exponents = draw(st.sets(st.integers(-40, 50), min_size=2, max_size=15))
    sigmas = [float(np.float32(math.exp(e / 10))) for e in sorted(exponents, reverse=True)]
    return [*sigmas[:-1], draw(st.sampled_from([0.0, sigmas[-1]]))]


def sigmas_of(case: Case) -> list[float]:
    theirs = their_scheduler(case)
    theirs.set_timesteps(**case.grid)
    return theirs.sigmas.tolist()


def drop(case: Case) -> float:
    """Return the largest σ/max(σ', 1) of a step."""
    return max(a / max(b, 1) for a, b in pairwise(sigmas_of(case)))


ROUNDINGS = [
    Rounding(
        "every sample is cast to float32",
        lambda c: c.name != "HeunDiscrete",
        lambda c: 2e-5,
        cap=2e-5,
    ),
    Rounding(
        "x + (sigma' - sigma) d: where sigma' is thousands of times smaller, what float32 leaves "
        "of sigma is large beside x'",
        lambda c: c.name != "HeunDiscrete" or c.dtype == torch.float32,
        lambda c: 2**-21 * drop(c),
        cap=1e-2,
    ),
    Rounding(
        "x0 from v with float32 weights: Heun's second slope divides what they lose by sigma', and "
        "its step multiplies it by sigma",
        lambda c: c.name == "HeunDiscrete" and c.options["prediction_type"] == "v_prediction",
        lambda c: 2**-21 * max((a / b for a, b in pairwise(sigmas_of(c)) if b > 0), default=0),
        cap=1e-2,
    ),
]


def formula_of(case: Case) -> str | None:
    if "sigmas" in case.grid:
        return None
    return next((f for f in FORMULAS if case.options.get(f)), None)


def begins_twice(case: Case) -> bool:
    theirs = their_scheduler(case)
    theirs.set_timesteps(**case.grid)
    return len(theirs.timesteps) > 1 and bool(theirs.timesteps[0] == theirs.timesteps[1])


def leaps(case: Case) -> bool:
    """Return whether some step of an ancestral trajectory divides σ by more than a thousand."""
    return any(a > 1000 * b > 0 for a, b in pairwise(sigmas_of(case)))


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
    compare(case, CORNERS, ROUNDINGS)


@pytest.mark.parametrize("name", NAMES)
def test_every_step_of_a_trajectory_equals_diffusers(name: str) -> None:
    settings(QUICK, max_examples=100)(given(cases(name))(compare_case))()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_step_of_a_trajectory_equals_diffusers_at_length(name: str) -> None:
    settings(QUICK, max_examples=4000, derandomize=False)(given(cases(name))(compare_case))()


@pytest.mark.parametrize("name", NAMES)
def test_the_exact_reading_samples_or_refuses_whatever_the_options(name: str) -> None:
    def check(case: Case) -> None:
        scheduler = our_scheduler(case, compat="exact")
        refusal = ""
        try:
            scheduler.set_timesteps(**case.grid)
        except InvalidArgument as error:
            refusal = str(error)
        if refusal:
            assert "zero terminal SNR" in refusal or "steps_offset" in refusal, refusal
            return
        stages = 2 if name == "HeunDiscrete" else 1
        assert case.n is None or len(scheduler.timesteps) == stages * case.n - (stages - 1)
        assert all(torch.isfinite(x).all() for x in trajectory(scheduler, case))

    settings(QUICK, max_examples=100)(given(cases(name))(check))()


# --- identities of the exact reading --------------------------------------------------------------

GRIDS = [{"timesteps": [990, 400, 399, 3]}, {"timesteps": [999]}, {"num_inference_steps": 7}]


def run(scheduler: Scheduler, **step_options: Any) -> list[Tensor]:
    """Return x/√(α² + σ²) after every step on the mixture, which does not depend on the scaling."""
    begin = scheduler.levels[0]
    x = math.hypot(*begin) * torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
    if "generator" in scheduler.step.__code__.co_varnames:
        step_options["generator"] = torch.Generator().manual_seed(0)
    states = []
    for i, t in enumerate(scheduler.grid):
        level = scheduler.levels[i]
        x0, eps = MIXTURE.denoise(x, level), MIXTURE.noise(x, level)
        x = scheduler.step(scheduler.target(x0, eps, level), t, x, **step_options).prev_sample
        states.append(x / math.hypot(*scheduler.levels[i + 1]))
    return states


def assert_same(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def on_the_same_grid(grid: dict[str, Any], *schedulers: Scheduler) -> list[Scheduler]:
    """Return the schedulers, all with the timesteps that DDIM, the first, has for this grid."""
    schedulers[0].set_timesteps(**grid)
    for scheduler in schedulers[1:]:
        scheduler.set_timesteps(timesteps=schedulers[0].grid)
    return list(schedulers)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("grid", GRIDS)
def test_euler_is_ddim_in_another_scaling(grid: dict, schedule: str) -> None:
    options = {"beta_schedule": schedule, "prediction_type": "v_prediction", "compat": "exact"}
    ddim, euler = on_the_same_grid(
        grid, DDIMScheduler(**options, clip_sample=False), EulerDiscreteScheduler(**options)
    )
    assert euler.init_noise_sigma == pytest.approx(1 / ddim.levels[0].alpha, rel=1e-12)
    assert_same(run(ddim), run(euler))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("n", [1, 2, 10, 28])  # linspace of these is whole
def test_the_ancestral_step_is_ddpm_and_ddim_with_eta_1_in_another_scaling(
    n: int, spacing: str
) -> None:
    options = {"prediction_type": "v_prediction", "timestep_spacing": spacing, "compat": "exact"}
    ancestral = EulerAncestralDiscreteScheduler(**options)
    ancestral.set_timesteps(n)
    ddim, ddpm = on_the_same_grid(
        {"timesteps": [int(t) for t in ancestral.grid]},
        DDIMScheduler(**options, clip_sample=False),
        DDPMScheduler(**options, clip_sample=False),
    )
    assert ddim.grid == ancestral.grid
    walk = run(ancestral)
    assert_same(walk, run(ddim, eta=1.0))
    assert_same(walk, run(ddpm))


@pytest.mark.parametrize("churn", [{}, {"s_churn": 2.0, "s_noise": 1.01}])
@pytest.mark.parametrize("name", NAMES)
def test_prediction_types_agree_when_fed_converted_outputs(name: str, churn: dict) -> None:
    if churn and name != "EulerDiscrete":
        return
    walks = []
    for kind in PREDICTION_TYPES:
        scheduler = SCHEDULERS[f"{name}Scheduler"](prediction_type=kind, compat="exact")
        scheduler.set_timesteps(9)
        walks.append(run(scheduler, **churn))
    for other in walks[1:]:
        assert_same(walks[0], other)


@pytest.mark.parametrize("n", [1, 2, 13])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "churn"), [*((name, {}) for name in NAMES), ("EulerDiscrete", {"s_churn": 5.0})]
)
def test_the_last_step_lands_on_the_prediction_of_the_clean_sample(
    name: str, churn: dict, kind: str, n: int
) -> None:
    scheduler = SCHEDULERS[f"{name}Scheduler"](prediction_type=kind, compat="exact")
    scheduler.set_timesteps(n)
    x = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
    for t in scheduler.grid:
        x, x0 = scheduler.step(torch.tanh(x), t, x, **churn, return_dict=False)
    torch.testing.assert_close(x, x0, rtol=1e-14, atol=1e-14)


def test_euler_samples_on_three_custom_grids() -> None:
    """Custom σ equal those of a formula, step by step, and so do custom timesteps."""
    formula = EulerDiscreteScheduler(use_karras_sigmas=True, compat="exact")
    formula.set_timesteps(12)
    given = EulerDiscreteScheduler(compat="exact")
    given.set_timesteps(sigmas=formula.sigmas.tolist())
    assert given.grid == pytest.approx(formula.grid, rel=1e-12)
    assert_same(run(given), run(formula))


@pytest.mark.parametrize("interpolation", ["linear", "log_linear"])
def test_interpolation_in_the_exact_reading_keeps_the_trained_sigma_of_whole_steps(
    interpolation: str,
) -> None:
    scheduler = EulerDiscreteScheduler(interpolation_type=interpolation, compat="exact")
    scheduler.set_timesteps(timesteps=[900, 17.5, 3])
    low, high = scheduler.schedule.sigma_of(np.array([17, 18]))
    middle = math.sqrt(low * high) if interpolation == "log_linear" else (low + high) / 2
    whole = scheduler.schedule.sigma_of(np.array([900, 3]))
    expected = [whole[0], middle, whole[1], 0.0]
    np.testing.assert_allclose(scheduler.sigmas.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("s_churn", [0.0, 1.0, 20.0])
def test_the_noise_of_churn_keeps_the_variance_of_the_marginal(s_churn: float) -> None:
    """Where the data is one point, and x̂0 it, x − x0 has variance σ'² after every step."""
    scheduler = EulerDiscreteScheduler(prediction_type="sample", compat="exact")
    table = scheduler.coefficients(20, s_churn=s_churn)
    assert bool((table.C[:-1] > 0).all()) == (s_churn > 0)
    expected = [level.sigma**2 for level in table.levels]
    measured = table.variance([0.0] * 20, start=expected[0])
    np.testing.assert_allclose(measured, expected[1:], rtol=1e-10, atol=1e-12)


def test_in_diffusers_the_churn_of_the_last_step_stays_in_the_picture() -> None:
    """ε of x is taken for ε of x̂: what is left is √(σ̂² − σ²), here 0.9 of the last σ."""
    for compat, left in (("exact", 0.0), ("diffusers", 1.0)):
        scheduler = EulerDiscreteScheduler(compat=compat)
        table = scheduler.coefficients(10, s_churn=10.0)
        assert table.C[-1].item() == pytest.approx(left * table.levels[-2].sigma, rel=1e-4)


def test_the_variance_of_churned_euler_converges_at_weak_order_one() -> None:
    def error(n: int) -> float:
        scheduler = EulerDiscreteScheduler(**FINE, prediction_type="sample", compat="exact")
        return variance_error(scheduler, n, s_churn=4.0)

    assert order(error, 120) == pytest.approx(1, abs=0.15)


# --- grids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train_steps", [1, 2, 37, 100])
def test_every_number_of_steps_has_that_many_falling_timesteps(
    name: str, spacing: str, train_steps: int
) -> None:
    scheduler = SCHEDULERS[f"{name}Scheduler"](
        num_train_timesteps=train_steps, timestep_spacing=spacing, compat="exact", beta_end=0.001
    )
    for n in range(1, train_steps + 1):
        scheduler.set_timesteps(n)
        grid = np.unique(scheduler.grid)[::-1]
        assert len(grid) == scheduler.num_inference_steps == n
        assert scheduler.grid == sorted(scheduler.grid, reverse=True)
        assert 0 <= grid[-1] <= grid[0] <= train_steps - 1
        if spacing != "leading":
            assert grid[0] == train_steps - 1
        expected = scheduler.schedule.sigma_of(np.array(scheduler.grid))
        np.testing.assert_allclose(scheduler.sigmas[:-1], expected)


def test_heun_visits_every_sigma_but_the_first_and_last_twice() -> None:
    scheduler = HeunDiscreteScheduler(compat="exact")
    scheduler.set_timesteps(3)
    a, b, c, end = 999.0, 499.5, 0.0, 0.0
    assert scheduler.grid == [a, b, b, c, c]
    s = scheduler.schedule.sigma_of(np.array([a, b, c])).tolist()
    assert [level.sigma for level in scheduler.levels] == [s[0], s[1], s[1], s[2], s[2], end]


# --- used as diffusers' pipelines use them --------------------------------------------------------


@pytest.mark.parametrize("begin", [0, 2, 6])
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
        t, off_grid = scheduler.timesteps[begin], torch.tensor([123.25])
        x = scheduler.add_noise(x0, eps, off_grid)
        out = scheduler.scale_model_input(x, t)
        generator = (
            {} if name == "HeunDiscrete" else {"generator": torch.Generator().manual_seed(0)}
        )
        y = scheduler.step(out, t, x, **generator).prev_sample
        noised.append((x, out, y, scheduler.add_noise(x0, eps, off_grid)))
        assert (scheduler.begin_index, scheduler.step_index) == (begin, begin + 1)
    for a, b in zip(*noised, strict=True):
        assert difference(a, b) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_setting_timesteps_again_forgets_the_sampling_under_way(name: str) -> None:
    case = Case(name, {}, {"num_inference_steps": 5}, {}, torch.float64)
    scheduler = our_scheduler(case)
    scheduler.set_timesteps(5)
    first = trajectory(scheduler, case)
    scheduler.set_timesteps(7)
    trajectory(scheduler, case, steps=3)
    scheduler.set_timesteps(5)
    assert all(map(torch.equal, first, trajectory(scheduler, case)))


def test_velocity_is_that_of_the_trained_schedule_and_in_diffusers_of_a_wrong_step() -> None:
    """diffusers takes the index in the grid for a training step."""
    x0, eps = torch.randn(2, *SHAPE, dtype=torch.float64)
    t = torch.tensor([999.0, 250.0])
    ddpm = DDPMScheduler(compat="exact").get_velocity(x0, eps, t.long())
    torch.testing.assert_close(
        EulerDiscreteScheduler(compat="exact").get_velocity(x0, eps, t), ddpm
    )
    mine, theirs = EulerDiscreteScheduler(), diffusers.EulerDiscreteScheduler()
    wrong = mine.get_velocity(x0, eps, t)
    assert difference(wrong, theirs.get_velocity(x0, eps, t)) < 1e-6
    assert difference(wrong, ddpm) > 0.1


# --- refusals -------------------------------------------------------------------------------------

EULER, ANCESTRAL, HEUN = (SCHEDULERS[f"{name}Scheduler"] for name in NAMES)


@pytest.mark.parametrize(
    ("cls", "options", "named"),
    [
        (
            EULER,
            {"use_karras_sigmas": True, "use_beta_sigmas": True},
            "use_karras_sigmas and",
        ),
        (HEUN, {"use_exponential_sigmas": True, "use_beta_sigmas": True}, "use_exponential_sigmas"),
        (EULER, {"timestep_type": "continuous"}, "timestep_type 'continuous'"),
        (EULER, {"timestep_type": "real"}, "timestep_type"),
        (EULER, {"interpolation_type": "cubic"}, "interpolation_type"),
        (EULER, {"sigma_min": 0.1}, "sigma_min"),
        (EULER, {"sigma_max": 10.0}, "sigma_max"),
        (EULER, {"sigma_min": 0.0, "use_karras_sigmas": True}, "sigma_min"),
        (EULER, {"final_sigmas_type": "one"}, "final_sigmas_type"),
        (EULER, {"prediction_type": "flow_prediction"}, "flow_prediction"),
        (EULER, {"clip_sample": True}, "clip_sample"),
        (ANCESTRAL, {"prediction_type": "sample"}, "prediction_type 'sample'"),
        (ANCESTRAL, {"use_karras_sigmas": True}, "use_karras_sigmas"),
        (HEUN, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        (HEUN, {"clip_sample_range": -1.0}, "clip_sample_range"),
        (HEUN, {"beta_schedule": "cosine"}, "beta_schedule"),
    ],
)
def test_an_option_that_cannot_work_is_refused_by_name(
    cls: type[Scheduler], options: dict, named: str
) -> None:
    with pytest.raises(InvalidArgument, match=named):
        cls(**options)


ONLY_ONE = "give one of num_inference_steps, timesteps and sigmas"
NEITHER = "either num_inference_steps or timesteps"


@pytest.mark.parametrize(
    ("scheduler", "grid", "named"),
    [
        (EULER(), {}, NEITHER),
        (EULER(), {"num_inference_steps": 5, "timesteps": [3]}, NEITHER),
        (EULER(), {"num_inference_steps": 5, "sigmas": [3.0, 0.0]}, ONLY_ONE),
        (EULER(), {"timesteps": [3], "sigmas": [3.0, 0.0]}, ONLY_ONE),
        (EULER(), {"num_inference_steps": 0}, "num_inference_steps"),
        (EULER(), {"num_inference_steps": 2.5}, "num_inference_steps"),
        (EULER(timestep_spacing="leading"), {"num_inference_steps": 1001}, "num_inference_steps"),
        (EULER(timestep_spacing="trailing"), {"num_inference_steps": 3001}, "num_inference_steps"),
        (EULER(), {"timesteps": [3, 5]}, "timesteps must be strictly falling"),
        (EULER(), {"timesteps": [5, 5]}, "timesteps must be strictly falling"),
        (EULER(), {"timesteps": []}, "timesteps must be strictly falling"),
        (EULER(), {"timesteps": [1000]}, "timesteps must be in"),
        (EULER(), {"timesteps": [5, -1]}, "timesteps must be in"),
        (EULER(), {"timesteps": [math.nan]}, "timesteps must be in"),
        (EULER(), {"timesteps": 5}, "timesteps must be a list"),
        (EULER(), {"sigmas": [1.0]}, "sigmas must hold a first and a last"),
        (EULER(), {"sigmas": [0.0, 1.0]}, "sigmas must be strictly falling"),
        (EULER(), {"sigmas": [1.0, -1.0]}, "sigmas must be"),
        (EULER(), {"sigmas": [math.inf, 1.0]}, "sigmas must be"),
        (EULER(use_karras_sigmas=True), {"timesteps": [5]}, "use_karras_sigmas"),
        (
            EULER(use_karras_sigmas=True, sigma_min=200.0),
            {"num_inference_steps": 5},
            "sigma_min must be in",
        ),
        (
            EULER(timestep_type="continuous", prediction_type="v_prediction"),
            {"timesteps": [5]},
            "timestep_type 'continuous'",
        ),
        (
            EULER(rescale_betas_zero_snr=True, compat="exact"),
            {"num_inference_steps": 5},
            "rescale_betas_zero_snr",
        ),
        (HEUN(), {}, NEITHER),
        (HEUN(), {"num_inference_steps": 5, "num_train_timesteps": 1001}, "num_train_timesteps"),
        (HEUN(use_beta_sigmas=True), {"timesteps": [5]}, "use_beta_sigmas"),
        (ANCESTRAL(), {"num_inference_steps": None}, NEITHER),
        (
            ANCESTRAL(rescale_betas_zero_snr=True),
            {"num_inference_steps": 1000},
            "rescale_betas_zero_snr",
        ),
    ],
    ids=repr,
)
def test_a_grid_that_cannot_work_is_refused_by_name(
    scheduler: Scheduler, grid: dict, named: str
) -> None:
    with pytest.raises(InvalidArgument, match=named):
        scheduler.set_timesteps(**grid)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"s_churn": -1.0}, "s_churn"),
        ({"s_churn": math.nan}, "s_churn"),
        ({"s_churn": math.inf}, "s_churn"),
        ({"s_tmin": -0.1}, "s_tmin"),
        ({"s_tmax": -1.0}, "s_tmax"),
        ({"s_tmax": math.nan}, "s_tmax"),
        ({"s_noise": -1.0}, "s_noise"),
        ({"s_noise": "1"}, "s_noise"),
    ],
)
@pytest.mark.parametrize("name", ["EulerDiscrete", "EDMEuler"])
def test_churn_out_of_range_is_refused_by_name(name: str, options: dict, named: str) -> None:
    scheduler, x = SCHEDULERS[f"{name}Scheduler"](), torch.zeros(SHAPE)
    scheduler.set_timesteps(3)
    with pytest.raises(InvalidArgument, match=named):
        scheduler.step(x, scheduler.grid[0], x, **options)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_off_the_grid_or_too_many_is_refused(name: str) -> None:
    scheduler, x = SCHEDULERS[f"{name}Scheduler"](), torch.zeros(SHAPE)
    scheduler.set_timesteps(3)
    for call in (scheduler.scale_model_input, lambda x, t: scheduler.step(x, t, x)):
        with pytest.raises(InvalidArgument, match="998 is not among"):
            call(x, 998.0)
    for t in scheduler.grid:
        scheduler.step(x, t, x)
    for call in (scheduler.scale_model_input, lambda x, t: scheduler.step(x, t, x)):
        with pytest.raises(InvalidArgument, match="steps are done"):
            call(x, 0.0)


def test_heun_begins_with_a_whole_step() -> None:
    scheduler = HeunDiscreteScheduler()
    scheduler.set_timesteps(5)
    for index in (1, 7, -2, 0.5):
        with pytest.raises(InvalidArgument, match="begin_index"):
            scheduler.set_begin_index(index)
