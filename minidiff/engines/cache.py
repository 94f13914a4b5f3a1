"""Converted graphs in the user's cache folder, so that an export is paid for once.

An entry is a folder named by a hash of all that the graph depends on: the structure of the network
and the source code of its layers, its weights, the inputs, the format, and the versions of the
libraries. It holds the files of the graph and `graph.json` with their SHA-256. An entry appears
under its name only when it is complete, and is read only if the hashes agree.
"""

import hashlib
import inspect
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

import minidiff
from minidiff.engines.backends import FORMATS, versions
from minidiff.engines.graph import Input
from minidiff.errors import CheckpointError, MinidiffError
from minidiff.runtime import files
from minidiff.runtime.tensors import digest

VARIABLE = "MINIDIFF_CACHE"
INDEX = "graph.json"
MAX_BYTES = 4 << 30  # of all entries together; the least recently used ones are deleted


class Entry(NamedTuple):
    """An entry of the cache."""

    path: Path
    title: str
    bytes: int
    used: float


def folder() -> Path:
    """Return the folder of the entries, which need not exist.

    It is in MINIDIFF_CACHE, or else in the user's cache folder (XDG_CACHE_HOME, ~/.cache).
    """
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser() / "engines"
    usual = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    base = os.environ.get(usual) or Path.home() / ".cache"
    return Path(base) / "minidiff" / "engines"


def key_of(network: nn.Module, name: str, inputs: list[Input], format: str) -> str:
    """Return the name of an entry: a hash of everything that the graph depends on."""
    libraries = FORMATS[format].libraries
    content = {
        "name": name,
        "inputs": inputs,
        "format": format,
        "versions": versions("torch", *libraries) | {"minidiff": minidiff.__version__},
        "structure": _structure(network),
        "sources": _sources(network),
        "weights": digest(network),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:40]


def _structure(network: nn.Module) -> list:
    """Return every module with its class and its plain attributes, such as a number of heads."""
    plain = (bool, int, float, str, type(None))
    return [
        (name, type(m).__qualname__, sorted(
            (key, repr(value)) for key, value in vars(m).items()
            if isinstance(value, plain) and not key.startswith("_") and key != "training"
        ))
        for name, m in network.named_modules()
    ]  # fmt: skip


def _sources(network: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of the source files that define the modules outside torch."""
    found = {}
    for cls in {type(module) for module in network.modules()}:
        if cls.__module__.split(".")[0] != "torch" and (file := inspect.getsourcefile(cls)):
            found[cls.__module__] = files.sha256(Path(file))
    return found


def fetch(
    key: str,
    make: Callable[[Path], dict],
    read: Callable[[Path, dict], Any],
    print_line: Callable[[str], None],
) -> Any:
    """Return what an entry holds; the entry is made if it is missing or damaged.

    Args:
        key: name of the entry.
        make: function that writes the files into a folder and returns the index; "files" of the
            index maps their names to their SHA-256.
        read: function from the folder and the index to the result.
        print_line: called with a sentence about a damaged entry.
    Raises:
        CheckpointError: the cache folder cannot be written.
    """
    place = folder() / key
    if place.exists():
        try:
            index = files.read_json(place / INDEX)
            if problem := wrong_file(place, index["files"]):
                raise CheckpointError(problem)
            result = read(place, index)
            os.utime(place)
            return result
        except (MinidiffError, OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:100]
            print_line(f"cache: {place.name[:8]} is damaged ({reason}): rebuilt")
    try:
        with files.atomic_folder(place) as temporary:
            index = make(temporary)
            files.write_json(temporary / INDEX, index)
    except (CheckpointError, OSError) as error:
        raise CheckpointError(
            f"cache folder {place.parent}: {error}; set {VARIABLE} to another folder, or use no "
            "cache"
        ) from error
    _bound(place)
    return read(place, index)


def wrong_file(place: Path, recorded: dict[str, str]) -> str:
    """Return what is wrong with files in a folder, "" for nothing.

    Args:
        place: folder.
        recorded: SHA-256 of every file by name.
    """
    for name, expected in recorded.items():
        if Path(name).name != name:
            return f"{name!r} is not the name of a file"
        if not (place / name).is_file():
            return f"{name} is missing"
        if files.sha256(place / name) != expected:
            return f"{name} has another SHA-256"
    return ""


def entries() -> Iterator[Entry]:
    """Yield the entries, the most recently used first."""
    found = []
    for index in folder().glob(f"*/{INDEX}"):
        size = sum(file.stat().st_size for file in index.parent.iterdir())
        try:
            title = str(files.read_json(index).get("title", "?"))
        except CheckpointError:
            title = "damaged"
        found.append(Entry(index.parent, title, size, index.parent.stat().st_mtime))
    yield from sorted(found, key=lambda entry: -entry.used)


def clear() -> int:
    """Delete all entries, and nothing else in the folder; return how many there were."""
    found = list(entries())
    for entry in found:
        shutil.rmtree(entry.path)
    if folder().is_dir():
        files.clear_temporaries(folder())
    return len(found)


def report(action: str) -> Iterator[str]:
    """Yield the lines of `minidiff cache list`, or delete all entries for "clear"."""
    if action == "clear":
        yield f"{folder()}: deleted {clear()} graphs"
        return
    found = list(entries())
    for entry in found:
        days = (time.time() - entry.used) / 86400
        size = f"{entry.bytes / 1e6:8.1f} MB"
        yield f"{entry.path.name[:8]}  {size}  {days:5.1f} days  {entry.title}"
    total = sum(entry.bytes for entry in found)
    yield f"{folder()}: {len(found)} graphs, {total / 1e6:.1f} MB"


def _bound(newest: Path) -> None:
    """Delete the least recently used entries beyond MAX_BYTES, but not the newest."""
    total = 0
    for entry in entries():
        total += entry.bytes
        if total > MAX_BYTES and entry.path != newest:
            shutil.rmtree(entry.path, ignore_errors=True)
