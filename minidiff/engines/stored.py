"""A graph as files: written, compared with torch, described by an index, and read again.

The index of a graph names its inputs, the SHA-256 of its files and of the weights, and how far its
outputs were from torch's. It stands in the cache and in exported folders.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from minidiff.engines import backends
from minidiff.engines.graph import EngineError, Input, Role, export_graph
from minidiff.engines.network import Graph, doubled, relative_error
from minidiff.errors import CheckpointError
from minidiff.runtime import files
from minidiff.runtime.tensors import digest

MAX_ERROR = 1e-4  # relative, of an output in float32


def write_graph(
    folder: Path,
    network: nn.Module,
    role: Role,
    arguments: dict[str, Any],
    format: str,
    *,
    sizes: bool = False,
) -> dict[str, Any]:
    """Write the graph of a network, compare it with torch, and return its index.

    Args:
        folder: existing folder.
        network: network on the CPU, in float32.
        role: how it is evaluated; its name is that of the files.
        arguments: example by name.
        format: "onnx", "openvino" or "pt2".
        sizes: whether the sides of the images may vary, where the network allows it.
    Raises:
        EngineError: the network cannot be exported, or the graph differs from torch.
        InvalidArgument: an unknown format, or one whose extra is not installed.
    """
    backend = backends.check_format(format)
    example = doubled(arguments)
    program, inputs = export_graph(network, role, example, sizes=sizes)
    path = folder / f"{role.name}{backend.suffix}"
    backends.write(program, inputs, format, path)
    # Twice the images of the export: a number that was taken for a constant shows here.
    error = relative_error(network, role, doubled(example), backend.load(path, torch.float32))
    if not error <= MAX_ERROR:
        raise EngineError(
            f"{format}: {role.name} differs from torch by {error:.1e}, more than {MAX_ERROR:g}"
        )
    return {
        "format": format,
        "file": path.name,
        "files": {file.name: files.sha256(file) for file in sorted(folder.glob(f"{role.name}.*"))},
        "inputs": [each._asdict() for each in inputs],
        "relative_error": error,
        "weights_sha256": digest(network),
    }


def read_graph(folder: Path, index: dict[str, Any], dtype: torch.dtype) -> Graph:
    """Return the graph of an index.

    Args:
        folder: folder of its files, whose SHA-256 have been checked.
        index: index that `write_graph` returned.
        dtype: number type of matrix products, if the engine has a choice.
    Raises:
        CheckpointError: the index has missing or wrong entries.
        InvalidArgument: an extra is not installed, or the engine has no such dtype.
    """
    try:
        format, file = index["format"], index["file"]
        inputs = [Input(i["name"], i["dtype"], tuple(i["shape"])) for i in index["inputs"]]
        known = format in backends.FORMATS and file in index["files"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: the index of a graph has no {error}") from error
    if not known:
        raise CheckpointError(f"{folder}: the index of a graph names {format!r} and {file!r}")
    return Graph(inputs, backends.check_format(format).load(folder / file, dtype))
