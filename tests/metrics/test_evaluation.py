"""The protocol: its counts, reasons for missing figures, and the table of the command line."""

import json
from dataclasses import replace

import pytest
import torch

from minidiff import metrics
from minidiff.cli import main
from minidiff.data import ImageData, load
from minidiff.errors import InvalidArgument
from minidiff.metrics import fixed_order, protocol
from minidiff.metrics.evaluation_table import FIGURES
from minidiff.metrics.protocol import Plan, counted, digest, evaluate, plan_for

FAST = Plan(200, seeds=(0, 1), learnt=60, compared=40, likely=2, steps=1)


def part(data, n):
    order = fixed_order(data)[:n]
    return ImageData(data.name, data.images[order], data.labels[order], data.class_names)


@pytest.fixture(scope="module")
def splits():
    return part(load("digits"), 600), part(load("digits", "test"), 400)


@pytest.fixture(autouse=True)
def less_work(monkeypatch):
    monkeypatch.setattr(protocol, "FLOW_STEPS", 2)
    monkeypatch.setattr(protocol, "BOUND_DRAWS", 4)
    monkeypatch.setattr(protocol, "LEARNT", replace(protocol.LEARNT, epochs=1, batch_size=20))


def test_the_hook_counts_every_evaluated_image_with_both_halves_of_guidance(pipe):
    for scale, expected in ((1.0, 3 * 4), (2.0, 2 * 3 * 4)):
        with counted(pipe.unet) as count:
            pipe(num_images=3, num_inference_steps=4, guidance_scale=scale, seed=0)
        assert count == [expected]
    pipe(num_images=1, num_inference_steps=1, seed=0)
    assert count == [expected]  # the hook is gone


def test_every_figure_has_its_columns_and_a_value_per_seed(pipe, splits):
    table = evaluate(pipe, *splits, metrics.load_classifier("digits"), FAST)
    assert table.absent == {}
    assert set(table.cells) == set(FIGURES)
    for figure, columns in table.cells.items():
        lengths = {column: len(values) for column, values in columns.items()}
        real = {"held out": 1, "training": 2}
        expected = {
            "learnt": {"model": 2, "training": 1},
            "copying": {"model": 2, "unguided": 2, "held out": 1, "training": 1},
            "bound": {"held out": 2, "training": 2},
            "flow": {"held out": 2, "training": 2},
            "evaluations": {"model": 2, "unguided": 2},
        }
        assert lengths == expected.get(figure, {"model": 2, "unguided": 2, **real}), figure
    assert table.cells["evaluations"] == {"model": [2, 2], "unguided": [1, 1]}
    assert table.cells["copying"]["training"] == [0]
    assert table.about["likelihood_evaluations"] == 4 * 2 + 4 + 1
    assert table.about["model_sha256"] == digest(pipe.unet)
    json.dumps(table.as_json(), allow_nan=False)
    text = str(table)
    assert "real, held out" in text
    assert "2.0 ± 0.0" in text


def test_the_same_seeds_give_the_same_figures(pipe, splits):
    plan = replace(FAST, seeds=(3,), parts=("copying", "likelihood"))
    first, second = (evaluate(pipe, *splits, None, plan).cells for _ in range(2))
    assert first == second


def test_without_a_classifier_the_rest_is_measured_and_the_reason_given(pipe, splits):
    table = evaluate(pipe, *splits, None, replace(FAST, seeds=(0,)))
    assert set(table.cells) == {"copying", "bound", "flow", "evaluations"}
    assert set(table.absent) == {"samples", "classifier"}
    assert "not measured: samples: no classifier is shipped" in str(table)


def test_a_model_without_classes_is_measured_without_accuracy(run_folder, splits, pipe):
    from minidiff.training.config import TrainConfig
    from minidiff.training.diffusion import train

    train_images, test_images = splits
    bare = [ImageData(d.name, d.images, None, ()) for d in splits]
    nameless = train(TrainConfig(steps=2, channels=(8, 8), batch_size=4, pictures=0), bare[0])
    plan = replace(FAST, seeds=(0,), parts=("samples", "classifier"))
    net = metrics.load_classifier("digits")
    table = evaluate(nameless, train_images, test_images, net, plan)
    assert "accuracy" not in {f for f, c in table.cells.items() if "model" in c}
    assert {"fd", "kd", "density", "coverage"} <= set(table.cells)
    assert "the model is unconditional" in table.absent["classifier"]


def test_likelihood_is_that_of_the_given_class(pipe, splits):
    """Right labels make the digits more probable than wrong ones."""
    train_images, test_images = splits
    wrong = replace(test_images, labels=(test_images.labels + 5) % 10)
    plan = replace(FAST, seeds=(0,), likely=12, parts=("likelihood",))
    right, other = (evaluate(pipe, train_images, d, None, plan) for d in (test_images, wrong))
    for figure in ("bound", "flow"):
        assert right.cells[figure]["held out"] < other.cells[figure]["held out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "num must be in 1"),
        ({"seeds": ()}, "seeds must list at least one seed"),
        ({"seeds": (1, 1)}, "each once, got"),
        ({"seeds": (-1,)}, "seed must be in"),
        ({"parts": ("fid",)}, "parts must be one of samples, classifier, copying, likelihood"),
        ({"parts": ()}, "parts must name at least one"),
        ({"likely": 0}, "likely must be at least 1"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(change, message):
    with pytest.raises(InvalidArgument, match=message):
        replace(FAST, **change)


def test_a_model_data_and_classifier_that_do_not_fit_are_refused_before_any_work(
    pipe, splits, monkeypatch
):
    train_images, test_images = splits
    net = metrics.load_classifier("digits")
    monkeypatch.setattr(type(pipe), "__call__", None)  # any work would fail
    small = replace(train_images, images=train_images.images[:, :, :12])
    with pytest.raises(InvalidArgument, match="images of shape"):
        evaluate(pipe, small, test_images, net, FAST)
    fewer = replace(train_images, class_names=(*train_images.class_names, "ten"))
    with pytest.raises(InvalidArgument, match="has 11 classes, the model 10"):
        evaluate(pipe, fewer, test_images, net, FAST)
    with pytest.raises(InvalidArgument, match="num must be at least 192, got 100"):
        evaluate(pipe, train_images, test_images, net, replace(FAST, samples=100))
    with pytest.raises(InvalidArgument, match="num must be at least 10, got 5"):
        evaluate(pipe, train_images, test_images, None, replace(FAST, samples=5))
    other = metrics.classifier.build_classifier({"channels": 3, "num_classes": 10}).eval()
    with pytest.raises(InvalidArgument, match="for 1 channels and 10 classes"):
        evaluate(pipe, train_images, test_images, other, FAST)


def test_the_protocol_takes_no_more_samples_than_there_are_images():
    data = load("digits")
    assert plan_for(data).samples == 10_000
    assert plan_for(part(data, 300)).samples == 300
    assert plan_for(data, 70_000, seeds=1, seed=5).samples == 70_000
    assert plan_for(data, quick=True, seed=5).seeds == (5, 6, 7)
    assert plan_for(data, quick=True).likely < plan_for(data).likely


def test_evaluate_prints_the_table_and_writes_all_figures_as_json(run_folder, tmp_path, capsys):
    out, png = tmp_path / "x.json", tmp_path / "x.png"
    call = ["evaluate", str(run_folder), "--num", "200", "--steps", "1", "--seeds", "1"]
    call += ["--parts", "samples,copying", "--sampler", "ddim", "--json", str(out)]
    assert main([*call, "--png", str(png)]) == 0
    text = capsys.readouterr().out
    assert "200 samples per seed, seeds 0, ddim, 1 steps, guidance 1.5" in text
    assert "Fréchet distance, ‰" in text
    found = json.loads(out.read_text())
    assert found["protocol"] == protocol.PROTOCOL
    assert found["plan"]["seeds"] == [0]
    assert found["figures"]["fd"]["model"]["std"] is None
    assert found["figures"]["evaluations"]["model"]["mean"] == 2
    assert png.is_file()


def test_a_classifier_of_a_file_gives_the_figures_of_the_shipped_one(run_folder, tmp_path, capsys):
    out = tmp_path / "x.json"
    call = ["evaluate", str(run_folder), "--num", "200", "--steps", "1", "--seeds", "1"]
    call += ["--parts", "samples", "--json", str(out)]
    figures = []
    for more in ([], ["--classifier", str(metrics.WEIGHTS / "digits.safetensors")]):
        assert main([*call, *more]) == 0
        figures.append(json.loads(out.read_text())["figures"])
    assert figures[0] == figures[1]
    wrong = str(metrics.WEIGHTS / "SHA256SUMS")
    assert main([*call, "--classifier", wrong]) == 1
    assert "not a readable safetensors file" in capsys.readouterr().err
    model = next((run_folder / "model" / "unet").glob("*.safetensors"))
    assert main([*call, "--classifier", str(model)]) == 1
    assert "has no valid architecture of a classifier" in capsys.readouterr().err


def test_weights_decide_the_digest(pipe):
    before = digest(pipe.unet)
    with torch.no_grad():
        next(pipe.unet.parameters()).flatten()[0] += 1
    assert digest(pipe.unet) != before
