"""Exported folders are sampled by minidiff and by others, and refused where they do not fit."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipelines import digits

from minidiff import cli
from minidiff.engines.backends import is_installed
from minidiff.engines.exported import INDEX, use_graphs
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.pipeline import Pipeline
from minidiff.schedulers import DDIMScheduler

SCRIPT = Path(__file__).with_name("run_onnx.py")
CALL = {"class_labels": [1, 2], "num_inference_steps": 3, "seed": 0, "output_type": "pt"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The pipeline of `digits` as a folder of torch.export's graphs."""
    folder = tmp_path_factory.mktemp("exported") / "digits"
    digits().export(folder, "pt2")
    return folder


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    """A copy of that folder."""
    import shutil

    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_the_folder_draws_the_same_images_in_any_size(exported):
    graphs = use_graphs(Pipeline.from_pretrained(exported), exported)
    for size in ({}, {"height": 24, "width": 20}):
        assert (graphs(**CALL, **size).images - digits()(**CALL, **size).images).abs().max() < 1e-5


def test_the_index_describes_inputs_and_error(exported):
    index = json.loads((exported / INDEX).read_text())
    unet = index["parts"]["unet"]
    assert unet["relative_error"] <= 1e-4
    assert [(i["name"], i["dtype"], i["shape"]) for i in unet["inputs"]] == [
        ("sample", "float32", [None, 4, None, None]),
        ("timestep", "float32", [None]),
        ("class_labels", "int64", [None]),
    ]


def test_the_command_samples_an_exported_folder(exported, tmp_path, capsys):
    words = ["sample", str(exported), "--class", "3", "--num", "2", "--steps", "2"]
    assert cli.main([*words, "--npz", str(tmp_path / "graph.npz")]) == 0
    assert "the graphs of" in capsys.readouterr().out
    assert cli.main([*words, "--engine", "torch", "--npz", str(tmp_path / "torch.npz")]) == 0
    both = [np.load(tmp_path / f"{name}.npz")["images"].astype(int) for name in ("graph", "torch")]
    assert abs(both[0] - both[1]).max() <= 1


def test_a_folder_without_its_index_is_refused(copied):
    (copied / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"has unet.pt2 but no export.json"):
        use_graphs(digits(), copied)


def test_a_folder_with_other_weights_is_refused(copied):
    pipe = digits()
    with torch.no_grad():
        pipe.unet.conv_in.bias += 1
    with pytest.raises(CheckpointError, match=r"unet.pt2 was exported from other weights"):
        use_graphs(pipe, copied)


def test_a_damaged_graph_or_index_is_refused(copied):
    content = bytearray((copied / "unet.pt2").read_bytes())
    content[100] ^= 1
    (copied / "unet.pt2").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"unet.pt2 has another SHA-256: export again"):
        use_graphs(digits(), copied)
    (copied / INDEX).write_text('{"format": "pt2", "parts": {}}')
    with pytest.raises(CheckpointError, match=r"has no part or format 'unet'"):
        use_graphs(digits(), copied)


def test_bad_calls_are_refused_before_work(tmp_path, capsys):
    with pytest.raises(InvalidArgument, match="format must be one of onnx, openvino, pt2"):
        digits().export(tmp_path / "x", "tflite")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match="not an empty folder; choose a new or empty one"):
        digits().export(tmp_path / "full", "pt2")
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", "--model", "mnist", "--engine", "tensorrt"])
    assert stop.value.code == 2
    assert cli.main(["sample", "--model", "mnist", "--threads", "0"]) == 2
    assert "threads must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.skipif(
    not is_installed("onnx", "onnxscript", "onnxruntime"), reason="onnxruntime is not installed"
)
def test_thirty_lines_without_minidiff_draw_the_same_images(tiny, tmp_path, capsys):
    assert len(SCRIPT.read_text().splitlines()) <= 30
    tiny.scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, prediction_type="v_prediction", clip_sample=False,
        set_alpha_to_one=False, compat="exact",
    )  # fmt: skip
    tiny.save_pretrained(tmp_path / "model")
    words = ["export", str(tmp_path / "model"), "--format", "onnx", "-o", str(tmp_path / "out")]
    assert cli.main(words) == 0
    assert "relative to torch" in capsys.readouterr().out
    noise = torch.randn(3, 2, 8, 8)
    np.save(tmp_path / "noise.npy", noise.numpy())
    result = tmp_path / "images.npy"
    subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "out" / "unet.onnx", "2", "10",
         tmp_path / "noise.npy", result], check=True,
    )  # fmt: skip
    ours = tiny(
        class_labels=[2] * 3, guidance_scale=1.0, num_inference_steps=10, latents=noise,
        output_type="pt",
    ).images  # fmt: skip
    assert np.abs(np.load(result) - ours.numpy()).max() < 1e-4
