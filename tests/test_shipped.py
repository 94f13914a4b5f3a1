"""The models that ship with the package."""

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff import Pipeline, shipped
from minidiff.cli import main
from minidiff.errors import InvalidArgument
from minidiff.images import plot
from minidiff.metrics import SceneEvaluator, load_classifier
from minidiff.metrics.classifier import features
from minidiff.metrics.scenes import task

LARGEST = 4 << 20


@pytest.mark.parametrize("name", shipped.MODELS)
def test_a_model_is_small_and_only_a_pipeline(name):
    folder = shipped.folder(name)
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= LARGEST
    assert {file.suffix for file in files} == {".json", ".safetensors"}


def test_the_model_of_mnist_draws_the_digits_requested():
    pipe = shipped.load("mnist")
    result = pipe(num_images=50, seed=0, output_type="np")
    images = torch.from_numpy(result.images).permute(0, 3, 1, 2)
    predicted, _ = features(load_classifier("mnist"), images)
    assert (predicted == result.labels).float().mean() >= 0.96


def test_the_distilled_model_of_mnist_draws_the_digits_requested_in_two_steps():
    pipe = shipped.load("mnist-fast")
    evaluations = []
    pipe.wraps.append(lambda denoise: lambda x, t: evaluations.append(t) or denoise(x, t))
    result = pipe(num_images=50, seed=0, output_type="np")
    images = torch.from_numpy(result.images).permute(0, 3, 1, 2)
    predicted, _ = features(load_classifier("mnist"), images)
    assert evaluations == [999, 499]
    assert (predicted == result.labels).float().mean() >= 0.9


def test_the_model_of_captions_draws_pairs_held_out_of_training():
    pipe = Pipeline.from_pretrained(shipped.folder("digits-text"))
    scenes = task(40, "held out")
    images = pipe(scenes.prompts, seed=0, num_inference_steps=12, output_type="np").images
    scores = SceneEvaluator().score(torch.from_numpy(images).permute(0, 3, 1, 2), scenes.wanted)
    assert scores.together >= 0.9


def test_sample_draws_with_a_shipped_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "--model", "mnist", "--class", "7", "--steps", "2"]) == 0
    assert capsys.readouterr().out == "wrote samples.png\n"
    assert main(["sample", "--model", "mnist", "--class", "7", "--steps", "2"]) == 0
    assert capsys.readouterr().out == "replaced samples.png\n"
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    sixteen = plot.grid(np.zeros((16, 28, 28, 1), np.uint8), 4)
    plot.save(sixteen, tmp_path / "sixteen.png")
    sizes = [Image.open(tmp_path / f"{name}.png").size for name in ("samples", "sixteen")]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sample", "give a run or --model"),
        ("sample --model mnist RUN text", "give a run or --model, not both: got the run 'RUN'"),
        ("evaluate --model mnist RUN", "give a run or --model, not both: got the run 'RUN'"),
    ],
)
def test_a_run_and_a_model_exclude_each_other(line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_model_is_refused_by_name():
    with pytest.raises(
        InvalidArgument, match="model must be one of mnist, mnist-fast, digits-text"
    ):
        shipped.folder("cifar")
