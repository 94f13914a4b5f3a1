"""TensorBoard shows what log.jsonl holds, every step once, and is imported only where requested."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from programs import rows

from minidiff.cli import main
from minidiff.data import load
from minidiff.errors import InvalidArgument, TrainingError
from minidiff.runs import autoencoder, diffusion
from minidiff.runs.autosave import Autosave, Saving
from minidiff.runs.folder import LOG, read_settings
from minidiff.runs.tensorboard import FOLDER
from minidiff.training.config import TrainConfig, VAEConfig

pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TINY = TrainConfig(steps=8, channels=(4, 4), batch_size=4, pictures=4)
VAE = VAEConfig(steps=4, channels=(4,), discriminator_channels=(4,), batch_size=4)
SAVING = Saving(save_every=3, log="tensorboard")


def events_of(run: Path) -> EventAccumulator:
    """What TensorBoard reads of a run."""
    events = EventAccumulator(str(run / FOLDER), size_guidance={"scalars": 0, "images": 0})
    return events.Reload()


def killed_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """End a training after a step as a kill does: without saving."""
    usual = Autosave.after_step

    def after_step(self, training):
        usual(self, training)
        if training.budget.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Autosave, "after_step", after_step)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """A run that saved at step 3, was killed after step 5, and was resumed."""
    out, data = tmp_path_factory.mktemp("runs") / "run", load("digits")
    with pytest.MonkeyPatch.context() as monkeypatch:
        killed_after(monkeypatch, 5)
        with pytest.raises(KeyboardInterrupt):
            diffusion.train_into(out, TINY, data, saving=SAVING)
    assert [event.step for event in events_of(out).Scalars("loss")] == [1, 2, 3, 4, 5]
    diffusion.resume(out, data, print_line=lambda text: None)
    return out


def test_a_killed_and_resumed_run_shows_every_row_of_its_log_once(resumed):
    events, log = events_of(resumed), rows(resumed)
    for tag in ("loss", "learning_rate"):
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert found == [(row["step"], float(np.float32(row[tag]))) for row in log]
    assert [row["step"] for row in log] == list(range(1, 9))


def test_images_per_second_are_those_between_two_rows(resumed):
    log = [json.loads(line) for line in (resumed / LOG).read_text().splitlines()]
    before = {row["step"]: row for row in log}
    found = {event.step: event.value for event in events_of(resumed).Scalars("images_per_second")}
    assert found.keys() == before.keys()
    for row in log[1:]:
        earlier = before[row["step"] - 1]
        if row["step"] != 4:  # where it was resumed, whose time began at the snapshot
            images, seconds = (row[name] - earlier[name] for name in ("images", "seconds"))
            assert found[row["step"]] == pytest.approx(images / seconds, rel=1e-5)


def test_the_pictures_along_the_way_appear_pixel_by_pixel(resumed):
    files = {int(path.stem[-6:]): path for path in resumed.glob("samples-*.png")}
    found = {event.step: event for event in events_of(resumed).Images("samples")}
    assert found.keys() == files.keys()
    assert len(files) == 3
    for step, event in found.items():
        with Image.open(io.BytesIO(event.encoded_image_string)) as there:
            assert np.array_equal(there, Image.open(files[step]).convert("RGB"))


def test_an_autoencoder_is_logged_in_the_same_way(tmp_path):
    data, out = load("digits"), tmp_path / "run"
    autoencoder.train_vae_into(out, VAE, data, load("digits", "test"), saving=SAVING)
    found = [event.value for event in events_of(out).Scalars("loss")]
    assert found == [float(np.float32(row["loss"])) for row in rows(out)]


def test_another_log_is_refused(tmp_path, capsys):
    with pytest.raises(InvalidArgument, match=r"log must be one of None, tensorboard; got 'wandb'"):
        Saving(log="wandb")
    words = ["train", "--data", "digits", "--out", str(tmp_path / "run"), "--log", "wandb"]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "must be one of tensorboard; got 'wandb'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "train-vae"])
def test_a_missing_library_is_refused_before_the_data_are_read(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    out, nowhere = tmp_path / "run", tmp_path / "nowhere"
    words = [command, "--data", str(nowhere), "--steps", "1", "--out", str(out)]
    assert main([*words, "--log", "tensorboard"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith('which is not installed: pip install "minidiff[tensorboard]"')
    assert not out.exists()


def test_a_run_that_needs_a_missing_library_is_not_resumed(resumed, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(diffusion, "train", None)
    with pytest.raises(InvalidArgument, match=r'pip install "minidiff\[tensorboard\]"'):
        diffusion.resume(resumed, load("digits"), print_line=lambda text: None)


def test_resuming_takes_the_log_of_the_run(resumed, capsys):
    assert main(["train", "--resume", str(resumed), "--log", "tensorboard"]) == 2
    assert "leave out --log" in capsys.readouterr().err
    assert read_settings(resumed, "train").saving.log == "tensorboard"


def test_a_run_without_the_option_imports_no_tensorboard(tmp_path):
    code = (
        "import sys; from minidiff.cli import main; main(sys.argv[1:]); "
        "print('tensorboard' in sys.modules)"
    )
    words = ["train", "--data", "digits", "--steps", "1", "--channels", "4,4", "--pictures", "0",
             "--batch-size", "4", "--final-batch-size", "4", "--out", str(tmp_path)]  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert out.stdout.splitlines()[-1] == "False", out.stderr
    assert not (tmp_path / FOLDER).exists()


def test_a_folder_that_cannot_be_written_is_named(resumed, tmp_path):
    run = shutil.copytree(resumed, tmp_path / "run")
    shutil.rmtree(run / FOLDER)
    (run / FOLDER).write_text("a file")
    with pytest.raises(TrainingError, match="cannot be written"):
        diffusion.resume(run, load("digits"), print_line=lambda text: None, steps=9)
