"""σ-grids: against diffusers, closed forms of the beta quantile, inverses, and the ends."""

import math
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minidiff.errors import InvalidArgument
from minidiff.schedule import (
    NoiseSchedule,
    beta_sigmas,
    exponential_sigmas,
    karras_sigmas,
    shifted_sigmas,
    stretched_sigmas,
)

T = 1000
GRIDS = [karras_sigmas, exponential_sigmas, beta_sigmas]
EULER_SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]
quick = settings(deadline=None, derandomize=True)
shifts = st.floats(0.01, 100)
flow_sigmas = st.lists(st.just(0.0) | st.floats(1e-9, 1), min_size=1)
ends = st.tuples(st.floats(1e-4, 0.9), st.floats(1.0, 1e4))  # sigma_min, sigma_max
counts = st.integers(2, 300)


@pytest.fixture(scope="module")
def diffusers() -> ModuleType:
    return pytest.importorskip("diffusers")


def log_ratios(schedule: object) -> np.ndarray:
    """Return ln σ/α by the expression in diffusers' set_timesteps, from its own table."""
    return np.log((((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod) ** 0.5).numpy())


@quick
@given(ends, counts)
def test_karras_and_exponential_grids_equal_diffusers_bit_for_bit(
    diffusers: ModuleType, ends: tuple[float, float], n: int
) -> None:
    euler, given_ends = diffusers.EulerDiscreteScheduler, np.array(ends[::-1])
    this = SimpleNamespace(config=SimpleNamespace())
    theirs = euler._convert_to_karras(this, given_ends, n)
    assert np.array_equal(karras_sigmas(*ends, n), theirs)
    theirs = euler._convert_to_exponential(this, given_ends, n)
    assert np.array_equal(exponential_sigmas(*ends, n), theirs)


@settings(quick, max_examples=20)
@given(ends, st.integers(2, 100))
def test_the_beta_grid_equals_diffusers(
    diffusers: ModuleType, ends: tuple[float, float], n: int
) -> None:
    pytest.importorskip("scipy")
    this = SimpleNamespace(config=SimpleNamespace())
    theirs = diffusers.EulerDiscreteScheduler._convert_to_beta(this, np.array(ends[::-1]), n)
    np.testing.assert_allclose(beta_sigmas(*ends, n), theirs, rtol=1e-12, atol=1e-13 * ends[1])


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_the_lu_lambdas_of_diffusers_are_the_exponential_grid(
    diffusers: ModuleType, n: int
) -> None:
    theirs = diffusers.DPMSolverMultistepScheduler(use_lu_lambdas=True)
    theirs.set_timesteps(n)
    low, high = np.exp(log_ratios(theirs)[[0, -1]].astype(np.float64))
    ours = exponential_sigmas(low, high, n)
    np.testing.assert_allclose(theirs.sigmas[:-1].numpy(), ours, rtol=1e-6)


def beta_quantile(p: np.ndarray, a: float, b: float) -> np.ndarray:
    """scipy's, or a closed form where there is one."""
    if a == b == 0.5:
        return np.sin(np.pi * p / 2) ** 2  # the arcsine law
    if a == b == 2:  # the root of 3x² − 2x³ = p, by Viète
        return 0.5 - np.sin(np.arcsin(1 - 2 * p) / 3)
    if b == 1:
        return p ** (1 / a)
    if a == 1:
        return 1 - (1 - p) ** (1 / b)
    return pytest.importorskip("scipy.stats").beta.ppf(p, a, b)


CLOSED_FORMS = [(0.5, 0.5), (2, 2), (1, 1), (0.1, 1), (10, 1), (1, 0.3), (1, 10)]
BY_SCIPY = [(0.6, 0.6), (0.1, 0.1), (0.3, 10), (10, 0.1), (10, 10), (2.5, 0.7)]


@pytest.mark.parametrize(("a", "b"), CLOSED_FORMS + BY_SCIPY)
@pytest.mark.parametrize("n", [3, 4, 101, 1000])
def test_the_beta_grid_has_the_quantiles_of_the_beta_distribution(
    a: float, b: float, n: int
) -> None:
    expected = beta_quantile(1 - np.arange(n) / (n - 1), a, b)
    np.testing.assert_allclose(beta_sigmas(1, 2, n, a, b) - 1, expected, rtol=0, atol=1e-12)


@quick
@given(st.floats(0.1, 10), st.floats(0.1, 10), st.integers(2, 200))
def test_exchanging_a_and_b_reverses_the_beta_grid(a: float, b: float, n: int) -> None:
    """1 − x has the distribution Beta(b, a) when x has Beta(a, b)."""
    turned = 3 - beta_sigmas(1, 2, n, b, a)[::-1]
    np.testing.assert_allclose(beta_sigmas(1, 2, n, a, b), turned, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
@quick
@given(ends, counts)
def test_grids_fall_from_sigma_max_to_sigma_min(
    grid: object, ends: tuple[float, float], n: int
) -> None:
    sigmas = grid(*ends, n)
    assert sigmas.shape == (n,)
    assert sigmas.dtype == np.float64
    assert sigmas[0] == pytest.approx(ends[1], rel=1e-13)
    assert sigmas[-1] == pytest.approx(ends[0], rel=1e-11)
    assert bool((np.diff(sigmas) < 0).all())


@pytest.mark.parametrize("grid", GRIDS)
def test_one_level_is_sigma_max_and_equal_ends_leave_one_value(grid: object) -> None:
    assert grid(0.1, 14.6, 1) == pytest.approx([14.6], rel=1e-14)
    assert grid(3.0, 3.0, 4) == pytest.approx([3.0] * 4, rel=1e-14)


@quick
@given(ends, counts, st.floats(1, 100))
def test_karras_grids_are_even_in_the_root_and_exponential_ones_in_the_log(
    ends: tuple[float, float], n: int, rho: float
) -> None:
    roots = np.diff(karras_sigmas(*ends, n, rho) ** (1 / rho))
    np.testing.assert_allclose(roots, roots.mean(), rtol=1e-8)
    logs = np.diff(np.log(exponential_sigmas(*ends, n)))
    np.testing.assert_allclose(logs, logs.mean(), rtol=1e-8)


@quick
@given(flow_sigmas, shifts, shifts)
@example([1.0], 0.43534287220074624, 1.0)  # s / (1 + (s − 1)) rounds to more than 1
def test_shifts_multiply_and_one_undoes_the_other(sigmas: list, s: float, r: float) -> None:
    once = shifted_sigmas(sigmas, s)
    assert bool((once <= 1).all())
    np.testing.assert_allclose(shifted_sigmas(once, 1 / s), sigmas, rtol=1e-9)
    np.testing.assert_allclose(shifted_sigmas(once, r), shifted_sigmas(sigmas, s * r), rtol=1e-9)


@quick
@given(st.lists(st.floats(1e-3, 1), min_size=1), shifts)
def test_both_dynamic_shifts_of_diffusers_are_the_one_shift(
    diffusers: ModuleType, sigmas: list, s: float
) -> None:
    flow, t = diffusers.FlowMatchEulerDiscreteScheduler, np.array(sigmas)
    expected = shifted_sigmas(t, s)
    linear = flow._time_shift_linear(None, s, 1.0, t)
    exponential = flow._time_shift_exponential(None, math.log(s), 1.0, t)
    np.testing.assert_allclose(linear, expected, rtol=1e-12)
    np.testing.assert_allclose(exponential, expected, rtol=1e-12)


def test_the_static_shift_of_diffusers_is_the_shift_in_float32(diffusers: ModuleType) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.numpy()
    sigmas = np.linspace(1, T, T, dtype=np.float32)[::-1] / T
    assert np.array_equal(shifted_sigmas(sigmas, 3.0), theirs)


@quick
@given(st.lists(st.floats(0, 0.99), min_size=1), st.floats(0.01, 0.99))
def test_stretching_ends_at_the_terminal_and_keeps_the_ratios_of_signal(
    diffusers: ModuleType, sigmas: list, terminal: float
) -> None:
    flow, t = diffusers.FlowMatchEulerDiscreteScheduler, np.array(sigmas)
    ours = stretched_sigmas(t, terminal)
    assert ours[-1] == pytest.approx(terminal, rel=1e-12)
    np.testing.assert_allclose((1 - ours) * (1 - t[-1]), (1 - t) * (1 - terminal), rtol=1e-9)
    this = SimpleNamespace(config=SimpleNamespace(shift_terminal=terminal))
    assert np.array_equal(ours, flow.stretch_shift_to_terminal(this, t))


@pytest.mark.parametrize("name", EULER_SCHEDULES)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("n", [1, 7, 30, 999])
def test_sigma_of_gives_the_sigmas_of_diffusers_bit_for_bit(
    diffusers: ModuleType, name: str, spacing: str, n: int
) -> None:
    theirs = diffusers.EulerDiscreteScheduler(beta_schedule=name, timestep_spacing=spacing)
    theirs.set_timesteps(n)
    ours = NoiseSchedule.named(name, dtype=torch.float32).sigma_of(theirs.timesteps.numpy())
    assert np.array_equal(ours.astype(np.float32), theirs.sigmas[:-1].numpy())


@pytest.mark.parametrize("name", EULER_SCHEDULES)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_timestep_of_gives_the_timesteps_of_diffusers_bit_for_bit(
    diffusers: ModuleType, name: str, zero: bool, dtype: type
) -> None:
    """Between, on and beyond the entries; with zero SNR ᾱ_{T−1} = 2^−24, where σ may fall again."""
    theirs = diffusers.EulerDiscreteScheduler(beta_schedule=name, rescale_betas_zero_snr=zero)
    ours = NoiseSchedule.named(name, rescale_zero_snr=zero, dtype=torch.float32)
    if zero:
        ours = ours.ending_at(2**-24)
    table = log_ratios(theirs)
    between = np.random.default_rng(0).uniform(table[0] - 1, table[-1] + 2, 2000)
    sigma = np.concatenate([[0, 1e6], np.exp(between), np.exp(table)]).astype(dtype)
    expected = [theirs._sigma_to_t(s, table) for s in sigma]
    assert np.array_equal(ours.timestep_of(sigma), expected)


@pytest.mark.parametrize("grid", ["karras", "exponential"])
@pytest.mark.parametrize("n", [1, 2, 25])
def test_a_grid_and_its_timesteps_equal_diffusers(diffusers: ModuleType, grid: str, n: int) -> None:
    theirs = diffusers.HeunDiscreteScheduler(
        beta_schedule="scaled_linear", **{f"use_{grid}_sigmas": True}
    )
    theirs.set_timesteps(n)
    schedule = NoiseSchedule.named(
        "scaled_linear", beta_start=0.00085, beta_end=0.012, dtype=torch.float32
    )
    high, low = schedule.sigma_of([T - 1 if n > 1 else 0, 0])  # one level is step 0 there
    sigmas = {"karras": karras_sigmas, "exponential": exponential_sigmas}[grid](low, high, n)
    first = [0, *range(1, 2 * n - 1, 2)]  # Heun has every level but the first twice
    assert np.array_equal(sigmas.astype(np.float32), theirs.sigmas[first].numpy())
    t = schedule.timestep_of(sigmas).astype(np.float32)
    assert np.array_equal(t, theirs.timesteps[first].numpy())


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2", "exp", "laplace"])
@quick
@given(st.lists(st.floats(0, T - 1), min_size=2))
def test_timestep_of_undoes_sigma_of(name: str, real: list[float]) -> None:
    schedule = NoiseSchedule.named(name)
    whole = np.arange(T)
    np.testing.assert_allclose(schedule.timestep_of(schedule.sigma_of(whole)), whole, atol=1e-9)
    real = np.sort(real)  # between the steps one is linear in σ, the other in ln σ
    back = schedule.timestep_of(schedule.sigma_of(real))
    assert bool((np.diff(back) >= -1e-9).all())
    assert bool((back >= np.floor(real) - 1e-9).all())
    assert bool((back <= np.ceil(real) + 1e-9).all())


def test_sigma_of_is_the_table_and_the_level() -> None:
    schedule = NoiseSchedule.named("linear")
    ratios = [level.sigma / level.alpha for level in schedule.levels()]
    np.testing.assert_allclose(schedule.sigma_of(np.arange(T)), ratios, rtol=1e-13)
    assert schedule.sigma_of(10.25) == pytest.approx(0.75 * ratios[10] + 0.25 * ratios[11])
    assert schedule.timestep_of(ratios[10] ** 0.75 * ratios[11] ** 0.25) == pytest.approx(10.25)
    betas = [1e-12, 0.5]  # σ/α from 1e-6 to 1
    nearly_clean = NoiseSchedule.named(num_train_timesteps=2, trained_betas=betas)
    assert nearly_clean.timestep_of(1e-5) == pytest.approx(1 / 6, rel=1e-4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pure_noise_at_the_end_has_a_timestep_and_no_nan(dtype: torch.dtype) -> None:
    schedule = NoiseSchedule.named("linear", rescale_zero_snr=True, dtype=dtype)
    before, end = schedule.sigma_of([T - 2, T - 1])
    assert math.isfinite(before)
    assert end == math.inf
    found = schedule.timestep_of([0, before, 2 * before, math.inf])
    assert found == pytest.approx([0, T - 2, T - 2, T - 1], abs=1e-6)
    plain = NoiseSchedule.named("linear", dtype=dtype)
    assert plain.timestep_of([0, math.inf]).tolist() == [0, T - 1]


@pytest.mark.filterwarnings("error")
def test_a_schedule_of_one_step_has_one_timestep() -> None:
    schedule = NoiseSchedule.named(num_train_timesteps=1, trained_betas=[0.5])  # σ/α = 1
    assert schedule.timestep_of([0, 0.5, 1, 2, math.inf]).tolist() == [0] * 5
    assert schedule.sigma_of([-1, 0, 0.5, 3]) == pytest.approx([1] * 4)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 5), "sigma_min must be above 0"),
        ((-1, 1, 5), "sigma_min"),
        ((2, 1, 5), "sigma_min"),
        ((math.nan, 1, 5), "sigma_min"),
        ((0.1, math.inf, 5), "sigma_max"),
        ((0.1, 0, 5), "sigma_max must be above 0"),
        ((0.1, 1, 0), "n must be"),
        ((0.1, 1, 2.5), "n must be"),
    ],
)
def test_an_impossible_grid_is_refused_by_name(
    grid: object, arguments: tuple, message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        grid(*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: karras_sigmas(0.1, 1, 5, rho=0), "rho"),
        (lambda: beta_sigmas(0.1, 1, 5, a=0), "a must be"),
        (lambda: beta_sigmas(0.1, 1, 5, b=math.nan), "b must be"),
        (lambda: shifted_sigmas([0.5], 0), "shift must be above 0"),
        (lambda: shifted_sigmas([0.5], math.inf), "shift"),
        (lambda: shifted_sigmas([1.5], 2), "sigmas"),
        (lambda: shifted_sigmas([math.nan], 2), "sigmas"),
        (lambda: shifted_sigmas(["0.5"], 2), "sigmas"),
        (lambda: stretched_sigmas([0.5], 0), "terminal"),
        (lambda: stretched_sigmas([0.5], 1), "terminal"),
        (lambda: stretched_sigmas([0.5, 1], 0.1), "sigmas"),
        (lambda: stretched_sigmas([], 0.1), "sigmas"),
        (lambda: stretched_sigmas(0.5, 0.1), "sigmas"),
        (lambda: NoiseSchedule.named().timestep_of([-0.1]), "sigma must be"),
        (lambda: NoiseSchedule.named().timestep_of(math.nan), "sigma must be"),
        (lambda: NoiseSchedule.named().sigma_of([math.nan]), "t must be"),
    ],
)
def test_values_outside_their_range_are_refused_by_name(call: object, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        call()
