"""Starts the command line in processes of their own, without importing torch for each."""

import contextlib
import json
import multiprocessing
import os
import resource
import socket
from pathlib import Path

import torch

from minidiff import run
from minidiff.cli import main
from minidiff.weights import headers, read_one

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["minidiff.cli", "minidiff.run", "torch._dynamo"])


def _program(arguments: list[str], log: str, limit: int | None, environment: dict) -> None:
    """What a process runs: the command line, its words in a file."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = main(arguments)
    raise SystemExit(code)


def started(arguments: list[str], log: Path, limit: int | None = None, **environment: str):
    """A process that runs the command line; `limit` is of the bytes in a file."""
    process = SERVER.Process(target=_program, args=(arguments, str(log), limit, environment))
    process.start()
    return process


def finished(arguments: list[str], log: Path, limit: int | None = None) -> int:
    """Run the command line to its end; returns the exit code."""
    process = started(arguments, log, limit)
    process.join(120)
    return process.exitcode


def started_together(k: int, arguments: list[str], logs: list[Path]) -> list:
    """k processes of one run, with the variables that torchrun would give them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(k)}
    return [started(arguments, logs[i], RANK=str(i), LOCAL_RANK=str(i), **shared) for i in range(k)]


def rows(out: Path) -> list[dict]:
    """The log of a run, without the seconds of the clock on the wall."""
    lines = [json.loads(line) for line in (out / run.LOG).read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in lines]


def tensors(file: Path) -> dict[str, torch.Tensor]:
    """All of a safetensors file."""
    return {name: read_one(entry) for name, entry in headers([file]).items()}
