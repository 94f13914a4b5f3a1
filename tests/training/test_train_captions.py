"""Training on captions: network and text encoder are trained and saved together."""

import json
import shutil

import pytest
import torch

from minidiff import cli
from minidiff.data import load
from minidiff.data.captioned.captions import CaptionedDigits
from minidiff.errors import InvalidArgument
from minidiff.pipeline import Pipeline
from minidiff.runs import diffusion
from minidiff.runs.autosave import Saving
from minidiff.text.conditioning import Captions
from minidiff.training.build import build
from minidiff.training.config import TrainConfig
from minidiff.training.diffusion import train
from minidiff.training.learner import Learner

SMALL = {"channels": (16, 32), "text_width": 32, "text_layers": 1, "batch_size": 8, "pictures": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of six steps, with a snapshot at the third."""
    out = tmp_path_factory.mktemp("runs") / "captions"
    config = TrainConfig(steps=6, **SMALL)
    saving = Saving(save_every=3)
    diffusion.train_into(out, config, load("captions"), saving=saving, load={"name": "captions"})
    return out


def weights(module) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in module.parameters()])


def test_the_text_encoder_is_trained_and_averaged_with_the_network():
    config = TrainConfig(steps=4, ema_half_life=0.3, **SMALL)
    fresh, seen = build(config, load("captions")), []

    def after(training):
        seen.append(weights(training.learner.condition.text_encoder).detach().clone())

    pipe = train(config, load("captions"), after_step=after)
    encoder = pipe.prompts.text_encoder
    assert not torch.equal(seen[-1], weights(fresh.prompts.text_encoder))
    exponent = torch.log(torch.tensor(0.5)) / torch.log1p(torch.tensor(-0.3))
    weights_of_steps = (torch.arange(1, 5) / 4) ** exponent - (torch.arange(4) / 4) ** exponent
    average = sum(weight * row for weight, row in zip(weights_of_steps, seen, strict=True))
    torch.testing.assert_close(weights(encoder), average, atol=1e-5, rtol=1e-4)


def test_hidden_captions_are_the_empty_prompt():
    data = load("captions")
    pipe = build(TrainConfig(steps=1, **SMALL), data)
    learner = Learner.of(pipe)
    assert isinstance(learner.condition, Captions)
    _, tokens = data.batch(torch.arange(3))
    hidden = learner.hide(tokens, torch.tensor([True, False, True]))
    empty = data.tokenizer.encode(["", ""])
    assert torch.equal(hidden[[0, 2]], empty)
    assert torch.equal(hidden[1], tokens[1])
    condition = learner.condition(hidden)["encoder_hidden_states"]
    expected = pipe.prompts.null(2, (32, 32))["encoder_hidden_states"]
    torch.testing.assert_close(condition[[0, 2]], expected)


def test_an_interrupted_run_resumes_to_the_same_weights(folder, tmp_path):
    again = shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints" / "step-000006")
    diffusion.resume(again, load("captions"), print_line=lambda line: None)
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        whole = (folder / "model" / f"{part}.safetensors").read_bytes()
        assert (again / "model" / f"{part}.safetensors").read_bytes() == whole


def test_pictures_during_training_are_drawn_from_captions(folder, tmp_path):
    pipe, data = Pipeline.from_pretrained(folder / "model"), load("captions")
    prompts = data.captions(torch.arange(10))
    images = diffusion.write_samples(pipe, tmp_path / "samples.png", 1, prompts=prompts)
    assert (images == pipe(prompts, seed=0, output_type="np").images).all()


def test_a_run_holds_a_pipeline_that_can_be_read(folder):
    about = json.loads((folder / "config.json").read_text())["data"]
    assert about["name"] == "captions"
    pipe = Pipeline.from_pretrained(folder / "model")
    assert pipe.guidance_scale == TrainConfig(steps=1).guidance_scale
    assert pipe.image_shape == CaptionedDigits.shape
    assert pipe.unet.class_name == "UNet2DConditionModel"


def test_without_hidden_captions_no_guidance_is_stored():
    config = TrainConfig(steps=1, label_dropout=0, guidance_scale=4, **SMALL)
    assert build(config, load("captions")).guidance_scale == 1


def test_the_command_line_samples_from_a_prompt(folder, tmp_path, capsys):
    png = tmp_path / "seven.png"
    arguments = ["sample", str(folder), "a red 7", "--negative", "blue", "--num", "2"]
    assert cli.main([*arguments, "--png", str(png)]) == 0
    assert png.is_file()
    assert cli.main(["sample", str(folder), "a red 7", "--class", "3", "--png", str(png)]) == 2
    assert "--class is for models with classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_width": 0}, "text_width must be at least 1, got 0"),
        ({"text_layers": 0}, "text_layers must be at least 1, got 0"),
    ],
)
def test_a_text_encoder_without_size_is_refused(options, message):
    with pytest.raises(InvalidArgument, match=message):
        TrainConfig(steps=1, **options)


@pytest.mark.parametrize("option", [["--data-dir", "x"], ["--image-size", "64"]])
def test_options_that_do_not_apply_to_captions_are_refused(tmp_path, capsys, option):
    arguments = ["train", "--data", "captions", "--steps", "1", "--out", str(tmp_path / "run")]
    assert cli.main([*arguments, *option]) == 2
    assert "captions" in capsys.readouterr().err
