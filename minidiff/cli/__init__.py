"""The command line: demo, train, train-vae, sample, evaluate, …; start with `minidiff --help`.

An error is one line: exit code 2 for a wrong call, 1 for a failure later on; `--debug` shows the
traceback. Each file in `commands` is a command: `add_to` adds its grammar, and the function with
the file's name runs it. `arguments` has the flags that several commands share, `run_options` the
handling of runs, `model_options` that of models.
"""

from minidiff.cli.entry import COMMANDS, main, parser

__all__ = ["COMMANDS", "main", "parser"]
