"""`compat="exact"`: samplers converge at the order their paper claims, and agree where they must.

The network is a mixture's closed form, so the only error is the sampler's. Order is measured
between two interior levels, where nothing forces a low-order last step. The training table is the
VP schedule of DDPM cut 100 times finer, so that grids of integer timesteps are smooth.
"""

import copy
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minidiff.exact import GaussianMixture
from minidiff.prediction import PREDICTION_TYPES, target
from minidiff.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    Scheduler,
)
from minidiff.schedulers.quirks import Diffusers, Exact

FINE = {"num_train_timesteps": 100_000, "beta_start": 1e-6, "beta_end": 2e-4}
FIRST, LAST = 80_000, 10_000  # λ from -3.2 to 1.1: nearly noise, to nearly data
MIXTURE = GaussianMixture([0.3, 0.7], [[-1.0], [1.5]], [0.4, 0.6])
GAUSSIAN = GaussianMixture([1.0], [[0.0]], [0.5])
ALL = (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler)


@lru_cache
def fine(cls: type[Scheduler], **options: Any) -> Scheduler:
    return cls(**FINE, **options, compat="exact")


def ddim(**options: Any) -> Scheduler:
    return fine(DDIMScheduler, clip_sample=False, prediction_type="sample", **options)


def solver(order: int, **options: Any) -> Scheduler:
    options = {"lower_order_final": False, "prediction_type": "sample"} | options
    return fine(DPMSolverMultistepScheduler, solver_order=order, **options)


def set_interior_grid(scheduler: Scheduler, n: int) -> None:
    """n steps from FIRST to LAST; the step below LAST is never taken."""
    grid = np.linspace(FIRST, LAST, n + 1)
    assert (grid == grid.round()).all()
    scheduler.set_timesteps(timesteps=grid.astype(int).tolist())


# --- the order of the ODE methods ---------------------------------------------------------------


def flow_error(scheduler: Scheduler, n: int, exact_starts: int = 0) -> float:
    """Largest error after n steps along the probability flow of the mixture.

    A multistep method begins with lower orders. Its own order shows when the first `exact_starts`
    steps are taken from the solution, so that its history is exact.
    """
    set_interior_grid(scheduler, n)
    begin, end = scheduler.levels[0], scheduler.levels[n]
    start = begin.sigma * torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]
    x = start
    for i, t in enumerate(scheduler.grid[:n]):
        x = scheduler.step(MIXTURE.denoise(x, scheduler.levels[i]), t, x).prev_sample
        if i < exact_starts:
            x = MIXTURE.flow(start, begin, scheduler.levels[i + 1])
    return (x - MIXTURE.flow(start, begin, end)).abs().max().item()


def slope(error: Callable[[int], float], n: int) -> float:
    """Order of convergence between n and 2n steps."""
    return math.log2(error(n) / error(2 * n))


@pytest.mark.parametrize(
    ("scheduler", "order", "exact_starts"),
    [
        pytest.param(ddim, 1, 0, id="DDIM"),
        pytest.param(lambda: solver(1), 1, 0, id="DPM++1"),
        pytest.param(lambda: solver(2), 2, 0, id="DPM++2M-midpoint"),
        pytest.param(lambda: solver(2, solver_type="heun"), 2, 0, id="DPM++2M-heun"),
        pytest.param(lambda: solver(3), 3, 2, id="DPM++3M"),
    ],
)
def test_the_error_shrinks_with_the_declared_order(
    scheduler: Callable[[], Scheduler], order: int, exact_starts: int
) -> None:
    measured = slope(lambda n: flow_error(scheduler(), n, exact_starts), 280)
    assert measured == pytest.approx(order, abs=0.15)


def with_diffusers_phi3(**options: Any) -> Scheduler:
    """An exact third-order solver with one coefficient of diffusers."""
    scheduler = solver(3, **options)
    mixed = copy.copy(scheduler)
    mixed.reading = type("Mixed", (Exact,), {"phi3": Diffusers.phi3})()
    return mixed


def test_diffusers_weight_of_the_second_difference_costs_the_third_order() -> None:
    """It lacks a factor 2: order 2 remains."""
    mixed = with_diffusers_phi3()
    assert slope(lambda n: flow_error(mixed, n, 2), 140) == pytest.approx(2, abs=0.15)
    assert flow_error(mixed, 280, 2) > 5 * flow_error(solver(3), 280, 2)


# --- the order of the SDE methods ---------------------------------------------------------------


def variance_error(scheduler: Scheduler, n: int, **step_options: Any) -> float:
    """Error of the variance after n steps on Gaussian data, without Monte Carlo.

    Every step is linear, so x stays Σ c_j·e_j for independent standard normals: e_0 the start and
    e_j the noise of step j. The batch holds the coefficients c, and the variance is Σ c².
    """
    set_interior_grid(scheduler, n)
    v = [level.alpha**2 * 0.25 + level.sigma**2 for level in scheduler.levels]
    basis = torch.eye(n + 1, dtype=torch.float64)[:, :, None]
    x = math.sqrt(v[0]) * basis[0]
    for i, t in enumerate(scheduler.grid[:n]):
        out = GAUSSIAN.denoise(x, scheduler.levels[i])
        x = scheduler.step(out, t, x, variance_noise=basis[i + 1], **step_options).prev_sample
    return abs(x.square().sum().item() - v[n])


@pytest.mark.parametrize(
    ("scheduler", "options", "order"),
    [
        pytest.param(ddim, {"eta": 1.0}, 1, id="DDIM-eta1"),
        pytest.param(lambda: solver(1, algorithm_type="sde-dpmsolver++"), {}, 1, id="SDE-DPM++1"),
        pytest.param(lambda: solver(2, algorithm_type="sde-dpmsolver++"), {}, 2, id="SDE-DPM++2M"),
        pytest.param(
            lambda: solver(2, algorithm_type="sde-dpmsolver++", solver_type="heun"),
            {},
            2,
            id="SDE-DPM++2M-heun",
        ),
    ],
)
def test_the_variance_of_a_stochastic_sampler_converges_at_its_weak_order(
    scheduler: Callable[[], Scheduler], options: dict, order: int
) -> None:
    measured = slope(lambda n: variance_error(scheduler(), n, **options), 280)
    assert measured == pytest.approx(order, abs=0.15)


def test_diffusers_sign_in_the_third_order_sde_costs_its_second_weak_order() -> None:
    """Its weak order is 2 (order 3 holds for the drift alone); the wrong sign makes it 1."""
    sde = {"algorithm_type": "sde-dpmsolver++"}
    assert slope(lambda n: variance_error(solver(3, **sde), n), 1000) == pytest.approx(2, abs=0.15)
    mixed = with_diffusers_phi3(**sde)
    assert slope(lambda n: variance_error(mixed, n), 500) == pytest.approx(1, abs=0.15)


# --- identities ---------------------------------------------------------------------------------


def run(
    scheduler: Scheduler, kind: str, grid: dict[str, Any], seed: int = 0, **step_options: Any
) -> list[Tensor]:
    """x after every step on the mixture, the network predicting `kind`."""
    scheduler.set_timesteps(**grid)
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
    states = []
    for i, t in enumerate(scheduler.grid):
        level = scheduler.levels[i]
        out = target(MIXTURE.denoise(x, level), MIXTURE.noise(x, level), level, kind)
        x = scheduler.step(out, t, x, generator=generator, **step_options).prev_sample
        states.append(x)
    return states


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


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
