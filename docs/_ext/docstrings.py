"""Makes reStructuredText of docstrings that are written to be read as plain text."""

import re


def escape(app, what, name, obj, options, lines: list[str]) -> None:
    """Keep "*space", "|x|" and "`name`" as they are written, and indented equations as blocks."""
    result, literal = [], False
    for line in lines:
        indented = line.startswith("    ") and what == "module"
        if indented != literal and (line.strip() or not literal):
            result += ["", "::", ""] if indented else [""]
            literal = indented
        result.append(line if literal or line.lstrip().startswith(".. ") else _escaped(line))
    lines[:] = result


def _escaped(line: str) -> str:
    parts = re.split(r"(``[^`]+``|`[^`]+`)", line)
    for at, part in enumerate(parts):
        if part.startswith("`"):
            parts[at] = f"``{part.strip('`')}``"
        else:
            parts[at] = re.sub(r"(?<!\\)([*|])", r"\\\1", re.sub(r"(\w)_(?!\w)", r"\1\\_", part))
    return "".join(parts)


def skip(app, what, name, obj, skipped: bool, options) -> bool | None:
    """Leave out the fields of a named tuple, which its signature and its docstring already list."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app) -> dict:
    """Connect to autodoc, after napoleon."""
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-docstring", escape, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
