"""LMS, DEIS and KDPM2: diffusers' trajectories, and identities with other solvers."""

import itertools
import math

import numpy as np
import pytest
import torch
from parity import (
    Case,
    Rounding,
    compare_trajectories,
    difference,
    distances,
    network,
    our_scheduler,
    outputs,
    their_scheduler,
    trajectory,
)

from minidiff import trajectory as sampled
from minidiff.errors import InvalidArgument
from minidiff.schedulers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
)
from minidiff.schedulers.adams_bashforth import lagrange_weights

FORMULAS = [{f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")]
GRIDS = [{}, {"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"}]
KINDS = [{"prediction_type": "v_prediction"}, {"beta_schedule": "scaled_linear"}]
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
OPTIONS = [*FORMULAS, *GRIDS, *KINDS]
DTYPES = [torch.float32, torch.float64]
QUADRATURE = Rounding(
    "diffusers integrates LMS' polynomial numerically, from float32 values",
    lambda case: case.step_options.get("order", 4) > 1,
    lambda case: 2e-5,
    2e-5,
)


@pytest.fixture(autouse=True)
def _without_hypothesis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the comparison run outside of hypothesis, which would count its corners."""
    monkeypatch.setattr("parity.event", lambda reason: None)


@pytest.mark.parametrize("n", [1, 2, 7, 20])
@pytest.mark.parametrize("options", [*OPTIONS, {"prediction_type": "sample"}], ids=str)
def test_lms_gives_the_trajectory_of_diffusers(options, n):
    for order, dtype in itertools.product((1, 2, 4), DTYPES):
        case = Case("LMSDiscrete", options, {"num_inference_steps": n}, {"order": order}, dtype)
        compare_trajectories(case, [QUADRATURE])


@pytest.mark.parametrize("n", [1, 2, 3, 14, 20])
@pytest.mark.parametrize(
    "options", [*OPTIONS, FLOW, {"prediction_type": "sample"}, {"thresholding": True}], ids=str
)
def test_deis_gives_the_trajectory_of_diffusers(options, n):
    choices = itertools.product((1, 2, 3), (True, False), DTYPES)
    for order, short, dtype in choices:
        more = {"solver_order": order, "lower_order_final": short}
        case = Case("DEISMultistep", options | more, {"num_inference_steps": n}, {}, dtype)
        compare_trajectories(case, [])


@pytest.mark.parametrize("n", [1, 2, 7, 20])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_kdpm2_gives_the_trajectory_of_diffusers(options, n):
    for dtype in DTYPES:
        case = Case("KDPM2Discrete", options, {"num_inference_steps": n}, {}, dtype)
        mine, theirs = our_scheduler(case), their_scheduler(case)
        mine.set_timesteps(n)
        theirs.set_timesteps(n)
        assert mine.timesteps.dtype == theirs.timesteps.dtype
        # diffusers looks the timesteps between two levels up in float32 logarithms
        torch.testing.assert_close(mine.timesteps, theirs.timesteps, rtol=0, atol=2e-4)
        torch.testing.assert_close(mine.sigmas[::2], theirs.sigmas[: 2 * n : 2], rtol=1e-6, atol=0)
        assert float(mine.init_noise_sigma) == pytest.approx(float(theirs.init_noise_sigma))
        far = max(distances(outputs(mine, case), outputs(theirs, case)))
        assert far < (2e-5 if dtype == torch.float32 else 4e-6)


@pytest.mark.parametrize("name", ["LMSDiscrete", "DEISMultistep", "KDPM2Discrete"])
def test_image_to_image_begins_in_the_middle_as_in_diffusers(name):
    case = Case(name, {}, {"num_inference_steps": 10}, {}, torch.float64)
    results = []
    for scheduler in (our_scheduler(case), their_scheduler(case)):
        scheduler.set_timesteps(10)
        x = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0)).double()
        start = 4 * scheduler.order
        scheduler.set_begin_index(start)
        x = scheduler.add_noise(x, x.flip(0), scheduler.timesteps[start : start + 1].expand(2))
        for t in scheduler.timesteps[start:]:
            out = network(case)(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(out, t, x, return_dict=False)[0]
        results.append(x)
    assert difference(*results) < 4e-6


def test_lms_uses_in_the_exact_reading_the_evaluations_that_there_are():
    """A start in the middle is a start: the first step is Euler's, the second of order 2."""
    lms = LMSDiscreteScheduler(compat="exact")
    euler = EulerDiscreteScheduler(compat="exact")
    ends = []
    for scheduler in (lms, euler):
        scheduler.set_timesteps(10)
        scheduler.set_begin_index(4)
        x = torch.ones(1, 1, dtype=torch.float64)
        t = scheduler.grid[4]
        ends.append(scheduler.step(torch.tanh(x), t, x, return_dict=False)[0])
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("options", [{}, {"use_karras_sigmas": True}])
def test_lms_of_order_1_is_euler(options):
    lms = LMSDiscreteScheduler(**options, compat="exact")
    euler = EulerDiscreteScheduler(**options, compat="exact")
    a, b = lms.coefficients(12, order=1), euler.coefficients(12)
    torch.testing.assert_close(a.A, b.A)
    torch.testing.assert_close(a.B, b.B)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_is_dpm_solver_for_the_noise(order):
    """The integral of the polynomial in ln ρ is that of DPM-Solver's in λ = −ln ρ."""
    options = {"solver_order": order, "compat": "exact", "lower_order_final": False}
    deis = DEISMultistepScheduler(**options)
    dpm = DPMSolverMultistepScheduler(
        **options, algorithm_type="dpmsolver", solver_type="heun", final_sigmas_type="sigma_min"
    )
    a, b = deis.coefficients(20), dpm.coefficients(20)
    torch.testing.assert_close(a.A, b.A)
    torch.testing.assert_close(a.B, b.B)


def test_the_weights_integrate_a_polynomial_exactly():
    positions = np.array([0.0, -0.7, -1.9, -5.0])
    weights = lagrange_weights(positions, [1 / (j + 1) for j in range(4)])
    for degree in range(4):
        assert weights @ positions**degree == pytest.approx(1 / (degree + 1), rel=1e-12)
    classical = lagrange_weights([0, -1, -2, -3], [1 / (j + 1) for j in range(4)])
    np.testing.assert_allclose(classical * 24, [55, -59, 37, -9], rtol=1e-12)  # Adams–Bashforth 4


def test_kdpm2_evaluates_at_the_geometric_mean_of_two_levels():
    scheduler = KDPM2DiscreteScheduler(compat="exact")
    scheduler.set_timesteps(8)
    sigmas = [level.sigma for level in scheduler.levels]
    assert len(scheduler.grid) == 15
    for a, middle, b in zip(sigmas[:-2:2], sigmas[1::2], sigmas[2::2], strict=False):
        assert middle == pytest.approx(math.sqrt(a * b))
    assert sigmas[-1] == 0


def test_a_solver_is_exact_for_a_constant_slope():
    """x0 + σ·ε with one ε for all σ is a straight line, which all three follow."""
    eps = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for cls in (LMSDiscreteScheduler, KDPM2DiscreteScheduler, DEISMultistepScheduler):
        scheduler = cls(compat="exact")
        scheduler.set_timesteps(9)
        start, end = scheduler.levels[0], scheduler.levels[-1]
        x0 = torch.full((1, 4), 0.3, dtype=torch.float64)
        *_, last = sampled(lambda x, t: eps, scheduler, start.alpha * x0 + start.sigma * eps)
        torch.testing.assert_close(last.next_x, end.alpha * x0 + end.sigma * eps)


@pytest.mark.parametrize("order", [0, 5, 1.5, "four"])
def test_an_order_of_lms_out_of_range_is_refused(order):
    scheduler = LMSDiscreteScheduler()
    scheduler.set_timesteps(3)
    x = torch.ones(1, 1)
    with pytest.raises(InvalidArgument, match="order must be"):
        scheduler.step(x, scheduler.grid[0], x, order=order)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm_type": "dpmsolver++"}, "algorithm_type must be one of deis"),
        ({"solver_type": "midpoint"}, "solver_type must be one of logrho"),
        ({"solver_order": 4}, "solver_order must be"),
    ],
)
def test_an_option_that_deis_lacks_is_refused(options, message):
    with pytest.raises(InvalidArgument, match=message):
        DEISMultistepScheduler(**options, compat="exact").set_timesteps(3)


def test_deis_reads_the_config_of_dpm_solver_as_diffusers_does():
    dpm = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_type="midpoint")
    deis = DEISMultistepScheduler.from_config(dpm.config)
    assert (deis.config.algorithm_type, deis.config.solver_type) == ("deis", "logrho")
    back = DPMSolverMultistepScheduler.from_config(deis.config)
    assert back.config.algorithm_type == "dpmsolver++"


def test_kdpm2_has_the_prediction_type_sample_in_the_exact_reading():
    with pytest.raises(InvalidArgument, match="'sample' is not implemented here by diffusers"):
        KDPM2DiscreteScheduler(prediction_type="sample")
    scheduler = KDPM2DiscreteScheduler(prediction_type="sample", compat="exact")
    scheduler.set_timesteps(5)
    case = Case("KDPM2Discrete", {}, {}, {}, torch.float64)
    assert all(torch.isfinite(x).all() for x in trajectory(scheduler, case))
