"""The README's examples run, and what it claims about the code holds."""

import ast
import io
import re
import tokenize
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minidiff import PRESETS, train, trajectory
from minidiff.data import load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
HOUSE = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
MAX_README_LINES = 150
CORE_LINES = 2_800


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= MAX_README_LINES


def test_the_cpu_build_that_it_installs_first_satisfies_the_constraints() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (pinned,) = re.findall(r"^(torch==\S+)$", constraints, re.M)
    assert README.index(f"pip install {pinned} --index-url") < README.index("-c constraints.txt")


def test_its_examples_run_in_order_in_one_interpreter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with torch.random.fork_rng(devices=[]):
        for block in re.findall(r"```python\n(.*?)```", README, re.S):
            exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "seven.png").is_file()
    assert "the guess changes by" in capsys.readouterr().out


def test_the_first_example_trains_saves_and_samples(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", PYTHON, re.S) if "train(" in b)
    short = replace(PRESETS["digits"].train, minutes=None, steps=3, pictures=0)
    monkeypatch.setitem(PRESETS, "digits", replace(PRESETS["digits"], train=short))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block, "python.md", "exec"), names)
    assert (tmp_path / "model" / "model_index.json").is_file()
    assert [image.size for image in names["images"]] == [(16, 16)] * 3
    assert names["pipe"](num_images=1, num_inference_steps=2).images


def test_the_custom_sampler_has_the_order_that_the_readme_prints(
    capsys: pytest.CaptureFixture,
) -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "class " in b)
    exec(compile(block, "README.md", "exec"), {})
    order, header, *lines = capsys.readouterr().out.splitlines()
    claimed = float(re.search(r"# (\d\.\d+): second order", block)[1])
    assert float(order) == pytest.approx(claimed, abs=0.01)
    assert header.split() == ["t", "A0", "B0", "B1"]
    assert len(lines) == 5


def test_the_custom_sampler_forgets_its_history_when_sampling_starts_again() -> None:
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


def test_the_custom_objective_trains_and_has_the_value_of_hubers_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", PYTHON, re.S) if "objective=" in b)
    short = replace(PRESETS["digits"].train, minutes=None, steps=3, pictures=0)
    monkeypatch.setitem(PRESETS, "digits", replace(PRESETS["digits"], train=short))
    names = {"PRESETS": PRESETS, "load": load, "train": train}
    exec(compile(block, "python.md", "exec"), names)
    assert names["pipe"](num_images=1, num_inference_steps=2).images
    huber = short.objective(names["Huber"])
    nothing = torch.zeros(2, 1, 4, 4)  # its target is 0 as well
    levels = huber.levels(np.zeros(2)).on(nothing)
    for far, expected in ((0.1, 0.1**2 / 2), (3.0, 0.5 * (3.0 - 0.25))):  # δ·(|a| − δ/2)
        error = huber.error(nothing + far, nothing, nothing, nothing, levels)
        torch.testing.assert_close(error, torch.full((2,), expected))


def test_every_import_of_an_example_works() -> None:
    examples = re.findall(r"```python\n(.*?)```", README + PYTHON, re.S)
    imports = re.findall(r"^from minidiff.*$", "\n".join(examples), re.M)
    assert len(imports) > 8
    for line in imports:
        exec(line, {})


def test_the_table_of_folders_names_every_folder_once() -> None:
    rows = re.findall(r"^\| `([\w/]+/)` \|", HOUSE, re.M)
    for folder in rows:
        assert (ROOT / folder).is_dir(), folder
    packages = {path.parent.name for path in (ROOT / "minidiff").glob("*/__init__.py")}
    listed = [row.split("/")[1] for row in rows if row.startswith("minidiff/")]
    assert len(listed) == len(set(listed))
    assert packages <= set(listed)


def core() -> list[Path]:
    """Return the files that the site lists as the core."""
    block = re.search(r"## The core\n.*?```\n(.*?)```", HOUSE, re.S)[1]
    files = []
    for line in block.splitlines():
        folder = re.match(r"(\S+/)", line)
        for name in re.findall(r"\S+\.py", line):
            files.append(ROOT / "minidiff" / (folder[1] if folder else "") / name)
    return files


def code_lines(source: str) -> int:
    """Count the lines that hold code: no blank lines, comments or docstrings."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", 0), str):
                docstrings.update(range(first.lineno, first.end_lineno + 1))
    layout = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_code_lines_are_lines_without_blanks_comments_and_docstrings() -> None:
    source = (
        '"""Doc."""\n\n# why\nx = (\n    1,  # one\n)\n\n\ndef f():\n    """Doc."""\n    return x\n'
    )
    assert code_lines(source) == 5


def test_the_core_has_at_most_the_lines_that_the_readme_promises() -> None:
    files = core()
    assert len(files) == len(set(files)) > 10
    lines = {path: code_lines(path.read_text(encoding="utf-8")) for path in files}
    assert f"at most {CORE_LINES:,} lines of" in README
    assert f"at most {CORE_LINES:,} lines of code" in HOUSE
    assert sum(lines.values()) <= CORE_LINES, lines


FILES = sorted((ROOT / "minidiff").rglob("*.py"))
MAX_LINES, MAX_FILE, MAX_FUNCTION, MAX_FOLDER = 19_000, 400, 50, 14
# Folders that nothing of the framework imports: each can be read, or left out, by itself.
BESIDE = {"lab", "teach", "adapters", "modalities", "engines"}
MAX_LINES_WITH_THEM = 29_500


def test_files_functions_and_folders_are_small() -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in FILES}
    lines = {path: code_lines(source) for path, source in sources.items()}
    framework = {p: n for p, n in lines.items() if p.relative_to(ROOT).parts[1] not in BESIDE}
    assert sum(framework.values()) <= MAX_LINES
    assert sum(lines.values()) <= MAX_LINES_WITH_THEM
    assert not {path: n for path, n in lines.items() if n > MAX_FILE}
    folders = Counter(path.parent for path in FILES if path.name != "__init__.py")
    assert not {folder: n for folder, n in folders.items() if n > MAX_FOLDER}
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert length <= MAX_FUNCTION, f"{path.name}:{node.lineno} {node.name}"


def test_every_reading_path_is_in_the_core() -> None:
    paths = HOUSE[HOUSE.index("## Where to begin") : HOUSE.index("## The folders")]
    named = {ROOT / "minidiff" / name for name in re.findall(r"`([\w/]+\.py)`", paths)}
    assert len(named) > 6
    assert named <= set(core())


def test_the_pictures_and_pages_that_documents_link_to_exist() -> None:
    for document in (*ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md"):
        links = re.findall(r"\]\((?!http|#)([^)#]+)", document.read_text(encoding="utf-8"))
        for link in links:
            assert (document.parent / link).exists(), (document.name, link)


def test_links_to_sections_name_a_heading() -> None:
    for document in (*ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md"):
        text = document.read_text(encoding="utf-8")
        for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", text):
            target = document.parent / path if path else document
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, (document.name, path, anchor)
