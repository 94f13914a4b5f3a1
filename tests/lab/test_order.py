"""The exact reading against mathematics: order of convergence, and identities between methods.

Each method's error is measured on data whose network, flow and marginals are known exactly, see
`minidiff.lab.order`; the declared orders are those of `METHODS` there.
"""

import math
from contextlib import suppress
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from mixture_runs import assert_same, run

from minidiff.errors import InvalidArgument
from minidiff.lab.order import FINE, METHODS, Method, curve, flow_error, order, variance_error
from minidiff.prediction import PREDICTION_TYPES
from minidiff.schedulers import (
    SCHEDULERS,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    Scheduler,
)
from minidiff.schedulers.core.quirks import departing
from minidiff.schedulers.dpm_solver import ALGORITHMS
from minidiff.schedulers.euler import ExplodingSigmas

ALL = (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler)


# --- order --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_the_error_shrinks_with_the_declared_order(name: str) -> None:
    assert METHODS[name].measured_order() == pytest.approx(METHODS[name].order, abs=0.15)


def test_every_scheduler_has_a_declared_order_or_a_reason_not_to() -> None:
    reasons = {
        "DDIMInverseScheduler": "walks away from the data; its inverse is DDIM",
        "LCMScheduler": "renoises the prediction of a distilled network: no path to converge to",
    }
    assert {m.scheduler for m in METHODS.values()} | set(reasons) == set(SCHEDULERS)


ONE_STAGE = "one stage is first-order multistep, see test_singlestep.py"
# class, what it integrates, order: no row of METHODS, because …
UNMEASURED = {
    ("DPMSolverSinglestepScheduler", "dpmsolver++", 1): ONE_STAGE,
    ("DPMSolverSinglestepScheduler", "dpmsolver", 1): ONE_STAGE,
    ("DPMSolverSinglestepScheduler", "sde-dpmsolver++", 1): ONE_STAGE,
}


def option(method: Method, name: str) -> Any:
    return method.options.get(name, SCHEDULERS[method.scheduler]._defaults().get(name))


def test_every_order_of_every_algorithm_is_measured() -> None:
    integrands = {"algorithm_type": ALGORITHMS, "predict_x0": (True, False)}
    exist, measured = set(), set()
    for name, values in integrands.items():
        having = [cls for cls in SCHEDULERS.values() if cls.has_option(name)]
        for cls, value, p in product(having, values, (1, 2, 3)):
            options = {name: value, "solver_order": p, "final_sigmas_type": "sigma_min"}
            with suppress(InvalidArgument):  # there is no such solver
                cls(**options, compat="exact")
                exist.add((cls.__name__, value, p))
        measured |= {
            (m.scheduler, option(m, name), option(m, "solver_order")) for m in METHODS.values()
        }
    assert exist - measured == set(UNMEASURED)


def test_every_way_to_be_random_is_measured() -> None:
    weak = [m for m in METHODS.values() if m.weak]
    kinds = {option(m, "variance_type") for m in weak if "DDPM" in m.scheduler}
    assert kinds == {"fixed_small", "fixed_large"}  # "fixed_small_log" is another way to write it
    churned = {m.scheduler for m in weak if "s_churn" in m.measure}
    assert churned == {"EulerDiscreteScheduler", "EDMEulerScheduler"}  # flows refuse it
    assert any(m.measure.get("eta") for m in weak)


def test_a_flow_that_renoises_its_prediction_does_not_converge() -> None:
    """`stochastic_sampling` keeps none of x: its error does not shrink, so it has no order."""
    scheduler = SCHEDULERS["FlowMatchEulerDiscreteScheduler"](
        stochastic_sampling=True, compat="exact"
    )
    assert order(lambda n: variance_error(scheduler, n), 240) == pytest.approx(0, abs=0.15)


def third_order(**options: Any) -> Scheduler:
    """Return DPM-Solver++ 3M with one coefficient of diffusers, otherwise exact."""
    options = FINE | {"lower_order_final": False, "prediction_type": "sample"} | options
    scheduler = DPMSolverMultistepScheduler(**options, solver_order=3, compat="exact")
    return scheduler.reread(departing("phi3"))


def test_diffusers_weight_of_the_second_difference_costs_the_third_order() -> None:
    """It lacks a factor 2: order 2 remains."""
    mixed = third_order()
    assert order(lambda n: flow_error(mixed, n, exact_starts=2), 240) == pytest.approx(2, abs=0.15)
    assert flow_error(mixed, 240, exact_starts=2) > 2 * METHODS["DPM-Solver++ 3M"].error(240)


def test_diffusers_sign_in_the_third_order_sde_costs_its_second_weak_order() -> None:
    """Its weak order is 2 (order 3 holds for the drift alone); the wrong sign makes it 1."""
    mixed = third_order(algorithm_type="sde-dpmsolver++")
    assert order(lambda n: variance_error(mixed, n), 480) == pytest.approx(1, abs=0.15)


def test_the_variance_of_a_table_is_that_of_the_marginal_when_steps_are_small() -> None:
    """At the middle of a fine grid, to what an order of one leaves of 1 %."""
    error = METHODS["DDPM"].error(960)
    assert 0 < error < 1e-3
    assert METHODS["DDPM"].error(240) > 3 * error


@pytest.mark.parametrize("part", [0, -0.1, 1.5, math.nan])
def test_a_part_outside_0_to_1_is_refused(part: float) -> None:
    scheduler = DDIMScheduler(clip_sample=False, compat="exact")
    with pytest.raises(InvalidArgument, match="part"):
        flow_error(scheduler, 10, part=part)


# --- identities ---------------------------------------------------------------------------------


GRIDS = [{"num_inference_steps": 7}, {"num_inference_steps": 50}, {"timesteps": [990, 400, 399, 3]}]


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("grid", GRIDS)
def test_ddim_is_first_order_dpm_solver(grid: dict, schedule: str) -> None:
    options = {"beta_schedule": schedule, "prediction_type": "v_prediction", "compat": "exact"}
    one = DDIMScheduler(**options, clip_sample=False)
    one.set_timesteps(**grid)
    two = DPMSolverMultistepScheduler(**options, solver_order=1)
    same_grid = {"timesteps": one.grid}
    assert_same(run(one, "v_prediction", same_grid), run(two, "v_prediction", same_grid))


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("grid", GRIDS)
def test_ddim_is_first_order_dpm_solver_in_the_noise_too(grid: dict, schedule: str) -> None:
    """Ending at training step 0, since ε̂ does not determine x at the data."""
    options = {"beta_schedule": schedule, "prediction_type": "v_prediction", "compat": "exact"}
    one = DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=False)
    one.set_timesteps(**grid)
    options |= {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    two = DPMSolverMultistepScheduler(**options, solver_order=1)
    same_grid = {"timesteps": one.grid}
    assert_same(run(one, "v_prediction", same_grid), run(two, "v_prediction", same_grid))


@pytest.mark.parametrize("grid", GRIDS)
def test_ddim_with_eta_1_is_ddpm_with_the_small_variance(grid: dict) -> None:
    options = {"clip_sample": False, "prediction_type": "v_prediction", "compat": "exact"}
    ddpm = run(DDPMScheduler(**options), "v_prediction", grid)
    assert_same(ddpm, run(DDIMScheduler(**options), "v_prediction", grid, eta=1.0))


@pytest.mark.parametrize("grid", GRIDS)
def test_first_order_sde_solver_is_ddpm(grid: dict) -> None:
    """1 − e^{−2h} is β̃/σ_s² and the decay the posterior's, so ancestral sampling is SDE-DPM++1."""
    options = {"prediction_type": "v_prediction", "compat": "exact"}
    ddpm = DDPMScheduler(**options, clip_sample=False)
    ddpm.set_timesteps(**grid)
    sde = DPMSolverMultistepScheduler(**options, solver_order=1, algorithm_type="sde-dpmsolver++")
    same_grid = {"timesteps": ddpm.grid}
    assert_same(run(ddpm, "v_prediction", same_grid), run(sde, "v_prediction", same_grid))


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("grid", GRIDS)
def test_prediction_types_agree_when_fed_converted_outputs(
    cls: type[Scheduler], grid: dict
) -> None:
    clipping = {} if cls is DPMSolverMultistepScheduler else {"clip_sample": False}
    results = [
        run(cls(**clipping, prediction_type=kind, compat="exact"), kind, grid)
        for kind in PREDICTION_TYPES
    ]
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(compat="exact"),
        DDPMScheduler(compat="exact", variance_type="fixed_large"),
        DDIMScheduler(compat="exact"),
        *(
            DPMSolverMultistepScheduler(compat="exact", solver_order=p, algorithm_type=a)
            for p in (1, 2, 3)
            for a in ("dpmsolver++", "sde-dpmsolver++")
        ),
    ],
    ids=repr,
)
@pytest.mark.parametrize("n", [1, 2, 13, 30])
def test_the_last_step_lands_on_the_prediction_of_the_clean_sample(
    scheduler: Scheduler, n: int
) -> None:
    scheduler.set_timesteps(n)
    x = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
    for t in scheduler.grid:
        x, x0 = scheduler.step(torch.tanh(x), t, x, return_dict=False)
    torch.testing.assert_close(x, x0, rtol=1e-14, atol=1e-14)


# --- grids --------------------------------------------------------------------------------------


def placed(name: str, train_steps: int, **options: Any) -> Scheduler:
    """Return a scheduler of T training steps, for a test of every n in 1 … T."""
    if name == "LCMScheduler":
        options["original_inference_steps"] = train_steps
    if name == "PNDMScheduler":
        options["skip_prk_steps"] = True  # of 1 to 3 steps none is left for Runge–Kutta
    return SCHEDULERS[name](num_train_timesteps=train_steps, **options, compat="exact")


SPACED = {
    "UniPCMultistepScheduler": ("linspace", "leading", "trailing"),
    "PNDMScheduler": ("linspace", "leading", "trailing"),
    "DDIMInverseScheduler": ("leading", "trailing"),
}
HERE = {cls.__name__ for cls in ALL}
OTHERS = [
    (name, spacing)
    for name in SCHEDULERS
    if name not in HERE and not issubclass(SCHEDULERS[name], ExplodingSigmas)  # test_euler.py
    for spacing in SPACED.get(name, (None,))
]


@pytest.mark.parametrize(("name", "spacing"), OTHERS)
@pytest.mark.parametrize("train_steps", [1, 2, 37, 100])
def test_every_number_of_steps_of_every_other_class_has_that_many_timesteps(
    name: str, spacing: str | None, train_steps: int
) -> None:
    options = {} if spacing is None else {"timestep_spacing": spacing}
    if SCHEDULERS[name].has_option("beta_end"):
        options["beta_end"] = 0.001
    scheduler = placed(name, train_steps, **options)
    for n in range(1, train_steps + 1):
        scheduler.set_timesteps(n)
        grid = scheduler.grid[::-1] if "Inverse" in name else scheduler.grid
        if name == "PNDMScheduler":
            grid = grid[:1] + grid[2:] if n > 1 else grid[:1]  # the second step is evaluated twice
        if "Inverse" in name:
            grid = grid[:-1]  # the clean x and training step 0 are both evaluated at 0
        assert len(grid) == n - ("Inverse" in name)
        assert all(a > b for a, b in pairwise(grid))
        if "EDM" not in name:  # c_noise is no training step
            last = train_steps if "Flow" in name else train_steps - 1
            assert all(0 <= t <= last for t in grid)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("train_steps", [1, 2, 37, 101, 999, 1000])
def test_every_number_of_steps_has_that_many_falling_timesteps(
    cls: type[Scheduler], spacing: str, train_steps: int
) -> None:
    scheduler = cls(
        num_train_timesteps=train_steps, timestep_spacing=spacing, compat="exact", beta_end=0.001
    )
    for n in range(1, train_steps + 1):
        scheduler.set_timesteps(n)
        grid = scheduler.timesteps
        assert len(grid) == len(scheduler.grid) == n
        assert bool((grid.diff() < 0).all())
        assert 0 <= grid[-1] <= grid[0] < train_steps
        if spacing != "leading":
            assert grid[0] == train_steps - 1


def test_a_curve_falls_by_the_order_of_its_method_from_point_to_point() -> None:
    errors = curve(METHODS["DPM-Solver++ 2M"], [120, 240, 480])
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([2, 2], abs=0.1)
    scheduler = METHODS["DPM-Solver++ 2M"].build()
    assert curve(scheduler, [120]) == errors[:1]


@pytest.mark.parametrize("steps", [[0], [2.5], 10])
def test_a_curve_over_impossible_steps_is_refused(steps: Any) -> None:
    with pytest.raises(InvalidArgument, match="steps must be"):
        curve(METHODS["DDIM"], steps)
