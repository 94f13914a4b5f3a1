"""The examples of CONTRIBUTING.md run, one after the other, and it names what exists."""

import re
from pathlib import Path

import torch
from test_imports import FLOORS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.S | re.M)


def test_every_example_runs(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) > 2
    names: dict = {"__name__": "contributing"}
    with torch.random.fork_rng(devices=[]):
        for block in BLOCKS:
            line = TEXT[: TEXT.index(block)].count("\n")
            exec(compile("\n" * line + block, "CONTRIBUTING.md", "exec"), names)


def test_the_examples_are_short() -> None:
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line.strip()]) <= 24, block


def test_its_table_of_floors_is_the_one_that_is_tested() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", TEXT, re.M)
    table = {int(number): set(re.findall(r"`(\w+)`", names)) for number, names in rows}
    assert table == dict(enumerate(FLOORS))


def test_the_files_and_folders_that_it_names_exist() -> None:
    for path in re.findall(r"`((?:minidiff|tests|schedulers|training|lab)/[\w/.]*)`", TEXT):
        roots = (ROOT, ROOT / "minidiff")
        assert any((root / path).exists() for root in roots), path
