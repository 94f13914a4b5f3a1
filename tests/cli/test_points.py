"""Models of points on the command line: trained, resumed, sampled, measured and checked."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image, ImageColor

from minidiff.cli import main

STEPS = ["--steps", "60", "--batch-size", "256", "--pictures", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    out = tmp_path_factory.mktemp("points") / "ring"
    assert main(["train", "--data", "ring", *STEPS, "--save-every", "20", "--out", str(out)]) == 0
    return out


def test_train_names_the_preset_that_it_chose(tmp_path, capsys):
    call = ["train", "--data", "checkerboard", "--steps", "1", "--out", str(tmp_path / "run")]
    assert main(call) == 0
    printed = capsys.readouterr().out
    assert "preset: points, which fits these data" in printed
    assert "50000 points of checkerboard" in printed
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["train"]["block"] == 1
    assert config["data"]["images"] == 50_000


def test_sample_writes_a_scatter_plot_and_the_points(ring, tmp_path):
    png, npz = tmp_path / "s.png", tmp_path / "s.npz"
    assert main(["sample", str(ring), "--png", str(png), "--npz", str(npz)]) == 0
    with np.load(npz, allow_pickle=False) as file:
        points, labels = file["images"], file["labels"]
    assert points.shape == (2000, 2)
    assert points.dtype == np.float32
    assert np.bincount(labels).tolist() == [250] * 8
    picture = np.asarray(Image.open(png))
    assert picture.shape == (480, 480, 3)
    assert (ring / "samples.png").is_file()
    # Gaussian 2 lies above the centre, and its hue is 274.
    y, x = np.nonzero((picture == ImageColor.getrgb("hsl(274, 70%, 42%)")).all(-1))
    assert abs(np.median(x) - 240) < 15
    assert np.median(y) < 140


def test_one_class_is_drawn_by_its_name(ring, tmp_path):
    npz = tmp_path / "s.npz"
    call = ["sample", str(ring), "--class", "Gaussian 3", "--num", "50", "--npz", str(npz)]
    assert main(call) == 0
    with np.load(npz, allow_pickle=False) as file:
        assert (file["labels"] == 3).all()
        assert len(file["images"]) == 50


def test_evaluate_measures_points_beside_fresh_ones(ring, tmp_path, capsys):
    out, png = tmp_path / "e.json", tmp_path / "e.png"
    call = ["evaluate", str(ring), "--num", "2000", "--json", str(out), "--png", str(png)]
    assert main(call) == 0
    printed = capsys.readouterr().out
    assert "within 3σ of a mode, %" in printed
    assert "fresh points" in printed
    figures = json.loads(out.read_text())["figures"]
    assert 0.98 < figures["fresh points"]["near"] < 1
    assert 0.5 < figures["model"]["near"] < figures["fresh points"]["near"]
    assert figures["model"]["modes"] == 8
    assert png.is_file()


def test_check_passes_a_run_of_points(ring, capsys):
    assert main(["check", str(ring)]) == 0
    printed = capsys.readouterr().out
    assert "50000 points of (2,)" in printed
    assert "FAIL" not in printed


def test_a_run_of_points_is_resumed(ring, tmp_path, capsys):
    run = tmp_path / "ring"
    shutil.copytree(ring, run)
    weights = run / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(run / "checkpoints" / "step-000060")
    shutil.rmtree(run / "model")
    assert main(["train", "--resume", str(run)]) == 0
    assert "is complete" in capsys.readouterr().out
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("train --data ring --steps 1 --block 4 --out OUT", "block must be 1 for ring, got 4"),
        ("train --data ring --steps 1 --flip --out OUT", "flip must be False for ring"),
        ("train --data ring --steps 1 --preset digits --block 2 --vae RING --out OUT", "RING"),
        ("train --data digits --init RING --steps 1 --out OUT", "data must be of shape (2,)"),
        ("train --data rign --steps 1 --out OUT", "did you mean"),
        ("train --data ring --image-size 8 --steps 1 --out OUT", "image_size is for folders"),
        ("sample RING --image x.png", "--image is for images"),
        ("sample RING --class north", "--class must be one of Gaussian 0"),
        ("sample RING a text", "unknown: text"),
        ("sample RING --gif OUT.gif", "--gif is for images"),
        ("evaluate RING --parts copying", "--parts must be left out for a model of points"),
        ("evaluate RING --classifier x", "--classifier must be left out for a model of points"),
        ("evaluate RING --num 1", "num must be"),
        ("evaluate RING --data digits", "data must be one of moons, swissroll"),
        ("evaluate mnist --data ring", "the model draws (1, 28, 28)"),
    ],
)
def test_what_points_cannot_have_is_refused_in_one_line(call, message, ring, tmp_path, capsys):
    words = call.replace("RING", str(ring)).replace("OUT", str(tmp_path / "out")).split()
    try:
        code = main(words)
    except SystemExit as error:
        code = error.code
    assert code in (1, 2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert message.replace("RING", str(ring)) in lines[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (["compare", "RUN", "--steps", "4"], "compare is for images"),
        (["sample", "RUN", "--image", "no.png"], "--image is for images"),
        (["sample", "RUN", "--mask", "no.png"], "--mask is for images"),
        (["sample", "RUN", "--image", "a.png", "--mask", "b.png"], "--image and --mask are for"),
        (["sample", "RUN", "--watermark", "6d696e69"], "--watermark is for images"),
        (["sample", "RUN", "--strength", "0.5"], "--strength is for images"),
        (["sample", "RUN", "--scale", "2"], "--scale is for images"),
        (["sample", "RUN", "--engine", "openvino"], "engines and export are for images"),
        (["export", "RUN", "--format", "pt2", "-o", "exported"], "engines and export are for"),
        (["explore", "RUN"], "the page is for images"),
        (["sculpt", "RUN", "--front", "Gaussian 1", "--side", "Gaussian 2"], "sculpt is for"),
        (["train", "--init", "RUN", "--learn", "word", "--data", "ring", "--steps", "1",
          "--out", "adapter"], "--learn is for images"),
    ],
)  # fmt: skip
def test_what_needs_images_refuses_a_model_of_points_in_a_line(
    ring, tmp_path, monkeypatch, capsys, call, text
):
    monkeypatch.chdir(tmp_path)
    assert main([str(ring) if word == "RUN" else word for word in call]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert text in error
    assert "but this model draws points" in error
    assert not list(tmp_path.iterdir())


def test_a_sampler_is_explained_on_a_model_of_points(ring, capsys):
    call = ["explain", str(ring), "--sampler", "ddim", "--steps", "3", "--class", "Gaussian 2"]
    assert main(call) == 0
    assert "x̂₀ moves" in capsys.readouterr().out


def test_a_text_for_a_model_of_points_names_its_classes(ring, capsys):
    assert main(["sample", str(ring), "a text"]) == 2
    assert "--class 'Gaussian 0'" in capsys.readouterr().err


def test_a_classifier_of_points_is_refused(tmp_path, capsys):
    call = ["train-classifier", "--data", "ring", "--out", str(tmp_path / "c.safetensors")]
    assert main(call) == 2
    assert "data must be of type ImageData, got PointData" in capsys.readouterr().err
