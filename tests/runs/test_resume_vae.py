"""A run of an autoencoder that is stopped, killed or damaged resumes as if never interrupted."""

import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from programs import assert_same_training, finished, killed_and_resumed, rows, tensors

from minidiff.cli import main
from minidiff.data import ImageData, load
from minidiff.errors import CheckpointError, InvalidArgument, Stopped, TrainingError
from minidiff.runs import autoencoder, diffusion, snapshot
from minidiff.runs.autosave import Saving
from minidiff.runs.folder import CONFIG, LOG
from minidiff.training.autoencoder import AutoencoderTraining
from minidiff.training.config import TrainConfig, VAEConfig

STEPS = 10
TINY = {"channels": (4,), "discriminator_channels": (4,), "batch_size": 6}
CONFIG_OF_ALL = VAEConfig(steps=STEPS, final_batch_size=12, **TINY)  # judged from step 5 on


def images(n: int, seed: int) -> ImageData:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)
    return ImageData("noise", torch.from_numpy(pixels), None, ())


DATA, HELD_OUT = images(20, 0), images(10, 1)  # a batch crosses the end of an epoch


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that was never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    autoencoder.train_vae_into(out, CONFIG_OF_ALL, DATA, HELD_OUT)
    return out


def assert_same_run(first: Path, second: Path) -> None:
    """Compare networks, average, optimizer, log and results, bit for bit."""
    assert_same_training(first, second)
    for name in ("vae/diffusion_pytorch_model.safetensors", "vae/config.json", autoencoder.PICTURE):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def signalled(monkeypatch, at: list[int], number: int = signal.SIGTERM) -> None:
    """Send the process a signal in the middle of each of these steps, once."""
    step, left = AutoencoderTraining.step, set(at)

    def interrupted(self):
        if self.budget.step in left:
            left.remove(self.budget.step)
            os.kill(os.getpid(), number)
        step(self)

    monkeypatch.setattr(AutoencoderTraining, "step", interrupted)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))]
)
def test_a_run_stopped_at_random_steps_ends_bit_for_bit_as_one_never_stopped(
    seed, whole, tmp_path, monkeypatch
):
    steps = sorted(random.Random(seed).sample(range(STEPS - 1), 3))
    signalled(monkeypatch, steps)
    out, printed = tmp_path / "run", []
    for again in range(len(steps)):
        with pytest.raises(Stopped, match=rf"saved at step {steps[again] + 1}; continue with: "):
            if again:
                autoencoder.resume(out, DATA, HELD_OUT, print_line=printed.append)
            else:
                autoencoder.train_vae_into(out, CONFIG_OF_ALL, DATA, HELD_OUT)
    autoencoder.resume(out, DATA, HELD_OUT, print_line=printed.append)
    assert printed == [f"going on from step {step + 1}" for step in steps]
    assert_same_run(whole, out)


def test_a_snapshot_holds_both_networks_and_the_average_of_the_one_that_is_kept(whole):
    folder = snapshot.snapshots(whole)[-1]
    weights, average = (tensors(folder / name) for name in (snapshot.WEIGHTS, snapshot.AVERAGE))
    assert {name.partition(".")[0] for name in weights} == {"vae", "judge"}
    assert {f"vae.{name}" for name in average} == {n for n in weights if n.startswith("vae.")}
    assert any(not torch.equal(average[name], weights[f"vae.{name}"]) for name in average)
    moments = tensors(folder / snapshot.OPTIMIZER)
    assert sum(name.endswith("exp_avg") for name in moments) == len(weights)


def test_a_run_resumes_from_the_newest_intact_snapshot(whole, tmp_path, monkeypatch):
    out, printed = tmp_path / "run", []
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        signalled(patch, [7])
        autoencoder.train_vae_into(out, CONFIG_OF_ALL, DATA, HELD_OUT, saving=Saving(3, 3))
    newest = snapshot.snapshots(out)[-1]
    with (newest / snapshot.OPTIMIZER).open("r+b") as file:
        file.truncate(100)
    autoencoder.resume(out, DATA, HELD_OUT, print_line=printed.append)
    assert len(printed) == 2
    assert printed[0].startswith("skipped step-000008: ")
    assert snapshot.OPTIMIZER in printed[0]
    assert printed[1] == "going on from step 6"
    assert_same_run(whole, out)


def test_a_loss_that_is_not_finite_never_replaces_a_good_snapshot(whole, tmp_path, monkeypatch):
    out, step = tmp_path / "run", AutoencoderTraining.step

    def spoiled(self):
        if self.budget.step == 8:
            with torch.no_grad():
                next(self.judge.parameters()).fill_(float("nan"))
        step(self)

    with (
        monkeypatch.context() as patch,
        pytest.raises(TrainingError, match="not finite at step 8"),
    ):
        patch.setattr(AutoencoderTraining, "step", spoiled)
        autoencoder.train_vae_into(out, CONFIG_OF_ALL, DATA, HELD_OUT, saving=Saving(4))
    assert snapshot.snapshots(out)[-1].name == "step-000008"
    assert not (out / "vae").exists()
    autoencoder.resume(out, DATA, HELD_OUT, print_line=lambda text: None)
    assert_same_run(whole, out)


# --- the command line ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Twenty-two images; two are held out."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    folder.mkdir()
    for i, picture in enumerate(images(22, 2).images):
        Image.fromarray(picture[0].numpy()).save(folder / f"{i:02}.png")
    return folder


def call(photos: Path, out: Path) -> list[str]:
    return ["train-vae", "--data", str(photos), "--out", str(out), "--steps", str(STEPS),
            "--channels", "4", "--discriminator-channels", "4", "--batch-size", "6",
            "--save-every", "2", "--dtype", "float32"]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_prints_in_one_line_how_to_resume(
    number, photos, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    signalled(monkeypatch, [4], number)
    assert main(call(photos, out)) == 128 + number
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"minidiff: stopped by {number.name} and saved at step 5; continue with: "
        f"minidiff train-vae --resume {out}"
    )
    if number == signal.SIGINT:
        return
    assert main(["train-vae", "--resume", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "going on from step 5"
    assert printed[1] == "2 held-out images"
    assert printed[-1].startswith(f"wrote {out}, see {out}/{autoencoder.PICTURE}. Next: ")
    assert len(rows(out)) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_twenty_times_ends_bit_for_bit_as_one_never_killed(seed, photos, tmp_path):
    out, never, printed = tmp_path / "run", tmp_path / "never", tmp_path / "printed"
    assert finished(call(photos, never), printed) == 0
    killed_and_resumed(20, seed, call(photos, out), out, printed, STEPS)
    assert_same_run(never, out)
    assert not list(out.glob(".*"))


@pytest.fixture(scope="module")
def diffusion_run(tmp_path_factory) -> Path:
    """The folder of a run of minidiff train."""
    out = tmp_path_factory.mktemp("diffusion") / "run"
    config = TrainConfig(steps=1, channels=(4, 4), batch_size=2, pictures=0)
    diffusion.train_into(out, config, load("digits"))
    return out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("train --resume VAE", 1, "is a run of minidiff train-vae, not of minidiff train"),
        ("check VAE", 1, "is a run of minidiff train-vae, not of minidiff train"),
        ("train-vae --resume DIFFUSION", 1, "is a run of minidiff train, not of minidiff train-v"),
        ("train-vae --resume VAE", 1, "use minidiff.runs.autoencoder.resume"),
        ("train-vae --resume NONE", 1, ": no such folder"),
        ("train-vae --resume VAE --out x", 2, "leave out --out"),
        ("train-vae --resume VAE --image-size 8", 2, "leave out --image-size"),
        ("train-vae --resume VAE --skip-nonfinite 0", 2, "leave out --skip-nonfinite"),
        ("train-vae --resume VAE --attention", 2, "leave out --attention"),
        ("train --resume DIFFUSION --guidance 0", 2, "leave out --guidance\n"),
        ("train-vae --data digits --steps 1 --out NONE --save-every 0", 2, "save_every must be"),
    ],
)
def test_a_run_that_cannot_be_resumed_is_refused_in_one_line(
    arguments, code, message, whole, diffusion_run, tmp_path, capsys
):
    places = {"VAE": whole, "DIFFUSION": diffusion_run, "NONE": tmp_path / "none"}
    assert main([str(places.get(word, word)) for word in arguments.split()]) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_other_images_are_refused(whole):
    with pytest.raises(CheckpointError, match=r"was trained on .*'images': 20.* the data are"):
        autoencoder.resume(whole, images(21, 0), HELD_OUT)


def test_several_processes_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidArgument, match="train-vae is for one process"):
        autoencoder.train_vae_into(tmp_path / "run", CONFIG_OF_ALL, DATA, HELD_OUT)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_writes_its_results_again(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(out / "vae")
    (out / f".{autoencoder.PICTURE}.x7.minidiff-tmp").write_text("half a picture")
    autoencoder.resume(out, DATA, HELD_OUT, print_line=lambda text: None)
    assert_same_run(whole, out)
    assert sorted(entry.name for entry in out.iterdir()) == sorted(
        ["checkpoints", CONFIG, LOG, "vae", autoencoder.PICTURE]
    )
