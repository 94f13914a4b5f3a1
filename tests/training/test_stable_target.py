"""The stable target: brute force, the exact mean of a Gaussian, and runs that are trained on it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiff import data
from minidiff.data.captioned.captions import CaptionedDigits
from minidiff.data.latents import LatentData
from minidiff.errors import InvalidArgument
from minidiff.nn import AutoencoderKL
from minidiff.schedule import Level
from minidiff.training.batches import STEPS_PER_REFERENCE
from minidiff.training.build import build, check
from minidiff.training.config import TrainConfig
from minidiff.training.diffusion import DiffusionTraining, train
from minidiff.training.stable_target import MAX_RATIO, Reference, stable_pair

TINY = {"channels": (8, 8), "batch_size": 12, "pictures": 0}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def level_of(ratios: list[float], dims: int) -> Level:
    """Return variance-preserving levels of these σ/α."""
    ratio = torch.tensor(ratios, dtype=torch.float64)
    alpha = (1 + ratio.square()).rsqrt()
    sigma = torch.where(ratio.isinf(), 1.0, ratio * alpha)
    shape = (-1,) + (1,) * dims
    return Level(alpha.float().view(shape), sigma.float().view(shape))


RATIOS = st.one_of(st.floats(1e-3, 1e3), st.just(math.inf))


@settings(max_examples=60, deadline=None)
@given(st.lists(RATIOS, min_size=1, max_size=5), st.integers(1, 20), st.integers(0, 999))
def test_it_is_the_mean_of_the_images_that_may_explain_the_noisy_one(ratios, count, seed):
    """Apply Bayes' rule to x0 and the reference batch in float64."""
    level, size = level_of(ratios, 2), (len(ratios), 3, 2)
    x0, eps = normal(*size, seed=seed), normal(*size, seed=seed + 1)
    y = normal(count, 3, 2, seed=seed + 2)
    allowed = normal(len(ratios), count, seed=seed + 3) > -0.5
    mean, noise = stable_pair(x0, eps, level, allowed, Reference(y, None))
    x = level.alpha.double() * x0.double() + level.sigma.double() * eps.double()
    for i in range(len(ratios)):
        alpha, sigma = (float(part[i]) for part in level)
        every = torch.cat([x0[i : i + 1], y[allowed[i]]]).double()
        far = (x[i] - alpha * every).square().flatten(1).sum(1)
        weights = (-far / (2 * sigma**2)).softmax(0)
        wanted = (weights[:, None, None] * every).sum(0)
        torch.testing.assert_close(mean[i].double(), wanted, rtol=1e-3, atol=1e-3)
        again = alpha * mean[i].double() + sigma * noise[i].double()
        torch.testing.assert_close(again, x[i], rtol=1e-5, atol=1e-5)  # the network sees the same


@given(st.floats(1e-8, 2e-2), st.integers(0, 99))
def test_nearly_clean_images_explain_themselves(ratio, seed):
    """To the bit: one weight is 1, and the noise of a clean image is not divided by its level."""
    x0, eps = normal(4, 1, 6, 6, seed=seed), normal(4, 1, 6, 6, seed=seed + 1)
    reference = Reference(normal(50, 1, 6, 6, seed=seed + 2), None)
    mean, noise = stable_pair(x0, eps, level_of([ratio] * 4, 3), None, reference)
    assert torch.equal(mean, x0)
    assert torch.equal(noise, eps)


def test_the_limit_is_beyond_what_images_can_share():
    """At the largest ratio the next grey level of one pixel is 39 standard deviations away."""
    assert 2 / 255 * MAX_RATIO / 2 > 39


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0, 20.0])
def test_it_is_the_exact_mean_of_normal_data_with_far_less_noise(ratio):
    """For data N(0, I) in the plane E[x0 | x] = α·x, and one x0 deviates from it by σ."""
    level = level_of([ratio] * 4000, 1)
    x0, eps = normal(4000, 2), normal(4000, 2, seed=1)
    x = level.alpha * x0 + level.sigma * eps
    exact = level.alpha * x  # of variance-preserving levels
    alone = (x0 - exact).square().mean()
    assert alone == pytest.approx(float(level.sigma[0] ** 2), rel=0.05)
    spread = []
    for count in (100, 1600):
        reference = Reference(normal(count, 2, seed=2), None)
        mean, _ = stable_pair(x0, eps, level, None, reference)
        spread.append((mean - exact).square().mean() / alone)
        assert (mean - exact).mean(0).abs().max() < 0.25  # one reference batch errs as one
    assert spread[1] < spread[0] / 4 < 0.1


def test_an_image_is_explained_by_its_own_class_alone():
    """An image with a label is explained by its class, one with a hidden label by all images; at
    pure noise the mean is then that of the class, or of all."""
    digits = data.load("digits")
    config = TrainConfig(steps=1, stable_target=600, label_dropout=0.5, **TINY)
    training = DiffusionTraining(config, digits, torch.device("cpu"))
    batch = training.batches.take(0, 12)
    assert 0 < int(batch.hidden.sum()) < 12
    assert torch.equal(batch.labels == 10, batch.hidden)
    mean, _ = batch.pair(batch.levels._replace(
        alpha=torch.zeros(12, 1, 1, 1), sigma=torch.ones(12, 1, 1, 1)
    ))  # fmt: skip
    y, labels = batch.reference
    for i in range(12):
        own = y if batch.hidden[i] else y[labels == batch.labels[i]]
        every = torch.cat([batch.z[i : i + 1], own])
        torch.testing.assert_close(mean[i], every.mean(0), rtol=1e-4, atol=1e-5)


def test_every_process_has_the_same_reference_and_consecutive_steps_share_one():
    """The reference depends on the step alone, not on earlier steps."""
    digits = data.load("digits")
    config = TrainConfig(steps=1, stable_target=40, shift=1, **TINY)
    one = DiffusionTraining(config, digits, torch.device("cpu")).batches
    other = DiffusionTraining(config, digits, torch.device("cpu")).batches
    other.part = lambda size: slice(size // 2, size)
    first, same, next_one = (
        one.take(step, 12).reference.y for step in (0, STEPS_PER_REFERENCE - 1, STEPS_PER_REFERENCE)
    )
    assert torch.equal(first, same)
    assert not torch.equal(same, next_one)
    assert torch.equal(next_one, other.take(STEPS_PER_REFERENCE + 1, 12).reference.y)
    assert torch.equal(first, other.take(1, 12).reference.y)


def test_parts_of_a_batch_have_the_targets_of_the_whole():
    """Accumulated over three parts, the gradient step is the same."""

    def weights(**options):
        config = TrainConfig(**{"steps": 3, "stable_target": 64} | TINY | options)
        pipe = train(config, data.load("digits"), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        return torch.cat([p.detach().flatten() for p in pipe.unet.parameters()])

    torch.testing.assert_close(weights(), weights(accumulate=3), rtol=1e-4, atol=1e-6)
    assert (weights() - weights(stable_target=0)).abs().max() > 1e-4


def test_the_loss_lacks_the_noise_of_the_target():
    """The losses are of the same batches before the first step."""
    digits = data.load("digits")

    def loss(count):
        config = TrainConfig(steps=1, stable_target=count, **TINY | {"batch_size": 256})
        training = DiffusionTraining(config, digits, torch.device("cpu"))
        with torch.no_grad():
            return float(training._loss(256, training.batches.take(0, 256).loss_inputs()))

    assert loss(1500) < 0.97 * loss(0)


@pytest.mark.parametrize("options", [{"prediction_type": "edm"}, {"prediction_type": "flow"},
                                     {"prediction_type": "epsilon", "loss_weight": "min_snr"},
                                     {"dtype": "bfloat16"}])  # fmt: skip
def test_every_objective_is_trained_with_it(options):
    rows = []
    config = TrainConfig(steps=40, stable_target=128, optimizer="muon", **TINY | options)
    train(config, data.load("digits"), on_log_row=rows.append)
    assert rows[-1].loss < rows[0].loss


def test_latents_have_a_reference_of_latents():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=[8, 8], norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    latents = LatentData(vae, data.load("digits", "test"))
    config = TrainConfig(steps=2, stable_target=50, block=1, **TINY)
    y, labels = (
        DiffusionTraining(config, latents, torch.device("cpu")).batches.take(0, 12).reference
    )
    assert y.shape == (50, *latents.shape)
    assert labels.shape == (50,)
    train(config, latents)


def test_data_without_a_reference_are_refused():
    with pytest.raises(InvalidArgument, match="stable_target must be 0 for learn_variance"):
        TrainConfig(steps=1, stable_target=8, learn_variance=True)
    with pytest.raises(InvalidArgument, match=r"stable_target must be in 0\.\.65536, got -1"):
        TrainConfig(steps=1, stable_target=-1)
    captions = data.load("captions")
    assert isinstance(captions, CaptionedDigits)
    with pytest.raises(InvalidArgument, match="stable_target must be 0 for captions: it draws"):
        check(TrainConfig(steps=1, stable_target=8), captions)


def test_the_sampler_is_stored_with_the_model():
    digits = data.load("digits")
    pipe = build(TrainConfig(steps=1, sampler="sde-dpm++", **TINY), digits)
    assert pipe.scheduler.config["algorithm_type"] == "sde-dpmsolver++"
    with pytest.raises(InvalidArgument, match="sampler must be one of ddpm, ddim"):
        TrainConfig(steps=1, sampler="lcm")
    with pytest.raises(InvalidArgument, match="sampler for this model's levels must be one of"):
        check(TrainConfig(steps=1, sampler="heun", prediction_type="edm"), digits)
