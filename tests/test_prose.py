"""The documents keep to plain words, and the checkers in `.ci/` find what they should."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def checker(name: str) -> ModuleType:
    """Import a script of `.ci/`, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


words, docstrings = checker("words"), checker("docstrings")
DOCUMENTS = sorted({path for pattern in words.DOCUMENTS for path in ROOT.glob(pattern)})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_files_that_a_document_names_exist(path: Path) -> None:
    if path.name == "CHANGELOG.md":  # it names what was
        return
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:[\w-]+/)+[\w-]+\.(?:py|md|ipynb))`", text):
        assert any((base / name).is_file() for base in (ROOT, ROOT / "minidiff", path.parent)), name


def found(text: str, kind: str = ".py") -> list[tuple[int, str]]:
    """Return line and phrase of every finding."""
    return [(finding.line, finding.phrase) for finding in words.READERS[kind](text)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_document_has_short_sentences_and_no_banned_phrasing(path: Path) -> None:
    assert found(path.read_text(encoding="utf-8"), path.suffix) == []


def test_a_phrase_is_found_in_comments_docstrings_and_messages_across_lines() -> None:
    assert found("x = 1\n# drawn in\n# place of y\n") == [(2, "in place of")]
    assert found('"""Train anew."""\n') == [(1, "anew")]
    assert found('raise ValueError("so many steps")\n') == [(1, "so many")]
    assert found('raise ValueError(f"{n} so many steps")\n') == [(1, "so many")]


def test_the_name_of_a_test_is_a_sentence() -> None:
    assert found("def test_a_network_is_asked_twice(): ...\n") == [(1, "asked")]
    assert found("def test_a_sampler_of_ones_own(): ...\n") == [(1, "of one's own")]


def test_code_is_not_prose() -> None:
    assert found("told = asked = 1\nx = 'told'\n") == []
    assert found("a\n\n    told anew\n\n```\ntold\n```\nand `told`\n| told |\n", ".md") == []


def changes(source: str) -> list[str]:
    return [change for _, change in docstrings.findings(source)]


def test_a_function_is_described_by_a_verb_and_a_property_by_a_noun() -> None:
    assert changes('def f():\n    """What f does."""\n') == ["begin with a verb: 'What f does.'"]
    assert changes('class A:\n    @property\n    def f(self):\n        """What f is."""\n') == []
    assert changes('def f():\n    """Return what f does."""\n') == []


ARGUMENTS = """
def f({}):
    '''Return f.

    Args:
        a: {}
        b, c: two sizes,
            which continue.
    '''
"""


def test_all_arguments_are_described_by_noun_phrases_and_no_others() -> None:
    assert changes(ARGUMENTS.format("a, b, *, c=1", "size.")) == []
    assert changes(ARGUMENTS.format("a, b, c", "of f.")) == ["describe a by a noun phrase: 'of f.'"]
    assert changes(ARGUMENTS.format("a, b, c, d", "size.")) == ["describe d of f"]
    assert changes(ARGUMENTS.format("a, b", "size.")) == ["f has no argument c"]
    others = ARGUMENTS.replace("b, c:", "others:")
    assert changes(others.format("a, b, c, **d", "size.")) == []


def test_a_sentence_of_a_document_has_at_most_35_words() -> None:
    short, long = "word " * 34 + "end.", "word " * 35 + "end."
    assert found(f"{short} {short}\n\n- {short}\n- {short}\n", ".md") == []
    assert [line for line, _ in found(f"{short}\n{short} {long}\n", ".md")] == [2]


def test_a_finding_in_a_notebook_has_its_line_in_the_file() -> None:
    cells = [{"cell_type": "markdown", "source": ["# Title\n", "Fine.\n", "Train anew."]}]
    text = json.dumps({"cells": cells}, indent=1)
    (line, phrase), *others = found(text, ".ipynb")
    assert (text.splitlines()[line - 1].strip(), phrase) == ('"Train anew."', "anew")
    assert not others
