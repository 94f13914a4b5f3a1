"""The demo, with a fast network, and with its own options (slow)."""

import pytest
import torch
from PIL import Image

from minidiff.errors import CheckpointError
from minidiff.lab.demo import STEPS, demo
from minidiff.runs.folder import open_pipeline
from minidiff.runtime.device import pick_dtype
from minidiff.training.config import TrainConfig


def check_pictures(out):
    samples = Image.open(out / "samples.png")
    assert samples.size == ((10 * 17 - 1) * 3, (10 * 17 - 1) * 3)
    assert Image.open(out / "forward.png").width > 500
    gif = Image.open(out / "denoise.gif")
    assert gif.n_frames > 10
    assert gif.info["loop"] == 0
    assert open_pipeline(out).class_names == tuple("0123456789")


def test_the_demo_trains_samples_measures_and_draws(tmp_path, capsys):
    config = TrainConfig(steps=200, channels=(24, 48), guidance_scale=3.0, pictures=0)
    rows = demo(tmp_path, config, torch.device("cpu"), samples=200)
    assert [row.sampler for row in rows] == list(STEPS)
    # chance is 10 %, and a few seconds of training suffice for more
    assert all(row.scores.accuracy > 0.4 for row in rows)
    out = capsys.readouterr().out
    assert out.startswith("device: cpu")
    for name in ("DDPM", "DDIM", "DPM-Solver++", "real, held out", "real, training"):
        assert name in out
    check_pictures(tmp_path)


def test_the_demo_does_not_overwrite_a_run(run_folder):
    config = TrainConfig(steps=1, pictures=0)
    with pytest.raises(CheckpointError, match="not of an earlier demo"):
        demo(run_folder, config, torch.device("cpu"))


@pytest.mark.slow
def test_the_demo_with_its_own_budget_draws_legible_digits(tmp_path):
    dtype = pick_dtype("auto", torch.device("cpu"))
    config = TrainConfig(
        minutes=1, guidance_scale=2.0, pictures=0, dtype=str(dtype).removeprefix("torch.")
    )
    rows = demo(tmp_path, config, torch.device("cpu"), samples=500)
    assert all(row.scores.accuracy >= 0.95 for row in rows)
    check_pictures(tmp_path)
