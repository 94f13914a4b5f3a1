"""The doctor finds what is wrong, and nothing where nothing is."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from minidiff import DDPMScheduler, Pipeline
from minidiff.cli import main
from minidiff.data import ImageData, load
from minidiff.errors import CheckpointError
from minidiff.lab.doctor import CHECKS, Finding, _patient, examine
from minidiff.nn import UNet
from minidiff.runs import diffusion, snapshot
from minidiff.runtime import files
from minidiff.training.build import build
from minidiff.training.config import TrainConfig

NAMES = ["data", "shape", "scheduler", "start", "prediction type", "average", "loss by level",
         "overfit", "sampler", "samples"]  # fmt: skip
CONFIG = {"steps": 200, "channels": (8, 16), "batch_size": 16, "block": 1, "pictures": 0,
          "learning_rate": 4e-3, "guidance_scale": 1.0, "num_inference_steps": 15}  # fmt: skip


def shades(low: int = 0, high: int = 255) -> ImageData:
    """Pictures of one bright half and one dark half, at one of four edges."""
    generator = torch.Generator().manual_seed(0)
    side = torch.randint(4, (400,), generator=generator)
    bright = torch.randint(150, 256, (400, 1, 1), generator=generator)
    across = torch.arange(8).expand(400, 8, 8) < 4
    halves = torch.where((side % 2 == 0).view(-1, 1, 1), across, across.transpose(1, 2))
    halves = halves ^ (side > 1).view(-1, 1, 1)
    pixels = torch.where(halves, bright, 255 - bright) / 255 * (high - low) + low
    return ImageData("shades", pixels.round().to(torch.uint8)[:, None], side, tuple("abcd"))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("check") / "run"
    diffusion.train_into(out, TrainConfig(**CONFIG), shades())
    return out


@pytest.fixture
def ill(healthy, tmp_path) -> Path:
    """A copy, to be spoiled."""
    return shutil.copytree(healthy, tmp_path / "run")


def found(path: Path, data: ImageData | None = None) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(path, data or shades())}


def failed(findings: dict[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if finding.good is False}


def edit(path: Path, **changes) -> None:
    files.write_json(path, json.loads(path.read_text()) | changes)


def test_nothing_is_found_in_a_run_that_is_well(healthy):
    findings = found(healthy)
    assert list(findings) == NAMES
    assert {name: finding.good for name, finding in findings.items()} == dict.fromkeys(NAMES, True)


def look(name: str, path: Path, data: ImageData | None = None) -> Finding:
    """One check alone."""
    check = CHECKS[NAMES.index(name)]
    return check(_patient(path, data or shades(), torch.device("cpu")))


def test_data_that_are_not_scaled_to_both_sides_of_zero(healthy):
    finding = look("data", healthy, shades(128, 255))
    assert finding.good is False
    assert "as in [0, 1]" in finding.advice


def test_data_without_contrast(healthy):
    finding = look("data", healthy, shades(100, 104))
    assert finding.good is False
    assert "contrast" in finding.advice


@pytest.mark.parametrize("said", ["epsilon", "sample"])
def test_a_scheduler_that_reads_another_prediction_type(said, ill):
    edit(ill / diffusion.MODEL / "scheduler" / "scheduler_config.json", prediction_type=said)
    finding = look("prediction type", ill)
    assert finding.good is False
    assert "The network says v_prediction" in finding.advice
    finding = look("scheduler", ill)
    assert finding.good is False
    assert f"prediction_type is {said}, trained v_prediction" in finding.text
    if said == "epsilon":  # v read as x0 is a blurred picture, not noise
        assert look("samples", ill).good is False


def test_a_young_network_that_errs_alike_as_anything_is_not_said_to_say_something_else(tmp_path):
    diffusion.train_into(tmp_path / "run", TrainConfig(**CONFIG | {"steps": 20}), shades())
    finding = look("prediction type", tmp_path / "run")
    assert finding.good or "too little is learnt to tell" in finding.advice


def test_a_model_of_other_pictures_is_not_asked_anything(ill):
    three = UNet(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        sample_size=8,
    )
    shutil.rmtree(ill / diffusion.MODEL)
    Pipeline(three, DDPMScheduler()).save_pretrained(ill / diffusion.MODEL)
    findings = found(ill)
    assert list(findings) == ["data", "shape"]
    assert findings["shape"].text == "the model's network takes (3, 8, 8), the data give (1, 8, 8)"
    assert failed(findings) == {"shape"}


def test_what_follows_from_a_wrong_prediction_type_points_to_it(ill):
    edit(ill / diffusion.MODEL / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    findings = found(ill)
    assert {"scheduler", "prediction type", "samples"} <= failed(findings)
    for name in failed(findings) - {"scheduler", "prediction type"}:
        assert findings[name].advice == "This may follow from the scheduler above: mend that first."
    assert "was changed since" in findings["scheduler"].advice
    assert "The network says v_prediction" in findings["prediction type"].advice


def test_a_schedule_that_leaves_signal_at_its_end(ill):
    scheduler = ill / diffusion.MODEL / "scheduler" / "scheduler_config.json"
    edit(scheduler, beta_schedule="linear", beta_end=0.005)
    finding = look("start", ill)
    assert finding.good is False
    assert "never saw pure noise" in finding.advice


def test_too_few_steps_for_any_network(ill):
    edit(ill / diffusion.MODEL / "model_index.json", num_inference_steps=1)
    finding = look("sampler", ill)
    assert finding.good is False
    assert "more steps" in finding.advice


def test_an_average_that_lags_behind(ill):
    build(TrainConfig(**CONFIG), shades()).save_pretrained(ill / diffusion.MODEL)
    finding = look("average", ill)
    assert finding.good is False
    assert "lags behind" in finding.advice


def test_a_network_that_has_learnt_nothing(ill):
    build(TrainConfig(**CONFIG), shades()).save_pretrained(ill / diffusion.MODEL)
    finding = look("loss by level", ill)
    assert finding.good is False
    assert "too short" in finding.advice
    assert look("prediction type", ill).good is None


@pytest.mark.parametrize("rate", [0.0, 1e-6])
def test_a_rate_at_which_nothing_is_learnt(rate, ill):
    config = files.read_json(ill / diffusion.CONFIG)
    edit(ill / diffusion.CONFIG, train=config["train"] | {"learning_rate": rate})
    finding = look("overfit", ill)
    assert finding.good is False
    assert "learning rate" in finding.advice


def test_the_floor_lies_below_the_network_and_the_network_below_pixels(healthy):
    lines = look("loss by level", healthy).text.splitlines()[2:]
    assert len(lines) == 8
    for line in lines[2:-1]:
        _, network, pixels, floor = map(float, line.split())
        assert floor < network < pixels


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"prediction_type": "edm"}, {"prediction_type": "flow"},
    {"prediction_type": "epsilon", "learn_variance": True, "num_inference_steps": 50},
])  # fmt: skip
def test_other_objectives_are_understood(options, tmp_path):
    out, data = tmp_path / "run", shades()
    diffusion.train_into(out, TrainConfig(**CONFIG | {"steps": 60} | options), data)
    for name in ("scheduler", "start", "prediction type", "overfit", "sampler"):
        assert look(name, out, data).good, look(name, out, data)


@pytest.mark.slow
def test_a_snapshot_alone_is_enough_and_without_one_the_average_is_not_judged(ill):
    shutil.rmtree(ill / diffusion.MODEL)
    assert not failed(found(ill))
    diffusion.resume(ill, shades(), print_line=lambda text: None)
    shutil.rmtree(ill / snapshot.FOLDER)
    assert look("average", ill).good is None
    shutil.rmtree(ill / diffusion.MODEL)
    with pytest.raises(CheckpointError, match="neither a model nor a snapshot"):
        found(ill)


def test_the_command_prints_every_check_and_fails_with_one_line(tmp_path, capsys):
    out = tmp_path / "run"
    diffusion.train_into(out, TrainConfig(steps=1, channels=(8, 8), batch_size=4, pictures=0),
                   load("digits"), load={"name": "digits"})  # fmt: skip
    capsys.readouterr()
    assert main(["check", str(out)]) == 1
    said = capsys.readouterr()
    assert [name for name in NAMES if f" {name}: " in said.out] == NAMES
    assert said.err.startswith(f"minidiff: {out}: ")
    assert "loss by level" in said.err
    assert said.err.count("\n") == 1
