"""Files and folders, read strictly and written atomically; `runtime.tensors` has weights.

Nothing is written in place. A file or a folder is written under a temporary name beside its
target, synced, and renamed. A reader sees the old content or the new, never half of it.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
from safetensors import SafetensorError

from minidiff.errors import CheckpointError, InvalidArgument, suggestion

MAX_JSON_BYTES = 1 << 20  # a config is a page of text; anything larger is not a config
TEMPORARY = ".minidiff-tmp"  # suffix of temporary names; no other hidden file is ever deleted


class Config(dict):
    """The options of a network or a scheduler: `config["dims"]` and `config.dims` are the same."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Config":
        self = super().__new__(cls)
        self.__dict__ = self  # fast: a scheduler reads its options in every step
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no option {name!r}") from None


def user_path(path: str | Path, name: str = "path") -> Path:
    """Return a path with "~" expanded, which a shell leaves as it is after "=".

    Args:
        path: path of a user.
        name: argument that has it, for the message.
    Raises:
        InvalidArgument: neither a text nor a path.
    """
    if not isinstance(path, str | os.PathLike):
        raise InvalidArgument(f"{name} must be the path of a file or folder, got {path!r}")
    return Path(path).expanduser()


def _sync(path: Path) -> None:
    """Flush a file or a directory entry to the disk, so that a rename cannot overtake it.

    Windows flushes only what is open for writing, and no directories.
    """
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not is_folder:
            raise


def _target(path: str | Path) -> Path:
    """Return the path to write to: behind "~" and behind links, which stay links."""
    path = user_path(path)
    try:
        return Path(os.path.realpath(path)) if path.is_symlink() else path
    except (OSError, ValueError):  # not a name of a file: whoever writes says so
        return path


def _mode(path: Path, default: int) -> int:
    """Return the permissions of a file or folder that is replaced, or those of a new one."""
    return path.stat().st_mode & 0o7777 if path.exists() else default & ~_umask()


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on error it is deleted.

    Raises:
        CheckpointError: the folder cannot be written, or `path` is not an ordinary file.
    """
    path = _target(path)
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
            temporary.chmod(_mode(path, 0o666))  # mkstemp makes private files
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
    path = _target(path)
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
            temporary.chmod(_mode(path, 0o777))
            _swap_in(temporary, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn errors of the system into a CheckpointError that names the path."""
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
    """Refuse a folder, and special files that a rename would destroy: /dev/null, a pipe."""
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, expected a file to write")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: is a device or a pipe, expected an ordinary file to write")


def _swap_in(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`, and delete the folder that was there.

    Linux exchanges the two in one step. Elsewhere the old folder is moved aside first, where
    `clear_temporaries` finds it after a kill in between.
    """
    if not path.exists():
        os.rename(temporary, path)
        return
    if _exchange(temporary, path):
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


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, if the system and the file system can."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of <linux/fs.h>
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def is_temporary(path: Path) -> bool:
    """Return True for the temporary names of `atomic_file` and `atomic_folder`."""
    return path.name.startswith(".") and path.name.endswith(TEMPORARY)


def clear_temporaries(folder: Path) -> None:
    """Delete the temporary entries that a killed process left in a folder.

    A folder that was moved aside, and whose replacement never came, is moved back instead.

    Call it only for a folder that minidiff owns, and under its lock: a process that is writing has
    temporary entries as well.
    """
    for entry in folder.iterdir():
        if is_temporary(entry):
            _move_back(entry)
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _move_back(aside: Path) -> None:
    """Put a folder that `_swap_in` moved aside where it was, if nothing is there."""
    if ".old." in aside.name and aside.is_dir():
        for old in aside.iterdir():
            if not (target := aside.parent / old.name).exists():
                os.rename(old, target)


@contextlib.contextmanager
def locked(folder: str | Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock of a folder, if the system and the file system have locks.

    Args:
        folder: existing folder, in which nothing is written.
        wait: wait for a process that holds the lock.
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
        os.close(descriptor)  # releases the lock


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def ensure_writable(path: str | Path) -> None:
    """Check that a file can be written, before the work whose result it is to hold.

    Raises:
        CheckpointError: its folder cannot be made or written, or `path` is not an ordinary file.
    """
    path = _target(path)
    with _naming(path):
        _refuse_other_than_a_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent
        ):
            pass


@contextlib.contextmanager
def announced(path: str | Path, note: str = "") -> Iterator[None]:
    """Print that a file was written in the block, or that one was replaced.

    Args:
        path: file that the block writes.
        note: text after the name.
    """
    word = "replaced" if user_path(path).exists() else "wrote"
    yield
    print(f"{word} {path}{note}")


def write_npz(path: str | Path, **arrays: np.ndarray) -> None:
    """Write named arrays as a compressed .npz without pickle. Raises CheckpointError."""
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def write_json(path: str | Path, content: Mapping | list) -> None:
    """Write JSON, indented and sorted as diffusers does. Raises CheckpointError."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_json(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> dict:
    """Read one JSON object of at most `max_bytes`.

    Raises:
        CheckpointError: missing, unreadable, too large, not UTF-8, not JSON, or not an object.
    """
    return _read_object(user_path(path), "JSON", parse_json, max_bytes)


def read_options(path: str | Path) -> dict[str, Any]:
    """Read the options of a config, JSON or TOML, or those in the `config.json` of a run.

    Raises:
        CheckpointError: the file is missing, too large, or not valid JSON or TOML.
        InvalidArgument: another suffix than .json or .toml.
    """
    path = user_path(path)
    parsers = {".json": parse_json, ".toml": _parse_toml}
    if path.suffix not in parsers:
        raise InvalidArgument(f"config must be a .json or .toml file, got {path}")
    content = _read_object(path, path.suffix[1:].upper(), parsers[path.suffix], MAX_JSON_BYTES)
    options = content.get("train")  # of a run's config.json
    return options if isinstance(options, dict) else content


def _read_object(path: Path, kind: str, parse: Callable[[str], Any], max_bytes: int) -> dict:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if (size := path.stat().st_size) > max_bytes:
        raise CheckpointError(f"{path}: {size} bytes, a config has at most {max_bytes}")
    try:
        content = parse(path.read_text(encoding="utf-8-sig"))  # with or without a byte order mark
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # also bad UTF-8, and numbers of 5000 digits
        raise CheckpointError(
            f"{path}: not valid {kind} ({wrong_content(path) or error})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def wrong_content(path: Path) -> str:
    """Return the usual reason why a file is not of its type; "" if it is none of these."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(100).strip().lower()
        if not start:
            return "the file is empty"
        if start.startswith(b"version https://git-lfs"):
            return "a Git LFS pointer, not the content: run git lfs pull"
        if start.startswith((b"<!doctype", b"<html", b"<?xml")):
            return "a web page saved under this name: download the file again"
    return ""


def existing_folder(path: str | Path) -> Path:
    """Return the path of a folder to read, "~" expanded. Raises CheckpointError."""
    folder = user_path(path)
    if folder.exists():
        return folder
    missing = no_folder(folder)
    if "did you mean" in missing or (folder.parent.is_dir() and folder.parent.name):
        raise CheckpointError(missing)
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", str(path), re.ASCII):
        return folder
    raise CheckpointError(
        f"{folder}: no such folder; names on the Hub are not looked up, download the files first: "
        f"hf download {folder} --local-dir FOLDER"
    )


def no_folder(folder: Path) -> str:
    """Return the message for a folder that is missing, with one beside it of a similar name."""
    beside: list[str] = []
    with contextlib.suppress(OSError):
        beside = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
    return f"{folder}: no such folder{suggestion(folder.name, beside)}"


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError, also for a key that comes twice in one object."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Raises ValueError for a key that comes twice."""
    if len(content := dict(pairs)) < len(pairs):
        raise ValueError(f"a key comes twice among {', '.join(content)}"[:200])
    return content


def _parse_toml(text: str) -> dict[str, Any]:
    import tomllib  # here, because only a TOML file needs it

    return tomllib.loads(text)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
