"""One run on several processes: the batch and weights of one process; one of them writes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from programs import finished, rows, started_together, tensors

from minidiff.data import load
from minidiff.errors import InvalidArgument
from minidiff.runs import diffusion, snapshot
from minidiff.runtime.distributed import World, launched, local, own_device, rank
from minidiff.text.conditioning import ClassLabels
from minidiff.training.batches import Batches
from minidiff.training.config import TrainConfig
from minidiff.training.diffusion import DiffusionTraining
from minidiff.training.learner import Learner

CALL = ["--data", "digits", "--channels", "8,8", "--batch-size", "14", "--final-batch-size", "20",
        "--pictures", "0", "--dtype", "float32", "--stable-target", "9",
        "--autoguidance", "2", "--weaker-at", "0.3"]  # fmt: skip


def call(out: Path, *others: str) -> list[str]:
    return ["train", *CALL, "--out", str(out), *others]


def together(k: int, arguments: list[str], folder: Path) -> list[str]:
    """Run k processes to their end and return the output of each."""
    logs = [folder / f"output-{i}" for i in range(k)]
    processes = started_together(k, arguments, logs)
    for process in processes:
        process.join(200)
    outputs = [log.read_text() for log in logs]
    assert [process.exitcode for process in processes] == [0] * k, outputs
    return outputs


def largest_difference(first: Path, second: Path) -> float:
    """Return the largest difference between the weights, averages and losses of two runs."""
    last = [snapshot.snapshots(out)[-1] for out in (first, second)]
    assert last[0].name == last[1].name
    gaps = []
    for name in (snapshot.WEIGHTS, snapshot.AVERAGE, "weaker.safetensors"):
        one, other = (tensors(folder / name) for folder in last)
        assert one.keys() == other.keys()
        gaps += [float((one[key] - other[key]).abs().max()) for key in one]
    logs = [rows(out) for out in (first, second)]
    assert [row["images"] for row in logs[0]] == [row["images"] for row in logs[1]]
    gaps += [abs(a["loss"] - b["loss"]) for a, b in zip(*logs, strict=True)]
    return max(gaps)


def test_two_processes_equal_one_with_the_same_batch_and_one_of_them_writes(tmp_path):
    one, two, halves = (tmp_path / name for name in ("one", "two", "halves"))
    assert finished(call(one, "--steps", "12"), tmp_path / "output") == 0
    outputs = together(2, call(two, "--steps", "12"), tmp_path)
    assert largest_difference(one, two) < 1e-6
    assert "wrote" in outputs[0]
    assert outputs[1] == ""
    # Only the order of the sum differs: one process that adds two halves gives equal bits.
    assert finished(call(halves, "--steps", "12", "--accumulate", "2"), tmp_path / "output") == 0
    assert largest_difference(two, halves) == 0


class Third(World):
    """The middle one of three processes, without the other two."""

    rank, size = 1, 3


def test_every_process_takes_its_part_of_one_batch():
    config, data = TrainConfig(steps=1), load("digits")
    learner = Learner(torch.nn.Identity(), ClassLabels(10))

    def batch(part):
        return Batches(
            config, data, learner, config.objective(), lambda x0: x0, part, torch.device("cpu")
        ).take(5, 10)

    whole, middle = batch(World().part), batch(Third().part)
    assert middle.size == whole.size == 10
    assert torch.equal(middle.z, whole.z[3:6])
    assert torch.equal(middle.eps, whole.eps[3:6])
    assert torch.equal(middle.labels, whole.labels[3:6])
    assert (middle.levels.sigma == whole.levels.sigma[3:6]).all()


def test_a_batch_that_leaves_a_process_without_an_image_is_refused():
    config = TrainConfig(steps=1, batch_size=5, accumulate=2, channels=(8, 8))
    with pytest.raises(InvalidArgument, match="batch_size must be at least 6"):
        DiffusionTraining(config, load("digits"), torch.device("cpu"), world=Third())


def test_muon_is_refused_where_the_weights_are_sharded():
    class Sharded(Third):
        splits = True

    config = TrainConfig(steps=1, batch_size=6, channels=(8, 8), optimizer="muon")
    with pytest.raises(InvalidArgument, match="optimizer must be 'adamw' where the weights are"):
        DiffusionTraining(config, load("digits"), torch.device("cpu"), world=Sharded())


def test_rank_and_device_come_from_the_variables_of_torchrun(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not launched()
    assert rank() == 0
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert launched()
    assert rank() == 3
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "3")
    assert own_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(InvalidArgument, match="device must be cuda for several processes"):
        own_device(torch.device("cuda:1"))


def test_shard_alone_is_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="shard is for several processes: torchrun"):
        diffusion.train_into(tmp_path, TrainConfig(steps=1), load("digits"), shard=True)
    assert local([torch.ones(2)])[0].tolist() == [1, 1]


@pytest.mark.slow
def test_sharded_weights_train_sample_and_resume_like_whole_ones(tmp_path):
    one, shared, pictures = tmp_path / "one", tmp_path / "shared", ("--pictures", "2")
    steps = ("--steps", "12", "--accumulate", "2", "--save-every", "5", "--keep-last", "3")
    assert finished(call(one, *steps, *pictures), tmp_path / "output") == 0
    together(2, call(shared, *steps, *pictures, "--shard"), tmp_path)
    assert largest_difference(one, shared) < 1e-6
    assert (one / "samples.png").is_file()
    assert (shared / "samples-000006.png").is_file()
    for k in (3, 1):
        drop_last_snapshot(shared)
        resumed = ["train", "--resume", str(shared)]
        if k == 1:
            assert finished(resumed, tmp_path / "output") == 0
        else:
            together(k, resumed, tmp_path)
        assert largest_difference(one, shared) < 1e-6


def drop_last_snapshot(out: Path) -> None:
    """Delete the last snapshot."""
    for file in (last := snapshot.snapshots(out)[-1]).iterdir():
        file.unlink()
    last.rmdir()


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    logs = [tmp_path / f"output-{i}" for i in range(3)]
    processes = started_together(3, call(out, "--steps", "60"), logs)
    wait_for_rows(out, 5)
    os.kill(processes[2].pid, signal.SIGTERM)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [143] * 3
    step = int(logs[0].read_text().split("at step ")[-1].split(";")[0])
    assert step == int(snapshot.snapshots(out)[-1].name.removeprefix("step-"))
    assert len(rows(out)) == step
    assert logs[1].read_text() == logs[2].read_text() == ""
    together(2, ["train", "--resume", str(out)], tmp_path)
    assert finished(call(whole, "--steps", "60"), tmp_path / "output") == 0
    assert largest_difference(whole, out) < 1e-5


def wait_for_rows(out: Path, n: int) -> None:
    """Wait until the log of a run has n rows."""
    deadline = time.monotonic() + 120
    while not (
        (out / diffusion.LOG).is_file() and (out / diffusion.LOG).read_bytes().count(b"\n") >= n
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_torchrun_ends_with_a_clear_message_when_a_process_is_killed(tmp_path):
    out, log = tmp_path / "run", tmp_path / "output"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--master_addr", "127.0.0.1",
                "--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint",
                "127.0.0.1:0", "--nproc_per_node"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        torchrun = subprocess.Popen(
            [*launcher, "2", "-m", "minidiff", *call(out, "--steps", "300", "--save-every", "5")],
            stdout=file, stderr=file, env=environment,
        )  # fmt: skip
        wait_for_rows(out, 4)  # a row every three steps
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert torchrun.wait(120) != 0
    assert "minidiff: a process of the run was lost (" in log.read_text()
    snapshot.verify(snapshot.snapshots(out)[-1])
    with log.open("w") as file:
        code = subprocess.run(
            [*launcher, "1", "-m", "minidiff", "train", "--resume", str(out)],
            stdout=file, stderr=file, env=environment, timeout=200,
        ).returncode  # fmt: skip
    assert code == 0
    assert "going on from step" in log.read_text()
