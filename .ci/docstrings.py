#!/usr/bin/env python3
"""Compare docstrings with signatures, and with the way this project writes them.

    python3 .ci/docstrings.py [FILE ...]        without a file: the package

Prints file:line and what to change, and exits with 1 if it found anything:

- A function is described by a verb ("Return the level of each timestep.").
- Where some arguments are described all are, each by a noun phrase that stands alone. Names that
  share a description share a line ("x0, eps: clean sample and noise"). "others: see …" stands for
  arguments that another docstring describes.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OTHERS = "others"

NO_VERB = re.compile(r"(?:What|Whether|Where|How|That|Those|The|Of|As|Who|When|A|An|Its)\b")
NO_NOUN = re.compile(r"(?:of|as)\b")
ARGUMENTS = re.compile(r"^Args:\n((?: *\n| +.*(?:\n|\Z))*)", re.MULTILINE)
ARGUMENT = re.compile(r"^    ((?:\*{0,2}\w+(?:, )?)+): +(.*)")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def described(text: str) -> dict[str, str]:
    """Return the first line of the description of every argument in a docstring."""
    section = ARGUMENTS.search(text)
    found = {}
    for row in section[1].splitlines() if section else ():
        if argument := ARGUMENT.match(row):
            names = argument[1].split(", ")
            found |= {name.lstrip("*"): argument[2] for name in names}
    return found


def parameters(function: Function) -> list[str]:
    """Return the names of the parameters that callers give."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    names = [parameter.arg for parameter in every if parameter is not None]
    return [name for name in names if name not in ("self", "cls") and name[0] != "_"]


def initializer(node: ast.ClassDef) -> Function | None:
    """Return the `__init__` of a class, whose arguments the docstring of the class describes."""
    for child in node.body:
        if isinstance(child, Function) and child.name == "__init__":
            return child
    return None


def findings(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line of every definition that needs a change, and the change."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, Function | ast.ClassDef):
            continue
        text = ast.get_docstring(node) or ""
        kinds = {getattr(d, "id", getattr(d, "attr", "")) for d in node.decorator_list}
        function = initializer(node) if isinstance(node, ast.ClassDef) else node
        is_value = function is not node or kinds & {"property", "cached_property"}
        if not is_value and NO_VERB.match(text):
            yield node.lineno, f"begin with a verb: {text.splitlines()[0][:60]!r}"
        arguments = described(text)
        for name, description in arguments.items():
            if name != OTHERS and NO_NOUN.match(description):
                yield node.lineno, f"describe {name} by a noun phrase: {description[:60]!r}"
        if arguments and function is not None:
            names = parameters(function)
            for name in arguments.keys() - set(names) - {OTHERS}:
                yield node.lineno, f"{node.name} has no argument {name}"
            for name in names:
                if name not in arguments and OTHERS not in arguments:
                    yield node.lineno, f"describe {name} of {node.name}"


def main() -> int:
    files = [Path(given) for given in sys.argv[1:]] or sorted((ROOT / "minidiff").rglob("*.py"))
    count = 0
    for path in files:
        name = path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path
        for line, change in sorted(set(findings(path.read_text(encoding="utf-8")))):
            print(f"{name}:{line}: {change}")
            count += 1
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
