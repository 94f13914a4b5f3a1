"""The pages of the site: their examples run, their commands parse, and what they name exists."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from minidiff.cli.entry import parser

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
RUNNABLE = ("samplers.md", "quirks.md")
PLACEHOLDERS = {"NAME": "ddim", "N": "10", "M": "3"}


def blocks(page: str) -> list[str]:
    """Return the Python examples of a page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)


@pytest.mark.parametrize("page", RUNNABLE)
def test_the_examples_of_a_page_run_in_order(page: str, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "docs"}
    assert blocks(page)
    with torch.random.fork_rng(devices=[]):
        for block in blocks(page):
            exec(compile(block, page, "exec"), names)


def test_every_import_of_every_page_works() -> None:
    lines = [line for page in PAGES for block in blocks(page.name) for line in block.splitlines()]
    imports = [line for line in lines if line.startswith("from minidiff") and "(" not in line]
    assert len(imports) > 5
    for line in imports:
        exec(line, {})


def commands() -> list[str]:
    """Return the command lines of minidiff that the pages give."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        found += re.findall(r"^    (?:\w+=\S+ )?(minidiff .+)$", text, re.M)
        found += re.findall(r"`(minidiff [a-z][^`…]*)`", text)
    return sorted({" ".join(re.split(r" && | \| |  +#", line)[0].split()) for line in found})


@pytest.mark.parametrize("line", commands())
def test_the_parser_accepts_every_command(line: str) -> None:
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line)[1:]]
    if len(words) > 1 and "COMMAND" not in words:
        parser().parse_args(words)


def test_the_pictures_and_pages_that_the_site_links_to_exist() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (DOCS / link).exists(), (page.name, link)


def test_every_page_is_in_the_navigation() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = {line.split("<")[-1].strip("> ") for line in index.splitlines()}
    assert {page.stem for page in PAGES} - listed == {"index"}
