"""The number of threads: as given, or the faster of one and all, and never more than allowed."""

import json
import os

import pytest
import torch

from minidiff.cli import main, run_options
from minidiff.errors import InvalidArgument
from minidiff.runtime import device
from minidiff.runtime.device import THREADS_VARIABLE, choose_threads, describe


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Two threads, and the number of before at the end."""
    before = torch.get_num_threads()
    monkeypatch.delenv(THREADS_VARIABLE)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("few_are_faster", "chosen"), [(True, 1), (False, 2)])
def test_the_faster_number_is_kept(monkeypatch, few_are_faster, chosen):
    monkeypatch.setattr(device, "_is_faster", lambda few, many: few_are_faster)
    assert choose_threads() == torch.get_num_threads() == chosen


def test_the_trial_compares_the_times_of_the_two(monkeypatch):
    clock = iter(range(1000))

    def seconds() -> float:  # each reading is a second later, ten with two threads
        return next(clock) * (10 if torch.get_num_threads() == 2 else 1)

    monkeypatch.setattr(device.time, "perf_counter", seconds)
    assert choose_threads() == 1


def test_a_limit_of_torch_is_not_exceeded(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(device, "_is_faster", lambda few, many: pytest.fail("nothing to compare"))
    assert choose_threads() == 1


def test_flag_and_variable_name_the_number(monkeypatch):
    monkeypatch.setattr(device, "_is_faster", lambda few, many: pytest.fail("a number is given"))
    monkeypatch.setenv(THREADS_VARIABLE, "1")
    assert choose_threads() == 1
    assert choose_threads(2) == torch.get_num_threads() == 2


@pytest.mark.parametrize("given", ["0", "-1", "two", "1.5"])
def test_another_number_is_refused_in_one_line(monkeypatch, given, capsys, tmp_path):
    monkeypatch.setenv(THREADS_VARIABLE, given)
    with pytest.raises(InvalidArgument, match="threads must be"):
        choose_threads()
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 2
    assert capsys.readouterr().err.startswith("minidiff: threads must be")
    assert not (tmp_path / "demo").exists()


def test_fewer_threads_than_cores_are_printed_as_such(monkeypatch):
    monkeypatch.setattr(device, "available_cores", lambda: 4)
    cpu = torch.device("cpu")
    assert describe(cpu, torch.float32) == "cpu (2 of 4 threads), float32"
    monkeypatch.setattr(device, "available_cores", lambda: 2)
    assert describe(cpu, torch.float32) == "cpu (2 threads), float32"
    assert 1 <= device.available_cores() <= (os.cpu_count() or 1)


def test_a_run_continues_with_the_threads_that_it_started_with(tmp_path, monkeypatch, capsys):
    out, command = tmp_path / "run", ["train", "--data", "digits", "--channels", "8,8"]
    assert (
        main([*command, "--steps", "1", "--device", "cpu", "--threads", "2", "--out", str(out)])
        == 0
    )
    assert json.loads((out / "config.json").read_text())["threads"] == 2
    monkeypatch.setenv(THREADS_VARIABLE, "1")
    monkeypatch.setattr(run_options, "available_cores", lambda: 2)
    assert main(["train", "--resume", str(out)]) == 0
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(run_options, "available_cores", lambda: 1)
    capsys.readouterr()
    assert main(["train", "--resume", str(out)]) == 0
    assert torch.get_num_threads() == 1
    assert "started with 2 threads, here are 1 cores" in capsys.readouterr().out
