"""The noise schedule: its βs by independent formulas, its moments by theory, diffusers' tables."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiff.errors import InvalidArgument
from minidiff.schedule import BETA_SCHEDULES, CLEAN, Level, NoiseSchedule, add_noise
from minidiff.schedulers import DDPMScheduler
from minidiff.schedulers.core.quirks import READINGS

T = 1000
NAMED = [(name, zero) for name in BETA_SCHEDULES for zero in (False, True)]


def cosine_alpha_bar(t: float) -> float:
    """f(t)/f(0) of Nichol & Dhariwal 2021, eq. 17, before the cap on β."""
    f = math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2


def laplace_alpha_bar(t: float) -> float:
    """1/(1 + 1/snr), snr the quantile of Hang et al. 2024 with μ = 0, b = ½, one sign at a time."""
    s = t / T
    log_snr = -0.5 * math.log(2 * s) if s < 0.5 else 0.5 * math.log(2 - 2 * s)
    return 1 / (1 + math.exp(-log_snr))


def laplace_beta(t: float) -> float:
    if t in (0, T - 1):  # where the logarithm is infinite: all signal, and none, which β caps
        return 1 - laplace_alpha_bar(1) if t == 0 else 0.999
    return 1 - laplace_alpha_bar(t + 1) / laplace_alpha_bar(t)


# The definitions, one t at a time in plain Python.
FORMULAS = {
    "linear": lambda t: 1e-4 + (0.02 - 1e-4) * t / (T - 1),
    "scaled_linear": lambda t: (1e-4**0.5 + (0.02**0.5 - 1e-4**0.5) * t / (T - 1)) ** 2,
    "squaredcos_cap_v2": lambda t: min(1 - cosine_alpha_bar(t + 1) / cosine_alpha_bar(t), 0.999),
    "sigmoid": lambda t: 1e-4 + (0.02 - 1e-4) / (1 + math.exp(6 - 12 * t / (T - 1))),
    "exp": lambda t: -math.expm1(-12 / T),  # the same at every step
    "laplace": laplace_beta,
}


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_betas_are_the_formula_of_the_paper(name: str) -> None:
    betas = NoiseSchedule.named(name).betas
    expected = [FORMULAS[name](t) for t in range(T)]
    np.testing.assert_allclose(betas.numpy(), expected, rtol=1e-11)


def test_the_uncapped_cosine_product_telescopes_to_its_closed_form() -> None:
    schedule = NoiseSchedule.named("squaredcos_cap_v2")
    for t in (0, 10, 500, 990):
        expected = cosine_alpha_bar(t + 1)
        assert schedule[t].alpha ** 2 == pytest.approx(expected, rel=1e-10)


def test_laplace_has_half_signal_variance_at_half_time_and_0707_in_diffusers() -> None:
    """There the log-SNR is 0; diffusers has the root of ᾱ, over that of ᾱ = 0.999 at the start."""
    for compat, expected in (("exact", 0.5), ("diffusers", math.sqrt(0.5 * 1.001))):
        scheduler = DDPMScheduler(beta_schedule="laplace", compat=compat)
        assert scheduler.alphas_cumprod[499].item() == pytest.approx(
            expected, rel=1e-9 if compat == "exact" else 1e-5
        )


def test_the_log_snr_of_laplace_has_a_laplace_distribution_over_the_steps() -> None:
    """Its distribution function is ½·e^{−2|2λ|} below 0 and one minus that above (b = ½)."""
    lams = np.array([level.lam for level in NoiseSchedule.named("laplace").levels()[:-1]])
    tail = 0.5 * np.exp(-2 * np.abs(2 * lams))
    below = np.where(lams < 0, tail, 1 - tail)
    np.testing.assert_allclose(below, 1 - np.arange(1, T) / T, atol=1e-10)


@pytest.mark.parametrize(("name", "zero"), NAMED)
def test_levels_preserve_variance_and_only_get_noisier(name: str, zero: bool) -> None:
    levels = NoiseSchedule.named(name, rescale_zero_snr=zero).levels()
    assert all(a**2 + s**2 == pytest.approx(1, abs=1e-15) for a, s in levels)
    lams = [level.lam for level in levels]
    assert all(b < a for a, b in pairwise(lams))


@pytest.mark.parametrize("name", BETA_SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_terminal_snr_ends_without_signal_and_keeps_the_start(
    name: str, dtype: torch.dtype
) -> None:
    plain = NoiseSchedule.named(name, dtype=dtype)
    zero = NoiseSchedule.named(name, dtype=dtype, rescale_zero_snr=True)
    assert zero[T - 1] == Level(0.0, 1.0)
    assert zero[T - 1].lam == -math.inf
    assert zero[0].alpha == pytest.approx(plain[0].alpha, rel=1e-6)
    # Lin et al. 2023, algorithm 1: √ᾱ is shifted and scaled, so its differences keep their ratios
    a, b = plain.alpha_bar.double().sqrt().diff(), zero.alpha_bar.double().sqrt().diff()
    ratio = (b / a)[::50]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=0.01, atol=0)


@pytest.mark.parametrize(("name", "zero"), [c for c in NAMED if c != ("exp", True)])
def test_the_float32_reading_is_the_table_of_diffusers_bit_for_bit(name: str, zero: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    if name == "exp":
        theirs = diffusers.HeunDiscreteScheduler(beta_schedule=name)
    else:
        theirs = diffusers.DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=zero)
    laplace = READINGS["diffusers"].laplace
    ours = NoiseSchedule.named(name, rescale_zero_snr=zero, dtype=torch.float32, laplace=laplace)
    assert torch.equal(ours.betas, theirs.betas)
    assert torch.equal(ours.alpha_bar, theirs.alphas_cumprod)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_noising_step_by_step_has_the_moments_of_noising_at_once(name: str) -> None:
    """x_t = √(1−β_t)·x_{t−1} + √β_t·z (DDPM eq. 2) has mean α_t·x0 and variance σ_t², exactly."""
    schedule = NoiseSchedule.named(name)
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(schedule.betas.tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert mean == pytest.approx(schedule[t].alpha, rel=1e-12)
        assert variance == pytest.approx(schedule[t].sigma ** 2, rel=1e-12)


@pytest.mark.parametrize("t", [0, 250, 999])
def test_noised_samples_have_the_mean_and_variance_of_theory(t: int) -> None:
    """Monte Carlo within 4.5 standard errors: σ/√n of the mean, σ²·√(2/n) of the variance."""
    n, level = 200_000, NoiseSchedule.named("linear")[t]
    g = torch.Generator().manual_seed(t)
    eps = torch.randn(n, 1, generator=g, dtype=torch.float64)
    x = add_noise(torch.full_like(eps, 0.7), eps, level)
    assert abs(x.mean().item() - 0.7 * level.alpha) < 4.5 * level.sigma / math.sqrt(n)
    assert abs(x.var().item() - level.sigma**2) < 4.5 * level.sigma**2 * math.sqrt(2 / n)


def test_variance_since_adds_up_to_the_whole() -> None:
    """From s to t and from the data to s: ᾱ multiplies, so 1 − v does."""
    schedule = NoiseSchedule.named("linear")
    now, middle = schedule[800], schedule[300]
    both = (1 - now.variance_since(middle)) * (1 - middle.variance_since(CLEAN))
    assert 1 - now.variance_since(CLEAN) == pytest.approx(both, rel=1e-13)
    assert schedule[5].variance_since(schedule[4]) == pytest.approx(schedule.betas[5].item())


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, T - 1), min_size=1, max_size=8), st.integers(0, 3))
def test_a_batch_of_levels_is_each_level_by_itself(steps: list[int], axes: int) -> None:
    schedule = NoiseSchedule.named("scaled_linear")
    like = torch.zeros(len(steps), *(2,) * axes, dtype=torch.float64)
    batch = schedule.at(torch.tensor(steps), like)
    for i, t in enumerate(steps):
        assert batch.alpha[i].shape == (1,) * axes
        assert (batch.alpha[i].item(), batch.sigma[i].item()) == schedule[t]
    one = schedule.at(torch.tensor(steps), like.float())
    assert one.alpha.dtype == torch.float32
    assert torch.equal(one.alpha, batch.alpha.float())


def test_a_schedule_of_trained_betas_is_those_betas() -> None:
    betas = [0.1, 0.3, 0.2]
    schedule = NoiseSchedule.named(num_train_timesteps=3, trained_betas=betas)
    assert len(schedule) == 3
    assert schedule[2].alpha ** 2 == pytest.approx(0.9 * 0.7 * 0.8, rel=1e-15)
    assert schedule.ending_at(0.25)[2] == Level(0.5, math.sqrt(0.75))
    assert schedule.ending_at(0.25).levels()[:2] == schedule.levels()[:2]


def test_log_snr_is_infinite_at_both_ends() -> None:
    assert CLEAN.lam == math.inf
    assert Level(0.0, 1.0).lam == -math.inf
    assert Level(0.6, 0.8).lam == pytest.approx(math.log(0.75))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "quadratic"}, "beta_schedule"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"num_train_timesteps": 2.5}, "num_train_timesteps"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps"),
        ({"beta_start": 0.0}, "beta_start"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start <= beta_end"),
        ({"beta_end": math.nan}, "beta_end"),
        ({"trained_betas": []}, "trained_betas"),
        ({"trained_betas": [0.1, 1.0]}, "trained_betas"),
        ({"trained_betas": [0.1, math.nan]}, "trained_betas"),
        ({"trained_betas": [0.9] * 1000}, "alpha_bar must fall"),  # 0.1^1000 is 0 in float64
        ({"trained_betas": [1e-9] * 1000, "dtype": torch.float32}, "alpha_bar must fall"),
        ({"trained_betas": [0.1] * 999}, "num_train_timesteps=1000, got 999"),
    ],
)
def test_an_impossible_schedule_is_refused_by_name(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        NoiseSchedule.named(**arguments)


@pytest.mark.parametrize("t", [-1, 1000, 2.0, True])
def test_a_timestep_outside_the_table_is_refused(t: object) -> None:
    with pytest.raises(InvalidArgument, match=r"timestep must be .*0\.\.999"):
        NoiseSchedule.named()[t]


def test_batches_that_do_not_fit_are_refused() -> None:
    schedule, x = NoiseSchedule.named(), torch.zeros(3, 1, 2, 2)
    for t in (torch.tensor([1, 2]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1, 2, 3]])):
        with pytest.raises(InvalidArgument, match="3 integers"):
            schedule.at(t, x)
    with pytest.raises(InvalidArgument, match="shape of x0"):
        add_noise(x, x[:1], schedule[0])
    with pytest.raises(InvalidArgument, match="betas must be"):
        NoiseSchedule(torch.zeros(2, 2))
    with pytest.raises(InvalidArgument, match="betas must lie"):
        NoiseSchedule(torch.tensor([0.1, 1.0, 0.1]))
