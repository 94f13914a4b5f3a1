"""The table of a linear sampler is the sampler."""

from typing import Any

import pytest
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.exact import GaussianMixture
from minidiff.schedulers import (
    SCHEDULERS,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    Scheduler,
)

GAUSSIAN = GaussianMixture([1.0], [[0.0]], [0.5])
SOLVER = "DPMSolverMultistepScheduler"
KINDS = [
    *((name, {}, {}) for name in SCHEDULERS),
    ("DDIMScheduler", {}, {"eta": 0.7}),
    ("DDPMScheduler", {"variance_type": "fixed_large", "prediction_type": "v_prediction"}, {}),
    (SOLVER, {"solver_order": 3, "prediction_type": "sample"}, {}),
    (SOLVER, {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}, {}),
    (SOLVER, {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}, {}),
    (SOLVER, {"use_karras_sigmas": True, "solver_type": "heun"}, {}),
]


def linear(name: str, **options: Any) -> Scheduler:
    """A scheduler of that class that clips nothing."""
    if name in ("DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler"):
        options["clip_sample"] = False
    return SCHEDULERS[name](**options, compat="exact")


def network(x: Tensor, t: float) -> Tensor:
    return torch.tanh(1.3 * x - 0.2) + 0.1 * torch.cos(torch.as_tensor(t / 100.0))


@pytest.mark.parametrize(("name", "options", "step_options"), KINDS, ids=str)
@pytest.mark.parametrize("n", [4, 23])
def test_the_table_reproduces_the_trajectory(
    name: str, options: dict, step_options: dict, n: int
) -> None:
    scheduler = linear(name, **options)
    table = scheduler.coefficients(n, **step_options)
    scheduler.set_timesteps(n)
    assert table.timesteps == scheduler.grid
    noise = torch.randn(len(table.timesteps), 5, 2, dtype=torch.float64)
    x = start = torch.randn(5, 2, dtype=torch.float64) * scheduler.init_noise_sigma
    states = []
    for i, t in enumerate(scheduler.grid):
        scheduler._noise = lambda *_, z=noise[i]: lambda: z
        out = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, return_dict=False, **step_options)[0]
        states.append(x)
    again = table.run(network, start, noise)
    for a, b in zip(states, again, strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max().clamp(min=1)


@pytest.mark.parametrize(
    ("scheduler", "step_options"),
    [
        (linear("DDPMScheduler"), {}),
        (linear("DDIMScheduler"), {"eta": 0.5}),
        (linear(SOLVER, algorithm_type="sde-dpmsolver++"), {}),
    ],
    ids=repr,
)
def test_the_table_predicts_the_variance_of_the_output(
    scheduler: Scheduler, step_options: dict
) -> None:
    """Against 400,000 samples; the standard error of a variance is then 0.22 %."""
    table = scheduler.coefficients(5, **step_options)
    one = torch.ones(1, 1, dtype=torch.float64)
    gains = [GAUSSIAN.noise(one, level).item() for level in table.levels[:-1]]
    expected = table.variance(gains, start=1.0)
    scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400_000, 1, generator=generator, dtype=torch.float64)
    for t, level, variance in zip(scheduler.grid, table.levels, expected, strict=False):
        x = scheduler.step(
            GAUSSIAN.noise(x, level), t, x, generator=generator, **step_options
        ).prev_sample
        assert x.var().item() == pytest.approx(variance, rel=0.01)


def test_a_first_order_step_depends_on_the_present_alone() -> None:
    table = linear("DDIMScheduler").coefficients(10, eta=0.0)
    assert table.A.shape == table.B.shape == (10, 1)
    assert bool((table.C == 0).all())
    assert (linear("DDPMScheduler").coefficients(10).C[:-1] > 0).all()


def test_a_second_order_step_in_x0_looks_one_output_back() -> None:
    table = linear(SOLVER, prediction_type="sample").coefficients(10)
    assert table.B.shape == (10, 2)
    assert bool((table.A[:, 1] == 0).all())  # x̂0 is all that is remembered
    assert table.B[0, 1] == table.B[9, 1] == 0  # first order at both ends
    assert bool((table.B[1:9, 1] < 0).all())  # an extrapolation


def test_the_table_prints_a_line_for_every_step() -> None:
    lines = str(linear(SOLVER, prediction_type="sample").coefficients(6)).splitlines()
    assert lines[0].split() == ["t", "A0", "B0", "B1"]
    assert [line.split()[0] for line in lines[1:]] == ["999", "832", "666", "500", "333", "166"]
    assert lines[-1].split() == ["166", "0.000000", "1.000000", "0.000000"]  # the end is x̂0


@pytest.mark.parametrize(
    ("scheduler", "named"),
    [
        (DDIMScheduler(), "clip_sample"),
        (DPMSolverMultistepScheduler(thresholding=True), "thresholding"),
        (DDPMScheduler(clip_sample=False, variance_type="learned_range"), "variance_type"),
    ],
)
def test_a_nonlinear_sampler_has_no_table(scheduler: Scheduler, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        scheduler.coefficients(5)


def test_asking_for_the_table_leaves_the_scheduler_as_it_is() -> None:
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(7)
    scheduler.coefficients(4)
    assert len(scheduler.grid) == scheduler.num_inference_steps == 7
    assert scheduler.step_index is None
