"""Autoguidance: sampling guided away from a guidance network, which training keeps."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pipelines import digits

from minidiff.cli import main
from minidiff.data import ImageData, load
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.guidance import extrapolated
from minidiff.metrics.protocol import counted
from minidiff.nn import UNet
from minidiff.pipeline import Pipeline
from minidiff.pipeline.denoiser import Guidance
from minidiff.training.build import check
from minidiff.training.config import TrainConfig
from minidiff.training.diffusion import DiffusionTraining, train

TINY = {"channels": (4, 4), "batch_size": 8, "pictures": 0}
DRAWN = {"num_images": 3, "num_inference_steps": 4, "seed": 0, "output_type": "pt"}


def perturbed(unet: UNet) -> UNet:
    """Return the network with noise added to its weights."""
    other, source = copy.deepcopy(unet), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))
    return other


@pytest.fixture
def autoguided() -> Pipeline:
    """Return a pipeline with random weights and a guidance network with other weights."""
    pipe = digits()
    pipe.weaker, pipe.autoguidance_scale = perturbed(pipe.unet), 1.5
    return pipe


@settings(deadline=None, max_examples=25)
@given(
    scale=st.sampled_from([-1.0, 0.0, 0.5, 1.5, 3.0]),
    guidance=st.sampled_from([0.0, 1.0, 2.5]),
    interval=st.sampled_from([None, (0.3, 3.0), (0.0, 0.3)]),
    entry=st.integers(0, 9),
)
def test_the_denoiser_applies_autoguidance_before_classifier_free_guidance(
    scale, guidance, interval, entry
):
    pipe = digits()
    pipe.weaker = perturbed(pipe.unet)
    pipe.scheduler.set_timesteps(10)
    t = pipe.scheduler.grid[entry]
    ratio = pipe.scheduler.schedule[t].sigma / pipe.scheduler.schedule[t].alpha
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 5])
    with torch.no_grad():
        denoise = pipe.denoiser(labels, Guidance(guidance, extrapolated, interval, scale))
        conditional, unconditional = (
            pipe.unet(x, t, class_labels=labels),
            pipe.unet(x, t, class_labels=torch.full_like(labels, 10)),
        )
        bad = pipe.weaker(x, t, class_labels=labels)
        better = bad + scale * (conditional - bad)
        guided = unconditional + guidance * (better - unconditional) if guidance != 1 else better
        inside = interval is None or interval[0] <= ratio <= interval[1]
        torch.testing.assert_close(
            denoise(x, t), guided if inside else conditional, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_guidance_away_from_the_network_itself_changes_nothing(guidance, autoguided):
    autoguided.weaker = autoguided.unet
    alone, guided = (
        autoguided(**DRAWN, guidance_scale=guidance, autoguidance_scale=w).images for w in (1, 3)
    )
    torch.testing.assert_close(guided, alone, rtol=1e-4, atol=1e-4)


def test_a_scale_of_1_does_not_evaluate_the_guidance_network(autoguided):
    with (
        counted(autoguided.weaker) as guide,
        counted(autoguided.unet, autoguided.weaker, None) as both,
    ):
        autoguided(**DRAWN, guidance_scale=1, autoguidance_scale=1)
        assert (guide, both) == ([0], [3 * 4])
        autoguided(**DRAWN, guidance_scale=1)
        assert (guide, both) == ([3 * 4], [3 * 3 * 4])


def test_a_model_without_classes_is_guided_and_only_inside_the_interval():
    images = load("digits").images
    data = ImageData("unlabelled", images, None, ())
    pipe = train(TrainConfig(steps=4, autoguidance_scale=2, weaker_at=0.5, **TINY), data)
    unguided, guided = (pipe(**DRAWN, autoguidance_scale=w).images for w in (1, 2))
    assert torch.equal(pipe(**DRAWN).images, guided)
    assert not torch.equal(unguided, guided)
    outside = pipe(**DRAWN, guidance_interval=(1e5, 1e6)).images
    assert torch.equal(outside, unguided)


# --- folders --------------------------------------------------------------------------------------


def test_a_folder_keeps_both_networks_and_diffusers_reads_them(autoguided, tmp_path):
    autoguided.save_pretrained(tmp_path / "model")
    again = Pipeline.from_pretrained(tmp_path / "model")
    assert again.autoguidance_scale == 1.5
    assert torch.equal(again(**DRAWN).images, autoguided(**DRAWN).images)
    theirs = UNet2DModel.from_pretrained(tmp_path / "model" / "weaker").eval()
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 10])
    with torch.no_grad():
        expected = autoguided.weaker(x, 300, class_labels=labels)
        found = theirs(x, 300, class_labels=labels).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_scale_without_a_guidance_network_is_refused(autoguided, tmp_path):
    autoguided.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["weaker"]
    shutil.rmtree(tmp_path / "weaker")  # a folder that the index does not list is refused itself
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="autoguidance_scale must be 1 for a model without"):
        Pipeline.from_pretrained(tmp_path)


def test_a_guidance_network_cannot_be_saved_in_a_pipeline_of_diffusers(latent_pipe, tmp_path):
    latent_pipe.weaker = latent_pipe.unet
    with pytest.raises(InvalidArgument, match="StableDiffusionPipeline has no place for it"):
        latent_pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


# --- training -------------------------------------------------------------------------------------


def test_the_guidance_network_is_an_early_average_and_training_is_unchanged():
    averages, data = [], load("digits")

    def keep_average(training: DiffusionTraining) -> None:
        averages.append(copy.deepcopy(training.average.model.unet.state_dict()))

    pipe = train(
        TrainConfig(steps=12, autoguidance_scale=2, weaker_at=0.25, **TINY),
        data,
        after_step=keep_average,
    )
    plain = train(TrainConfig(steps=12, **TINY), data)
    assert (plain.weaker, plain.autoguidance_scale, pipe.autoguidance_scale) == (None, 1, 2)
    for found, expected in ((pipe.weaker, averages[2]), (pipe.unet, plain.unet.state_dict())):
        assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


def test_pictures_before_the_guidance_network_exists_are_drawn_without_it():
    scales = []
    config = TrainConfig(steps=8, autoguidance_scale=2, weaker_at=0.5, **TINY | {"pictures": 4})
    train(config, load("digits"), picture=lambda pipe, step: scales.append(pipe.autoguidance_scale))
    assert scales == [1, 2, 2]


def test_the_command_line_trains_and_samples_with_autoguidance(tmp_path):
    out = str(tmp_path / "run")
    assert main(["train", "--data", "digits", "--out", out, "--steps", "4", "--channels", "4,4",
                 "--pictures", "0", "--autoguidance", "3", "--weaker-at", "0.5"]) == 0  # fmt: skip
    images = []
    for scale in ("1", "3", None):
        file = str(tmp_path / f"{scale}.npz")
        option = [] if scale is None else ["--autoguidance", scale]
        assert main(["sample", out, "--num", "10", "--steps", "3", "--npz", file, *option]) == 0
        images.append(np.load(file)["images"])
    assert np.array_equal(images[1], images[2])
    assert not np.array_equal(images[0], images[1])


# --- invalid arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "2", None])
def test_a_scale_that_is_not_a_finite_number_is_refused(autoguided, scale):
    with pytest.raises(InvalidArgument, match="autoguidance_scale must be"):
        Pipeline(
            autoguided.unet,
            autoguided.scheduler,
            autoguided.vae,
            autoguided.class_names,
            weaker=autoguided.weaker,
            autoguidance_scale=scale,
        )


def test_a_scale_in_a_call_without_a_guidance_network_is_refused_before_sampling(pipe, monkeypatch):
    monkeypatch.setattr(UNet, "forward", None)
    with pytest.raises(InvalidArgument, match="autoguidance_scale must be 1 for a model without"):
        pipe(autoguidance_scale=1.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_class_embeds": 10},
            "num_class_embeds=11 like the network; got 10",
        ),
        ({"out_channels": 8}, "the guidance network must have out_channels=4"),
        ({"in_channels": 1}, "the guidance network must have in_channels=4"),
    ],
)
def test_a_guidance_network_of_another_configuration_is_refused(autoguided, change, message):
    other = UNet(**{**dict(autoguided.unet.config), **change})
    with pytest.raises(InvalidArgument, match=message):
        Pipeline(
            autoguided.unet,
            autoguided.scheduler,
            autoguided.vae,
            autoguided.class_names,
            weaker=other,
        )


def test_captions_are_refused_because_their_encoder_keeps_training():
    with pytest.raises(InvalidArgument, match="autoguidance_scale must be 1 for captions"):
        check(TrainConfig(steps=1, autoguidance_scale=2), load("captions"))
