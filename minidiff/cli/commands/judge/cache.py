"""minidiff cache"""

import argparse
from typing import Any

from minidiff.cli.arguments import add_command


def add_to(commands: Any) -> None:
    """Add the grammar of minidiff cache."""
    command = add_command(
        commands,
        cache,
        "list or delete the graphs that engines keep",
        "Lists or deletes the exported graphs in the user's cache folder (MINIDIFF_CACHE, or "
        "XDG_CACHE_HOME/minidiff).",
    )
    command.add_argument("action", choices=("list", "clear"))


def cache(options: argparse.Namespace) -> None:
    """Run minidiff cache."""
    from minidiff.engines.cache import report

    for line in report(options.action):
        print(line)
