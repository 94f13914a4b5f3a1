"""The model card of a run: its command and options train the same model again."""

import re
import shlex
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from minidiff.cli import main
from minidiff.data import load
from minidiff.pipeline import card
from minidiff.runs import diffusion
from minidiff.runs.folder import MODEL, card_facts, read_settings
from minidiff.training.config import TrainConfig

FLAGS = ["--steps", "3", "--channels", "4,4", "--batch-size", "4", "--final-batch-size", "4"]
WEIGHTS = Path(MODEL) / "unet" / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--data", "digits", *FLAGS, "--seed", "5", "--out", str(out)]) == 0
    return out


def readme(run: Path) -> str:
    return (run / MODEL / card.FILE).read_text(encoding="utf-8")


def block(run: Path, language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", readme(run), re.S)[1]


def test_the_command_of_the_card_trains_the_same_weights(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(card.OPTIONS).write_text(block(run, "json"))
    command = shlex.split(block(run, "sh"))
    assert command.pop(0) == "minidiff"
    assert main(command) == 0
    assert read_settings("RUN", "train").config == read_settings(run, "train").config
    assert (Path("RUN") / WEIGHTS).read_bytes() == (run / WEIGHTS).read_bytes()
    assert readme(Path("RUN")) == readme(run)


def test_the_card_has_data_and_the_pictures_of_the_run(run):
    assert f"Data: {len(load('digits'))} images of `digits`." in readme(run)
    assert f"![Samples of the model]({card.PICTURE})" in readme(run)
    assert (run / MODEL / card.PICTURE).read_bytes() == (run / "samples.png").read_bytes()
    assert ModelCard.load(run / MODEL / card.FILE).data.library_name == "minidiff"


def test_the_card_names_no_path_of_this_machine(run, tmp_path):
    settings = read_settings(run, "train")
    places = {"name": "/home/me/photos", "data_dir": "/data", "image_size": 8, "vae": "/runs/vae",
              "init": "mnist"}  # fmt: skip
    command = card_facts(settings._replace(data=places)).command
    assert command == (
        "minidiff train --data DATA --data-dir DATA-DIR --image-size 8 --vae VAE --init mnist "
        "--config train.json --out RUN"
    )


def test_a_run_that_no_single_command_repeats_has_none(run):
    settings = read_settings(run, "train")
    assert card_facts(settings._replace(lengthened=({"at_step": 2, "steps": 2},))).command == ""
    assert card_facts(settings._replace(data={})).command == ""
    assert card_facts(settings._replace(command="demo")).command == ""
    assert card_facts(settings._replace(shard=True)).command.startswith("torchrun --nproc_per_node")


def test_a_resumed_run_keeps_the_card_of_someone_else(tmp_path):
    config = TrainConfig(steps=1, pictures=0, channels=(4, 4), batch_size=4)
    diffusion.train_into(tmp_path / "run", config, load("digits"))
    assert "Samples" not in readme(tmp_path / "run")
    (tmp_path / "run" / MODEL / card.FILE).write_text("my card")
    diffusion.resume(tmp_path / "run", load("digits"), print_line=lambda text: None, steps=2)
    assert readme(tmp_path / "run") == "my card"
