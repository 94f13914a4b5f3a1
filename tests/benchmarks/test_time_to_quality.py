"""The benchmark that compares minidiff with its peers, as far as it runs without their packages."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from minidiff import data
from minidiff.data import ImageData
from minidiff.errors import CheckpointError
from minidiff.metrics import Evaluator, load_classifier
from minidiff.training.config import LoopConfig
from minidiff.training.progress import Budget

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import time_to_quality

    return time_to_quality


def part_of(split: str) -> ImageData:
    """Return four hundred of the embedded digits."""
    digits = data.load("digits", split)
    return ImageData("digits", digits.images[:400], digits.labels[:400], digits.class_names)


def row(contender: str, form: str, rate: float, seconds: float, fd: float) -> dict:
    return {
        "contender": contender, "form": form, "learning_rate": rate, "minutes": 10.0, "seed": 0,
        "dtype": "float32", "machine": "any", "seconds": seconds, "fd": fd,
    }  # fmt: skip


def test_snapshots_are_evenly_spaced_and_saving_them_is_not_counted(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("minidiff.training.progress.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(bench, "write_tensors", lambda *_: clock.__setitem__(0, clock[0] + 1000))
    budget, keep = Budget(LoopConfig(minutes=1)), bench.Snapshots(tmp_path, 3, {})
    while budget.fraction_done < 1:
        clock[0] += 50 if budget.step == 3 else 7
        budget.tick(budget.now())
        keep(budget, 64 * budget.step, lambda: torch.nn.Linear(2, 3))
    rows = bench.rows_of(tmp_path / bench.LOG)
    assert [(row["seconds"], row["steps"], row["images"]) for row in rows] == [
        (21, 3, 192),
        (71, 4, 256),  # two were due at once
    ]
    assert [row["file"] for row in rows] == [
        "snapshot-001.safetensors",
        "snapshot-003.safetensors",
    ]
    assert rows[0]["parameters"] == 9


# One of two steps is at a level with guidance, which evaluates both networks.
@pytest.mark.parametrize(("form", "evaluations"), [("preset", 2), ("autoguided", 3)])
def test_a_run_is_saved_and_scored_once(
    form: str, evaluations: int, bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peers import ours

    monkeypatch.setattr(ours, "_PRESET", replace(ours._PRESET, final_batch_size=None))
    run, table = tmp_path / "run", tmp_path / "scores.jsonl"
    job = bench.Job("minidiff", form, 0.1 / 60, 3e-3, 0, "float32")
    cpu, images, net = torch.device("cpu"), part_of("train"), load_classifier("digits")
    bench.train(job, images, cpu, run, 2)
    rows = bench.rows_of(run / bench.LOG)
    assert rows[-1]["seconds"] >= 0.1
    assert rows[-1]["images"] == rows[-1]["steps"] * ours._PRESET.batch_size

    evaluator = Evaluator.of(images, part_of("test"), net)
    first = bench.score([run], evaluator, cpu, table, num=200, steps=2)
    written = table.read_text()
    assert [row["evaluations"] for row in first] == [evaluations] * len(rows)
    assert bench.score([run], evaluator, cpu, table, num=200, steps=2) == first
    assert table.read_text() == written

    changed = {**json.loads((run / bench.RUN).read_text()), "contender": "nobody"}
    (run / bench.RUN).write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="contender must be one of minidiff, "):
        bench.score([run], evaluator, cpu, table, num=200, steps=2)
    with pytest.raises(CheckpointError, match="not an empty folder"):
        bench.train(job, images, cpu, run, 2)


def test_a_damaged_snapshot_is_skipped_with_a_warning(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, images = tmp_path / "run", part_of("train")
    job = bench.Job("minidiff", "preset", 0.1 / 60, 3e-3, 0, "float32")
    bench.train(job, images, torch.device("cpu"), run, 1)
    (snapshot,) = run.glob("*.safetensors")
    snapshot.write_bytes(snapshot.read_bytes()[:-4])
    evaluator = Evaluator.of(images, part_of("test"), load_classifier("digits"))
    found = bench.score([run], evaluator, torch.device("cpu"), tmp_path / "s", num=200, steps=2)
    assert found == []
    assert f"{snapshot}: not a readable safetensors file" in capsys.readouterr().err


def test_the_best_run_counts_and_the_table_marks_a_goal_that_was_not_reached(
    bench: ModuleType,
) -> None:
    rows = [
        row("minidiff", "preset", 3e-3, 60, 20.0),
        row("minidiff", "preset", 3e-3, 120, 15.0),
        row("minidiff", "preset", 3e-3, 180, 9.0),
        row("minidiff", "autoguided", 3e-3, 180, 13.0),
        row("azula", "tuned", 1e-3, 600, 14.0),
        row("azula", "tuned", 1e-3, 300, 30.0),
        row("azula", "tuned", 2e-3, 300, 14.9),
        row("azula", "tuned", 2e-3, 600, 16.0),
        row("azula", "tuned", 5e-4, 600, 1e9),
        row("azula", "shipped", 3e-4, 600, 80.0),
    ]
    ours, slower, tuned, shipped = bench.results(rows)
    assert (ours.minutes, slower.minutes) == (2.0, 3.0)
    assert (tuned.minutes, tuned.learning_rate) == (5.0, 2e-3)
    assert (shipped.minutes, shipped.budget, shipped.fd) == (None, 10.0, 80.0)
    _, last, first, second, third = bench.lines([slower, ours, tuned, shipped])
    assert last.endswith("3.00")
    assert first.endswith("2.00")
    assert second.endswith("2.5 × minidiff")
    assert "not in 10.0, then FD 80.0 ‰" in third
    assert third.endswith("more than 5.0 × minidiff")


def test_an_incomplete_last_row_is_skipped(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert bench.rows_of(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(CheckpointError, match="line 2 is not JSON"):
        bench.rows_of(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody"], "contender must be one of minidiff, "),
        (["minidiff", "--form", "tuned"], "form of minidiff must be one of preset"),
        (["minidiff", "--threads", "0"], "threads must be at least 1"),
        (["minidiff", "--snapshots", "0"], "snapshots must be in 1..999"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(
    bench: ModuleType,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "run"
    assert bench.main(["train", *arguments, "--minutes", "1", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_peer_that_is_not_installed_is_named(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "azula.denoise", None)
    monkeypatch.delitem(sys.modules, "peers.azula_unet", raising=False)
    arguments = ["azula", "--form", "tuned", "--minutes", "1", "--out", str(tmp_path / "run")]
    assert bench.main(["train", *arguments]) == 2
    assert "pip install azula==0.11.1" in capsys.readouterr().err
