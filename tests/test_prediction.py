"""Prediction types: one row each, and every row gives back the same (x0, ε)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.prediction import PREDICTION_TYPES, clip, dynamic_threshold, row, split, target
from minidiff.schedule import CLEAN, Level, NoiseSchedule, add_noise

QUICK = settings(deadline=None, derandomize=True, max_examples=200)
PURE_NOISE = Level(0.0, 1.0)
angles = st.floats(1e-6, math.pi / 2 - 1e-6)  # the two ends have their own test
kinds = st.sampled_from(PREDICTION_TYPES)


def level_at(angle: float) -> Level:
    """Every variance-preserving level is α = cos, σ = sin of an angle."""
    return Level(math.cos(angle), math.sin(angle))


def determinant(kind: str, level: Level) -> float:
    p, q = row(kind, level)
    return abs(q * level.alpha - p * level.sigma)


def sample(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 3, 2, 2, 2, generator=g, dtype=torch.float64)
    return x0, eps


@QUICK
@given(kinds, angles, st.integers(0, 2**31))
def test_splitting_a_target_gives_back_the_clean_sample_and_the_noise(
    kind: str, angle: float, seed: int
) -> None:
    level, (x0, eps) = level_at(angle), sample(seed)
    out, x = target(x0, eps, level, kind), add_noise(x0, eps, level)
    # solving two equations costs a factor 1/det of the digits
    tolerance = 1e-13 / determinant(kind, level)
    torch.testing.assert_close(split(out, x, level, kind), (x0, eps), rtol=0, atol=tolerance)


@QUICK
@given(kinds, angles, st.integers(0, 2**31))
def test_a_split_satisfies_both_equations_for_any_output(
    kind: str, angle: float, seed: int
) -> None:
    """The output may be anything: α·x0 + σ·ε = x and p·x0 + q·ε = out hold all the same."""
    level, (out, x) = level_at(angle), sample(seed)
    x0, eps = split(out, x, level, kind)
    tolerance = 1e-13 / determinant(kind, level)
    torch.testing.assert_close(add_noise(x0, eps, level), x, rtol=0, atol=tolerance)
    torch.testing.assert_close(target(x0, eps, level, kind), out, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("level", [CLEAN, PURE_NOISE])
def test_either_end_splits_right_or_is_refused_by_name(kind: str, level: Level) -> None:
    x0, eps = sample(0)
    out, x = target(x0, eps, level, kind), add_noise(x0, eps, level)
    if (kind, level) in (("epsilon", PURE_NOISE), ("sample", CLEAN)):
        with pytest.raises(InvalidArgument, match=f"{kind}.*alpha={level.alpha:g}"):
            split(out, x, level, kind)
    else:
        torch.testing.assert_close(split(out, x, level, kind), (x0, eps), rtol=0, atol=1e-15)


def test_v_at_pure_noise_is_minus_the_clean_sample() -> None:
    """The sign that zero terminal SNR depends on: v = α·ε − σ·x0 = −x0 at α = 0."""
    x0, eps = sample(1)
    assert torch.equal(target(x0, eps, PURE_NOISE, "v_prediction"), -x0)
    assert torch.equal(split(-x0, eps, PURE_NOISE, "v_prediction")[0], x0)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_tensor_of_levels_is_each_level_by_itself(kind: str) -> None:
    schedule = NoiseSchedule.named("linear")
    steps = [1, 400, 990]
    x0, eps = sample(2)
    batch = schedule.at(torch.tensor(steps), x0)
    out, x = target(x0, eps, batch, kind), add_noise(x0, eps, batch)
    together = split(out, x, batch, kind)
    for i, t in enumerate(steps):
        torch.testing.assert_close(out[i], target(x0[i], eps[i], schedule[t], kind))
        alone = split(out[i], x[i], schedule[t], kind)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-11, atol=1e-11)


def test_the_rows_are_those_of_the_papers() -> None:
    x0, eps = sample(3)
    level = Level(0.6, 0.8)
    expected = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": 0.6 * eps - 0.8 * x0,
        "flow": eps - x0,
    }
    assert set(expected) == set(PREDICTION_TYPES)
    for kind, value in expected.items():
        torch.testing.assert_close(target(x0, eps, level, kind), value, rtol=0, atol=1e-15)


def test_an_unknown_prediction_type_is_refused_with_the_known_ones() -> None:
    x0, eps = sample(4)
    for call in (target, split):
        with pytest.raises(InvalidArgument, match="epsilon, sample, v_prediction, flow"):
            call(x0, eps, Level(0.6, 0.8), "velocity")


# --- limits on x0 --------------------------------------------------------------------------------


def test_clipping_is_the_range_of_the_data() -> None:
    x0 = torch.tensor([-3.0, -0.5, 0.5, 3.0])
    assert clip(x0, 1.0).tolist() == [-1.0, -0.5, 0.5, 1.0]


@QUICK
@given(
    st.floats(0.5, 1.0),
    st.floats(1.0, 4.0),
    st.floats(0.1, 5.0),
    st.sampled_from([torch.float16, torch.float32, torch.float64]),
    st.integers(0, 2**31),
)
def test_dynamic_thresholding_is_its_definition_and_that_of_diffusers(
    ratio: float, max_value: float, scale: float, dtype: torch.dtype, seed: int
) -> None:
    diffusers = pytest.importorskip("diffusers")
    x0 = (scale * sample(seed)[0]).to(dtype)
    ours = dynamic_threshold(x0, ratio, max_value)
    assert ours.dtype == dtype
    options = {"dynamic_thresholding_ratio": ratio, "sample_max_value": max_value}
    theirs = diffusers.DDPMScheduler(thresholding=True, **options)._threshold_sample(x0)
    assert torch.equal(ours, theirs)
    for image, expected in zip(ours.double().numpy(), x0.double().numpy(), strict=True):
        s = np.clip(np.quantile(np.abs(expected), ratio), 1, max_value)
        unit = {torch.float16: 2e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
        np.testing.assert_allclose(image, np.clip(expected, -s, s) / s, atol=unit)


def test_dynamic_thresholding_treats_every_image_by_itself() -> None:
    x0 = torch.randn(4, 1, 8, 8) * torch.tensor([0.1, 1.0, 3.0, 9.0])[:, None, None, None]
    together = dynamic_threshold(x0, 0.9, 5.0)
    for i in range(4):
        assert torch.equal(together[i : i + 1], dynamic_threshold(x0[i : i + 1], 0.9, 5.0))
    assert torch.equal(together[0], x0[0])  # nothing to do within [-1, 1]
    assert together.abs().max() <= 1
