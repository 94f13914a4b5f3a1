"""Training learns, and what it writes down is true."""

import copy

import pytest
import torch
from torch import nn

from minidiff.data import ImageData, load
from minidiff.errors import InvalidArgument, TrainingError
from minidiff.exact import GaussianMixture
from minidiff.prediction import PREDICTION_TYPES
from minidiff.schedule import NoiseSchedule
from minidiff.train import TrainConfig, _dropped, build, loss_of, train


def test_a_run_repeats_bit_for_bit():
    data = load("digits")
    config = TrainConfig(steps=3, channels=(8, 8), batch_size=8, pictures=0)
    first, second = (train(config, data).unet.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = train(TrainConfig(**{**vars(config), "seed": 1}), data).unet.state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_pictures_and_reports_come_when_the_budget_says(tmp_path):
    rows, pictures = [], []
    config = TrainConfig(steps=10, channels=(8, 8), batch_size=4, pictures=5)
    train(config, load("digits"), report=rows.append, picture=lambda p, step: pictures.append(step))
    assert pictures == [2, 4, 6, 8]  # the fifth is the result
    assert rows[-1].step == 10
    assert rows[-1].images == 40
    assert rows[-1].learning_rate == 0


def test_a_budget_in_minutes_ends_in_time_with_a_rate_of_zero():
    rows = []
    config = TrainConfig(minutes=0.05, channels=(8, 8), batch_size=4, pictures=0)
    train(config, load("digits"), report=rows.append)
    assert 3 <= rows[-1].seconds < 10
    assert rows[-1].learning_rate == 0


def test_the_loss_of_the_best_possible_network_is_the_one_that_theory_gives():
    """On Gaussian data x0 ~ N(0, s²) the posterior variance of x0 given x_t is known:
    Var = s²σ²/(α²s² + σ²). The ε-loss of the exact denoiser is α²Var/σ², its x0-loss is Var.
    """
    std = 0.7
    data = GaussianMixture(torch.ones(1), torch.zeros(1, 1), torch.tensor([std]))
    schedule = NoiseSchedule.named("linear")
    generator = torch.Generator().manual_seed(0)
    x0 = data.sample(200_000, generator=generator).view(-1, 1, 1)
    eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    for step in (50, 300, 800):
        level = schedule[step]
        variance = (std * level.sigma) ** 2 / ((level.alpha * std) ** 2 + level.sigma**2)

        def exact(x, t, class_labels=None, level=level):
            return data.denoise(x.flatten(1), level).view(x.shape)

        t = torch.full((len(x0),), step)
        loss = loss_of(exact, x0, None, t, eps, schedule, "sample")
        assert float(loss) == pytest.approx(variance, rel=0.02)

        def exact_noise(x, t, class_labels=None, level=level):
            return (x - level.alpha * exact(x, t)) / level.sigma

        loss = loss_of(exact_noise, x0, None, t, eps, schedule, "epsilon")
        assert float(loss) == pytest.approx((level.alpha / level.sigma) ** 2 * variance, rel=0.02)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_prediction_type_learns(prediction_type):
    rows = []
    config = TrainConfig(
        steps=40, channels=(8, 16), batch_size=32, pictures=0, prediction_type=prediction_type
    )
    data = load("digits")
    train(config, ImageData("few", data.images[:64], None, ()), report=rows.append)
    fresh = build(config, ImageData("few", data.images[:64], None, ()))
    x0, _ = data.batch(torch.arange(64))
    z, schedule = fresh.vae.to_latents(x0), fresh.scheduler.schedule
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(1000, (64,), generator=generator)
    eps = torch.randn(z.shape, generator=generator)
    with torch.no_grad():
        before = loss_of(fresh.unet, z, None, t, eps, schedule, prediction_type)
    assert rows[-1].loss < 0.8 * float(before)


def test_hidden_labels_have_the_share_that_was_asked_for():
    labels = torch.arange(10).repeat(10_000)
    dropped = _dropped(labels, 0.1, 10, torch.Generator().manual_seed(0))
    hidden = dropped == 10
    assert float(hidden.double().mean()) == pytest.approx(0.1, abs=4 * (0.09 / 1e5) ** 0.5)
    assert torch.equal(dropped[~hidden], labels[~hidden])


def test_a_loss_that_is_not_finite_stops_the_run():
    config = TrainConfig(steps=50, channels=(8, 8), batch_size=4, pictures=0, learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"the loss is .* near step"):
        train(config, load("digits"))


def test_training_does_not_touch_the_callers_random_state():
    torch.manual_seed(1234)  # not a state that a run leaves behind
    state = torch.random.get_rng_state()
    train(TrainConfig(steps=1, channels=(8, 8), batch_size=4, pictures=0), load("digits"))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either minutes or steps"),
        ({"steps": 1, "minutes": 1}, "either minutes or steps"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"minutes": float("nan")}, "minutes"),
        ({"minutes": float("inf")}, "minutes"),
        ({"steps": 1, "batch_size": 0}, "batch_size"),
        ({"steps": 1, "learning_rate": -1}, "learning_rate"),
        ({"steps": 1, "label_dropout": 1.5}, "label_dropout"),
        ({"steps": 1, "ema_half_life": 1}, "ema_half_life"),
        ({"steps": 1, "prediction_type": "noise"}, "prediction_type must be one of epsilon"),
        ({"steps": 1, "dtype": "half"}, "dtype must be one of float32, bfloat16"),
        ({"steps": 1, "batch_size": 10**15}, "batch_size must be in 1..65536"),
        ({"steps": 1, "num_inference_steps": 1001}, "num_inference_steps must be in 1..1000"),
        ({"steps": 1, "seed": 2**32}, "seed"),
        ({"steps": 1, "channels": ()}, "channels"),
        ({"steps": 1, "channels": 48}, "channels"),
        ({"steps": 1, "channels": (8, 0)}, "channels"),
    ],
)
def test_a_bad_option_is_refused_when_the_config_is_built(options, message):
    with pytest.raises(InvalidArgument, match=message):
        TrainConfig(**options)


def test_a_deep_copy_is_what_is_averaged_so_the_live_weights_stay():
    from minidiff.train import EMA

    model = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    average = EMA(model, 0.05)
    average.update(model)
    with torch.no_grad():
        average.model.weight.zero_()
    assert torch.equal(model.weight, before["weight"])


def test_without_hidden_labels_there_is_no_label_for_no_class_and_no_guidance():
    """A label that training never showed would steer guidance by random weights."""
    config = TrainConfig(steps=1, channels=(8, 8), batch_size=4, pictures=0, label_dropout=0)
    pipe = train(config, load("digits"))
    assert pipe.unet.config.num_class_embeds == 10
    assert pipe.guidance_scale == 1
    with pytest.raises(InvalidArgument, match="no class"):
        pipe(guidance_scale=2)


def test_data_without_images_are_refused():
    empty = ImageData("none", torch.zeros(0, 1, 8, 8, dtype=torch.uint8), None, ())
    with pytest.raises(InvalidArgument, match="data none must hold at least one image"):
        train(TrainConfig(steps=1), empty)
