"""minidiff explore"""

import argparse
from pathlib import Path
from typing import Any

from minidiff.cli.arguments import add_command, add_model
from minidiff.errors import InvalidArgument


def add_to(commands: Any) -> None:
    """Add the grammar of minidiff explore."""
    command = add_command(
        commands,
        explore,
        "write a web page in which you can try every sampler",
        "Writes one HTML file that needs neither a server nor a connection: drag the data, switch "
        "samplers, schedules and steps, and watch. With a model, its network runs in the page "
        "if it is small enough; otherwise the page has pictures of its predictions.",
    )
    add_model(command)
    command.set_defaults(sampler=None)
    command.adder("model")("--text", action="append", default=[], metavar="PROMPT",
        help="prompt to offer, for a model trained on captions; may be repeated")  # fmt: skip
    command.adder("sampling")("--plugin", action="append", default=[], metavar="FILE:CLASS",
        help="custom sampler to add, such as mine.py:MySampler; may be repeated")  # fmt: skip
    command.adder("output")("-o", "--out", default="explore.html", help="file to write")


def explore(options: argparse.Namespace) -> None:
    """Run minidiff explore."""
    from minidiff.cli.model_options import open_model
    from minidiff.lab.explore import page
    from minidiff.lab.plugin import load_plugin
    from minidiff.runtime import files

    if Path(options.out).suffix.lower() not in (".html", ".htm"):
        raise InvalidArgument(f"--out must be a .html file, got {options.out}")
    files.ensure_writable(options.out)
    plugins = {spec.rpartition(":")[2]: load_plugin(spec) for spec in options.plugin}
    has_model = options.run is not None or options.model is not None
    if options.text and not has_model:
        raise InvalidArgument("--text is for a model: give a run or --model")
    pipe = open_model(options, "float32") if has_model else None
    name = options.model or Path(options.run or "").resolve().name
    made = page(pipe, name, plugins, options.text)
    for note in made.notes:
        print(f"note: {note}")
    size = f" ({len(made.html.encode()) / 1e6:.1f} MB); open it in a browser"
    with files.announced(options.out, size):
        made.write(options.out)
