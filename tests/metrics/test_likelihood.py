"""Likelihood against Gaussian data, whose exact network and exact density are known."""

import copy
import math

import pytest
import torch

from minidiff.errors import InvalidArgument
from minidiff.exact import GaussianMixture
from minidiff.metrics import likelihood
from minidiff.metrics.likelihood import (
    PIXEL,
    Model,
    bits_per_dimension,
    flow_log_prob,
    rademacher,
    variational_bound,
)
from minidiff.schedulers import SCHEDULERS, DDIMScheduler

DATA = GaussianMixture([1.0], [[0.2]], [0.5])
# Every term below is quadratic in x and in the noise, so the mean over these few points is the
# mean over all data and all noise.
POINTS = torch.tensor([[0.7], [0.7], [-0.3], [-0.3]], dtype=torch.float64)
NOISE = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
EXACT = math.log2(0.5 * math.sqrt(2 * math.pi * math.e))  # bits of N(0.2, 0.25)
PLANE = GaussianMixture([0.5, 0.5], [[-1.0, 0.5, 0.0], [1.0, 0.0, -0.5]], [0.4, 0.6])
KINDS = [
    ("DDIMScheduler", {"prediction_type": "epsilon"}),
    ("DDPMScheduler", {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"}),
    ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}),
    ("DDIMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ("EulerDiscreteScheduler", {"prediction_type": "epsilon"}),
    ("EDMEulerScheduler", {}),
    ("EDMDPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
]


def exact_denoiser(scheduler, data):
    """Return the denoiser of a perfect network for this scheduler."""
    model, one = Model(None, scheduler), torch.ones(1, dtype=torch.float64)
    levels = {node.t: node.level for node in model.nodes}

    def denoise(model_input, t):
        x = model_input / copy.copy(model.scheduler).scale_model_input(one, t).item()
        return scheduler.target(data.denoise(x, levels[t]), data.noise(x, levels[t]), levels[t])

    return denoise


def bits(nats, dimensions=1):
    return bits_per_dimension(nats, dimensions).mean().item()


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_the_likelihood_of_gaussian_data_is_exact_to_a_ten_thousandth_of_a_bit(name, options):
    scheduler = SCHEDULERS[name](**options, compat="exact")
    found = flow_log_prob(exact_denoiser(scheduler, DATA), scheduler, POINTS)
    assert bits(-DATA.log_prob(POINTS)) == pytest.approx(EXACT, rel=1e-12)
    assert bits(-found) == pytest.approx(EXACT, abs=1e-5)


@pytest.mark.parametrize("std", [0.05, 0.2, 1.5])
def test_narrow_and_wide_gaussians_have_their_exact_likelihood_in_several_dimensions(std):
    data = GaussianMixture([1.0], [[0.1, 0.0, -0.2]], [std])
    scheduler = DDIMScheduler(clip_sample=False, compat="exact", beta_schedule="squaredcos_cap_v2")
    x = torch.tensor([[1.0, 1, 1], [-1, -1, -1]]).double() * std + data.means
    found = flow_log_prob(exact_denoiser(scheduler, data), scheduler, x)
    assert bits(-found, 3) == pytest.approx(bits(-data.log_prob(x), 3), abs=1e-4)


def knowable(scheduler, data, x):
    """ln p(x) of the data as they are at the scheduler's cleanest level."""
    low = Model(None, scheduler).nodes[0].level
    return data.log_prob(low.alpha * x, low) + math.log(low.alpha)


def test_the_error_of_the_flow_shrinks_with_fourth_order():
    scheduler = DDIMScheduler(
        20_000, clip_sample=False, compat="exact", beta_schedule="squaredcos_cap_v2"
    )
    data = GaussianMixture([1.0], [[0.0]], [0.5])
    denoise, x = exact_denoiser(scheduler, data), torch.tensor([[0.2], [0.5]], dtype=torch.float64)
    exact = knowable(scheduler, data, x)
    errors = [
        (flow_log_prob(denoise, scheduler, x, steps=n) - exact).abs().mean().item() for n in (8, 16)
    ]
    assert math.log2(errors[0] / errors[1]) > 3.5


def test_a_mixture_in_one_dimension_has_its_exact_likelihood_point_by_point():
    data = GaussianMixture([0.3, 0.7], [[-1.0], [1.5]], [0.4, 0.6])
    scheduler = DDIMScheduler(clip_sample=False, compat="exact", beta_schedule="squaredcos_cap_v2")
    x = torch.linspace(-2, 3, 11, dtype=torch.float64)[:, None]
    found = flow_log_prob(exact_denoiser(scheduler, data), scheduler, x)
    torch.testing.assert_close(found, knowable(scheduler, data, x), rtol=0, atol=1e-3)


def test_probes_estimate_the_divergence_without_bias():
    scheduler = DDIMScheduler(clip_sample=False, compat="exact")
    denoise = exact_denoiser(scheduler, PLANE)
    x = PLANE.sample(4, torch.Generator().manual_seed(0)).repeat(250, 1)
    probes = rademacher(x.shape, torch.Generator().manual_seed(0), x)
    exact = flow_log_prob(denoise, scheduler, x[:4], steps=4)
    found = flow_log_prob(denoise, scheduler, x, steps=4, probes=probes).view(250, 4)
    error = found.std(dim=0) / math.sqrt(250)
    assert (error > 0).all()  # a mixture's Jacobian is not diagonal
    assert ((found.mean(dim=0) - exact).abs() < 4 * error).all()


def test_probes_are_exact_where_dimensions_are_independent():
    scheduler = DDIMScheduler(clip_sample=False, compat="exact")
    data = GaussianMixture([1.0], [[0.2, -0.1]], [0.5])
    denoise, x = exact_denoiser(scheduler, data), POINTS.repeat(1, 2)
    probes = rademacher(x.shape, torch.Generator().manual_seed(1), x, probes=2)
    exact = flow_log_prob(denoise, scheduler, x, steps=6)
    torch.testing.assert_close(flow_log_prob(denoise, scheduler, x, steps=6, probes=probes), exact)


@pytest.fixture
def all_noise(monkeypatch):
    """Noise that stands for all noise, see POINTS."""
    monkeypatch.setattr(likelihood, "randn", lambda shape, *rest: NOISE)


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_the_bound_is_above_the_exact_likelihood_and_near_it(name, options, all_noise):
    scheduler = SCHEDULERS[name](**options, compat="exact")
    bound = variational_bound(exact_denoiser(scheduler, DATA), scheduler, POINTS, draws=None)
    assert bits(bound.total("small")) > EXACT
    assert EXACT < bits(bound.total("large")) < EXACT + 0.02


def test_the_bound_approaches_the_exact_likelihood_with_more_levels(all_noise):
    """About in proportion to their number: β(t) is the same, cut finer."""
    gaps = []
    for steps in (50, 200, 800):
        ends = {"beta_start": 0.1 / steps, "beta_end": 20 / steps}
        scheduler = DDIMScheduler(steps, **ends, clip_sample=False, compat="exact")
        denoise = exact_denoiser(scheduler, DATA)
        bound = variational_bound(denoise, scheduler, POINTS, draws=None)
        gaps.append(bits(bound.total("large")) - EXACT)
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0
    assert gaps[2] < 0.03


def test_drawn_levels_estimate_the_sum_over_all_without_bias():
    scheduler = DDIMScheduler(num_train_timesteps=50, clip_sample=False, compat="exact")
    denoise, x = exact_denoiser(scheduler, DATA), POINTS.repeat(1000, 1)

    def bound(draws, seed):
        generator = torch.Generator().manual_seed(seed)
        found = variational_bound(
            denoise, scheduler, x, generator=generator, draws=draws, seed=seed
        )
        return bits(found.small)

    drawn = torch.tensor([bound(3, seed) for seed in range(40)])
    whole = torch.tensor([bound(None, seed) for seed in range(4)])
    error = math.hypot(drawn.std().item() / 40**0.5, whole.std().item() / 2)
    assert abs(drawn.mean() - whole.mean()) < 3.5 * error
    assert error < 0.05 * whole.mean()


def test_the_probabilities_of_all_bytes_sum_to_one():
    """The decoder with bins: every byte's bound has the same other parts, so they cancel."""
    from minidiff.metrics.likelihood import Node, _decoder
    from minidiff.schedule import Level

    bins = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)[:, None]
    for std in (0.002, 0.05, 2.0):
        for mean in (-1.3, -1.0, 0.001, 0.7):
            node = Node(0, Level(1 / math.hypot(1, std), std / math.hypot(1, std)))
            logs = _decoder(bins, torch.full_like(bins, mean), node, PIXEL)
            assert (-logs).exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_bits_of_uniform_bytes_are_eight():
    nats = torch.tensor([3 * math.log(2.0)])  # density ½ on [−1, 1] in three dimensions
    width = 2 / 256
    assert bits_per_dimension(nats, 3, width).item() == pytest.approx(8)


def test_the_scheduler_is_left_as_it_was():
    scheduler = SCHEDULERS["EulerDiscreteScheduler"](compat="exact")
    scheduler.set_timesteps(7)
    grid = list(scheduler.grid)
    denoise = exact_denoiser(scheduler, DATA)
    flow_log_prob(denoise, scheduler, POINTS, steps=3)
    variational_bound(denoise, scheduler, POINTS, draws=2)
    assert scheduler.grid == grid
    assert scheduler.step_index is None


def test_a_learned_variance_has_no_influence():
    options = {"clip_sample": False, "compat": "exact"}
    plain = SCHEDULERS["DDPMScheduler"](**options)
    learned = SCHEDULERS["DDPMScheduler"](**options, variance_type="learned_range")
    denoise = exact_denoiser(plain, DATA)

    def wide(x, t):
        return torch.cat([denoise(x, t), torch.zeros_like(x)], dim=1)

    x = POINTS
    assert torch.equal(
        flow_log_prob(wide, learned, x, steps=4), flow_log_prob(denoise, plain, x, steps=4)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"x": torch.zeros(2, 300)}, r"exact divergence must be in 1\.\.256, got 300"),
        ({"x": torch.zeros(2, 2, dtype=torch.int64)}, "float32 or float64"),
        ({"probes": torch.zeros(3, 2)}, r"probes must be \(K, 4, 1\)"),
    ],
)
def test_a_call_that_cannot_work_is_refused(change, message):
    scheduler = DDIMScheduler(compat="exact")
    arguments = {"denoise": lambda x, t: x, "scheduler": scheduler, "x": POINTS} | change
    with pytest.raises(InvalidArgument, match=message):
        flow_log_prob(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": 0}, "draws must be at least 1"),
        ({"bin_width": 0}, "bin_width must be above 0"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_a_bound_that_cannot_be_taken_is_refused(change, message):
    with pytest.raises(InvalidArgument, match=message):
        variational_bound(lambda x, t: x, DDIMScheduler(compat="exact"), POINTS, **change)
