"""A run never deletes files of others, and two processes never write to one run."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from minidiff.data import load
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.lab.demo import demo
from minidiff.runs import autoencoder, diffusion
from minidiff.runs.folder import open_pipeline, read_settings
from minidiff.runs.run import Run
from minidiff.runtime import files
from minidiff.training.config import TrainConfig, VAEConfig

FOREIGN = (
    ".modelscope/credentials",
    ".vault",
    ".samples.bak/one.png",
    ".config.json.bak",
    ".reconstructions",
    ".model.x1/model_index.json",
    "thesis.tex",
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": 5}, "config must be of type TrainConfig, got 5"),
        ({"data": "digits"}, "data must be a data set, .* got 'digits'"),
        ({"saving": 5}, "saving must be of type Saving, got 5"),
        ({"saving": {"save_every": 3}}, "saving must be of type Saving, got dict"),
        ({"load": 5}, "load must be of type Mapping, got 5"),
        ({"load": "digits"}, "load must be of type Mapping, got 'digits'"),
        (
            {"load": {"names": "digits"}},
            "load must be one of name, .* got 'names'; did you mean name",
        ),
        ({"load": {"split": "train"}}, "name of load must be a text, got None"),
        ({"load": {"name": 5}}, "name must be a text, got 5"),
        ({"start": "mnist"}, "start must be of type Pipeline, got 'mnist'"),
        ({"learner": 5}, "learner must be a function, got 5"),
    ],
)
def test_an_argument_of_another_type_is_refused_before_the_folder_exists(
    tmp_path, options, message
):
    given = {"config": TrainConfig(steps=1, pictures=0), "data": load("digits"), **options}
    with pytest.raises(InvalidArgument, match=message):
        diffusion.train_into(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def begin_training(out: Path) -> None:
    diffusion.train_into(out, TrainConfig(steps=1, pictures=0), load("digits"))


def begin_autoencoder(out: Path) -> None:
    autoencoder.train_vae_into(out, VAEConfig(steps=1), load("digits"), load("digits", "test"))


def begin_demo(out: Path) -> None:
    demo(out, TrainConfig(steps=1, pictures=0), torch.device("cpu"))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("begin", [begin_training, begin_autoencoder, begin_demo])
@pytest.mark.parametrize("names", [FOREIGN, FOREIGN[:1], (".config.json.bak",)])
def test_a_folder_with_anything_in_it_is_refused_and_keeps_every_file(tmp_path, begin, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"not an empty folder|not empty and not of"):
        begin(tmp_path)
    assert contents(tmp_path) == before


def test_resuming_a_run_deletes_only_its_own_temporary_files(tmp_path):
    out = tmp_path / "run"
    data = load("digits")
    config = TrainConfig(steps=2, pictures=0, channels=(8, 8))
    diffusion.train_into(out, config, data)
    shutil.rmtree(out / "model")  # as if it had been interrupted
    for name in FOREIGN:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("precious")
    left = out / f".samples.png.abc{files.TEMPORARY}"
    left.write_text("half a picture")
    diffusion.resume(out, data, print_line=lambda text: None)
    assert not left.exists()
    assert all((out / name).read_text() == "precious" for name in FOREIGN)


def test_a_run_in_use_is_refused_and_left_alone(tmp_path):
    out = tmp_path / "run"
    data = load("digits")
    diffusion.train_into(out, TrainConfig(steps=1, pictures=0, channels=(8, 8)), data)
    shutil.rmtree(out / "model")  # as if it had been interrupted
    half = out / f".model.abc{files.TEMPORARY}"
    half.mkdir()
    before = contents(out)
    with (
        Run(out, read_settings(out, "train"), print).kept(),  # another process is at it
        pytest.raises(CheckpointError, match="in use by another process"),
    ):
        half.mkdir()  # and is writing
        diffusion.resume(out, data, print_line=lambda text: None)
    assert contents(out) == before
    assert half.is_dir()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")
def test_a_folder_that_another_process_is_starting_in_is_refused(tmp_path):
    with (
        files.locked(tmp_path, wait=False),
        pytest.raises(CheckpointError, match="in use by another process"),
    ):
        begin_training(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_model_is_reported_as_interrupted(tmp_path):
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(CheckpointError, match="if it was interrupted, continue it"):
        open_pipeline(tmp_path)
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(CheckpointError, match="neither a run"):
        open_pipeline(tmp_path)
