"""The field guide and its wall agree with the planted bugs, at their real strength."""

import re
from pathlib import Path

import pytest
import torch

from minidiff import teach
from minidiff.lab.doctor import FIELD_GUIDE
from minidiff.schedulers import DDIMScheduler, DDPMScheduler
from minidiff.teach import guide, ring, wall
from minidiff.teach.__main__ import main as command

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / FIELD_GUIDE).read_text(encoding="utf-8")


def drawn(kind, **options):
    return ring.judge(ring.sampled(kind(**ring.OPTIONS, **options)))


def test_right_samplers_reach_the_data():
    for kind in (DDPMScheduler, DDIMScheduler):
        verdict = drawn(kind, clip_sample=False, compat="exact")
        assert verdict.near > 0.985
        assert verdict.modes == 8
        assert verdict.radius == pytest.approx(2**0.5, abs=0.02)
    truth = ring.judge(ring.TRUTH.sample(20_000, torch.Generator().manual_seed(0)))
    assert truth.near == pytest.approx(1 - torch.tensor(-4.5).exp().item(), abs=0.003)  # 3σ in 2-D


# The figures of the catalogue, which the field guide repeats.
@pytest.mark.parametrize(
    ("name", "near", "radius", "spread"),
    [
        ("B3", 0.969, 1.41, 0.109),
        ("B9", 0.999, 1.38, 0.036),
        ("B14", 0.916, 1.16, None),
        ("B4", 0.899, 1.28, None),
        ("B11", 0.992, 1.41, None),
    ],
)
def test_a_planted_sampler_has_the_symptoms_that_the_guide_gives(name, near, radius, spread):
    verdict = drawn(teach.planted(name))
    assert verdict.near == pytest.approx(near, abs=0.01)
    assert verdict.radius == pytest.approx(radius, abs=0.03)
    assert verdict.modes == (4 if name == "B4" else 8)
    assert spread is None or verdict.spread == pytest.approx(spread, abs=0.005)
    number = f"{near:.1%}".replace("%", " %")
    assert number in teach.BUGS[name].seen or name == "B14"


def test_the_repaired_samplers_reach_the_data():
    for name in ("B3", "B9", "B14", "B11"):
        assert drawn(teach.BUGS[name].exercise.solution).near > 0.97


def test_conditioning_on_the_step_before_changes_no_measure():
    def verdict(shift):
        scheduler = DDIMScheduler(**ring.OPTIONS, clip_sample=False, compat="exact")
        scheduler.set_timesteps(50)
        levels = {t: scheduler.level(max(t - shift, 0)) for t in scheduler.grid}
        x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for t in scheduler.grid:
            out = ring.TRUTH.denoise(x, levels[t])
            x = scheduler.step(out, t, x).prev_sample
        return ring.judge(x)

    right, shifted = verdict(0), verdict(1)
    assert shifted.near == pytest.approx(right.near, abs=0.005)
    assert shifted.spread == pytest.approx(right.spread, abs=0.005)


def test_the_guide_holds_the_table_that_the_command_prints(capsys):
    assert command(["--guide"]) == 0
    assert capsys.readouterr().out.strip() in GUIDE
    assert guide.table() in GUIDE


def test_every_group_of_pictures_has_a_section_and_every_bug_a_row():
    sections = re.findall(r"^## (.+)$", GUIDE, re.M)
    assert [title for title in sections if title in guide.LOOKS.values()] == [*guide.LOOKS.values()]
    for bug in teach.BUGS.values():
        assert bug.look in guide.LOOKS
        assert re.search(rf"\({bug.name}\)|\b{bug.name}\b", GUIDE.split("## All planted bugs")[0])


def test_a_row_of_the_wall_differs_from_the_right_one(monkeypatch):
    monkeypatch.setattr(wall, "ROWS", [wall.ROWS[0], wall.ROWS[-1]])
    monkeypatch.setattr(wall, "STEPS", 4)
    (_, right), (label, thin) = wall.pictures()
    assert label.startswith("B15")
    assert right.shape == thin.shape == (10, 28, 28)
    assert thin.mean() < right.mean()


def test_the_wall_is_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(wall, "ROWS", wall.ROWS[:2])
    monkeypatch.setattr(wall, "STEPS", 2)
    assert command(["--wall", str(tmp_path / "wall.png")]) == 0
    assert (tmp_path / "wall.png").read_bytes().startswith(b"\x89PNG")


def test_a_wall_that_cannot_be_written_is_refused_in_a_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(wall, "ROWS", wall.ROWS[:1])
    monkeypatch.setattr(wall, "STEPS", 2)
    assert command(["--wall", str(tmp_path)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_every_row_of_the_wall_is_drawn():
    rows = dict(wall.pictures())
    assert len(rows) == len(wall.ROWS)
    right = rows["right (DDIM)"].astype(float)
    for label, digits in rows.items():
        if not label.startswith("right"):
            assert abs(digits.astype(float) - right).mean() > 0, label
