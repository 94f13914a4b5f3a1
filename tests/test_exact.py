"""The closed forms of `minidiff.exact` against integration, finite differences and each other."""

import math

import pytest
import torch
from torch import Tensor

from minidiff import exact
from minidiff.data import load
from minidiff.errors import InvalidArgument
from minidiff.exact import GaussianMixture
from minidiff.prediction import PREDICTION_TYPES, split, target
from minidiff.schedule import CLEAN, Level, NoiseSchedule

SCHEDULE = NoiseSchedule.named("linear")
LEVELS = [SCHEDULE[t] for t in (0, 100, 400, 700, 999)]
LINE = GaussianMixture([0.3, 0.7], [[-1.0], [1.5]], [0.4, 0.6])
SPACE = GaussianMixture([1, 2, 1], [[0, 1, 2], [1, -1, 0], [-2, 0, 1]], [0.5, 1.0, 0.2])


def points(n: int, d: int, scale: float = 1.5, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, d, generator=g, dtype=torch.float64)


def integral(values: Tensor, grid: Tensor) -> Tensor:
    """Trapezoid rule; on a smooth function that vanishes at both ends it is exact to rounding."""
    return torch.trapezoid(values, grid, dim=-1)


@pytest.mark.parametrize("level", LEVELS)
def test_the_marginal_is_the_data_convolved_with_the_noise(level: Level) -> None:
    x = torch.linspace(-3, 3, 25, dtype=torch.float64)
    x0 = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    clean = LINE.log_prob(x0[:, None], CLEAN).exp()
    kernel = torch.exp(-(((x[:, None] - level.alpha * x0) / level.sigma) ** 2) / 2)
    direct = integral(clean * kernel, x0) / (level.sigma * math.sqrt(2 * math.pi))
    torch.testing.assert_close(LINE.log_prob(x[:, None], level).exp(), direct, rtol=1e-11, atol=0)


@pytest.mark.parametrize("level", LEVELS)
def test_the_denoiser_is_the_mean_of_the_posterior_by_integration(level: Level) -> None:
    x = torch.linspace(-3, 3, 25, dtype=torch.float64)
    x0 = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    joint = (
        LINE.log_prob(x0[:, None], CLEAN) - ((x[:, None] - level.alpha * x0) / level.sigma) ** 2 / 2
    )
    weight = (joint - joint.max(dim=1, keepdim=True).values).exp()
    mean = integral(weight * x0, x0) / integral(weight, x0)
    torch.testing.assert_close(LINE.denoise(x[:, None], level)[:, 0], mean, rtol=1e-11, atol=1e-12)


def test_no_linear_correction_denoises_better_in_three_dimensions() -> None:
    """E[(x0 − D(x))·g(x)] = 0 for every g: the property that defines a conditional mean."""
    n, level = 400_000, SCHEDULE[400]
    g = torch.Generator().manual_seed(0)
    x0 = SPACE.sample(n, g)
    x = level.alpha * x0 + level.sigma * torch.randn(n, 3, generator=g, dtype=torch.float64)
    residual = x0 - SPACE.denoise(x, level)
    for probe in (torch.ones_like(x), x, x.flip(1), x.sin(), (x**2).roll(1, 1)):
        product = residual * probe
        standard_error = product.std(dim=0) / math.sqrt(n)
        assert (product.mean(dim=0).abs() < 4.5 * standard_error).all()


def test_samples_have_the_moments_of_the_mixture() -> None:
    n = 200_000
    x0 = SPACE.sample(n, torch.Generator().manual_seed(1))
    w, m, s = SPACE.weights, SPACE.means, SPACE.stds
    mean = w @ m
    variance = w @ (s[:, None] ** 2 + m**2) - mean**2
    assert ((x0.mean(dim=0) - mean).abs() < 4.5 * (variance / n).sqrt()).all()
    fourth = ((x0 - mean) ** 4).mean(dim=0)
    error = ((fourth - variance**2) / n).sqrt()
    assert ((x0.var(dim=0) - variance).abs() < 4.5 * error).all()


@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("mixture", [LINE, SPACE])
def test_the_score_is_the_slope_of_log_prob(mixture: GaussianMixture, level: Level) -> None:
    d, h = mixture.means.shape[1], 1e-5
    x = points(40, d)
    slope = torch.empty_like(x)
    for j in range(d):
        step = h * torch.eye(d, dtype=torch.float64)[j]
        slope[:, j] = (mixture.log_prob(x + step, level) - mixture.log_prob(x - step, level)) / (
            2 * h
        )
    torch.testing.assert_close(mixture.score(x, level), slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("level", LEVELS)
def test_denoiser_and_noise_make_up_x_and_every_prediction_type_splits_into_them(
    level: Level,
) -> None:
    x = points(50, 3)
    x0, eps = SPACE.denoise(x, level), SPACE.noise(x, level)
    torch.testing.assert_close(level.alpha * x0 + level.sigma * eps, x, rtol=1e-12, atol=1e-12)
    for kind in PREDICTION_TYPES:
        again = split(target(x0, eps, level, kind), x, level, kind)
        torch.testing.assert_close(again, (x0, eps), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("now", LEVELS)
@pytest.mark.parametrize("nxt", [*LEVELS, CLEAN])
def test_the_flow_keeps_the_fraction_of_samples_on_either_side(now: Level, nxt: Level) -> None:
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)[:, None]
    y = LINE.flow(x, now, nxt)
    assert (y.diff(dim=0) > 0).all()
    below, expected = (LINE._log_tails(*pair)[0].exp() for pair in ((y, nxt), (x, now)))
    torch.testing.assert_close(below, expected, rtol=1e-13, atol=1e-15)


def test_the_flow_goes_there_and_back_and_by_any_stop_on_the_way() -> None:
    x = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64)[:, None]
    start, middle, end = SCHEDULE[999], SCHEDULE[500], SCHEDULE[10]
    through = LINE.flow(LINE.flow(x, start, middle), middle, end)
    torch.testing.assert_close(through, LINE.flow(x, start, end), rtol=0, atol=1e-13)
    torch.testing.assert_close(LINE.flow(through, end, start), x, rtol=0, atol=1e-13)
    torch.testing.assert_close(LINE.flow(x, start, start), x, rtol=0, atol=1e-13)


def test_the_flow_obeys_the_probability_flow_equation() -> None:
    """dx/dσ̄ = ε̂ in the variables x/α and σ̄ = σ/α (DDIM, arXiv:2010.02502, eq. 14)."""
    now, h = SCHEDULE[400], 1e-4
    ratio = now.sigma / now.alpha
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]

    def scaled(sigma_bar: float) -> Tensor:
        alpha = 1 / math.hypot(1, sigma_bar)
        return LINE.flow(x, now, Level(alpha, alpha * sigma_bar)) / alpha

    slope = (scaled(ratio + h) - scaled(ratio - h)) / (2 * h)
    torch.testing.assert_close(slope, LINE.noise(x, now), rtol=1e-7, atol=1e-7)


def test_the_inverted_cdf_is_the_closed_form_for_one_gaussian() -> None:
    one = GaussianMixture([1], [[0.7]], [0.3])
    twice = GaussianMixture([0.5, 0.5], [[0.7], [0.7]], [0.3, 0.3])
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)[:, None]
    for nxt in (*LEVELS, CLEAN):
        torch.testing.assert_close(
            twice.flow(x, SCHEDULE[999], nxt), one.flow(x, SCHEDULE[999], nxt), rtol=0, atol=1e-13
        )


def test_shape_and_dtype_of_images_are_kept() -> None:
    image = points(5, 12, seed=3)
    mixture = GaussianMixture([1, 1], points(2, 12, seed=4), [0.5, 1])
    level = SCHEDULE[300]
    for f in (mixture.denoise, mixture.score, mixture.noise):
        out = f(image.view(5, 3, 2, 2).float(), level)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.flatten(1).double(), f(image, level), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 1], [[0.0]], [1.0]), r"\(2,\), \(1, 1\), \(1,\)"),
        (([1.0], [0.0], [1.0]), "means"),
        (([0.0], [[0.0]], [1.0]), "positive"),
        (([1.0], [[0.0]], [-1.0]), "at least 0"),
        (([math.nan], [[0.0]], [1.0]), "positive"),
    ],
)
def test_an_impossible_mixture_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        GaussianMixture(*arguments)


def test_an_undecided_flow_and_impossible_points_are_refused() -> None:
    dots = GaussianMixture([1, 1], [[0.0, 1.0], [1.0, 0.0]], [0.0, 0.0])
    with pytest.raises(InvalidArgument, match="stds above 0 where a level has σ = 0"):
        dots.flow(points(2, 2), SCHEDULE[9], CLEAN)
    with pytest.raises(InvalidArgument, match="3 elements per image"):
        SPACE.denoise(points(2, 4), SCHEDULE[9])


@pytest.mark.parametrize(("now", "nxt"), [(SCHEDULE[999], SCHEDULE[100]), (SCHEDULE[700], CLEAN)])
def test_the_flow_of_independent_coordinates_is_that_of_each(now: Level, nxt: Level) -> None:
    # Two axes of two components each: the product has four, and its flow is two flows on a line.
    weights, means, std = [0.3, 0.7], [[-1.0], [1.5]], 0.3
    line = GaussianMixture(weights, means, [std] * 2)
    product = GaussianMixture(
        [a * b for a in weights for b in weights],
        [[a[0], b[0]] for a in means for b in means],
        [std] * 4,
    )
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    each = torch.cat([line.flow(x[:, i : i + 1], now, nxt) for i in range(2)], dim=1)
    torch.testing.assert_close(product.flow(x, now, nxt), each, rtol=0, atol=2e-8)


def test_the_flow_in_a_plane_turns_back_and_scales_with_the_level() -> None:
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    now, nxt = SCHEDULE[800], SCHEDULE[300]
    there = SPACE.flow(x, now, nxt)
    torch.testing.assert_close(SPACE.flow(there, nxt, now), x, rtol=0, atol=1e-6)
    double = Level(2 * nxt.alpha, 2 * nxt.sigma)
    torch.testing.assert_close(SPACE.flow(x, now, double), 2 * there, rtol=0, atol=1e-7)


def test_the_denoiser_of_a_finite_set_is_its_weighted_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    level, x = Level(0.8, 0.6), images[:7] + 0.3
    distance = (x[:, None] - 0.8 * images).square().flatten(2).sum(2).double()
    direct = torch.einsum("bk,kcij->bcij", (-distance / 0.72).softmax(1), images.double())
    whole = exact.of_images(images).denoise(x, level)
    assert whole.shape == x.shape
    assert whole.dtype == x.dtype
    torch.testing.assert_close(whole, direct.float())
    monkeypatch.setattr(exact, "MAX_NUMBERS", 64)  # two rows of x at a time, by products
    torch.testing.assert_close(exact.of_images(images).denoise(x, level), whole)


def test_almost_without_noise_a_finite_set_returns_its_nearest_image() -> None:
    data = load("digits", "test")
    images = data.batch(torch.arange(20))[0]
    found = exact.of_images(data).denoise(images + 0.01, Level(1.0, 0.02))
    torch.testing.assert_close(found, images)


@pytest.mark.parametrize(
    "images", [torch.zeros(0, 2), torch.zeros(4), [[1.0]], torch.tensor([[math.nan, 0.0]])]
)
def test_what_is_no_set_of_images_is_refused(images: object) -> None:
    with pytest.raises(InvalidArgument, match="images must be"):
        exact.of_images(images)
