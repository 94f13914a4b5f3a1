"""minidiff export"""

import argparse
from typing import Any

from minidiff.cli.arguments import add_command, add_model
from minidiff.names import GRAPH_FORMATS


def add_to(commands: Any) -> None:
    """Add the grammar of minidiff export."""
    command = add_command(
        commands,
        export,
        "write a model as graphs for other programs",
        "Writes the networks of a model as ONNX, OpenVINO or torch.export graphs, each compared "
        "with torch, with a description of their inputs in export.json. minidiff sample draws "
        "from the folder as well.",
    )
    add_model(command)
    add = command.adder("output")
    add("--format", choices=GRAPH_FORMATS, default="onnx", help="format of the graphs")
    add("-o", "--out", required=True, help="new or empty folder")


def export(options: argparse.Namespace) -> None:
    """Run minidiff export."""
    from minidiff.cli.model_options import model_folder
    from minidiff.runs.folder import open_pipeline
    from minidiff.runtime.device import pick_device

    open_pipeline(model_folder(options), pick_device("cpu")).export(options.out, options.format)
