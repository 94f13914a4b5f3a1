"""The notebooks run from the first cell to the last, and those of the course check themselves.

A notebook of the course has `minidiff.course` in its metadata. Cells tagged "exercise" hold what a
reader finds, and fail their checks; the cell after each is tagged "solution", and passes. A line
`NAME = value  # fast: other` is shortened here.
"""

import contextlib
import io
import json
import re
import warnings
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from minidiff import teach

FOLDER = Path(__file__).parents[1] / "notebooks"
ALL = sorted(FOLDER.glob("*.ipynb"))
COURSE = [
    p for p in ALL if "course" in json.loads(p.read_text("utf-8"))["metadata"].get("minidiff", {})
]
FIRST, *OTHERS = ALL
SLOW = [FIRST, *(pytest.param(path, marks=pytest.mark.slow) for path in OTHERS)]


def by_name(path):
    return path.stem


def code_of(path):
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", SLOW, ids=by_name)
def test_a_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


@pytest.mark.parametrize("path", ALL, ids=by_name)
def test_what_a_notebook_shows_is_whole_and_free_of_warnings(path):
    """Every cell was run, in order; a warning would name a folder of whoever ran it."""
    code = code_of(path)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.get("name", output.output_type) for cell in code for output in cell.outputs}
    assert not kinds & {"stderr", "error"}


def tags(cell):
    return cell.metadata.get("tags", [])


def verdicts(text):
    """Return the marks of the checks that a text prints."""
    return re.findall(r"^([✓✗≈]) [\w-]+", text, re.M)


def shortened(source):
    return re.sub(r"^([A-Z, ]+ = ).+?  # fast: (.+)$", r"\1\2", source, flags=re.M)


@pytest.mark.parametrize("path", COURSE, ids=by_name)
def test_a_notebook_of_the_course_runs_and_its_exercises_await_an_answer(
    path, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(code_of(path)):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DeprecationWarning)  # Jupyter hides them too
            exec(compile(shortened(cell.source), f"{path.name}, cell {number}", "exec"), names)
        marks = verdicts(printed.getvalue())
        if "exercise" in tags(cell):
            assert marks, cell.source
            assert "✓" not in marks, printed.getvalue()
        elif "solution" in tags(cell):
            assert set(marks) == {"✓"}, printed.getvalue()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("path", COURSE, ids=by_name)
def test_a_notebook_of_the_course_has_the_form_of_the_series(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert text.startswith(f"# {path.stem[:2]} · ")
    for part in ("After this you can\n", "## Guess first", "## What to remember", "**Read on.**"):
        assert text.count(part) == 1, part
    aims = text.split("After this you can\n")[1].split("\n\n")[0]
    assert len(re.findall(r"^- ", aims, re.M)) == 3
    assert "$$" in text
    assert any(cell.source.startswith("guess = ") for cell in code)
    assert sum("{guess}" in cell.source or "guess, " in cell.source for cell in code) >= 1
    assert any("plot.source(" in cell.source for cell in code)
    assert len(code) <= 25
    lines = [line for cell in code for line in cell.source.splitlines() if line.strip()]
    assert len(lines) <= 100
    assert path.stat().st_size <= 300_000


@pytest.mark.parametrize("path", COURSE, ids=by_name)
def test_every_exercise_is_followed_by_its_folded_solution(path):
    cells = nbformat.read(path, as_version=4).cells
    exercises = [i for i, cell in enumerate(cells) if "exercise" in tags(cell)]
    solutions = [i for i, cell in enumerate(cells) if "solution" in tags(cell)]
    assert exercises
    assert solutions == [i + 1 for i in exercises]
    for i in solutions:
        assert cells[i].metadata["jupyter"]["source_hidden"]
        asked = re.findall(r'teach\.check\("([\w-]+)"', cells[i - 1].source)
        assert asked == re.findall(r'teach\.check\("([\w-]+)"', cells[i].source)
        assert teach.find(asked[0]).notebook in (int(path.stem[:2]), 3)


@pytest.mark.parametrize("path", COURSE, ids=by_name)
def test_pictures_are_png_with_a_description(path):
    outputs = [output for cell in code_of(path) for output in cell.outputs]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert kinds == {"image/png", "text/plain"}
    for output in outputs:
        if "image/png" in output.get("data", {}):
            assert len(output.metadata["image/png"]["alt"]) > 20


@pytest.mark.parametrize("path", COURSE, ids=by_name)
def test_links_of_the_course_lead_somewhere(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (FOLDER / link).exists(), link
    for name in re.findall(r'teach\.(?:task|hint|planted|check)\("([\w-]+)"', text):
        teach.find(name)
    for file in re.findall(r"`(minidiff/[\w/]+\.py)`", text):
        assert (FOLDER.parent / file).is_file(), file
