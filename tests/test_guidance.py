"""Guidance against closed forms, diffusers' numbers and samples of the tilted target."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.exact import GaussianMixture
from minidiff.guidance import (
    Denoiser,
    Pair,
    Reader,
    autoguidance,
    both,
    classifier_free,
    classifier_guided,
    concat_channels,
    extrapolated,
    pair_of,
    projected,
    reading,
    rescaled,
    thresholded,
    within,
)
from minidiff.lab.mixtures import LabelledMixture, energy_distance
from minidiff.prediction import dynamic_threshold, split, target
from minidiff.sample import meaning_of, trajectory
from minidiff.schedule import NoiseSchedule
from minidiff.schedulers import SCHEDULERS, DDIMScheduler

SCHEDULE = NoiseSchedule.named()
KINDS = ("epsilon", "sample", "v_prediction", "flow")
# Two classes that overlap in the middle, each a mixture of two Gaussians.
DATA = LabelledMixture(
    [
        GaussianMixture([0.6, 0.4], [[-0.5, 0.3], [0.1, -0.4]], [0.2, 0.15]),
        GaussianMixture([0.5, 0.5], [[0.5, 0.3], [-0.1, -0.6]], [0.2, 0.2]),
    ]
)
WEAK = GaussianMixture([0.6, 0.4], [[-0.45, 0.25], [0.05, -0.35]], [0.32, 0.28])  # class 0, blurred
NONE = 2  # the label that means no class


def optimal(data: GaussianMixture, kind: str) -> Denoiser:
    """Return the optimal network for a distribution, in a prediction type."""

    def denoise(x: Tensor, t: float) -> Tensor:
        level = SCHEDULE[int(t)]
        return target(data.denoise(x, level), data.noise(x, level), level, kind)

    return denoise


def network(kind: str) -> Callable[..., Tensor]:
    """Return the optimal network of a prediction type, conditioned on class labels."""
    denoisers = [optimal(data, kind) for data in (*DATA.classes, DATA.union)]

    def denoise(x: Tensor, t: float, class_labels: Tensor) -> Tensor:
        outputs = torch.stack([each(x, t) for each in denoisers])
        return outputs[class_labels, torch.arange(len(x))]

    return denoise


def labels(label: int, n: int) -> dict[str, Tensor]:
    return {"class_labels": torch.full((n,), label)}


def pair(kind: str = "epsilon") -> Pair:
    return pair_of(optimal(DATA.classes[0], kind), optimal(DATA.union, kind))


def points(n: int = 50, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, generator=source, dtype=torch.float64)


def reader(kind: str) -> Reader:
    return reading(SCHEDULE.__getitem__, kind)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- identities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [20, 400, 950])
def test_an_exact_classifier_guides_like_classifier_free_guidance(kind, t):
    """∇ ln p(y|x) is the difference of the two scores, for every prediction type."""

    def log_prob(x: Tensor, t: float) -> Tensor:
        return DATA.log_posterior(x, 0, SCHEDULE[int(t)])

    x = points()
    expected = classifier_free(network(kind), labels(0, 50), labels(NONE, 50), 3.0)
    guided = classifier_guided(optimal(DATA.union, kind), log_prob, reader(kind), 3.0)
    close(guided(x, t), expected(x, t))
    with torch.no_grad():  # as in a pipeline
        close(guided(x, t), expected(x, t))
    from_conditional = classifier_guided(
        optimal(DATA.classes[0], kind), log_prob, reader(kind), 2.0
    )
    close(from_conditional(x, t), expected(x, t))


def test_one_batch_of_twice_the_size_gives_the_outputs_of_two_denoisers():
    x = points()
    together = both(network("epsilon"), labels(0, 50), labels(NONE, 50))
    for a, b in zip(together(x, 300), pair()(x, 300), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 4.0])
def test_autoguidance_by_the_network_itself_changes_nothing(scale):
    denoise = optimal(DATA.classes[0], "epsilon")
    guided = autoguidance(denoise, denoise, scale)
    assert torch.equal(guided(points(), 300), denoise(points(), 300))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0])
def test_projected_guidance_that_keeps_the_parallel_part_is_extrapolation(kind, scale):
    guided = projected(pair(kind), scale, reader(kind), parallel=1, momentum=0)
    for t in (900, 500, 30):
        close(guided(points(), t), extrapolated(pair(kind), scale)(points(), t))


@pytest.mark.parametrize("kind", KINDS)
def test_methods_on_x0_agree_for_every_prediction_type(kind):
    """The guided x̂0 is that of networks that predict the sample."""
    for make in (
        lambda p, m: projected(p, 5.0, m, threshold=0.7),
        lambda p, m: thresholded(extrapolated(p, 5.0), m, ratio=0.5),
    ):
        ours, theirs = make(pair(kind), reader(kind)), make(pair("sample"), reader("sample"))
        for t in (900, 500, 30):
            x0, _ = split(ours(points(), t), points(), SCHEDULE[t], kind)
            close(x0, theirs(points(), t), 1e-8)


def test_rescale_0_changes_nothing_and_1_gives_the_standard_deviation_of_the_conditional():
    x = points(8).repeat(1, 16)[:, :, None]
    c, u = torch.randn(2, 8, 32, 1, generator=torch.Generator().manual_seed(1))
    outputs = pair_of(lambda x, t: c, lambda x, t: u)
    plain = extrapolated(outputs, 7.0)(x, 3)
    assert torch.equal(rescaled(outputs, 7.0, 0.0)(x, 3), plain)
    full = rescaled(outputs, 7.0, 1.0)(x, 3)
    close(full.std(dim=(1, 2)), c.std(dim=(1, 2)), 1e-5)
    partial = rescaled(outputs, 7.0, 0.7)(x, 3)
    close(partial, rescale_noise_cfg(plain, c, 0.7), 1e-5)


def test_projected_guidance_with_momentum_gives_the_numbers_of_diffusers():
    c = torch.randn(5, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    u = torch.randn(5, 3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    outputs = pair_of(lambda x, t: c[4 - int(t)], lambda x, t: u[4 - int(t)])
    ours = projected(outputs, 6.0, reader("sample"), parallel=0.3, momentum=-0.5, threshold=5.0)
    buffer = MomentumBuffer(-0.5)
    for t in (4, 3, 2, 1, 0):
        i = 4 - t
        # diffusers counts the scale from the conditional: w − 1
        theirs = normalized_guidance(c[i], u[i], 5.0, buffer, 0.3, 5.0, True)
        close(ours(torch.zeros(3, 3, 8, 8), t), theirs, 1e-5)


def test_momentum_restarts_with_every_trajectory():
    scheduler = DDIMScheduler(clip_sample=False)
    apg = projected(pair(), 4.0, reader("epsilon"), momentum=-0.75)

    def sample(n: int) -> Tensor:
        scheduler.set_timesteps(n)
        *_, last = trajectory(apg, scheduler, points())
        return last.next_x

    for n in (1, 5, 1):
        assert torch.equal(sample(n), sample(n))
    fresh = projected(pair(), 4.0, reader("epsilon"), momentum=-0.75)
    scheduler.set_timesteps(5)
    *_, last = trajectory(fresh, scheduler, points())
    assert torch.equal(sample(5), last.next_x)


def test_a_second_evaluation_at_the_same_t_counts_once():
    apg, other = (projected(pair(), 4.0, reader("epsilon"), momentum=-0.75) for _ in range(2))
    apg(points(), 900), other(points(), 900)
    apg(points(seed=5), 800)
    assert torch.equal(apg(points(), 800), other(points(), 800))


def test_guidance_is_evaluated_inside_the_interval_and_the_plain_network_outside():
    evaluated = []
    guided = lambda x, t: evaluated.append("guided") or x  # noqa: E731
    plain = lambda x, t: evaluated.append("plain") or x  # noqa: E731
    everywhere = within(guided, plain, reader("epsilon"), 0, math.inf)
    for t in (0, 500, 999):
        everywhere(points(), t)
    assert evaluated == ["guided"] * 3
    ratio = SCHEDULE[500].sigma / SCHEDULE[500].alpha
    evaluated.clear()
    part = within(guided, plain, reader("epsilon"), SCHEDULE[200].sigma, ratio)
    for t in (999, 501, 500, 300, 10):
        part(points(), t)
    assert evaluated == ["plain", "plain", "guided", "guided", "plain"]


def test_a_threshold_keeps_x0_in_range_and_other_samples_unchanged_to_the_bit():
    kind, x = "v_prediction", points()
    guided = extrapolated(pair(kind), 5.0)
    limited = thresholded(guided, reader(kind), ratio=1.0)
    before, _ = split(guided(x, 600), x, SCHEDULE[600], kind)
    after, eps = split(limited(x, 600), x, SCHEDULE[600], kind)
    close(after, dynamic_threshold(before, 1.0, math.inf), 1e-12)
    assert before.abs().max() > 1.2
    assert after.abs().max() < 1 + 1e-12
    close(SCHEDULE[600].alpha * after + SCHEDULE[600].sigma * eps, x, 1e-12)
    inside = before.abs().amax(1) <= 1
    assert torch.equal(limited(x, 600)[inside], guided(x, 600)[inside])
    assert 0 < inside.sum() < len(x)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("compat", ["exact", "diffusers"])
def test_guidance_reads_the_x0_that_the_scheduler_computes(name, compat):
    scheduler = SCHEDULERS[name](compat=compat)
    if "clip_sample" in scheduler.config:
        scheduler = SCHEDULERS[name](compat=compat, clip_sample=False)
    scheduler.set_timesteps(6)
    meaning = meaning_of(scheduler)
    x = points().float()
    for t in scheduler.grid:
        model_input = scheduler.scale_model_input(x, t)
        out = torch.tanh(2 * model_input + 0.3)
        x0, eps = meaning(t).split(out, model_input)
        level = meaning(t).level
        torch.testing.assert_close(
            level.alpha * x0 + level.sigma * eps, model_input, rtol=1e-4, atol=1e-4
        )
        x, theirs = scheduler.step(out, t, x, return_dict=False)[:2]
        if name not in ("LCMScheduler", "DDIMInverseScheduler", "PNDMScheduler"):
            torch.testing.assert_close(x0, theirs, rtol=2e-4, atol=2e-4)


def test_extra_channels_follow_those_of_x_in_each_half_of_a_doubled_batch():
    extra = torch.arange(6.0).view(2, 3, 1)
    network = concat_channels(lambda x, t: x, extra)
    x = torch.zeros(2, 1, 1)
    assert torch.equal(network(x, 0), torch.cat([x, extra], 1))
    assert torch.equal(network(torch.cat([x, x]), 0)[2:], torch.cat([x, extra], 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: extrapolated(pair(), math.nan), "guidance_scale must be finite"),
        (lambda: autoguidance(None, None, math.inf), "guidance_scale must be finite"),
        (lambda: rescaled(pair(), 2.0, 1.5), r"guidance_rescale must be in \[0, 1\]"),
        (lambda: projected(pair(), 2.0, None, threshold=0), "threshold must be above 0"),
        (lambda: projected(pair(), 2.0, None, momentum=2), r"momentum must be in \[-1, 1\]"),
        (lambda: projected(pair(), 2.0, None, parallel=math.nan), "parallel must be finite"),
        (lambda: within(None, None, None, 2, 1), "guidance_interval must rise"),
        (lambda: within(None, None, None, -1, 1), "guidance_interval must be finite and at least"),
        (lambda: within(None, None, None, 0, math.nan), "guidance_interval must be"),
        (lambda: thresholded(None, None, 0), "ratio must be above 0"),
        (lambda: thresholded(None, None, 0.9, 0.5), "max_value must be"),
        (lambda: classifier_guided(None, None, None, math.nan), "scale must be finite"),
        (
            lambda: classifier_guided(
                optimal(DATA.union, "epsilon"), lambda x, t: x, reader("epsilon"), 1.0
            )(points(), 5),
            "log_prob must return one number per image",
        ),
        (
            lambda: thresholded(lambda x, t: x[:, :1], reader("epsilon"))(points(), 5),
            "needs an output of the shape of x",
        ),
    ],
)
def test_invalid_arguments_are_refused_by_name(make, message):
    with pytest.raises(InvalidArgument, match=message):
        make()


# --- against the tilted target --------------------------------------------------------------------


def test_samples_of_the_tilted_target_have_the_mean_of_its_density():
    """In one dimension, where the density can be integrated."""
    data = LabelledMixture(
        [GaussianMixture([1.0], [[-0.5]], [0.5]), GaussianMixture([1.0], [[0.7]], [0.6])], [1, 3]
    )
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)[:, None]
    density = (data.classes[0].log_prob(grid) + 2 * data.log_posterior(grid, 0)).exp()
    mean = (density * grid[:, 0]).sum() / density.sum()
    x = data.tilted(0, 3.0, 20_000, torch.Generator().manual_seed(0))
    assert x.mean().item() == pytest.approx(mean.item(), abs=0.01)
    with pytest.raises(InvalidArgument, match="scale must be at least 1"):
        data.tilted(0, 0.5, 10)
    with pytest.raises(InvalidArgument, match="as many shares as classes"):
        LabelledMixture(data.classes, [1.0])


def samples(denoise: Denoiser, n: int = 1500) -> Tensor:
    scheduler = DDIMScheduler(clip_sample=False, compat="exact", timestep_spacing="trailing")
    scheduler.set_timesteps(40)
    *_, last = trajectory(denoise, scheduler, points(n))
    return last.next_x


def test_guidance_methods_keep_their_order_of_distance_to_the_tilted_target():
    """Plain sampling gives p(x|y). Guidance of scale 3 overshoots the tilted target p(x|y)·p(y|x)²,
    because its noisy scores are not those of a noisy density. In an interval, or projected, it is
    closer. Autoguidance concentrates the samples without moving them away from the other class.
    """
    w, source = 3.0, torch.Generator().manual_seed(3)
    data, more_data = (DATA.classes[0].sample(1500, source) for _ in range(2))
    tilted = DATA.tilted(0, w, 1500, source)
    plain, guided = optimal(DATA.classes[0], "epsilon"), extrapolated(pair(), w)
    results = {
        "plain": samples(plain),
        "free": samples(guided),
        "interval": samples(within(guided, plain, reader("epsilon"), 0.2, 1.0)),
        "projected": samples(projected(pair(), w, reader("epsilon"))),
        "auto": samples(autoguidance(plain, optimal(WEAK, "epsilon"), w)),
    }
    from_data = {name: energy_distance(x, data) for name, x in results.items()}
    from_tilted = {name: energy_distance(x, tilted) for name, x in results.items()}
    confidence = {name: DATA.log_posterior(x, 0).mean() for name, x in results.items()}
    assert from_data["plain"] < energy_distance(more_data, data) + 0.05
    assert from_tilted["interval"] < 0.6 * from_tilted["free"]
    assert from_tilted["projected"] < 0.6 * from_tilted["free"]
    assert from_tilted["interval"] < 0.7 * from_tilted["plain"]
    assert confidence["free"] > DATA.log_posterior(tilted, 0).mean() > confidence["plain"]
    assert from_data["auto"] < 0.6 * from_data["free"]
    log_prob = DATA.classes[0].log_prob
    assert log_prob(results["auto"]).mean() > log_prob(results["plain"]).mean() + 0.5
