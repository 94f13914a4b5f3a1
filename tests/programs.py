"""Runs of the command line in separate processes, and comparison of their folders.

Processes are forked from a server that has imported torch already.
"""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import socket
import time
from pathlib import Path

import torch

from minidiff.cli import main
from minidiff.runs import diffusion, snapshot
from minidiff.runtime.tensors import read_headers, read_tensor

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["minidiff.cli", "minidiff.runs.diffusion", "torch._dynamo"])


def _program(arguments: list[str], log: str, limit: int | None, environment: dict) -> None:
    """Run the command line in this process, with its output in a file."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = main(arguments)
    raise SystemExit(code)


def started(arguments: list[str], log: Path, limit: int | None = None, **environment: str):
    """Start a process that runs the command line; `limit` bounds the bytes of a file."""
    process = SERVER.Process(target=_program, args=(arguments, str(log), limit, environment))
    process.start()
    return process


def finished(arguments: list[str], log: Path, limit: int | None = None) -> int:
    """Run the command line to its end and return the exit code."""
    process = started(arguments, log, limit)
    process.join(120)
    return process.exitcode


def killed_and_resumed(
    kills: int, seed: int, arguments: list[str], out: Path, output: Path, steps: int
) -> None:
    """Run a training to its end, killing and resuming it at random moments.

    Args:
        kills: number of kills.
        seed: seed of the moments.
        arguments: command line of the training.
        out: folder of the run.
        output: file for the printed output.
        steps: rows of the complete log.
    """
    command, chance = arguments[0], random.Random(seed)
    for _ in range(kills):
        process = started(arguments, output)
        reach = chance.randrange(0, steps + 3)
        deadline = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < deadline:
            log = out / diffusion.LOG
            if log.is_file() and log.read_bytes().count(b"\n") >= reach:
                break
            time.sleep(0.001)
        time.sleep(chance.random() * 0.1)  # during a step, a write, or after the end
        process.kill()
        process.join()
        arguments = (
            [command, "--resume", str(out)] if (out / diffusion.CONFIG).is_file() else arguments
        )
    assert finished(arguments, output) == 0, output.read_text()
    assert not list((out / snapshot.FOLDER).glob(".*"))  # no temporary files are left


def started_together(k: int, arguments: list[str], logs: list[Path]) -> list:
    """Start k processes of one run, with the variables that torchrun sets."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(k)}
    return [started(arguments, logs[i], RANK=str(i), LOCAL_RANK=str(i), **shared) for i in range(k)]


def rows(out: Path) -> list[dict]:
    """Return the log of a run without wall-clock times."""
    lines = [json.loads(line) for line in (out / diffusion.LOG).read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in lines]


def tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a safetensors file."""
    return {name: read_tensor(entry) for name, entry in read_headers([file]).items()}


def assert_same_training(first: Path, second: Path) -> None:
    """Compare the last snapshots of two runs, and their logs, bit for bit."""
    last = snapshot.snapshots(first)[-1].name
    assert snapshot.snapshots(second)[-1].name == last
    folders = [out / snapshot.FOLDER / last for out in (first, second)]
    names, others = (
        sorted(path.name for path in folder.glob("*.safetensors")) for folder in folders
    )
    assert names == others
    for name in names:
        one, other = (tensors(folder / name) for folder in folders)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    states = [json.loads((folder / snapshot.STATE).read_text()) for folder in folders]
    for state in states:  # wall-clock times
        del state["seconds"], state["log_bytes"], state["meter"]["reported_at"]
    assert states[0] == states[1]
    assert rows(first) == rows(second)
