"""A run that is killed, stopped, out of disk or damaged resumes as if never interrupted."""

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from programs import assert_same_training, finished, killed_and_resumed, rows, started, tensors

from minidiff.cli import main
from minidiff.data import load
from minidiff.errors import CheckpointError, Stopped, TrainingError
from minidiff.runs import diffusion, snapshot
from minidiff.runs.autosave import Saving
from minidiff.runtime import files
from minidiff.training.config import TrainConfig
from minidiff.training.diffusion import DiffusionTraining

STEPS = 24
GUIDANCE = "weaker.safetensors"
TINY = {"channels": (4, 4), "batch_size": 8, "pictures": 0, "dropout": 0.1,
        "autoguidance_scale": 2.0, "weaker_at": 0.1}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Twenty images: a batch of 8 crosses the end of an epoch in every third step."""
    folder, random_bytes = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    folder.mkdir()
    for i in range(20):
        pixels = random_bytes.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


def call(photos: Path, out: Path, *others: str) -> list[str]:
    return ["train", "--data", str(photos), "--out", str(out), "--steps", str(STEPS),
            "--channels", "4,4", "--batch-size", "8", "--pictures", "0", "--dropout", "0.1",
            "--save-every", "2", "--dtype", "float32", "--stable-target", "9",
            "--autoguidance", "2", "--weaker-at", "0.5", *others]  # fmt: skip


def assert_same_run(first: Path, second: Path) -> None:
    """Compare weights, average, optimizer, log and model, bit for bit."""
    assert_same_training(first, second)
    for part in ("unet", "weaker"):
        weights = Path(diffusion.MODEL) / part / "diffusion_pytorch_model.safetensors"
        assert (first / weights).read_bytes() == (second / weights).read_bytes()


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory) -> Path:
    """A run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert finished(call(photos, folder / "run"), folder / "printed") == 0
    return folder / "run"


def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_one_never_killed(
    photos, whole, tmp_path
):
    out = tmp_path / "run"
    killed_and_resumed(3, 1, call(photos, out), out, tmp_path / "printed", STEPS)
    assert_same_run(whole, out)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_a_run_killed_twenty_times_ends_bit_for_bit_as_one_never_killed(
    seed, photos, whole, tmp_path
):
    out = tmp_path / "run"
    killed_and_resumed(20, seed, call(photos, out), out, tmp_path / "printed", STEPS)
    assert_same_run(whole, out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_prints_one_line(number, photos, whole, tmp_path):
    out, printed = tmp_path / "run", tmp_path / "printed"
    process = started(call(photos, out), printed)
    while not ((out / diffusion.LOG).is_file() and rows_so_far(out) >= 3):
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    last = printed.read_text().splitlines()[-1]
    assert last.startswith(f"minidiff: stopped by {number.name} and saved at step ")
    assert f"minidiff train --resume {out}" in last
    step = int(last.split("at step ")[1].split(";")[0])
    assert snapshot.snapshots(out)[-1].name == f"step-{step:06d}"
    if number == signal.SIGINT:
        return
    assert finished(["train", "--resume", str(out)], printed) == 0
    assert_same_run(whole, out)


def rows_so_far(out: Path) -> int:
    return (out / diffusion.LOG).read_bytes().count(b"\n")


def test_a_second_interrupt_stops_at_once(monkeypatch, tmp_path):
    """The first is noted; the second raises KeyboardInterrupt in the middle of the step."""
    taken = []
    step = DiffusionTraining.step

    def pressed(self):
        step(self)
        os.kill(os.getpid(), signal.SIGINT)
        taken.append("once")
        os.kill(os.getpid(), signal.SIGINT)
        taken.append("not reached")

    monkeypatch.setattr(DiffusionTraining, "step", pressed)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        diffusion.train_into(tmp_path / "run", TrainConfig(steps=5, **TINY), load("digits"))
    assert taken == ["once"]
    assert signal.getsignal(signal.SIGINT) is before


# --- what a snapshot holds -------------------------------------------------------------------


def saved(folder: Path, training: DiffusionTraining) -> Path:
    return snapshot.write(folder, snapshot.content(training), 0)


class Ended(Exception):
    """Ends a run in a test as a crash would."""


def partly(out: Path, steps: int, monkeypatch, config: TrainConfig | None = None, **saving) -> None:
    """Train a run of ten steps that crashes after the given number."""
    step = DiffusionTraining.step

    def until(self):
        if self.budget.step == steps:
            raise Ended
        step(self)

    config = config or TrainConfig(steps=10, **TINY)
    with monkeypatch.context() as patch, pytest.raises(Ended):
        patch.setattr(DiffusionTraining, "step", until)
        diffusion.train_into(
            out, config, load("digits"), saving=Saving(**{"save_every": 1} | saving)
        )


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory) -> Path:
    """A run of ten steps that crashed after three snapshots."""
    out = tmp_path_factory.mktemp("crashed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        partly(out, 3, patch, keep_last=3)
    edit(out, load={"name": "digits"})
    return out


@pytest.fixture
def crash(crashed, tmp_path) -> Path:
    """A copy of that run, to be damaged."""
    return shutil.copytree(crashed, tmp_path / "run")


@pytest.mark.parametrize("name", [*snapshot.FILES, GUIDANCE])
@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_a_damaged_snapshot_is_skipped_and_named(name, how, crash):
    newest, earlier = snapshot.snapshots(crash)[:0:-1]
    path, printed = newest / name, []
    if how == "changed":
        damage(path)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    assert snapshot.newest(crash, printed.append) == earlier
    (line,) = printed
    assert line.startswith("skipped step-000003: ")
    assert name in line


def test_a_run_resumes_from_the_newest_intact_snapshot(crash, tmp_path):
    printed = []
    damage(snapshot.snapshots(crash)[-1] / snapshot.WEIGHTS)
    (snapshot.snapshots(crash)[-2] / snapshot.MANIFEST).write_text("{")
    diffusion.resume(crash, load("digits"), print_line=printed.append)
    assert [line.split(":")[0] for line in printed] == [
        "skipped step-000003", "skipped step-000002", "going on from step 1",
    ]  # fmt: skip
    diffusion.train_into(tmp_path / "whole", TrainConfig(steps=10, **TINY), load("digits"))
    assert_same_run(tmp_path / "whole", crash)


def test_a_snapshot_without_an_average_is_an_error(crash):
    for folder in snapshot.snapshots(crash):
        (folder / snapshot.AVERAGE).unlink()
        manifest = files.read_json(folder / snapshot.MANIFEST)
        del manifest[snapshot.AVERAGE]
        files.write_json(folder / snapshot.MANIFEST, manifest)
    with pytest.raises(CheckpointError, match=f"names no {snapshot.AVERAGE}"):
        snapshot.verify(folder)
    config, data = TrainConfig(steps=10, **TINY), load("digits")
    with pytest.raises(CheckpointError, match=rf"{snapshot.AVERAGE}: no such file"):
        snapshot.restore(folder, DiffusionTraining(config, data, torch.device("cpu")))
    with pytest.raises(CheckpointError, match="none of 3 snapshots is intact"):
        diffusion.resume(crash, data, print_line=lambda text: None)


def test_a_snapshot_without_the_guidance_network_of_its_time_is_an_error(crash):
    *_, folder = snapshot.snapshots(crash)
    (folder / GUIDANCE).unlink()
    manifest = files.read_json(folder / snapshot.MANIFEST)
    del manifest[GUIDANCE]
    files.write_json(folder / snapshot.MANIFEST, manifest)
    training = DiffusionTraining(TrainConfig(steps=10, **TINY), load("digits"), torch.device("cpu"))
    with pytest.raises(CheckpointError, match=rf"{GUIDANCE}: no such file"):
        snapshot.restore(folder, training)


def test_raw_and_averaged_weights_are_separate_and_saving_changes_neither(tmp_path):
    config, data = TrainConfig(steps=10, **TINY), load("digits")
    training = DiffusionTraining(config, data, torch.device("cpu"))
    for _ in range(4):
        training.step()
    live = {name: t.clone() for name, t in training.learner.state_dict().items()}
    pointers = [p.data_ptr() for p in training.learner.parameters()]
    folder = saved(tmp_path, training)
    assert pointers == [p.data_ptr() for p in training.learner.parameters()]
    now, raw = training.learner.state_dict(), tensors(folder / snapshot.WEIGHTS)
    averaged = tensors(folder / snapshot.AVERAGE)
    assert live.keys() == raw.keys() == averaged.keys()
    assert all(torch.equal(live[name], now[name]) and torch.equal(live[name], raw[name])
               for name in live)  # fmt: skip
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw)

    other = DiffusionTraining(config, data, torch.device("cpu"))
    snapshot.restore(folder, other)
    training.step()
    other.step()
    ours, theirs = training.average.model.state_dict(), other.average.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_snapshot_of_another_network_is_refused(tmp_path):
    data = load("digits")
    training = DiffusionTraining(TrainConfig(steps=10, **TINY), data, torch.device("cpu"))
    training.step()
    folder = saved(tmp_path, training)
    wide = DiffusionTraining(
        TrainConfig(steps=10, **TINY | {"channels": (8, 8)}), data, training.device
    )
    with pytest.raises(CheckpointError, match="has shape"):
        snapshot.restore(folder, wide)


def test_a_custom_optimizer_is_resumed(tmp_path):
    """Its state has numbers, tensors of other shapes and an option that is a tensor."""
    data, config = load("digits"), TrainConfig(steps=10, **TINY)

    def make(parameters):
        return torch.optim.NAdam(parameters, lr=torch.tensor(1e-3))

    trainings = [DiffusionTraining(config, data, torch.device("cpu"), make) for _ in range(2)]
    first, second = trainings
    for _ in range(2):
        first.step()
    snapshot.restore(saved(tmp_path, first), second)
    for training in trainings:
        training.step()
    assert all(map(torch.equal, first.learner.parameters(), second.learner.parameters()))
    first.optimizer.param_groups[0]["hook"] = print
    with pytest.raises(CheckpointError, match="the optimizer's hook cannot be saved"):
        saved(tmp_path, first)


def test_a_budget_in_minutes_resumes_with_the_remaining_seconds(tmp_path, monkeypatch):
    config = TrainConfig(minutes=0.05, **TINY | {"weaker_at": 0.9})  # not due by then
    training = DiffusionTraining(config, load("digits"), torch.device("cpu"))
    training.step()
    training.budget.elapsed = 1.5
    folder = saved(tmp_path, training)
    other = DiffusionTraining(config, load("digits"), torch.device("cpu"))
    snapshot.restore(folder, other)
    other.budget.start()
    assert other.budget.fraction_done == 0.5
    other.budget.tick(other.budget.now())
    assert other.budget.elapsed >= 1.5
    assert other.budget.step == 2


def test_a_run_without_a_snapshot_starts_again(tmp_path, monkeypatch):
    out, whole = tmp_path / "run", tmp_path / "whole"
    partly(out, 3, monkeypatch, save_every=100)
    assert not snapshot.snapshots(out)
    assert len(rows(out)) == 3
    diffusion.resume(out, load("digits"))
    diffusion.train_into(whole, TrainConfig(steps=10, **TINY), load("digits"))
    assert_same_run(whole, out)


def test_a_run_with_cuda_graphs_resumes_without_them_on_a_cpu(crash, tmp_path):
    printed = []
    config = files.read_json(crash / diffusion.CONFIG)["train"]
    edit(crash, train=config | {"cuda_graph": True})
    diffusion.resume(crash, load("digits"), device="cpu", print_line=printed.append)
    assert "without --cuda-graph" in printed[0]
    diffusion.train_into(tmp_path / "whole", TrainConfig(steps=10, **TINY), load("digits"))
    assert_same_run(tmp_path / "whole", crash)


def test_the_last_snapshots_and_the_best_are_kept(tmp_path, monkeypatch):
    out = tmp_path / "run"
    losses = {2: 0.1}  # the running loss of other steps is what it is, far above
    state = DiffusionTraining.row

    def row(self, last=False):
        found = state(self, last)
        self.meter.running = losses.get(self.budget.step, self.meter.running + 1)
        return found

    monkeypatch.setattr(DiffusionTraining, "row", row)
    partly(out, 8, monkeypatch, keep_last=3)
    names = [folder.name for folder in snapshot.snapshots(out)]
    assert names == ["step-000002", "step-000006", "step-000007", "step-000008"]


# --- a disk that is full, a folder that cannot be written --------------------------------------


def test_a_full_disk_leaves_the_earlier_snapshot_and_is_reported(photos, whole, tmp_path):
    """A limit on the size of files stands in for the disk: snapshots do not fit, the log does."""
    out, printed = tmp_path / "run", tmp_path / "printed"
    process = started(call(photos, out), printed)
    while not snapshot.snapshots(out):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    held = [folder.name for folder in snapshot.snapshots(out)]
    assert finished(["train", "--resume", str(out)], printed, limit=8192) == 1
    last = printed.read_text().splitlines()[-1]
    assert "cannot be written" in last
    assert f"of the run's snapshots {held[-1]} is intact" in last
    assert [folder.name for folder in snapshot.snapshots(out)] == held
    snapshot.verify(snapshot.snapshots(out)[-1])
    assert finished(["train", "--resume", str(out)], printed) == 0
    assert_same_run(whole, out)


def test_a_write_that_fails_at_any_file_leaves_the_earlier_snapshot(tmp_path, monkeypatch):
    data, config = load("digits"), TrainConfig(steps=10, **TINY)
    training = DiffusionTraining(config, data, torch.device("cpu"))
    training.step()
    first = saved(tmp_path, training)
    training.step()
    real = os.replace
    for failing in (*snapshot.FILES, snapshot.MANIFEST):

        def replace(source, target, failing=failing):
            if Path(target).name == failing:
                raise OSError(28, "No space left on device")
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(CheckpointError, match="No space left on device"):
            saved(tmp_path, training)
        assert os.listdir(tmp_path / snapshot.FOLDER) == [first.name]
        snapshot.verify(first)


def test_a_loss_that_is_not_finite_never_replaces_a_good_snapshot(tmp_path, monkeypatch):
    out, data = tmp_path / "run", load("digits")
    config = TrainConfig(steps=10, **TINY)
    step = DiffusionTraining.step

    def spoiled(self):
        if self.budget.step == 4:
            with torch.no_grad():
                next(self.learner.parameters()).fill_(float("nan"))
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionTraining, "step", spoiled)
        with pytest.raises(TrainingError, match="not finite at step 4"):
            diffusion.train_into(out, config, data, saving=Saving(save_every=1))
    assert snapshot.snapshots(out)[-1].name == "step-000004"
    diffusion.resume(out, data)
    diffusion.train_into(tmp_path / "whole", config, data)
    assert_same_run(tmp_path / "whole", out)


# --- the command line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda out: shutil.rmtree(out), 1, ": no such folder"),
        (lambda out: (out / diffusion.CONFIG).write_text("{}"), 1, "not the config of a run"),
        (lambda out: edit(out, train={"steps": 0}), 1, "not the config of a run (steps must be"),
        (lambda out: edit(out, data={"name": "digits", "images": 3}), 1, "was trained on"),
        (lambda out: edit(out, load={}), 1, "minidiff.runs.diffusion.resume"),
        (lambda out: edit(out, load={"image_size": 3}), 1, "not the config of a run (name of load"),
        (lambda out: edit(out, load={"name": "digits", "x": 1}), 1, "load must be one of name, s"),
        (lambda out: edit(out, load={"name": "moons"}), 1, "was trained on"),
        (lambda out: edit(out, command=["train"]), 1, "is a run of minidiff ['train']"),
    ],
)
def test_a_run_that_cannot_be_resumed_is_refused_in_one_line(change, code, message, crash, capsys):
    change(crash)
    assert main(["train", "--resume", str(crash)]) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def edit(out: Path, **parts) -> None:
    content = files.read_json(out / diffusion.CONFIG)
    files.write_json(out / diffusion.CONFIG, content | parts)


def test_the_rest_of_a_run_killed_at_its_first_file_is_not_a_run(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / f".{diffusion.CONFIG}.x7.minidiff-tmp").write_text("{")
    diffusion.train_into(out, TrainConfig(steps=1, **TINY), load("digits"))
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("flag", ["--image-size 9", "--download", "--out x", "--save-every 3",
                                  "--learn-variance", "--seed 1", "--preset mnist"])  # fmt: skip
def test_resume_takes_no_other_options(flag, tmp_path, capsys):
    assert main(["train", "--resume", str(tmp_path), *flag.split()]) == 2
    assert f"leave out {flag.split()[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"save_every": 0}, {"keep_last": 0}, {"keep_last": 1.5}])
def test_saving_is_checked(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        Saving(**options)


def test_stopping_is_distinguished_from_failing():
    assert Stopped("x", signal.SIGTERM).signal == 15
