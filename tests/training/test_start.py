"""Training continues from a pipeline, and a learner decides which part is trained."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from minidiff import shipped
from minidiff.data import ImageData, load
from minidiff.data.latents import LatentData
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.nn import AutoencoderKL
from minidiff.pipeline import Pipeline
from minidiff.runs import diffusion
from minidiff.runs.autosave import Saving
from minidiff.training.build import build
from minidiff.training.config import TrainConfig
from minidiff.training.diffusion import train
from minidiff.training.learner import Learner

SMALL = {"batch_size": 8, "pictures": 0}
TINY = SMALL | {"channels": (8, 8)}


@pytest.fixture(scope="module")
def mnist() -> Pipeline:
    return Pipeline.from_pretrained(shipped.folder("mnist"))


@pytest.fixture(scope="module")
def stripes() -> ImageData:
    """Random stripes of 28×28 pixels in ten classes: nothing like a digit."""
    rows = np.random.default_rng(0).integers(0, 2, (200, 1, 28, 1), dtype=np.uint8) * 255
    images = torch.from_numpy(rows).repeat(1, 1, 1, 28)
    return ImageData("stripes", images, torch.arange(200) % 10, tuple("abcdefghij"))


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    """A small pipeline for the embedded digits."""
    return build(TrainConfig(steps=1, **TINY), load("digits"))


def weights(pipe: Pipeline) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pipe.unet.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_shipped_model_is_trained_on_other_data_and_stays_as_it_is(mnist, stripes):
    rows, before = [], weights(mnist)
    config = TrainConfig(steps=30, **SMALL)
    pipe = train(config, stripes, on_log_row=rows.append, start=mnist)
    losses = [row.loss for row in rows]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:3])
    assert same(before, weights(mnist))
    assert not same(before, weights(pipe))
    assert pipe.class_names == stripes.class_names
    assert mnist.class_names == tuple("0123456789")
    assert pipe.guidance_scale == mnist.guidance_scale
    assert pipe.unet.config == mnist.unet.config
    assert pipe(class_labels=[3], seed=0, num_inference_steps=2, output_type="np").images.any()


def test_training_begins_at_the_weights_of_the_start(mnist):
    """With a learning rate of zero the result is the start; of grey images a warning says so."""
    data = ImageData("grey", torch.full((9, 1, 28, 28), 99, dtype=torch.uint8),
                     torch.zeros(9, dtype=torch.int64), mnist.class_names)  # fmt: skip
    with pytest.warns(UserWarning, match="data grey are of one colour: there is nothing to learn"):
        pipe = train(TrainConfig(steps=2, learning_rate=0, **SMALL), data, start=mnist)
    assert same(weights(mnist), weights(pipe))


class UpOnly(Learner):
    """A learner whose network's down path is frozen."""

    @classmethod
    def of(cls, pipe: Pipeline) -> "UpOnly":
        learner = super().of(pipe)
        learner.unet.down_blocks.requires_grad_(False)
        return learner


def is_frozen(name: str) -> bool:
    return name.startswith("down_blocks.")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_weights_stay_to_the_bit_and_the_others_change(tiny, optimizer):
    before, data = weights(tiny), load("digits")
    config = TrainConfig(steps=4, optimizer=optimizer, ema_half_life=0.3, **TINY)
    after = weights(train(config, data, start=tiny, learner=UpOnly.of))
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert not any(map(is_frozen, moved))
    kinds = (nn.Linear, nn.Conv2d)
    layers = {f"{name}.weight" for name, m in tiny.unet.named_modules() if isinstance(m, kinds)}
    assert {name for name in layers if not is_frozen(name)} <= moved


def test_an_interrupted_run_with_frozen_weights_resumes_to_the_same_weights(tiny, tmp_path):
    data, config = load("digits"), TrainConfig(steps=6, ema_half_life=0.3, **TINY)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    how = {"start": tiny, "learner": UpOnly.of}
    first = diffusion.train_into(whole, config, data, saving=Saving(save_every=2), **how)

    class Ended(Exception):
        pass

    def ending(pipe):
        learner = UpOnly.of(pipe)
        learner.calls = 0

        def count(module, given):
            learner.calls += 1
            if learner.calls > 4:
                raise Ended

        learner.register_forward_pre_hook(count)
        return learner

    with pytest.raises(Ended):
        diffusion.train_into(
            cut, config, data, saving=Saving(save_every=2), start=tiny, learner=ending
        )
    second = diffusion.resume(cut, data, print_line=lambda line: None, **how)
    assert same(weights(first), weights(second))
    assert same(weights(first), weights(Pipeline.from_pretrained(cut / "model")))
    with pytest.raises(CheckpointError, match="was trained from a start"):
        diffusion.resume(whole, data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "epsilon"},
         r"prediction_type must be 'v_prediction', which the start's scheduler "
         r"\(DPMSolverMultistepScheduler\) samples; got 'epsilon'"),
        ({"beta_schedule": "linear"}, "beta_schedule must be 'squaredcos_cap_v2', as in the start"),
        ({"num_train_timesteps": 100}, "num_train_timesteps must be 1000, as in the start"),
        ({"channels": (8, 16)}, r"channels must be \(8, 8\), as in the start"),
        ({"block": 4}, "block must be 2, as in the start, or be left out; got 4"),
        ({"learn_variance": True}, "learn_variance must be False, as in the start"),
    ],
)  # fmt: skip
def test_a_config_that_disagrees_with_the_start_is_refused(tiny, options, message):
    with pytest.raises(InvalidArgument, match=message):
        train(TrainConfig(**{"steps": 1, "num_inference_steps": 5} | TINY | options),
              load("digits"), start=tiny)  # fmt: skip


def images(channels=1, side=16, classes=10, name="others") -> ImageData:
    pixels = torch.zeros(4, channels, side, side, dtype=torch.uint8)
    pixels[0] = 255
    labels = torch.zeros(4, dtype=torch.int64) if classes else None
    return ImageData(name, pixels, labels, tuple(map(str, range(classes))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 3}, r"data must be of shape \(1, 16, 16\), as the start has it; others are"),
        ({"side": 32}, r"data must be of shape \(1, 16, 16\)"),
        ({"classes": 3}, "data must have 10 classes, as the start has; others have 3"),
        ({"classes": 0}, "data must have 10 classes, as the start has; others have 0"),
    ],
)
def test_data_that_do_not_fit_the_start_are_refused(tiny, options, message):
    with pytest.raises(InvalidArgument, match=message):
        train(TrainConfig(steps=1, **TINY), images(**options), start=tiny)


def test_captions_and_latents_fit_only_a_start_of_their_kind(tiny):
    captions, text = load("captions"), Pipeline.from_pretrained(shipped.folder("digits-text"))
    with pytest.raises(InvalidArgument, match="data must have captions, as the start is trained"):
        train(TrainConfig(steps=1, **SMALL), images(3, 32, 0), start=text)
    plain = build(TrainConfig(steps=1, block=1, **TINY), images(3, 32, 0))
    with pytest.raises(InvalidArgument, match="start must have the tokenizer of captions"):
        train(TrainConfig(steps=1, **SMALL), captions, start=plain)
    vae = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8, 8),
                        norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=2,
                        mid_block_add_attention=False)  # fmt: skip
    latents = LatentData(vae, images(name="latents"))
    with pytest.raises(InvalidArgument, match="data must be images, as the start has no vae"):
        train(TrainConfig(steps=1, block=1, **SMALL), latents, start=plain)
    start = build(TrainConfig(steps=1, block=1, **TINY), latents)
    other = copy.deepcopy(vae)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(InvalidArgument, match="data must be LatentData of the start's vae"):
        train(TrainConfig(steps=1, **SMALL), LatentData(other, images()), start=start)
    pipe = train(TrainConfig(steps=2, **SMALL), latents, start=start)
    assert not same(weights(start), weights(pipe))


def test_text_encoder_and_network_of_a_start_are_trained_together():
    start = Pipeline.from_pretrained(shipped.folder("digits-text"))
    before = copy.deepcopy(start.prompts.text_encoder.state_dict())
    pipe = train(TrainConfig(steps=2, warmup=0, **SMALL), load("captions"), start=start)
    after = pipe.prompts.text_encoder.state_dict()
    assert not same(before, after)
    assert same(before, start.prompts.text_encoder.state_dict())


@pytest.mark.parametrize("prediction_type", ["flow", "edm", "epsilon"])
def test_every_prediction_type_is_trained_on(prediction_type):
    data = load("digits")
    config = TrainConfig(steps=2, prediction_type=prediction_type, **TINY)
    start = train(config, data)
    pipe = train(config, data, start=start)
    assert not same(weights(start), weights(pipe))
    assert pipe.scheduler.config == start.scheduler.config


def test_labels_cannot_be_hidden_from_a_start_without_no_class():
    data = load("digits")
    start = build(TrainConfig(steps=1, label_dropout=0, **TINY), data)
    with pytest.raises(InvalidArgument, match="label_dropout must be 0 for a start without"):
        train(TrainConfig(steps=1, **TINY), data, start=start)
    train(TrainConfig(steps=1, label_dropout=0, **TINY), data, start=start)
