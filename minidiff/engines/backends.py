"""The engines: how a graph becomes files, and files a function from tensors to tensors.

| engine | format | what it is | bfloat16 |
|---|---|---|---|
| onnxruntime | onnx | ONNX Runtime on the CPU, https://onnxruntime.ai | no |
| openvino | openvino | OpenVINO on the CPU, https://docs.openvino.ai | yes |
| | pt2 | torch.export's own format, run by torch | no |
| compile | | torch.compile, in this process only | yes |
| cuda-graph | | the network's kernels captured once, see `runtime.cuda_graph` | yes |
| torch | | the network as it is | yes |

Libraries are imported where they are used; none is needed by the rest of minidiff.
"""

import importlib.metadata
import importlib.util
import io
import json
import logging
import sys
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.engines.graph import EngineError, Input, Run, reason_of
from minidiff.errors import CheckpointError, InvalidArgument, one_of

MAX_SHAPES = 6  # compiled models that OpenVINO keeps, one for each shape of the inputs


class Format(NamedTuple):
    """A file format of graphs.

    Attributes:
        suffix: suffix of the main file.
        extra: extra of minidiff with its libraries; None if torch is enough.
        libraries: modules that must be importable to write it.
        write: (graph, inputs, path) → None.
        load: (path, dtype) → function.
    """

    suffix: str
    extra: str | None
    libraries: tuple[str, ...]
    write: Callable[[Any, Sequence[Input], Path], None]
    load: Callable[[Path, torch.dtype], Run]


def is_installed(*modules: str) -> bool:
    """Return True if all modules can be imported; none is."""
    return all(importlib.util.find_spec(module) is not None for module in modules)


def versions(*libraries: str) -> dict[str, str]:
    """Return the installed versions of libraries, without those that are missing."""
    found = {}
    for name in libraries:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _arrays(tensors: list[Tensor]) -> list[np.ndarray]:
    return [x.detach().contiguous().numpy() for x in tensors]


# --- ONNX ----------------------------------------------------------------------------------------


def _write_onnx(program: Any, inputs: Sequence[Input], path: Path) -> None:
    logger = logging.getLogger("torch.onnx")  # it reports every library that it does not find
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=[each.name for each in inputs]
            )
        exported.save(str(path))
    finally:
        logger.setLevel(before)


def _load_onnx(path: Path, dtype: torch.dtype) -> Run:
    import onnxruntime

    if dtype != torch.float32:
        raise InvalidArgument(f"dtype must be float32 for engine onnxruntime, got {dtype}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    if hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()  # Windows sends them by default
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        feed = dict(zip(names, _arrays(tensors), strict=True))
        return [torch.from_numpy(y) for y in session.run(None, feed)]

    return run


# --- OpenVINO ------------------------------------------------------------------------------------


def _openvino() -> Any:
    """Import OpenVINO, which reports its use to Intel by default, with that switched off."""
    sys.modules.setdefault("openvino_telemetry", None)  # an import fails, and a stub is used
    import openvino
    from openvino.tools.ovc import telemetry_stub, telemetry_utils

    telemetry_utils.tm = telemetry_stub  # also if the program has imported OpenVINO before
    return openvino


def _write_openvino(program: Any, inputs: Sequence[Input], path: Path) -> None:
    openvino = _openvino()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = openvino.convert_model(program)
    for port, each in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({each.name})
    openvino.save_model(model, path, compress_to_fp16=False)


def _load_openvino(path: Path, dtype: torch.dtype) -> Run:
    openvino = _openvino()
    core = openvino.Core()
    model = core.read_model(path)
    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    requests: dict[tuple, Any] = {}

    def request_for(shapes: tuple) -> Any:
        """Return the model compiled for these shapes, a fifth faster than one for all shapes."""
        if shapes not in requests:
            if len(requests) == MAX_SHAPES:
                del requests[next(iter(requests))]
            fixed = model.clone()
            fixed.reshape({p: list(s) for p, s in zip(fixed.inputs, shapes, strict=True)})
            requests[shapes] = core.compile_model(fixed, "CPU", options).create_infer_request()
        return requests[shapes]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        request = request_for(tuple(tuple(x.shape) for x in tensors))
        results = request.infer(_arrays(tensors), share_inputs=True)
        return [torch.from_numpy(results[i]) for i in range(len(results))]

    return run


# --- torch.export --------------------------------------------------------------------------------

_TABLE = "_config.json"  # tables of weights and constants
_EXAMPLES = "/data/sample_inputs/"  # a pickle, which nothing here reads


def _write_pt2(program: Any, inputs: Sequence[Input], path: Path) -> None:
    archive = io.BytesIO()
    torch.export.save(program, archive)
    with zipfile.ZipFile(archive) as written, zipfile.ZipFile(path, "w") as kept:
        for name in written.namelist():
            kept.writestr(name, b"" if _EXAMPLES in name else written.read(name))


def _refuse_pickles(path: Path) -> None:
    """Refuse an archive in which anything is pickled. Raises CheckpointError."""
    try:
        with zipfile.ZipFile(path) as archive:
            files = archive.infolist()
            tables = [json.loads(archive.read(f)) for f in files if f.filename.endswith(_TABLE)]
            entries = [entry for table in tables for entry in table["config"].values()]
            pickled = any(entry["use_pickle"] for entry in entries)
    except (zipfile.BadZipFile, ValueError, LookupError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is no graph of torch.export: {reason_of(error)}") from None
    if pickled or any(_EXAMPLES in file.filename and file.file_size for file in files):
        raise CheckpointError(f"{path} contains a pickle, which may run code; export it again")


def _load_pt2(path: Path, dtype: torch.dtype) -> Run:
    _refuse_pickles(path)
    module = torch.export.load(str(path)).module()

    def run(tensors: list[Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return [y.float() if y.is_floating_point() else y for y in module(*tensors)]

    return run


FORMATS = {
    "onnx": Format(".onnx", "onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _load_onnx),
    "openvino": Format(".xml", "openvino", ("openvino",), _write_openvino, _load_openvino),
    "pt2": Format(".pt2", None, (), _write_pt2, _load_pt2),
}
FORMAT_OF = {"onnxruntime": "onnx", "openvino": "openvino"}  # engine → format
ENGINE_OF = {"onnx": "onnxruntime", "openvino": "openvino", "pt2": "torch.export"}


def check_format(name: str) -> Format:
    """Return a format whose libraries are installed.

    Raises:
        InvalidArgument: an unknown format, or one whose extra is not installed.
    """
    one_of("format", name, FORMATS)
    found = FORMATS[name]
    for module in found.libraries:
        if not is_installed(module):
            raise InvalidArgument(
                f"{name} needs the library {module}, which is not installed: "
                f'pip install "minidiff[{found.extra}]"'
            )
    return found


def write(program: Any, inputs: Sequence[Input], format: str, path: Path) -> None:
    """Write a graph as `path` and files beside it.

    Raises:
        EngineError: the format cannot express an operator, which the error names.
        InvalidArgument: an unknown format, or one whose extra is not installed.
    """
    writer = check_format(format).write
    try:
        writer(program, inputs, path)
    except Exception as error:  # each library raises its own kinds
        raise EngineError(f"{format}: {path.stem} cannot be written: {reason_of(error)}") from error
