"""`minidiff compare`: order, distance to the converged solution, scores, and a picture."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff import shipped
from minidiff.cli import main
from minidiff.errors import InvalidArgument
from minidiff.lab import compare as module
from minidiff.lab.choose import choose
from minidiff.lab.compare import adds_noise, compare, distance, order_of, title_of
from minidiff.metrics import Evaluator
from minidiff.pipeline import Pipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained(shipped.folder("mnist"))


@pytest.fixture(scope="module")
def readme_sampler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return FILE:CLASS of the sampler that the README writes."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "class " in b)
    file = tmp_path_factory.mktemp("plugin") / "examples.py"
    file.write_text(block.split("\nprint(")[0])
    return f"{file}:AdamsBashforth"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a solution of few steps, and no time to measure known orders."""
    monkeypatch.setattr(module, "CONVERGED", 8)
    monkeypatch.setattr(module, "order_of", lambda name, chosen: 1.0)


def test_the_readmes_sampler_has_second_order(pipe: Pipeline, readme_sampler: str) -> None:
    chosen = choose(readme_sampler, pipe.scheduler)
    assert order_of(readme_sampler, chosen) == pytest.approx(1.99, abs=0.02)


@pytest.mark.parametrize(("name", "p"), [("ddim", 1), ("dpm++", 2), ("PNDM", 2), ("euler-a", 1)])
def test_known_samplers_have_the_order_of_their_paper(pipe: Pipeline, name: str, p: int) -> None:
    assert order_of(name, choose(name, pipe.scheduler)) == pytest.approx(p, abs=0.1)


@pytest.mark.parametrize(
    ("name", "random"), [("ddim", False), ("ddpm", True), ("sde-dpm++", True), ("heun", False)]
)
def test_samplers_that_add_noise_are_known_by_their_table(
    pipe: Pipeline, name: str, random: bool
) -> None:
    assert adds_noise(choose(name, pipe.scheduler).scheduler) is random


def test_distances_are_those_of_separate_calls_and_fall_with_the_steps(
    pipe: Pipeline, quick: None
) -> None:
    before = pipe.scheduler
    found = compare(pipe, ["ddim", "ddpm"], [2, 4], num_images=3, seed=5)
    assert pipe.scheduler is before
    images = {}
    for name, n in (("ddim", 2), ("ddim", 4), ("dpm++", 8), ("dpm++", 4)):
        pipe.scheduler = choose(name, before).scheduler
        call = pipe(num_images=3, num_inference_steps=n, seed=5, output_type="pt")
        images[name, n] = call.images
    pipe.scheduler = before
    ddim, ddpm = found.lines
    for cell in ddim.cells:
        far = (images["ddim", cell.steps] - images["dpm++", 8]).square().mean().sqrt() * 127.5
        assert cell.distance == pytest.approx(far.item(), rel=1e-4)
    assert ddim.cells[0].distance > ddim.cells[1].distance > 0
    assert [cell.distance for cell in ddpm.cells] == [None, None]
    coarse = distance(images["dpm++", 4], images["dpm++", 8])
    assert found.uncertainty == pytest.approx(coarse / 3, rel=1e-4)
    text = str(found)
    assert "ddpm: adds noise" in text
    assert f"{ddim.cells[1].distance:.1f}" in text


def test_a_step_of_several_evaluations_says_how_many(pipe: Pipeline, quick: None) -> None:
    found = compare(pipe, ["heun"], [2, 3], num_images=1)
    assert [cell.evaluations for cell in found.lines[0].cells] == [3, 5]
    assert "heun: 3, 5 evaluations of the network" in str(found)


def test_with_data_the_samples_are_scored(quick: None, pipe: Pipeline) -> None:
    evaluator = Evaluator("digits")

    class Drawn:
        """A pipeline whose every sample is a real digit."""

        scheduler, class_names = pipe.scheduler, tuple("0123456789")
        image_shape = evaluator.image_shape
        space = pipe.space

        def __call__(self, num_images: int, **call: object) -> "Drawn":
            assert call["guidance_scale"] == 2.0
            self.scheduler.set_timesteps(call["num_inference_steps"])
            chosen = evaluator.order[:num_images]
            self.images = evaluator.train.images[chosen].float() / 127.5 - 1
            self.labels = evaluator.train.labels[chosen]
            return self

    found = compare(Drawn(), ["ddim"], [2], num_images=200, evaluator=evaluator, guidance_scale=2.0)
    (cell,) = found.lines[0].cells
    assert cell.distance == 0
    assert cell.scores.accuracy > 0.98
    assert found.real.accuracy > 0.98
    text = str(found)
    assert all(f"{title} (held-out images: " in text for title in ("accuracy", "FD ‰", "coverage"))
    assert f"{cell.scores.fd:.1f}" in text


def test_the_command_prints_a_table_and_writes_a_labelled_picture(
    quick: None, readme_sampler: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    png, figures = tmp_path / "compare.png", tmp_path / "compare.json"
    words = ["compare", "mnist", "--samplers", "ddim", "--steps", "2,3", "--num", "2"]
    words += ["--plugin", readme_sampler, "--png", str(png), "--json", str(figures)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert re.search(r"^examples.AdamsBashforth +1.00 │ +\d+\.\d +\d+\.\d$", out, re.M)
    picture = np.asarray(Image.open(png))
    assert picture.shape[0] > 5 * 56  # two samplers with two numbers of steps, and the solution
    margin = picture[-5 * 57 :, :40]
    assert (margin > 250).mean() > 0.5  # a white margin
    assert (margin < 100).any()  # with letters
    content = json.loads(figures.read_text())
    assert set(content) == {"steps", "images", "reference", "samplers", "real"}
    assert list(content["samplers"]) == ["ddim", "examples.AdamsBashforth"]
    assert set(content["samplers"]["ddim"]["cells"][0]) == {
        "steps", "evaluations", "distance", "scores",
    }  # fmt: skip


WRONG = """
from minidiff.schedulers import Scheduler
class Mine(Scheduler):
    def update(self, x, x0, eps, now, nxt, noise):
        return nxt.alpha * x0 + nxt.sigma**2 * eps
"""


def test_a_plug_in_with_a_wrong_noise_level_passes_the_tests_of_form_and_is_named(
    quick: None, readme_sampler: str, tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("bad.py").write_text(WRONG)
    words = ["compare", "mnist", "--samplers", "ddpm", "--steps", "4", "--num", "1", "--plugin"]
    assert main([*words, "bad.py:Mine"]) == 0
    # σ² is σ only at σ = 0, the end of the last step.
    assert "bad.Mine: 3 of its 4 steps do not end at the signal" in capsys.readouterr().out
    assert main([*words, readme_sampler]) == 0
    assert "do not end" not in capsys.readouterr().out


BAD = """
from minidiff.schedulers import Scheduler
class Changes(Scheduler):
    def update(self, x, x0, eps, now, nxt, noise):
        x *= 0
        return x + nxt.alpha * x0 + nxt.sigma * eps
class Raises(Scheduler):
    def update(self, x, x0, eps, now, nxt, noise):
        raise RuntimeError("not written yet")
class Nothing:
    pass
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samplers", "ddim,unpic"], "did you mean unipc?"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--steps", "4,2000"], "num_inference_steps must be in 1..1000, got 2000"),
        (["--samplers", "PNDM", "--steps", "3"], "num_inference_steps must be at least 4"),
        (["--num", "0"], "num_images must be at least 1, got 0"),
        (["--guidance", "nan"], "guidance_scale must be"),
        (["--plugin", "{}:Changes"], "'inputs unchanged' failed: update changed its input in pla"),
        (["--plugin", "{}:Raises"], "raised RuntimeError: not written yet"),
        (["--plugin", "{}:Nothing"], "must be a subclass of minidiff.schedulers.Scheduler"),
        (["--plugin", "{}:Missing"], "there is no class 'Missing' in the file"),
        (["--data", "digits"], "draws images of shape (1, 28, 28), but the data have (1, 16, 16)"),
        (["--data", "captions"], "captions are for SceneEvaluator"),
    ],
)
def test_a_wrong_call_is_one_line_before_anything_is_sampled(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("bad.py").write_text(BAD)
    assert main(["compare", "mnist", *(word.format("bad.py") for word in words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", str(tmp_path), "--png", str(tmp_path / "a.png")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_titles_of_plug_ins_are_short() -> None:
    assert title_of("ddim") == "ddim"
    assert title_of("some/where/mine.py:Mine") == "mine.Mine"


def test_an_empty_list_is_refused(pipe: Pipeline) -> None:
    with pytest.raises(InvalidArgument, match="give samplers and steps"):
        compare(pipe, [], [4])


def test_grey_levels_are_of_255() -> None:
    black, white = -torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    assert distance(black, white) == 255
