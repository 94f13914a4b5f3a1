"""A finished run is made longer, a run begins with a given model, and its data may be moved."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from programs import assert_same_training, rows, tensors

from minidiff import Pipeline
from minidiff.cli import main
from minidiff.data import load
from minidiff.errors import CheckpointError, InvalidArgument, Stopped
from minidiff.runs import autoencoder, diffusion
from minidiff.runs.folder import CONFIG, read_settings
from minidiff.runs.run import longer
from minidiff.runtime import files
from minidiff.training.config import TrainConfig, VAEConfig
from minidiff.training.progress import learning_rate

TINY = TrainConfig(steps=8, channels=(4, 4), batch_size=4, pictures=0)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder, random_bytes = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    folder.mkdir()
    for i in range(11):
        pixels = random_bytes.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    diffusion.train_into(out, TINY, load(photos), load={"name": str(photos)})
    return out


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


# --- a longer budget -------------------------------------------------------------------------


@pytest.mark.parametrize("amount", ["+4", 12])
def test_a_lengthened_run_follows_the_learning_rate_of_the_longer_one(run, photos, amount):
    printed, before = [], rows(run)
    diffusion.resume(run, load(photos), print_line=printed.append, steps=amount)
    after = rows(run)
    assert after[:8] == before  # nothing that was done changes
    longest = TrainConfig(steps=12, channels=(4, 4))
    assert [row["learning_rate"] for row in after[8:]] == [
        learning_rate(longest, step / 12) for step in range(9, 13)
    ]
    assert [row["images"] for row in after] == [4 * step for step in range(1, 13)]
    rate = f"{learning_rate(longest, 8 / 12):.2g}"
    assert printed[0].startswith(f"from 8 to 12 steps; the learning rate is {rate} at step 8")
    settings = read_settings(run, "train")
    assert settings.config.steps == 12
    assert settings.lengthened == ({"at_step": 8, "steps": 8},)


def test_a_lengthened_run_that_is_interrupted_ends_in_the_same_bits(
    run, photos, tmp_path, monkeypatch
):
    whole = shutil.copytree(run, tmp_path / "whole")
    diffusion.resume(whole, load(photos), steps="+8")
    with monkeypatch.context() as patch:
        inner = diffusion.train

        def train(config, data, device, on_log_row, picture, *, after_step, **others):
            def stopping(training):
                training.agreed_stop = 15 if training.budget.step == 11 else 0
                after_step(training)

            return inner(config, data, device, on_log_row, picture, after_step=stopping, **others)

        patch.setattr(diffusion, "train", train)
        with pytest.raises(Stopped, match="saved at step 11"):
            diffusion.resume(run, load(photos), steps="+8")
    diffusion.resume(run, load(photos))  # the budget is that of the longer run by now
    assert_same_training(whole, run)


def test_a_run_is_lengthened_twice(run, photos):
    for _ in range(2):
        diffusion.resume(run, load(photos), steps="+2")
    assert len(rows(run)) == 12
    assert [change["steps"] for change in read_settings(run, "train").lengthened] == [8, 10]


def test_minutes_are_added_to_minutes():
    config = TrainConfig(minutes=3)
    spent = {"minutes": 3.02, "steps": 500}
    assert longer(config, spent, {"minutes": "+10", "steps": None}).minutes == 13
    assert longer(config, spent, {"minutes": 4.5, "steps": None}).minutes == 4.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 8}, "steps must be more than the 8 that the run has taken, got 8"),
        ({"steps": 3}, "steps must be more than the 8 that the run has taken, got 3"),
        ({"steps": "+0"}, r"steps must be a number, or a text such as '\+10'.*got '\+0'"),
        ({"steps": "+-4"}, r"got '\+-4'"),
        ({"steps": "12"}, "got '12'"),
        ({"steps": "+x"}, r"got '\+x'"),
        ({"steps": 12.5}, "steps must be a whole number in 1..1000000000000, got 12.5"),
        ({"steps": [12]}, r"steps must be a whole number in 1..1000000000000, got \[12\]"),
        ({"minutes": 5}, "minutes must be left out: the budget of the run is 8 steps; got 5"),
        ({"minutes": 5, "steps": 12}, "minutes must be left out"),
    ],
)
def test_a_budget_that_makes_nothing_longer_is_refused_and_the_run_stays(
    run, photos, given, message
):
    before = (run / CONFIG).read_bytes()
    with pytest.raises(InvalidArgument, match=message):
        diffusion.resume(run, load(photos), **given)
    assert (run / CONFIG).read_bytes() == before


@pytest.mark.parametrize("minutes", ["+nan", "+inf", float("nan"), 3.0, "+"])
def test_minutes_that_make_nothing_longer_are_refused(minutes):
    with pytest.raises(InvalidArgument, match=r"^minutes must be"):
        longer(TrainConfig(minutes=3), {"minutes": 3.02, "steps": 500},
               {"minutes": minutes, "steps": None})  # fmt: skip


def test_the_command_line_lengthens_a_run(run, capsys):
    assert main(["train", "--resume", str(run), "--steps", "+2"]) == 0
    assert "from 8 to 10 steps" in capsys.readouterr().out
    assert main(["train", "--resume", str(run), "--steps", "5"]) == 2
    assert "steps must be more than the 10" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--minutes", "+1"]) == 2
    assert "minutes must be left out" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--batch-size", "4"]) == 2
    assert "leave out --batch-size" in capsys.readouterr().err


def test_a_new_run_has_no_budget_to_add_to(tmp_path, capsys):
    call = ["train", "--data", "digits", "--steps", "+4", "--out", str(tmp_path / "run")]
    assert main(call) == 2
    assert "steps must be a whole number in 1..1000000000000, got '+4'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_autoencoder_is_trained_longer(tmp_path, photos):
    out, data = tmp_path / "run", load(photos)
    config = VAEConfig(steps=2, channels=(4, 4), batch_size=4, adversarial_start=0.9)
    autoencoder.train_vae_into(out, config, data, data)
    autoencoder.resume(out, data, data, steps="+1")
    assert len(rows(out)) == 3


# --- a given model ---------------------------------------------------------------------------


def test_a_run_begins_with_the_weights_of_a_model(run, photos, tmp_path):
    out = tmp_path / "second"
    call = ["train", "--init", str(run), "--data", str(photos), "--steps", "1", "--pictures", "0",
            "--learning-rate", "0", "--out", str(out)]  # fmt: skip
    assert main(call) == 0
    one, other = (tensors(folder / "model" / WEIGHTS) for folder in (run, out))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert main(["train", "--resume", str(out), "--steps", "+1"]) == 0
    assert len(rows(out)) == 2


def test_a_shipped_model_is_trained_on_by_its_name(tmp_path, capsys):
    call = ["train", "--init", "mnist", "--data", "digits", "--steps", "1"]
    assert main([*call, "--out", str(tmp_path / "run")]) == 2
    assert "data must be of shape (1, 28, 28), as the start has it" in capsys.readouterr().err


def test_a_run_that_began_with_a_model_needs_the_same_weights(run, photos, tmp_path):
    start = Pipeline.from_pretrained(run / "model")
    out, data = tmp_path / "second", load(photos)
    config = TrainConfig(steps=1, channels=(4, 4), batch_size=4, pictures=0)
    diffusion.train_into(out, config, data, start=start)
    with torch.no_grad():
        start.unet.conv_in.weight[0, 0, 0, 0] += 1
    with pytest.raises(CheckpointError, match="the weights of its start have changed"):
        diffusion.resume(out, data, start=start)
    with pytest.raises(CheckpointError, match="was trained from a start, which must be given"):
        diffusion.resume(out, data)
    with pytest.raises(CheckpointError, match="was trained from fresh weights"):
        diffusion.resume(run, data, start=start)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init", "nix"], "nix: no such folder"),
        (["--channels", "4,8"], "channels must be (4, 4), as in the start, or be left out"),
        (["--prediction-type", "epsilon"], "prediction_type must be 'v_prediction'"),
        (["--data", "digits"], "data must be of shape (1, 8, 8), as the start has it"),
        (["--init", "digits-text"], "data must be of shape (3, 32, 32)"),
    ],
)
def test_what_does_not_fit_a_given_model_is_named(run, photos, tmp_path, capsys, flags, message):
    call = ["train", "--init", str(run), "--data", str(photos), "--steps", "1", *flags]
    assert main([*call, "--out", str(tmp_path / "new")]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# --- moved data ------------------------------------------------------------------------------


def test_data_that_were_moved_are_known_by_their_pixels(run, photos, tmp_path, capsys):
    moved = shutil.copytree(photos, tmp_path / "elsewhere" / "pictures")
    whole = shutil.copytree(run, tmp_path / "whole")
    assert main(["train", "--resume", str(whole), "--steps", "+2"]) == 0
    call = ["train", "--resume", str(run), "--data", str(moved), "--steps", "+2"]
    assert main(call) == 0
    assert_same_training(whole, run)
    assert read_settings(run, "train").data["name"] == str(moved)
    assert main(["train", "--resume", str(run), "--steps", "+1"]) == 0  # finds them there

    Image.new("L", (8, 8), 7).save(moved / "03.png")
    assert main(["train", "--resume", str(run), "--data", str(moved)]) == 1
    assert "the pixels of its data have changed since it began" in capsys.readouterr().err


def test_only_places_of_files_can_be_given_to_a_resumed_run(run, tmp_path, capsys):
    for flag, how in (("--data-dir", "without it"), ("--vae", "without it"),
                      ("--init", "without it")):  # fmt: skip
        assert main(["train", "--resume", str(run), flag, str(tmp_path)]) == 2
        assert f"leave out {flag}: the run began {how}" in capsys.readouterr().err


def test_a_run_of_an_older_version_knows_no_moved_data(run, photos):
    known = files.read_json(run / CONFIG)
    del known["data"]["digests"]
    files.write_json(run / CONFIG, known)
    with pytest.raises(CheckpointError, match="kept no digest to know moved data by"):
        diffusion.resume(run, load(photos), load={"name": str(photos)})


@pytest.mark.parametrize("data", ["digits", 5, None])
def test_what_is_no_data_set_is_refused_by_runs(run, data, tmp_path):
    with pytest.raises(InvalidArgument, match="data must be a data set"):
        diffusion.resume(run, data)
    with pytest.raises(InvalidArgument, match="data must be a data set"):
        diffusion.train_into(tmp_path / "new", TINY, data)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("lengthened", [5, "x", {"a": 1}])
def test_a_damaged_history_of_budgets_is_refused(run, photos, lengthened):
    files.write_json(run / CONFIG, files.read_json(run / CONFIG) | {"lengthened": lengthened})
    with pytest.raises(CheckpointError, match="lengthened must be a list"):
        diffusion.resume(run, load(photos))
