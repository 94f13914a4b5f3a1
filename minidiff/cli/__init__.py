"""The command line: demo, train, train-vae, sample, evaluate, …; start with `minidiff --help`.

An error is one line: exit code 2 for a wrong call, 1 for a failure later on; `--debug` shows the
traceback. Each file in `commands` is a command: `add_to` adds its grammar, and the function with
the file's name runs it. `arguments` has the flags that several commands share, `run_options` the
handling of runs, `model_options` that of models.
"""

import sys
from collections.abc import Sequence

__all__ = ["COMMANDS", "main"]

COMMANDS = (
    "demo", "train", "train-vae", "train-classifier", "sample", "evaluate", "explore", "check",
    "explain", "compare", "diff", "list",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; torch is imported only if there is such a one."""
    words = sys.argv[1:] if arguments is None else arguments
    from minidiff.errors import suggestion

    if words and words[0] not in (*COMMANDS, "-h", "--help", "--version"):
        print(
            f"minidiff: {words[0]!r} is not a command; begin with one of {', '.join(COMMANDS)}"
            f"{suggestion(words[0], COMMANDS)} (see minidiff --help)",
            file=sys.stderr,
        )
        raise SystemExit(2)
    from minidiff.cli import entry  # here, because it imports torch

    return entry.main(arguments)


def __getattr__(name: str) -> object:
    """Import `parser` where it is first used (PEP 562)."""
    if name != "parser":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from minidiff.cli.entry import parser

    return parser
