"""The command line: demo, train, train-vae, sample, evaluate; `minidiff --help` begins it.

Bad input ends in one line: exit code 2 for a wrong call, 1 for what failed later; `--debug` shows
the traceback. A file here is a command, `add_to` its grammar and a function of its name what it
does; `arguments`, `runs` and `models` are what several of them share.
"""

from minidiff.cli.entry import main, parser

__all__ = ["main", "parser"]
