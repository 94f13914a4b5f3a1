"""minidiff list"""

import argparse
import json
import sys
from typing import Any

from minidiff.lab.catalogue import TABLES, WIDTH, as_text


def add_to(commands: Any) -> None:
    """Add the grammar of minidiff list."""
    help = "list models, data, presets, samplers, objectives and metrics"
    about = "Prints the names that flags take, each with a line. Loads no model and no data."
    command = commands.add_parser("list", help=help, description=about)
    command.set_defaults(command=print_tables, uses_torch=False)
    command.add_argument("kind", nargs="?", choices=list(TABLES), help="part of the list")
    command.adder("output")("--json", action="store_true", help="print JSON")


def print_tables(options: argparse.Namespace) -> None:
    """Run minidiff list."""
    tables = TABLES if options.kind is None else {options.kind: TABLES[options.kind]}
    width = WIDTH if sys.stdout.isatty() else None  # a file or another program gets whole lines
    text = json.dumps(tables, ensure_ascii=False, indent=1) if options.json else None
    print(text or as_text(tables, width))
