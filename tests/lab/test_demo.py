"""The demo, with a fast network, and with its own options (slow)."""

import signal

import pytest
import torch
from PIL import Image

from minidiff.cli import main
from minidiff.data import load
from minidiff.errors import CheckpointError, InvalidArgument, Stopped
from minidiff.lab.demo import CAP, MEANING, STEPS, TRAINING_STEPS, cut_short, demo, fitting_samples
from minidiff.runs.folder import Settings, open_pipeline
from minidiff.runtime.device import pick_dtype
from minidiff.training.config import TrainConfig
from minidiff.training.diffusion import DiffusionTraining


def check_pictures(out):
    samples = Image.open(out / "samples.png")
    assert samples.size == ((10 * 17 - 1) * 3, (10 * 17 - 1) * 3)
    assert Image.open(out / "forward.png").width > 500
    assert "The trained network" in (out / "explore.html").read_text(encoding="utf-8")
    gif = Image.open(out / "denoise.gif")
    assert gif.n_frames > 10
    assert gif.info["loop"] == 0
    assert open_pipeline(out).class_names == tuple("0123456789")


def test_the_demo_trains_samples_measures_and_draws(tmp_path, capsys):
    config = TrainConfig(steps=200, channels=(24, 48), guidance_scale=3.0, pictures=0)
    rows = demo(tmp_path, config, torch.device("cpu"), samples=200, engine="torch")
    assert [row.sampler for row in rows] == list(STEPS)
    # chance is 10 %, and a few seconds of training suffice for more
    assert all(row.scores.accuracy > 0.4 for row in rows)
    out = capsys.readouterr().out
    assert out.startswith("device: cpu")
    assert "engine torch, " in out
    for name in ("DDPM", "DDIM", "DPM-Solver++", "real, held out", "real, training"):
        assert name in out
    assert all(line in out for line in MEANING)
    assert out.index("mnist.png") < out.index("drawing and scoring")
    assert Image.open(tmp_path / "mnist.png").size == ((10 * 29 - 1) * 2, (2 * 29 - 1) * 2)
    check_pictures(tmp_path)
    main(["check", str(tmp_path)])  # whose result depends on the seconds of training
    found = capsys.readouterr().out
    assert "ok   data: " in found
    assert " samples: " in found


def test_a_slow_machine_scores_fewer_samples_and_says_so(capsys):
    assert fitting_samples(75) == 500
    assert not capsys.readouterr().out
    assert fitting_samples(400) == 200
    assert "200 samples of each sampler are scored instead of 500" in capsys.readouterr().out


def test_the_demo_refuses_a_number_of_samples_that_it_cannot_score(tmp_path, capsys):
    config = TrainConfig(steps=1)
    for number in ("5", "20000"):
        with pytest.raises(SystemExit):
            main(["demo", "--samples", number, "--out", str(tmp_path / "demo")])
        assert f"--samples: must be in 192..10000, got {number}" in capsys.readouterr().err
        with pytest.raises(InvalidArgument, match=f"samples must be in 192..10000, got {number}"):
            demo(tmp_path / "demo", config, torch.device("cpu"), samples=int(number))
    assert not (tmp_path / "demo").exists()


def test_an_engine_that_is_not_there_is_refused_before_the_demo_trains(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("minidiff.engines.backends.is_installed", lambda *names: False)
    assert main(["demo", "--engine", "openvino", "--out", str(tmp_path / "demo")]) == 2
    assert 'pip install "minidiff[openvino]"' in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_demo_cannot_be_resumed(tmp_path, capsys):
    config = TrainConfig(steps=1, pictures=0)
    Settings("demo", config, {"name": "digits"}, {"name": "digits"}, "cpu").write(tmp_path)
    assert main(["train", "--resume", str(tmp_path)]) == 1
    assert "is a run of minidiff demo, not of minidiff train" in capsys.readouterr().err


@pytest.mark.parametrize("budget", [{"steps": 1400}, {"minutes": 5}])
def test_ctrl_c_ends_the_training_of_a_demo_but_not_the_demo(budget, capsys):
    training = DiffusionTraining(
        TrainConfig(channels=(4, 4), pictures=0, **budget), load("digits"), torch.device("cpu")
    )
    training.budget.step, training.budget.elapsed = 30, 2.0
    training.agreed_stop = signal.SIGINT
    cut_short(training)
    assert training.budget.fraction_done == 1
    assert "stopped at step 30" in capsys.readouterr().out
    training.agreed_stop = signal.SIGTERM
    with pytest.raises(Stopped):
        cut_short(training)


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


@pytest.mark.parametrize(
    ("flags", "steps", "minutes"), [([], TRAINING_STEPS, None), (["--minutes", "2"], None, 2.0)]
)
def test_the_demo_has_a_budget_in_steps_unless_minutes_are_given(
    flags, steps, minutes, tmp_path, monkeypatch
):
    given = []
    monkeypatch.setattr("minidiff.lab.demo.demo", lambda out, config, *_: given.append(config))
    assert main(["demo", "--out", str(tmp_path), *flags]) == 0
    assert [(config.steps, config.minutes) for config in given] == [(steps, minutes)]


def training_after(step: int, seconds: float, **budget) -> DiffusionTraining:
    config = TrainConfig(channels=(4, 4), pictures=0, **budget)
    training = DiffusionTraining(config, load("digits"), torch.device("cpu"))
    training.budget.step, training.budget.elapsed = step, seconds
    cut_short(training)
    return training


def test_a_demo_on_a_fast_machine_takes_all_its_steps(capsys):
    assert training_after(1300, 70.0, steps=1400).budget.steps == 1400
    assert training_after(1400, 75.0, steps=1400).budget.fraction_done == 1
    assert not capsys.readouterr().out


def test_a_demo_on_a_slow_machine_ends_at_its_cap_and_prints_what_is_missing(capsys):
    training = training_after(70, 61.0, steps=1400)
    assert training.budget.steps == int(CAP * 70 / 61)  # the learning rate falls to zero there
    assert not capsys.readouterr().out
    training.budget.step, training.budget.elapsed = 690, CAP
    cut_short(training)
    assert training.budget.fraction_done == 1
    assert "trained 690 of 1400 steps" in capsys.readouterr().out


def test_the_speed_of_the_first_seconds_does_not_shorten_a_demo():
    assert training_after(1, 20.0, steps=1400).budget.steps == 1400


def test_a_demo_in_minutes_has_no_cap():
    assert training_after(1, CAP + 1, minutes=30).budget.steps is None
