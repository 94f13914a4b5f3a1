"""Entry point of the command line: parses arguments, runs a command, prints errors as a line."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from minidiff import __version__
from minidiff.cli.arguments import Parser, flag_of
from minidiff.errors import InvalidArgument, MinidiffError, Stopped, suggestion

# One folder for each row of README's table, one file for each command.
FOLDERS = {
    "make": (
        "demo",
        "train",
        "distill",
        "train-vae",
        "train-classifier",
        "sample",
        "sculpt",
        "export",
    ),
    "judge": ("evaluate", "check", "list", "cache", "watermark"),
    "understand": ("explore", "explain", "compare", "diff"),
}
COMMANDS = tuple(name for names in FOLDERS.values() for name in names)
PATHS = {
    "out", "resume", "run", "data", "data_dir", "image", "mask", "png", "npz", "gif", "strip",
    "json", "vae",
    "config", "classifier", "init",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; a wrong call imports no torch."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without "‰" prints "?", not a traceback
            stream.reconfigure(errors="replace")
    words, root = sys.argv[1:] if arguments is None else arguments, parser()
    if words and words[0] not in (*COMMANDS, "-h", "--help", "--version"):
        known, hint = ", ".join(COMMANDS), suggestion(words[0], COMMANDS)
        root.error(f"{words[0]!r} is not a command; begin with one of {known}{hint}")
    options = root.parse_args(words)
    if not getattr(options, "uses_torch", True):
        options.command(options)
        return 0
    from minidiff.runtime.device import choose_threads, keep_freed_memory  # they import torch
    from minidiff.runtime.distributed import rank

    keep_freed_memory()
    number = 0
    try:
        number = rank()
        _expand_paths(options)
        choose_threads(options.threads)
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            options.command(options)
    except Stopped as stopped:
        if not number:
            print(f"minidiff: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("\nminidiff: interrupted", file=sys.stderr)
        return 130
    except (MinidiffError, OSError) as error:
        if options.debug:
            raise
        who = f"minidiff (rank {number})" if number else "minidiff"
        print(f"{who}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, InvalidArgument) else 1
    except (MemoryError, RuntimeError) as error:
        if options.debug or not _is_out_of_memory(error):
            raise
        print("minidiff: out of memory; use a smaller --batch-size or model", file=sys.stderr)
        return 1
    return 0


def _print_warning(message: Warning | str, *where: Any) -> None:
    """Print a warning as a line above a progress bar."""
    from tqdm import tqdm

    tqdm.write(f"minidiff: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _expand_paths(options: argparse.Namespace) -> None:
    """Expand "~", which a shell leaves after "=". Raises InvalidArgument for an empty path."""
    for name in PATHS & vars(options).keys():
        if isinstance(value := getattr(options, name), str):
            is_text = name == "run" and getattr(options, "model", None)
            if not value and not is_text:
                flag = name if name == "run" else flag_of(name)
                raise InvalidArgument(f"{flag} must be the path of a file or folder, got ''")
            setattr(options, name, os.path.expanduser(value))


def _is_out_of_memory(error: Exception) -> bool:
    """Return True if torch ran out of memory: an exception type on GPUs, a message on the CPU."""
    words = ("out of memory", "allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def parser() -> Parser:
    """Return the grammar of the command line."""
    root = Parser(
        prog="minidiff",
        description="Diffusion models from scratch. Start with: minidiff demo",
    )
    root.add_argument("--version", action="version", version=f"minidiff {__version__}")
    commands = root.add_subparsers(metavar="COMMAND", required=True)
    for folder, names in FOLDERS.items():
        for name in names:
            module = f"minidiff.cli.commands.{folder}.{name.replace('-', '_')}"
            import_module(module).add_to(commands)
    return root
