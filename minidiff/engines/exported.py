"""Exported pipelines: a pipeline's folder with the graphs of its networks beside the weights.

    DIR/export.json          per network: files, inputs with dtypes and shapes, error, hashes
    DIR/unet.onnx            or unet.xml and unet.bin, or unet.pt2
    DIR/vae_decoder.onnx     latents of the network → images in [−1, 1]
    DIR/text_encoder.onnx    token numbers → last hidden state, pooled, projected, hidden states
    DIR/model_index.json …   the pipeline itself: scheduler, tokenizer, weights

Other programs run the graphs. minidiff samples such a folder with its own schedulers, and evaluates
the graphs in it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import minidiff
from minidiff.engines.backends import ENGINE_OF, FORMATS, check_format, versions
from minidiff.engines.cache import wrong_file
from minidiff.engines.graph import EngineError
from minidiff.engines.network import Graph
from minidiff.engines.optimize import attach, check_weights, parts
from minidiff.engines.stored import read_graph, write_graph
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.runtime import files
from minidiff.runtime.device import DTYPES
from minidiff.runtime.tensors import digest

if TYPE_CHECKING:
    from minidiff.pipeline import Pipeline

INDEX = "export.json"


def export(
    pipe: "Pipeline", folder: str | Path, format: str = "onnx",
    print_line: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Write an exported pipeline; see `Pipeline.export`. Return the content of export.json."""
    check_format(format)
    check_weights(pipe)
    if pipe.device.type != "cpu":
        raise InvalidArgument(f"export needs the CPU, but the device is {pipe.device}")
    target = files.user_path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: not an empty folder; choose a new or empty one")
    networks = parts(pipe)
    if any(arguments is None for *_, arguments in networks):
        raise InvalidArgument("export needs a network whose config names its sample_size")
    libraries = ("torch", *FORMATS[format].libraries)
    index: dict[str, Any] = {
        "format": format,
        "minidiff": minidiff.__version__,
        "versions": versions(*libraries),
        "parts": {},
    }
    with files.atomic_folder(target) as temporary:
        pipe.save_pretrained(temporary)
        for network, role, arguments in networks:
            entry = write_graph(temporary, network, role, arguments, format, sizes=True)
            index["parts"][role.name] = entry
            print_line(f"{target / entry['file']}: {entry['relative_error']:.1e} relative to torch")
        files.write_json(temporary / INDEX, index)
    return index


def is_exported(folder: str | Path) -> bool:
    """Return whether a folder holds an exported pipeline.

    Raises:
        CheckpointError: it holds graphs, but no export.json.
    """
    folder = files.user_path(folder)
    if (folder / INDEX).is_file():
        return True
    suffixes = {each.suffix for each in FORMATS.values()}
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix in suffixes:
                raise CheckpointError(
                    f"{folder}: has {path.name} but no {INDEX}, which describes it: export again"
                )
    return False


def use_graphs(
    pipe: "Pipeline",
    folder: str | Path,
    dtype: str = "float32",
    print_line: Callable[[str], None] = print,
) -> "Pipeline":
    """Evaluate the networks of a pipeline by the graphs of the exported folder that it is from.

    Args:
        pipe: pipeline read from this folder, on the CPU; changed in place.
        folder: folder that `export` wrote.
        dtype: number type of matrix products; ONNX Runtime has float32 only.
        print_line: called with a sentence for every call that torch evaluates.
    Raises:
        CheckpointError: export.json is missing or damaged, or a graph is damaged or was exported
            from other weights.
        InvalidArgument: an extra is not installed, or the engine has no such dtype.
    """
    folder = files.user_path(folder)
    if not is_exported(folder):
        raise CheckpointError(f"{folder}: has no {INDEX}: not an exported pipeline")
    index = files.read_json(folder / INDEX)
    try:
        entries, engine = dict(index["parts"]), ENGINE_OF[index["format"]]
        for network, role, _ in parts(pipe):
            _check_entry(folder, role.name, entries[role.name], digest(network))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / INDEX}: has no part or format {error}") from error
    pipe.engines.clear()

    def make(network: Any, role: Any, arguments: dict[str, Any]) -> Graph:
        if any(role.name == made for made in used):
            raise EngineError(f"{role.name} was exported for other inputs")
        used.append(role.name)
        return read_graph(folder, entries[role.name], DTYPES[dtype])

    used: list[str] = []
    attach(pipe, make, lambda error: print_line(f"{error}: torch evaluates it"))
    print_line(f"engine {engine}, {dtype}: the graphs of {folder}")
    return pipe


def _check_entry(folder: Path, name: str, entry: dict[str, Any], weights: str) -> None:
    """Refuse the files of a graph that are damaged, or of other weights. Raises CheckpointError."""
    if problem := wrong_file(folder, entry["files"]):
        raise CheckpointError(f"{folder}: {problem}: export again")
    if entry["weights_sha256"] != weights:
        raise CheckpointError(
            f"{folder}: {entry['file']} was exported from other weights than those of {name} "
            "beside it: export again"
        )
