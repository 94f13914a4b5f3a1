"""The table of a linear sampler is the sampler."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.lab.order import GAUSSIAN, output_of
from minidiff.schedulers import (
    SCHEDULERS,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    Scheduler,
)

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
    """Return a scheduler of that class that clips nothing."""
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
        scheduler.noise_source = lambda like, z=noise[i]: z
        out = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, return_dict=False, **step_options)[0]
        states.append(x)
    again = table.run(network, start, noise)
    for a, b in zip(states, again, strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max().clamp(min=1)


VARIANCES = [
    *KINDS,
    ("EulerDiscreteScheduler", {}, {"s_churn": 2.0}),
    ("EDMEulerScheduler", {}, {"s_churn": 2.0, "s_noise": 1.1}),
    ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}),
    ("PNDMScheduler", {"skip_prk_steps": True}, {}),
]


@pytest.mark.parametrize(("name", "options", "step_options"), VARIANCES, ids=str)
def test_the_table_predicts_the_variance_of_the_output(
    name: str, options: dict, step_options: dict
) -> None:
    """Exactly where no noise is drawn, else against 400,000 samples: their standard error is 0.22 %
    of a variance.
    """
    scheduler = linear(name, **options)
    table = scheduler.coefficients(5, **step_options)
    one = torch.ones(1, 1, dtype=torch.float64)
    gains = [output_of(scheduler, GAUSSIAN, one, scheduler.level(t)) for t in table.timesteps]
    gains = [gain.item() / scale for gain, scale in zip(gains, table.input_scale, strict=True)]
    expected = table.variance(gains, start=2.0)

    random = bool((table.C != 0).any())
    generator = torch.Generator().manual_seed(0)
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_options = step_options | {"generator": generator}
    x = 2**0.5 * (torch.randn(400_000, 1, generator=generator, dtype=one.dtype) if random else one)
    scheduler.set_timesteps(5)
    for t, gain, variance in zip(scheduler.grid, gains, expected, strict=True):
        out = gain * scheduler.scale_model_input(x, t)
        x = scheduler.step(out, t, x, **step_options).prev_sample
        assert x.square().mean().item() == pytest.approx(variance, rel=0.01 if random else 1e-10)


def test_a_first_order_step_depends_on_the_present_alone() -> None:
    table = linear("DDIMScheduler").coefficients(10, eta=0.0)
    assert table.A.shape == table.B.shape == (10, 1)
    assert bool((table.C == 0).all())
    assert (linear("DDPMScheduler").coefficients(10).C[:-1] > 0).all()


@pytest.mark.parametrize("name", [SOLVER, "EDMDPMSolverMultistepScheduler"])
def test_lower_order_final_lowers_the_last_orders_of_fewer_than_15_steps(name: str) -> None:
    """Order 3 looks two outputs back, the last step but one of a short grid one, the last none."""
    options = {} if "EDM" in name else {"prediction_type": "sample"}
    options |= {"solver_order": 3, "final_sigmas_type": "sigma_min"}
    for n, lower, orders in ((14, True, [3, 2, 1]), (15, True, [3, 3, 3]), (14, False, [3, 3, 3])):
        table = linear(name, **options, lower_order_final=lower).coefficients(n)
        assert (table.B[-3:] != 0).sum(dim=1).tolist() == orders


@pytest.mark.parametrize("n", [6, 30])
def test_lower_order_final_lowers_the_last_orders_of_unipc_whatever_their_number(n: int) -> None:
    for lower, orders in ((True, [3, 2, 1]), (False, [3, 3, 3])):
        scheduler = linear(
            "UniPCMultistepScheduler",
            prediction_type="sample",
            solver_order=3,
            lower_order_final=lower,
            final_sigmas_type="sigma_min",
            disable_corrector=list(range(n)),
        )
        assert (scheduler.coefficients(n).B[-3:] != 0).sum(dim=1).tolist() == orders


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


def test_deriving_the_table_leaves_the_scheduler_unchanged() -> None:
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(7)
    x = torch.ones(2, 1)
    scheduler.step(x, scheduler.grid[0], x)
    past = list(scheduler.past)
    scheduler.coefficients(4)
    assert len(scheduler.grid) == scheduler.num_inference_steps == 7
    assert scheduler.step_index == len(past) == 1
    assert scheduler.past[0] is past[0]
