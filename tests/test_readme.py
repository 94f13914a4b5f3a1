"""What the README shows is what happens."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minidiff import PRESETS, train, trajectory
from minidiff.data import load

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_first_example_trains_saves_and_draws(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "train(" in b)
    short = replace(PRESETS["digits"].train, minutes=None, steps=3, pictures=0)
    monkeypatch.setitem(PRESETS, "digits", replace(PRESETS["digits"], train=short))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "model" / "model_index.json").is_file()
    assert [image.size for image in names["images"]] == [(16, 16)] * 3
    assert names["pipe"](num_images=1, num_inference_steps=2).images


def test_the_sampler_of_ones_own_has_the_order_it_says(capsys: pytest.CaptureFixture) -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "class " in b)
    exec(compile(block, "README.md", "exec"), {})
    order, header, *lines = capsys.readouterr().out.splitlines()
    claimed = float(re.search(r"# (\d\.\d+): of second order", block)[1])
    assert float(order) == pytest.approx(claimed, abs=0.01)
    assert header.split() == ["t", "A0", "B0", "B1"]
    assert len(lines) == 5


def test_the_sampler_of_ones_own_begins_anew_without_being_told() -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "class " in b)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    scheduler = names["AdamsBashforth"]()
    scheduler.set_timesteps(5)
    x, ends = torch.ones(2, 1, dtype=torch.float64), []
    for _ in range(2):
        for step in trajectory(lambda x, t: torch.tanh(x), scheduler, x):
            last = step.next_x
        ends.append(last)
    assert torch.equal(*ends)


def test_the_objective_of_ones_own_is_learnt_and_can_be_sampled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "objective=" in b)
    short = replace(PRESETS["digits"].train, minutes=None, steps=3, pictures=0)
    monkeypatch.setitem(PRESETS, "digits", replace(PRESETS["digits"], train=short))
    names = {"PRESETS": PRESETS, "load": load, "train": train}
    exec(compile(block, "README.md", "exec"), names)
    assert names["pipe"](num_images=1, num_inference_steps=2).images
    huber = short.objective(names["Huber"])
    nothing = torch.zeros(2, 1, 4, 4)  # of which the target is 0 as well
    levels = huber.levels(np.zeros(2)).on(nothing)
    for far, expected in ((0.1, 0.1**2 / 2), (3.0, 0.5 * (3.0 - 0.25))):  # δ·(|a| − δ/2)
        error = huber.error(nothing + far, nothing, nothing, nothing, levels)
        torch.testing.assert_close(error, torch.full((2,), expected))


def test_the_table_of_contents_names_what_exists() -> None:
    rows = re.findall(r"^\| `([\w/]+/)` \|", README, re.M)
    assert rows
    for folder in rows:
        assert (Path(__file__).parent.parent / folder).is_dir(), folder


def test_the_pictures_and_pages_it_links_to_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links
    for link in links:
        assert (Path(__file__).parent.parent / link).is_file(), link
