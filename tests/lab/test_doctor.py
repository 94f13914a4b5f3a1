"""The doctor fails each spoiled run by the right check, and passes a healthy one."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from minidiff import DDPMScheduler, Pipeline
from minidiff.cli import main
from minidiff.data import ImageData, load
from minidiff.errors import CheckpointError
from minidiff.lab.doctor import CHECKS, FIELD_GUIDE, Finding, _open, examine
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
    """Return images with a bright and a dark half, divided in four ways."""
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
def spoiled(healthy, tmp_path) -> Path:
    """A copy of the run, for a test to spoil."""
    return shutil.copytree(healthy, tmp_path / "run")


def found(path: Path, data: ImageData | None = None) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(path, data or shades())}


def failed(findings: dict[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if finding.good is False}


def edit(path: Path, **changes) -> None:
    files.write_json(path, json.loads(path.read_text()) | changes)


def test_a_healthy_run_passes_every_check(healthy):
    findings = found(healthy)
    assert list(findings) == NAMES
    assert {name: finding.good for name, finding in findings.items()} == dict.fromkeys(NAMES, True)


def look(name: str, path: Path, data: ImageData | None = None) -> Finding:
    """Return the finding of one check alone."""
    check = CHECKS[NAMES.index(name)]
    return check(_open(path, data or shades(), torch.device("cpu")))


def test_data_in_zero_to_one_fail(healthy):
    finding = look("data", healthy, shades(128, 255))
    assert finding.good is False
    assert "as in [0, 1]" in finding.advice


def test_data_without_contrast_fail(healthy):
    finding = look("data", healthy, shades(100, 104))
    assert finding.good is False
    assert "contrast" in finding.advice


@pytest.mark.parametrize("other", ["epsilon", "sample"])
def test_a_scheduler_with_another_prediction_type_than_the_network_fails(other, spoiled):
    edit(spoiled / diffusion.MODEL / "scheduler" / "scheduler_config.json", prediction_type=other)
    finding = look("prediction type", spoiled)
    assert finding.good is False
    assert "The network predicts v_prediction" in finding.advice
    finding = look("scheduler", spoiled)
    assert finding.good is False
    assert f"prediction_type is {other}, trained v_prediction" in finding.text
    if other == "epsilon":  # v taken for x0 is a blurred image, not noise
        assert look("samples", spoiled).good is False


def test_a_network_of_few_steps_with_similar_errors_for_every_type_does_not_fail(tmp_path):
    diffusion.train_into(tmp_path / "run", TrainConfig(**CONFIG | {"steps": 20}), shades())
    finding = look("prediction type", tmp_path / "run")
    assert finding.good or "too little is learnt to decide" in finding.advice


def test_a_model_of_another_shape_is_not_evaluated(spoiled):
    three = UNet(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        sample_size=8,
    )
    shutil.rmtree(spoiled / diffusion.MODEL)
    Pipeline(three, DDPMScheduler()).save_pretrained(spoiled / diffusion.MODEL)
    findings = found(spoiled)
    assert list(findings) == ["data", "shape"]
    assert findings["shape"].text == "the network takes (3, 8, 8), the data have (1, 8, 8)"
    assert failed(findings) == {"shape"}


def test_failures_that_may_follow_from_a_wrong_prediction_type_refer_to_it(spoiled):
    edit(
        spoiled / diffusion.MODEL / "scheduler" / "scheduler_config.json", prediction_type="epsilon"
    )
    findings = found(spoiled)
    assert {"scheduler", "prediction type", "samples"} <= failed(findings)
    for name in failed(findings) - {"scheduler", "prediction type"}:
        assert (
            findings[name].advice == "This may follow from the scheduler above: correct that first."
        )
    assert "was changed after training" in findings["scheduler"].advice
    assert "The network predicts v_prediction" in findings["prediction type"].advice


def test_a_schedule_with_signal_at_its_noisy_end_fails(spoiled):
    scheduler = spoiled / diffusion.MODEL / "scheduler" / "scheduler_config.json"
    edit(scheduler, beta_schedule="linear", beta_end=0.005)
    finding = look("start", spoiled)
    assert finding.good is False
    assert "was not trained on pure noise" in finding.advice


def test_too_few_steps_fail_with_a_perfect_network(spoiled):
    edit(spoiled / diffusion.MODEL / "model_index.json", num_inference_steps=1)
    finding = look("sampler", spoiled)
    assert finding.good is False
    assert "more steps" in finding.advice


def test_an_average_that_lags_behind_fails(spoiled):
    build(TrainConfig(**CONFIG), shades()).save_pretrained(spoiled / diffusion.MODEL)
    finding = look("average", spoiled)
    assert finding.good is False
    assert "lags behind" in finding.advice


def test_an_untrained_network_fails(spoiled):
    build(TrainConfig(**CONFIG), shades()).save_pretrained(spoiled / diffusion.MODEL)
    finding = look("loss by level", spoiled)
    assert finding.good is False
    assert "too short" in finding.advice
    assert look("prediction type", spoiled).good is None


@pytest.mark.parametrize("rate", [0.0, 1e-6])
def test_a_learning_rate_that_is_too_low_fails(rate, spoiled):
    config = files.read_json(spoiled / diffusion.CONFIG)
    edit(spoiled / diffusion.CONFIG, train=config["train"] | {"learning_rate": rate})
    finding = look("overfit", spoiled)
    assert finding.good is False
    assert "learning rate" in finding.advice


def test_the_network_lies_between_the_floor_and_the_optimum_by_pixel(healthy):
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
def test_runs_of_other_objectives_pass(options, tmp_path):
    out, data = tmp_path / "run", shades()
    diffusion.train_into(out, TrainConfig(**CONFIG | {"steps": 60} | options), data)
    for name in ("scheduler", "start", "prediction type", "overfit", "sampler"):
        assert look(name, out, data).good, look(name, out, data)


@pytest.mark.slow
def test_a_snapshot_alone_suffices_and_without_one_the_average_is_undecided(spoiled):
    shutil.rmtree(spoiled / diffusion.MODEL)
    assert not failed(found(spoiled))
    diffusion.resume(spoiled, shades(), print_line=lambda text: None)
    shutil.rmtree(spoiled / snapshot.FOLDER)
    assert look("average", spoiled).good is None
    shutil.rmtree(spoiled / diffusion.MODEL)
    with pytest.raises(CheckpointError, match="neither a model nor a snapshot"):
        found(spoiled)


def test_the_command_prints_every_check_and_fails_with_one_line(tmp_path, capsys):
    out = tmp_path / "run"
    diffusion.train_into(out, TrainConfig(steps=1, channels=(8, 8), batch_size=4, pictures=0),
                   load("digits"), load={"name": "digits"})  # fmt: skip
    capsys.readouterr()
    assert main(["check", str(out)]) == 1
    output = capsys.readouterr()
    assert [name for name in NAMES if f" {name}: " in output.out] == NAMES
    assert output.out.splitlines()[-1].endswith(FIELD_GUIDE)
    assert output.err.startswith(f"minidiff: {out}: ")
    assert "loss by level" in output.err
    assert output.err.count("\n") == 1
