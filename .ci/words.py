#!/usr/bin/env python3
"""Find phrasings that this project avoids, in its code and in its documents.

    python3 .ci/words.py [PATH ...]     without a path: code, tests and documents

Prints file:line, the phrase and what to write instead, and exits with 1 if it found any. It reads
docstrings, comments, texts and names of tests in Python files, and Markdown, in files and in
notebooks; code samples are left alone. In Markdown no sentence may have more than 35 words.
"""

import argparse
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CODE = ("minidiff", "benchmarks", "tests", ".ci")
DOCUMENTS = ("*.md", "minidiff/**/*.md", "benchmarks/*.md", "docs/*.md", "notebooks/*.ipynb")
MAX_WORDS = 35  # in a sentence of a document

# A phrasing as a regular expression, and what to write instead.
PHRASES = {
    r"told": "given, conditioned on",
    r"shown": "given, used as input; drawn, printed",
    r"asks|asked|asking": "evaluates, evaluated; requests, requested",
    r"(?:network|model|denoiser|classifier|unet|u-net)s? (?:say|says|said)": "predicts, outputs",
    r"what it says|what (?:the|a) \w+ says": "its output, its prediction",
    r"says nothing of|goes on with": "does not mention; continues with",
    r"(?:of )?one's own|of (?:your|its|their) own": "custom",
    r"anew": "again",
    r"so many": "this many, n",
    r"of which": "two sentences",
    r"in place of": "instead of",
    r"(?:come|comes|came|coming) along": "ship with",
    r"shares? of": "fraction of",
    r"(?:lead|leads|led|leading) away|(?:is|are) led": "guide away, is guided",
    r"be it|at hand|of another class|that is no(?! longer)": "plain syntax",
    r"learnt by heart|by heart": "memorized, overfitted",
}
BANNED = re.compile(
    r"(?<![\w-])(?:" + "|".join(f"({phrase})" for phrase in PHRASES) + r")(?![\w-])", re.IGNORECASE
)
INSTEAD = list(PHRASES.values())

# Names that have a plain successor.
NAMES = {
    "told_of": "resolve_conditioning",
    "against_of": "negative_prompts",
    "walks_of": "timestep_schedule",
    "sides_of": "image_size",
    "entry_of": "first_step",
    "Keeper": "Autosave",
    "Recorded": "CudaGraph",
    "MOST": "MAX_…",
    "LEAST": "MIN_…",
    "CLEARLY": "the quantity, with its unit",
}


class Finding(NamedTuple):
    line: int
    phrase: str
    instead: str


def phrases(text: str, line: int) -> Iterator[Finding]:
    """Yield the phrases of a text that begins on a line, across its line breaks."""
    flat = re.sub(r"\n[ \t#>]*", lambda found: " " * len(found[0]), text)
    spaces = re.sub(r" +", lambda found: " " + "\0" * (len(found[0]) - 1), flat)
    kept = [i for i, letter in enumerate(spaces) if letter != "\0"]
    for found in BANNED.finditer("".join(spaces[i] for i in kept)):
        at = line + text.count("\n", 0, kept[found.start()])
        yield Finding(at, found[0], INSTEAD[found.lastindex - 1])


def python(source: str) -> Iterator[Finding]:
    """Yield the findings of a Python file."""
    comment = []  # consecutive lines, as one text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comment.append(token)
            continue
        if token.type == tokenize.NL:
            continue
        yield from comments(comment)
        comment = []
        texts = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
        if token.type in texts and " " in token.string:
            yield from phrases(token.string, token.start[0])
        if token.type == tokenize.NAME and token.string in NAMES:
            yield Finding(token.start[0], token.string, NAMES[token.string])
        if token.type == tokenize.NAME and token.string.startswith("test_"):
            sentence = token.string.replace("ones_own", "one's own").replace("_", " ")
            yield from phrases(sentence, token.start[0])
    yield from comments(comment)


def comments(tokens: list[tokenize.TokenInfo]) -> Iterator[Finding]:
    """Yield the phrases of comments, taking those on consecutive lines together."""
    runs: list[list[tokenize.TokenInfo]] = []
    for token in tokens:
        if runs and token.start[0] == runs[-1][-1].start[0] + 1:
            runs[-1].append(token)
        else:
            runs.append([token])
    for run in runs:
        yield from phrases("\n".join(token.string for token in run), run[0].start[0])


def prose(text: str) -> str:
    """Return Markdown with code, tables, images and addresses blanked, line by line."""

    def blank(found: re.Match) -> str:
        return re.sub(r"[^\n]", " ", found[0])

    text = re.sub(r"^```.*?^```", blank, text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(?:(?<=\n\n)|\A)(?: {4}.*\n)+", blank, text)
    text = re.sub(r"`[^`\n]+(?:\n[^`\n]+)?`", lambda found: blank(found)[:-1] + "x", text)
    return re.sub(r"^ *\|.*|!\[[^]]*\]\([^)]*\)|(?<=\])\([^)]*\)", blank, text, flags=re.MULTILINE)


# A sentence ends at its full stop; an item of a list is a sentence, headings are not.
SENTENCE = re.compile(
    r"(?=^ *(?:[-*]|\d+\.) )|(?<=[.!?])(?=\s)|(?<=[.!?]\*\*)|(?<=:)(?=\n\n)", re.MULTILINE
)


def sentences(text: str) -> Iterator[Finding]:
    """Yield the sentences of a document that are too long."""
    text = re.sub(r"^#+ .*", "", prose(text), flags=re.MULTILINE)
    for block in re.finditer(r"(?:^.*\S.*\n?)+", text, re.MULTILINE):
        start = block.start()
        items = re.split(r"(?m)(?=^ *(?:[-*]|\d+\.) )|(?<=[.!?:;])(?=\s)|(?<=[.!?]\*\*)", block[0])
        for item in items:
            words = re.findall(r"[^\s]*\w[^\s]*", item)
            if len(words) > MAX_WORDS:
                line = 1 + text.count("\n", 0, start + len(item) - len(item.lstrip()))
                yield Finding(line, " ".join(words[:8]) + " …", f"{len(words)} words: divide it")
            start += len(item)


def markdown(text: str) -> Iterator[Finding]:
    """Yield the findings of a Markdown text."""
    yield from phrases(prose(text), 1)
    yield from sentences(text)


def notebook(source: str) -> Iterator[Finding]:
    """Yield the findings of a notebook, with the line in its file where the cell begins."""
    position = 0
    for cell in json.loads(source)["cells"]:
        first = cell["source"][0] if cell["source"] else ""
        found = source.find(json.dumps(first, ensure_ascii=False), position)
        position = max(found, position)
        line = source.count("\n", 0, position)
        read = markdown if cell["cell_type"] == "markdown" else python
        text = "".join(cell["source"])
        for finding in read(text):
            yield finding._replace(line=line + finding.line)


READERS = {".py": python, ".md": markdown, ".ipynb": notebook}


def files(arguments: list[str]) -> list[Path]:
    """Return the files to read: those named, or all of them."""
    if arguments:
        given = [Path(argument) for argument in arguments]
        found = [p for path in given for p in (path.rglob("*") if path.is_dir() else [path])]
    else:
        found = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
        found += [path for pattern in DOCUMENTS for path in ROOT.glob(pattern)]
    own = {Path(__file__).resolve(), ROOT / "tests" / "test_prose.py"}  # they name the phrases
    return sorted({path.resolve() for path in found if path.suffix in READERS} - own)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", metavar="PATH", help="files and folders to read")
    count = 0
    for path in files(parser.parse_args().paths):
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        for finding in sorted(set(READERS[path.suffix](path.read_text(encoding="utf-8")))):
            print(f"{name}:{finding.line}: {finding.phrase!r}: {finding.instead}")
            count += 1
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
