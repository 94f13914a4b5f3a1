"""DPM-Solver singlestep against diffusers' own, and its exact reading against mathematics."""

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
    falling_timesteps,
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
from minidiff.lab.order import FINE, flow_error, order, variance_error
from minidiff.prediction import PREDICTION_TYPES
from minidiff.schedule import Level
from minidiff.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
)
from minidiff.schedulers.core.quirks import departing
from minidiff.schedulers.dpm_solver import ALGORITHMS, Interval

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.algorithm_types=dpmsolver:FutureWarning"),
]

FORMULAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw from the full product of options."""
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
    """Return whether the first two timesteps are cut to the same whole step."""
    theirs = their_scheduler(case)
    theirs.set_timesteps(**case.grid)
    return len(theirs.timesteps) > 1 and bool(theirs.timesteps[0] == theirs.timesteps[1])


def steps_back(case: Case) -> bool:
    """Return whether a stage of the SDE goes to a higher sigma than where its cycle starts."""
    if case.options["algorithm_type"] != "sde-dpmsolver++":
        return False
    theirs = their_scheduler(case)
    theirs.set_timesteps(**case.grid)
    ends = enumerate(theirs.order_list, 1)
    return any(theirs.sigmas[i - order] < theirs.sigmas[i] for i, order in ends)


def integrates_noise(case: Case) -> bool:
    return case.options["algorithm_type"] == "dpmsolver"


CORNERS = [
    *(
        Corner(
            failure,
            "can go back towards noise",
            "sigma_min is that of the beta schedule, and can lie above the last sigma of a flow",
            steps_back,
        )
        for failure in ("divides by zero", "raises IndexError", "raises RuntimeError")
    ),
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


def test_every_step_of_a_trajectory_equals_diffusers() -> None:
    settings(QUICK, max_examples=200)(given(cases())(compare_case))()


@pytest.mark.slow
def test_every_step_of_a_trajectory_equals_diffusers_at_length() -> None:
    settings(QUICK, max_examples=4000, derandomize=False)(given(cases())(compare_case))()


def test_the_exact_reading_samples_or_refuses_whatever_the_options() -> None:
    def check(case: Case) -> None:
        sample_or_refuse(case, "lambda_min_clipped")

    settings(QUICK, max_examples=100)(given(cases())(check))()


@pytest.mark.parametrize("solver_order", [1, 2, 3])
@pytest.mark.parametrize("begin", [0, 1, 5, 8])
def test_sampling_from_the_middle_of_a_cycle_and_once_more_equals_diffusers(
    solver_order: int, begin: int
) -> None:
    """As image-to-image does; where stages are missing a cycle has a lower order."""
    options = {"solver_order": solver_order, "algorithm_type": "sde-dpmsolver++"}
    case = Case("DPMSolverSinglestep", options, {}, {}, torch.float64)
    mine, theirs, f = our_scheduler(case), their_scheduler(case), network(case)
    image, noise = initial_sample(case, mine), initial_sample(case, mine).flip(2)
    for n in (10, 13):  # the second time as if there had been no first
        results = []
        for scheduler in (mine, theirs):
            generator = torch.Generator().manual_seed(1)
            scheduler.set_timesteps(n)
            scheduler.set_begin_index(begin)
            x = scheduler.add_noise(image, noise, scheduler.timesteps[begin : begin + 1])
            results.append([x])
            for t in scheduler.timesteps[begin:]:
                x = scheduler.step(f(x, t), t, x, generator=generator).prev_sample
                results[-1].append(x)
                if t != scheduler.timesteps[-1]:
                    results[-1].append(scheduler.add_noise(image, noise, t[None]))
        assert len(results[0]) == 2 * (n - begin)
        assert max(map(difference, *results)) < 1e-6


@pytest.mark.parametrize("solver_order", [1, 2, 3])
@pytest.mark.parametrize("lower_order_final", [False, True])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_the_order_of_every_stage_equals_diffusers_and_the_config_stays(
    solver_order: int, lower_order_final: bool, final: str
) -> None:
    options = {
        "solver_order": solver_order,
        "lower_order_final": lower_order_final,
        "final_sigmas_type": final,
    }
    mine = DPMSolverSinglestepScheduler(**options)
    for n in range(1, 25):
        theirs = diffusers.DPMSolverSinglestepScheduler(**options)  # it would remember another n
        mine.set_timesteps(n)
        theirs.set_timesteps(n)
        assert mine.order_list == theirs.order_list
        assert mine.config.lower_order_final == lower_order_final


def test_constructor_and_methods_take_diffusers_arguments_with_its_defaults() -> None:
    for name, added in (("__init__", ["compat"]), ("set_timesteps", []), ("step", [])):
        mine, theirs = (
            inspect.signature(getattr(cls, name)).parameters
            for cls in (DPMSolverSinglestepScheduler, diffusers.DPMSolverSinglestepScheduler)
        )
        assert list(mine) == [*theirs, *added]
        assert all(mine[key].default == theirs[key].default for key in theirs)


# --- mathematics --------------------------------------------------------------------------------

SAMPLE = FINE | {"prediction_type": "sample"}
NOISE = FINE | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
SDE = {  # as FINE, but ten times coarser: fine enough for a hundred steps
    "num_train_timesteps": 10_000,
    "beta_start": 1e-5,
    "beta_end": 2e-3,
    "prediction_type": "sample",
    "algorithm_type": "sde-dpmsolver++",
}


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("integrand", [SAMPLE, NOISE], ids=["x0", "noise"])
@pytest.mark.parametrize(("p", "n"), [(1, 60), (2, 120), (3, 240)])
def test_a_cycle_has_as_high_an_order_as_it_has_stages(
    p: int, n: int, integrand: dict, solver_type: str
) -> None:
    options = integrand | {"solver_order": p, "solver_type": solver_type, "compat": "exact"}
    scheduler = DPMSolverSinglestepScheduler(**options)
    measured = order(lambda n: flow_error(scheduler, n, stride=p), n)
    assert measured == pytest.approx(p, abs=0.15)


def test_multistep_noise_prediction_has_its_order_too() -> None:
    for solver_type in ("midpoint", "heun"):
        options = NOISE | {"solver_type": solver_type, "lower_order_final": False}
        scheduler = DPMSolverMultistepScheduler(**options, compat="exact")
        measured = order(lambda n, solver=scheduler: flow_error(solver, n), 120)
        assert measured == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize(("p", "grid"), [(2, [900, 850, 200]), (3, [900, 870, 300, 250])])
def test_heun_integrates_a_polynomial_of_degree_p_minus_1_exactly_on_any_grid(
    p: int, grid: list[int], algorithm: str
) -> None:
    """The integrals are taken by quadrature, so this also checks φ₁, φ₂ and φ₃ themselves."""
    scheduler = DPMSolverSinglestepScheduler(
        solver_order=p, solver_type="heun", algorithm_type=algorithm, compat="exact",
        prediction_type="sample" if algorithm == "dpmsolver++" else "epsilon",
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    scheduler.set_timesteps(timesteps=grid)
    levels, coefficients = scheduler.levels, np.array([0.7, -0.4, 0.3])[:p]
    first = x = torch.tensor([[[[0.3]]]], dtype=torch.float64)
    for t, level in zip(grid[:p], levels, strict=False):
        m = np.polynomial.polynomial.polyval(level.lam, coefficients)
        x = scheduler.step(torch.full_like(x, m), t, x).prev_sample
    s, t = levels[0], levels[p]
    assert x.item() == pytest.approx(solution(algorithm, first.item(), s, t, coefficients), 1e-12)


def solution(algorithm: str, x: float, s: Level, t: Level, coefficients: np.ndarray) -> float:
    """DPM-Solver eq. 3.4, DPM-Solver++ eq. 8: the exact x at t if m(λ) is this polynomial."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    h = t.lam - s.lam
    u = h * (nodes + 1) / 2
    m = np.polynomial.polynomial.polyval(s.lam + u, coefficients)
    if algorithm == "dpmsolver":
        return t.alpha / s.alpha * x - t.sigma * h / 2 * weights @ (np.exp(h - u) * m)
    return t.sigma / s.sigma * x + t.alpha * h / 2 * weights @ (np.exp(u - h) * m)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_moments_of_an_interval_are_their_integrals(algorithm: str) -> None:
    s, t = Level(0.6, 0.8), Level(0.8, 0.6)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    step = Interval(algorithm, s, t, departing())
    k, h, u = step.k, step.h, (nodes + 1) / 2
    for j, found in enumerate([step.phi1, *step.moments(3)]):
        assert found == pytest.approx(k * h / 2 * weights @ (np.exp(k * h * (u - 1)) * u**j), 1e-12)
    assert [step.phi2, step.phi3] == pytest.approx(step.moments(2), 1e-12)


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_the_variance_of_two_stages_converges_with_weak_order_2(solver_type: str) -> None:
    scheduler = DPMSolverSinglestepScheduler(**SDE, solver_type=solver_type, compat="exact")
    measured = order(lambda n: variance_error(scheduler, n, stride=2), 60)
    assert measured == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_three_stages_are_nearer_than_two(solver_type: str) -> None:
    """On Gaussian data the variance of three stages has terms of order 2 so small, and of either
    sign, that no slope shows below a thousand steps; they only must not lose to two stages.
    """
    errors = [
        variance_error(
            DPMSolverSinglestepScheduler(
                **SDE, solver_order=p, solver_type=solver_type, compat="exact"
            ),
            60,
            stride=p,
        )
        for p in (2, 3)
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("p", [2, 3])
def test_noise_drawn_again_for_every_stage_costs_a_weak_order(p: int) -> None:
    """As diffusers does: the prediction at a stage then knows nothing of the step's noise."""
    exact = DPMSolverSinglestepScheduler(**SDE, solver_order=p, solver_type="heun", compat="exact")
    redrawn = exact.reread(departing("stage_noise"))
    errors = {n: variance_error(redrawn, n, stride=p) for n in (60, 120)}
    assert order(errors.__getitem__, 60) == pytest.approx(1, abs=0.15)
    assert errors[60] > 20 * variance_error(exact, 60, stride=p)


def test_diffusers_sign_in_three_stages_keeps_the_sde_from_converging_at_all() -> None:
    exact = DPMSolverSinglestepScheduler(**SDE, solver_order=3, solver_type="heun", compat="exact")
    wrong = exact.reread(departing("singlestep_phi3"))
    errors = {n: variance_error(wrong, n, stride=3) for n in (60, 120)}
    assert min(errors.values()) > 0.5  # the variance itself is less than 1
    assert abs(order(errors.__getitem__, 60)) < 0.15


GRIDS = [{"num_inference_steps": 7}, {"num_inference_steps": 50}, {"timesteps": [990, 400, 399, 3]}]
EXACT = {"prediction_type": "v_prediction", "compat": "exact"}


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("grid", GRIDS)
def test_one_stage_is_ddim_and_first_order_multistep(grid: dict, schedule: str) -> None:
    options = EXACT | {"beta_schedule": schedule}
    mine = DPMSolverSinglestepScheduler(**options, solver_order=1)
    mine.set_timesteps(**grid)
    same_grid = {"timesteps": mine.grid}
    states = run(mine, "v_prediction", same_grid)
    for other in (
        DDIMScheduler(**options, clip_sample=False),
        DPMSolverMultistepScheduler(**options, solver_order=1),
    ):
        assert_same(states, run(other, "v_prediction", same_grid))


@pytest.mark.parametrize("grid", GRIDS)
def test_one_stage_of_the_sde_is_ddpm(grid: dict) -> None:
    mine = DPMSolverSinglestepScheduler(**EXACT, solver_order=1, algorithm_type="sde-dpmsolver++")
    mine.set_timesteps(**grid)
    same_grid = {"timesteps": mine.grid}
    ddpm = DDPMScheduler(**EXACT, clip_sample=False)
    assert_same(run(mine, "v_prediction", same_grid), run(ddpm, "v_prediction", same_grid))


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++", "dpmsolver"])
def test_prediction_types_agree_when_fed_converted_outputs(algorithm: str) -> None:
    shared = {"solver_order": 3, "algorithm_type": algorithm, "final_sigmas_type": "sigma_min"}
    results = [
        run(
            DPMSolverSinglestepScheduler(**shared, prediction_type=kind, compat="exact"),
            kind,
            {"num_inference_steps": 12},
        )
        for kind in PREDICTION_TYPES
    ]
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 13, 30])
def test_the_last_step_lands_on_the_prediction_of_the_clean_sample(
    n: int, p: int, algorithm: str
) -> None:
    scheduler = DPMSolverSinglestepScheduler(
        solver_order=p, algorithm_type=algorithm, compat="exact"
    )
    scheduler.set_timesteps(n)
    x = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
    for t in scheduler.grid:
        x, x0 = scheduler.step(torch.tanh(x), t, x, return_dict=False)
    torch.testing.assert_close(x, x0, rtol=1e-14, atol=1e-14)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"algorithm_type": "sde-dpmsolver"}, "algorithm_type"),
        ({"algorithm_type": "deis"}, "algorithm_type"),
        ({"algorithm_type": "dpmsolver"}, "'dpmsolver' cannot step to sigma 0"),
        ({"solver_type": "bh2"}, "solver_type"),
        ({"solver_order": 4}, "solver_order"),
        ({"lower_order_final": 1}, "lower_order_final"),
        ({"variance_type": "fixed_small"}, "variance_type"),
        ({"time_shift_type": "linear"}, "time_shift_type"),
        ({"use_karras_sigmas": True, "use_flow_sigmas": True}, "exclude each other"),
        ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
        ({"lambda_min_clipped": float("nan")}, "lambda_min_clipped"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    ],
)
def test_an_option_that_cannot_work_is_refused_by_name(options: dict, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        DPMSolverSinglestepScheduler(**options)


@pytest.mark.parametrize(
    ("options", "grid", "named"),
    [
        ({}, {}, "num_inference_steps or timesteps"),
        ({}, {"num_inference_steps": 3, "timesteps": [3, 2, 1]}, "not both"),
        ({}, {"num_inference_steps": 1001}, "num_inference_steps"),
        ({}, {"timesteps": [1, 2]}, "strictly falling"),
        ({}, {"timesteps": [1000]}, "timesteps"),
        ({}, {"num_inference_steps": 5, "mu": 1.0}, "mu=1.0"),
        ({"use_beta_sigmas": True}, {"timesteps": [5, 1]}, "use_beta_sigmas=True"),
        (
            {
                "use_flow_sigmas": True,
                "flow_shift": 0.5,
                "algorithm_type": "sde-dpmsolver++",
                "final_sigmas_type": "sigma_min",
            },
            {"num_inference_steps": 999},
            "can go back towards noise",
        ),
    ],
)
def test_an_impossible_sampling_grid_is_refused_by_name(
    options: dict, grid: dict, named: str
) -> None:
    scheduler = DPMSolverSinglestepScheduler(**options)
    with pytest.raises(InvalidArgument, match=named):
        scheduler.set_timesteps(**grid)


def test_the_output_of_a_learned_variance_has_twice_the_channels_or_has_lost_them() -> None:
    scheduler = DPMSolverSinglestepScheduler(variance_type="learned")
    x, out = torch.ones(1, 3, 2, 2), torch.randn(1, 6, 2, 2)
    results = []
    for output in (out, out[:, :3]):
        scheduler.set_timesteps(3)
        results.append(scheduler.step(output, scheduler.grid[0], x).prev_sample)
    assert torch.equal(*results)
    scheduler.set_timesteps(3)
    with pytest.raises(InvalidArgument, match="6 channels"):
        scheduler.step(out[:, :5], scheduler.grid[0], x)


def test_values_of_other_classes_are_translated() -> None:
    # diffusers translates "deis" too late to see that it may end at sigma 0
    config = {"solver_type": "bh1", "algorithm_type": "deis", "final_sigmas_type": "sigma_min"}
    mine = DPMSolverSinglestepScheduler.from_config(config).config
    theirs = diffusers.DPMSolverSinglestepScheduler.from_config(config).config
    assert (mine.solver_type, mine.algorithm_type) == ("midpoint", "dpmsolver++")
    assert (theirs.solver_type, theirs.algorithm_type) == ("midpoint", "dpmsolver++")
