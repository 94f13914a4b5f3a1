"""Runs of adapters: a folder with what was learned, resumed bit for bit, used on the base."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_text_model import small_text_model

from minidiff.adapters import CustomDiffusion, DreamBooth, LoRA, TextualInversion, examples
from minidiff.adapters.files import DENSE, LORA, WORDS
from minidiff.adapters.prior import FILE
from minidiff.cli import main
from minidiff.errors import CheckpointError
from minidiff.pipeline import Pipeline
from minidiff.runs import diffusion
from minidiff.runs.autosave import Saving
from minidiff.training.config import TrainConfig

CONFIG = TrainConfig(steps=4, batch_size=4, pictures=0, learning_rate=1e-2)
EVERY = [LoRA(rank=2, text_rank=2, prior=2), TextualInversion(vectors=2), DreamBooth(prior=2),
         CustomDiffusion(prior=2)]  # fmt: skip


@pytest.fixture(scope="module")
def base() -> Pipeline:
    return small_text_model()


@pytest.fixture(scope="module")
def hearts():
    return examples.load("hearts", 4)


class Killed(Exception):
    """Ends a run where a kill would."""


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder; the order of a header's metadata differs from file to file."""
    paths = sorted(folder.rglob("*.safetensors"))
    return {f"{p.name}/{n}": tensor for p in paths for n, tensor in load_file(p).items()}


@pytest.mark.parametrize("learner", EVERY, ids=lambda own: own.name)
def test_a_killed_run_resumes_bit_for_bit_and_holds_only_what_is_trained(
    learner, base, hearts, tmp_path, monkeypatch
):
    whole = diffusion.train_into(tmp_path / "whole", CONFIG, hearts, start=base, learner=learner)
    step = diffusion.DiffusionTraining.step

    def killed(self):
        if self.budget.step == 3:
            raise Killed
        step(self)

    monkeypatch.setattr(diffusion.DiffusionTraining, "step", killed)
    with pytest.raises(Killed):
        diffusion.train_into(
            tmp_path / "cut", CONFIG, hearts, start=base, learner=learner, saving=Saving(2)
        )
    monkeypatch.setattr(diffusion.DiffusionTraining, "step", step)
    (snapshot,) = (tmp_path / "cut" / "checkpoints").glob("step-*")
    kept = sum(tensor.numel() for tensor in load_file(snapshot / "weights.safetensors").values())
    pipe = diffusion.resume(
        tmp_path / "cut", hearts, start=base, learner=learner, print_line=lambda _: None
    )
    cut, uncut = (tensors(tmp_path / name / "adapter") for name in ("cut", "whole"))
    assert cut.keys() == uncut.keys()
    assert all(torch.equal(cut[name], uncut[name]) for name in cut)
    adapter = pipe.stack.adapters[learner.name][0]
    numbers = sum(p.numel() for p in adapter.change.parameters())
    assert kept == numbers + sum(rows.numel() for rows in adapter.words.values())
    assert not (tmp_path / "cut" / "model").exists()
    drawn = [
        p(["a red heart"], seed=0, output_type="pt", progress=False).images
        for p in (whole, pipe, base_with(base, tmp_path / "cut"))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.allclose(drawn[0], drawn[2], atol=1e-6)


def base_with(base: Pipeline, path: Path) -> Pipeline:
    import copy

    return copy.copy(base).load_adapter(path)


def test_a_finished_run_is_read_again_and_a_damaged_prior_is_refused(base, hearts, tmp_path):
    run, learner = tmp_path / "run", EVERY[0]
    first = diffusion.train_into(run, CONFIG, hearts, start=base, learner=learner)
    lines: list[str] = []
    again = diffusion.resume(run, hearts, start=base, learner=learner, print_line=lines.append)
    assert "already finished" in lines[-1]
    assert again.adapters == first.adapters
    content = load_file(run / FILE)
    content["images"][0, 0, 0, 0] += 1
    save_file(content, run / FILE, {"sha256": "0"})
    with pytest.raises(CheckpointError, match="SHA-256"):
        diffusion.resume(
            run, hearts, start=base, learner=learner, steps="+1", print_line=lines.append
        )


def test_another_start_or_rank_is_refused_at_resume(base, hearts, tmp_path):
    run = tmp_path / "run"
    diffusion.train_into(run, CONFIG, hearts, start=base, learner=LoRA(rank=2, prior=0))
    with pytest.raises(CheckpointError, match="has shape"):
        diffusion.resume(
            run, hearts, start=base, learner=LoRA(rank=3, prior=0), steps="+1",
            print_line=lambda _: None,
        )  # fmt: skip
    with pytest.raises(CheckpointError, match="holds an adapter; sample its model with --adapter"):
        diffusion.open_pipeline(run)


def test_the_command_line_learns_resumes_and_samples(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base.save_pretrained("model")
    train = ["train", "--init", "model", "--data", "hearts", "--steps", "2", "--batch-size", "4"]
    train += ["--pictures", "0"]
    lora = ["--learn", "lora", "--rank", "2", "--targets", "attention,convolution", "--prior", "2"]
    assert main([*train, *lora, "--out", "heart"]) == 0
    assert "minidiff sample model --adapter heart" in capsys.readouterr().out.replace(
        str(tmp_path) + "/", ""
    )
    stored = json.loads(Path("heart/config.json").read_text())
    assert stored["load"]["learn"] == {
        "what": "lora", "rank": 2, "targets": ["attention", "convolution"], "prior": 2,
    }  # fmt: skip
    assert stored["train"]["learning_rate"] == LoRA.defaults["learning_rate"]
    assert main(["train", "--resume", "heart", "--steps", "3"]) == 0
    assert {path.name for path in Path("heart/adapter").iterdir()} == {LORA, WORDS}
    assert main([*train, "--learn", "custom", "--word", "heart", "--prior", "0", "--out", "c"]) == 0
    assert {path.name for path in Path("c/adapter").iterdir()} == {DENSE, WORDS}
    sample = ["sample", "model", "a red heart on a blue background", "--num", "2"]
    for adapters in (["heart"], ["heart:0.5"], ["c"]):
        named = [word for path in adapters for word in ("--adapter", path)]
        assert main([*sample, *named, "--png", "out.png"]) == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--rank", "8"], "--rank is an option of --learn, which is missing"),
        (["--learn", "word", "--rank", "8"], "rank is an option of --learn lora, not of word"),
        (["--learn", "lora", "--rank", "0"], "rank must be in 1"),
        (["--learn", "lora", "--word", "red"], "word must be new to the model, which knows 'red'"),
    ],
)
def test_bad_options_are_one_line(words, text, capsys):
    command = ["train", "--init", "digits-text", "--data", "hearts", "--minutes", "1", "--out", "x"]
    assert main([*command, *words]) == 2
    assert text in capsys.readouterr().err
    assert main(["train", "--learn", "lora", "--data", "hearts", "--out", "x"]) == 2
    assert "--learn lora needs a model to change: --init MODEL" in capsys.readouterr().err


def test_a_bad_adapter_is_one_line(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base.save_pretrained("model")
    for adapter, code, text in (
        ("nothing", 1, "no such file or folder"),
        ("model:much", 2, "--adapter must be PATH or PATH:SCALE"),
        ("model:inf", 2, "scale must be in"),
        ("model", 1, "no adapter; looked for"),
    ):
        assert main(["sample", "model", "a red 7", "--adapter", adapter]) == code
        assert text in capsys.readouterr().err
