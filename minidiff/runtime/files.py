"""Folders on disk: read strictly and written atomically; `weights.py` has their tensors.

Nothing is written in place. A file or a folder is written under a temporary name beside its
target, synced, and renamed; a reader sees the old content or the new, never half of it.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
from safetensors import SafetensorError

from minidiff.errors import CheckpointError, InvalidArgument

MAX_JSON_BYTES = 1 << 20  # a config is a page of text; anything larger is not a config
TEMPORARY = ".minidiff-tmp"  # ends every temporary name, so that no other hidden file is ever ours


class Config(dict):
    """The options of a network or a scheduler: `config["dims"]` and `config.dims` are the same."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Config":
        self = super().__new__(cls)
        self.__dict__ = self  # a scheduler reads its options in every step: found at once
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no option {name!r}") from None


def _sync(path: Path) -> None:
    """Flush a file or a directory entry to the disk, so that a rename cannot overtake it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, on error it is gone.

    Raises:
        CheckpointError: the folder cannot be written, or `path` is no ordinary file.
    """
    path = Path(path)
    with _naming(path):
        _refuse_other_than_a_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(TEMPORARY, f".{path.name}.", path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        with _naming(path):
            yield temporary
            _sync(temporary)
            temporary.chmod(0o666 & ~_umask())  # mkstemp is private; a result is an ordinary file
            os.replace(temporary, path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it replaces `path` as a whole.

    Raises:
        CheckpointError: the folder cannot be written, or `path` is a file.
    """
    path = Path(path)
    with _naming(path):
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"{path}: is a file, expected a folder to write into")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(TEMPORARY, f".{path.name}.", path.parent))
    try:
        with _naming(path):
            yield temporary
            for entry in sorted(temporary.rglob("*")):
                _sync(entry)
            temporary.chmod(0o777 & ~_umask())
            _swap_in(temporary, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what the system says of a path that cannot be written into an error that names it."""
    if "\0" in str(path):
        raise CheckpointError(f"{str(path)!r}: cannot be written (a null byte in the name)")
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{path}: cannot be written ({reason})") from error
    except SafetensorError as error:  # how safetensors reports a full disk
        raise CheckpointError(f"{path}: cannot be written ({error})") from error


def _refuse_other_than_a_file(path: Path) -> None:
    """Refuse a folder, and what a rename would destroy: /dev/null, a pipe, a socket."""
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, expected a file to write")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: is a device or a pipe, expected an ordinary file to write")


def _swap_in(temporary: Path, path: Path) -> None:
    """Put `temporary` at `path`. Directories cannot be renamed over: the old one steps aside."""
    if not path.exists():
        os.rename(temporary, path)
        return
    aside = Path(tempfile.mkdtemp(TEMPORARY, f".{path.name}.old.", path.parent))
    os.rename(path, aside / path.name)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(aside / path.name, path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def is_temporary(path: Path) -> bool:
    """Return whether a name is one that `atomic_file` or `atomic_folder` makes."""
    return path.name.startswith(".") and path.name.endswith(TEMPORARY)


def clear_temporaries(folder: Path) -> None:
    """Delete what a process that was killed left in a folder under temporary names.

    Call it only for a folder of minidiff's own, and under its lock: a process that is still
    writing has temporary names as well.
    """
    for entry in folder.iterdir():
        if is_temporary(entry):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


@contextlib.contextmanager
def locked(folder: str | Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock of a folder, where the system and the file system have locks.

    Args:
        folder: an existing folder; nothing is written into it.
        wait: wait until the other process is done.
    Raises:
        CheckpointError: another process holds the lock, and `wait` is False.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise CheckpointError(f"{folder}: in use by another process of minidiff") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)  # which unlocks


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def ensure_writable(path: str | Path) -> None:
    """Refuse a file that cannot be written, before work starts that would end in it.

    Raises:
        CheckpointError: its folder cannot be made or written, or `path` is no ordinary file.
    """
    path = Path(path)
    with _naming(path):
        _refuse_other_than_a_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent
        ):
            pass


def write_npz(path: str | Path, **arrays: np.ndarray) -> None:
    """Write named arrays as a compressed .npz without pickle. Raises CheckpointError."""
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def write_json(path: str | Path, content: Mapping | list) -> None:
    """Write JSON, indented and sorted as diffusers does. Raises CheckpointError."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_json(path: str | Path, most: int = MAX_JSON_BYTES) -> dict:
    """Read one JSON object of at most so many bytes.

    Raises:
        CheckpointError: missing, unreadable, too large, not UTF-8, not JSON, or not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size > most:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes, a config has at most {most}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # also bad UTF-8, and numbers of 5000 digits
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


MAX_CONFIG_BYTES = 1 << 20


def read_options(path: str | Path) -> dict[str, Any]:
    """Options from a JSON or TOML file: those of a config, or a run's `config.json`.

    Raises:
        CheckpointError: the file is missing, too large or not what its name says.
        InvalidArgument: another kind of file.
    """
    path = Path(path)
    if path.suffix not in (".json", ".toml"):
        raise InvalidArgument(f"config must be a .json or .toml file, got {path}")
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path}: more than {MAX_CONFIG_BYTES} bytes, no config is")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else _toml(text)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid {path.suffix[1:].upper()} ({error})") from error
    if isinstance(content, dict) and isinstance(content.get("train"), dict):
        content = content["train"]  # a run's config.json
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must be a table of options, got {type(content).__name__}")
    return content


def _toml(text: str) -> dict[str, Any]:
    import tomllib  # here, because only a TOML file needs it

    return tomllib.loads(text)
