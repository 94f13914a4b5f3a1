"""`minidiff explain` prints a sampler's numbers, which are its step, and marks wrong ones."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from minidiff import shipped
from minidiff.cli import main
from minidiff.errors import InvalidArgument
from minidiff.lab.choose import SCHEDULES, Chosen, choose, like_schedule
from minidiff.lab.explain import described, equations_of, explain, moves_of
from minidiff.names import SAMPLERS
from minidiff.pipeline import Pipeline
from minidiff.schedule import CLEAN
from minidiff.schedulers import SCHEDULERS, DDIMScheduler, DDPMScheduler, Scheduler

CASES = [
    *((name, "squaredcos_cap_v2", {}) for name in SAMPLERS),
    *((name, "linear", {}) for name in (*SAMPLERS, "PNDM", "LCM")),
    *((name, "edm", {}) for name in ("euler", "dpm++", "dpm++3", "sde-dpm++")),
    *((name, "flow", {}) for name in ("euler", "dpm++", "dpm++2s", "unipc")),
    ("ddim", "scaled_linear", {"eta": 0.7}),
    ("ddim", "linear", {"rescale_betas_zero_snr": True}),
    ("dpm++", "linear", {"use_karras_sigmas": True, "solver_type": "heun"}),
    ("unipc", "linear", {"solver_order": 3}),
    ("ddpm", "linear", {"prediction_type": "sample"}),
    ("ddim", "linear", {"prediction_type": "epsilon"}),
]


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize(("name", "schedule", "options"), CASES, ids=str)
def test_a_row_is_the_step(name: str, schedule: str, options: dict, steps: int) -> None:
    chosen = choose(name, like_schedule(schedule), options)
    steps = max(steps, 4) if name == "PNDM" else steps  # begins with three steps of Runge-Kutta
    rows = explain(chosen, steps).rows
    scheduler, g = chosen.scheduler, torch.Generator().manual_seed(3)
    scheduler.set_timesteps(steps)
    xs = [torch.randn(9, generator=g, dtype=torch.float64) * scheduler.init_noise_sigma]
    clean = []
    for i, (t, row) in enumerate(zip(scheduler.grid, rows, strict=True)):
        out, z = torch.randn(2, 9, generator=g, dtype=torch.float64)
        scheduler.noise_source = lambda like, z=z: z
        new, x0 = scheduler.step(out, t, xs[i], return_dict=False, **chosen.step_options)
        clean.append(scheduler.split(out, xs[i], scheduler.levels[i])[0])
        if name != "LCM":  # returns f(x, t), which is c_skip·x + c_out·x̂0
            torch.testing.assert_close(x0, clean[-1])
        samples = sum(w * xs[i - k] for k, w in enumerate(row.x) if k <= i)
        mine = samples + sum(w * clean[i - k] for k, w in enumerate(row.x0) if k <= i) + row.z * z
        size = max(1.0, new.abs().max().item(), xs[i].abs().max().item())
        # the polynomial's integrals in DEIS lose a digit where σ/α spans 20,000 in one step
        tolerance = 1e-11 if name == "deis" else 1e-12
        assert (mine - new).abs().max() <= tolerance * size, i
        xs.append(new)


@pytest.mark.parametrize(("name", "schedule", "options"), CASES, ids=str)
def test_no_row_of_a_right_sampler_is_marked(name: str, schedule: str, options: dict) -> None:
    found = explain(choose(name, like_schedule(schedule), options), 12)
    assert found.wrong == []
    assert "≠" not in str(found)


@pytest.mark.parametrize("cls", SCHEDULERS.values(), ids=lambda cls: cls.__name__)
def test_every_paper_has_an_equation_a_source_and_a_place(cls: type[Scheduler]) -> None:
    idea, equations, source, code = described(cls)
    assert "=" in equations or "order" in equations
    assert "def " not in equations
    assert "arXiv:" in source
    assert idea.endswith(".")
    path, line = code.split(":")
    text = (Path(shipped.__file__).parents[1] / path).read_text(encoding="utf-8").splitlines()
    assert text[int(line) - 1].strip().startswith("def update(")


@pytest.mark.parametrize("name", ["ddim_inverse", "edm"])
def test_papers_that_share_an_update_have_an_equation_too(name: str) -> None:
    module = __import__(f"minidiff.schedulers.{name}", fromlist=["__doc__"])
    assert "=" in equations_of(module.__doc__)
    assert "Source" in module.__doc__


# --- bugs that people write, see the sources in the names ---------------------------------------


class Ancestral(Scheduler):
    """DDPM's step, right."""

    def update(self, x, x0, eps, now, nxt, noise):
        beta = 1 - (now.alpha / nxt.alpha) ** 2
        mean = nxt.alpha * beta / now.sigma**2 * x0
        mean = mean + now.alpha / nxt.alpha * nxt.sigma**2 / now.sigma**2 * x
        return mean + self.std(beta, now, nxt) * noise()

    def std(self, beta, now, nxt):
        return math.sqrt(beta) * nxt.sigma / now.sigma


class NoiseAtTheEnd(Ancestral):
    def std(self, beta, now, nxt):
        return super().std(beta, now, nxt) or math.sqrt(beta) / 50


class VarianceForStd(Ancestral):
    def std(self, beta, now, nxt):
        return super().std(beta, now, nxt) ** 2


class NoNoise(Ancestral):
    def std(self, beta, now, nxt):
        return 0.0


class OffByOneLevel(Ancestral):
    def update(self, x, x0, eps, now, nxt, noise):
        t = self.grid[self.levels.index(now)]
        return super().update(x, x0, eps, self.level(max(t - 20, 0)), nxt, noise)


class Reversed(Ancestral):
    def update(self, x, x0, eps, now, nxt, noise):
        i = self.levels.index(now)
        now, nxt = self.levels[-2 - i], self.levels[-3 - i] if i + 2 < len(self.levels) else CLEAN
        beta = max(1 - (now.alpha / nxt.alpha) ** 2, 0.0)
        mean = nxt.alpha * beta / now.sigma**2 * x0
        mean = mean + now.alpha / nxt.alpha * nxt.sigma**2 / now.sigma**2 * x
        return mean + math.sqrt(beta) * nxt.sigma / now.sigma * noise()


class ClampHidesVariance(Scheduler):
    def update(self, x, x0, eps, now, nxt, noise):
        std = now.sigma if nxt.sigma else 0.0
        return nxt.alpha * x0 + math.sqrt(max(0, nxt.sigma**2 - std**2)) * eps + std * noise()


class ClippedButNoiseKept(Scheduler):
    def update(self, x, x0, eps, now, nxt, noise):
        return nxt.alpha * x0.clamp(-1, 1) + nxt.sigma * eps


class WrongDigit(Scheduler):
    """DDIM with one coefficient a thousandth off, in one step."""

    def update(self, x, x0, eps, now, nxt, noise):
        off = 1.001 if now == self.levels[2] else 1
        return nxt.alpha * x0 + off * nxt.sigma * eps


def planted(cls: type[Scheduler], steps: int = 6) -> list[int]:
    scheduler = cls(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    return explain(Chosen(cls.__name__, scheduler, {}), steps).wrong


@pytest.mark.parametrize(
    ("cls", "marked"),
    [
        (Ancestral, []),
        (NoiseAtTheEnd, [6]),
        (VarianceForStd, [1, 2, 3, 4, 5]),
        (NoNoise, [1, 2, 3, 4, 5]),
        (OffByOneLevel, [1, 2, 3, 4, 5]),
        (Reversed, [1, 2, 3, 4, 5]),
        (ClampHidesVariance, [1, 2, 3, 4, 5]),
        (WrongDigit, [3]),
    ],
)
def test_a_planted_bug_is_marked_where_it_acts(cls: type[Scheduler], marked: list[int]) -> None:
    assert planted(cls) == marked


def test_a_sampler_that_clips_by_itself_is_marked_as_not_linear() -> None:
    chosen = Chosen("clipped", ClippedButNoiseKept(), {})
    found = explain(chosen, 5)
    assert found.wrong
    assert not found.rows[1].is_linear
    assert "not linear" in str(found)


def test_a_departure_of_diffusers_is_marked() -> None:
    options = {"timestep_spacing": "linspace", "clip_sample": False}
    exact = Chosen("DDIM", DDIMScheduler(**options, compat="exact"), {})
    departed = Chosen("DDIM", DDIMScheduler(**options, compat="diffusers"), {})
    assert explain(exact, 300).wrong == []
    grid = [*exact.scheduler.grid, -1]
    uneven = [i for i in range(1, 301) if grid[i - 1] - grid[i] != 1000 // 300]
    assert set(explain(departed, 300).wrong) == set(uneven) - {300}  # it steps to t − T//n


def test_the_clean_image_moves_as_in_the_trajectory_of_the_model() -> None:
    pipe = Pipeline.from_pretrained(shipped.folder("mnist"))
    chosen = choose("dpm++", pipe.scheduler)
    moves = moves_of(pipe, chosen, 4, seed=1, class_labels=7)
    seen: list[Any] = []
    pipe(num_images=1, class_labels=7, seed=1, num_inference_steps=4, callback=seen.append)
    change = [(b.x0 - a.x0).square().mean().sqrt().item() for a, b in pairwise(seen)]
    assert moves[0] is None
    assert moves[1:] == pytest.approx(change, rel=1e-5)


# --- the command --------------------------------------------------------------------------------


def test_the_command_prints_equation_source_place_and_numbers(
    capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    path = tmp_path / "ddpm.json"
    assert main(["explain", "--sampler", "ddpm", "--steps", "5", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "x_s = (α_s·β/σ_t²)·x̂0" in out
    assert "arXiv:2006.11239" in out
    assert "minidiff/schedulers/ddpm.py:" in out
    assert "0.382·x + 0.467·x̂₀ + 0.726·z" in out
    content = json.loads(path.read_text())
    assert set(content) == {
        "title", "idea", "equations", "source", "code", "steps", "wrong", "rows",
    }  # fmt: skip
    assert set(content["rows"][0]) == {
        "step", "right", "equation", "t", "next_t", "now", "nxt", "x", "x0", "z", "signal",
        "noise", "off", "moved",
    }  # fmt: skip
    assert content["rows"][1]["z"] == pytest.approx(0.726, abs=5e-4)


def test_the_command_explains_a_plug_in_by_its_code(
    capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "from minidiff.schedulers import Scheduler\n\n\nclass Mine(Scheduler):\n"
        '    """DDIM with less noise."""\n\n'
        "    def update(self, x, x0, eps, now, nxt, noise):\n"
        "        return nxt.alpha * x0 + 0.9 * nxt.sigma * eps\n"
    )
    assert main(["explain", "--sampler", f"{tmp_path / 'mine.py'}:Mine", "--steps", "3"]) == 0
    out = capsys.readouterr().out
    assert "return nxt.alpha * x0 + 0.9 * nxt.sigma * eps" in out
    assert "mine.py:7" in out
    assert out.count("≠") == 3  # two steps and the legend; the last step has no noise


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sampler", "dmp++"], "did you mean dpm++?"),
        (["--sampler", "ddim", "--steps", "0"], "steps must be at least 1, got 0"),
        (["--sampler", "ddim", "--steps", "1001"], "num_inference_steps must be in 1..1000"),
        (["--sampler", "ddim", "--schedule", "cosine"], "schedule must be one of linear"),
        (["--sampler", "ddim", "--option", "order=2"], "option of DDIMScheduler must be one of"),
        (["--sampler", "ddim", "--option", "clip_sample=yes"], "clip_sample must be True or Fal"),
        (["--sampler", "ddim", "--option", "clip_sample=True"], "makes a step nonlinear"),
        (["--sampler", "ddim", "--option", "eta=2"], "eta must be in [0, 1], got 2"),
        (["--sampler", "DDIMInverse"], "begins at the data"),
        (["--sampler", "heun", "--schedule", "edm"], "must be one of euler, dpm++"),
        (["--sampler", "ddim", "--class", "7"], "--class needs a model"),
        (["--sampler", "ddim", "--model", "mnist", "--schedule", "linear"], "without a model"),
        (["--sampler", "ddim", "--model", "mnist", "--class", "x"], "--class must be one of"),
        (["--sampler", "none.py:Mine"], "there is no file none.py"),
    ],
)
def test_a_wrong_call_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["explain", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_schedules_have_names_and_ddpm_learns_no_variance_here() -> None:
    assert all(isinstance(like_schedule(name), Scheduler) for name in SCHEDULES)
    learned = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    with pytest.raises(InvalidArgument, match="variance_type='learned_range' makes a step"):
        explain(Chosen("DDPM", learned, {}), 3)
