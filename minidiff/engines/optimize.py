"""`pipe.optimize`: the choice of an engine, and its place in a pipeline."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiff.engines import cache as graph_cache
from minidiff.engines.backends import FORMAT_OF, FORMATS, check_format, is_installed
from minidiff.engines.graph import EngineError, Flat, Input, Role, evaluating, flatten
from minidiff.engines.memory import in_parts, is_offloaded
from minidiff.engines.network import (
    GUIDANCE,
    UNET,
    VAE,
    Engine,
    EngineEncoder,
    Graph,
    text_role,
)  # fmt: skip
from minidiff.engines.stored import read_graph, write_graph
from minidiff.errors import InvalidArgument, one_of, true_or_false
from minidiff.names import ENGINES
from minidiff.nn import AutoencoderKL, UNet
from minidiff.pipeline.denoiser import guidance_embedding, network_inputs
from minidiff.pipeline.space import require_images
from minidiff.runtime.cuda_graph import CudaGraph
from minidiff.runtime.device import pick_dtype
from minidiff.text.clip import tokenize
from minidiff.text.prompts import PromptsXL

if TYPE_CHECKING:
    from minidiff.pipeline import Pipeline

Print = Callable[[str], None]
MEMORY = ("normal", "low")


class Choice(NamedTuple):
    """An engine, its number type, and why it was chosen."""

    engine: str
    dtype: torch.dtype
    reason: str


def choose(engine: str, dtype: str, device: torch.device) -> Choice:
    """Return the engine for a device; nothing is measured.

    Args:
        engine: one of `ENGINES`. "auto" is a CUDA graph on a GPU of NVIDIA. On the CPU it is
            OpenVINO for bfloat16 and ONNX Runtime for float32, the faster ones, or the other of
            the two if only that is installed.
        dtype: "float32", "bfloat16", or "auto": bfloat16 where the hardware is faster with it.
        device: device of the networks.
    Raises:
        InvalidArgument: an unknown engine or dtype, or an engine that is not installed or does
            not work on the device.
    """
    one_of("engine", engine, ENGINES)
    number_type = pick_dtype(dtype, device)
    if engine == "auto":
        return _automatic(dtype, number_type, device)
    if engine in FORMAT_OF:
        check_format(FORMAT_OF[engine])
        if device.type != "cpu":
            raise InvalidArgument(f"engine {engine} needs the CPU, but the device is {device.type}")
    if engine == "cuda-graph" and device.type != "cuda":
        raise InvalidArgument(
            f"engine cuda-graph needs an NVIDIA GPU, but the device is {device.type}"
        )
    if engine == "onnxruntime" and number_type != torch.float32:
        if dtype != "auto":
            raise InvalidArgument(f"dtype must be float32 for engine onnxruntime, got {dtype}")
        number_type = torch.float32
    return Choice(engine, number_type, "as given")


def _automatic(dtype: str, number_type: torch.dtype, device: torch.device) -> Choice:
    """Return the engine of "auto"."""
    if device.type == "cuda":
        return Choice("cuda-graph", number_type, "the device is a GPU of NVIDIA")
    if device.type != "cpu":
        return Choice("torch", number_type, f"the only one for {device.type}")
    narrow = number_type == torch.bfloat16
    openvino, onnx = (is_installed(*FORMATS[name].libraries) for name in ("openvino", "onnx"))
    if openvino and (narrow or not onnx):
        return Choice("openvino", number_type, "installed, and the faster one for "
                      + ("bfloat16" if narrow else "float32 that is installed"))  # fmt: skip
    if onnx and not (narrow and dtype != "auto"):
        return Choice("onnxruntime", torch.float32, "installed, and the faster one for float32")
    missing = 'neither openvino nor onnxruntime is installed: pip install "minidiff[onnx]"'
    return Choice("torch", number_type, missing)


def optimize(
    pipe: "Pipeline",
    engine: str = "auto",
    dtype: str = "auto",
    cache: bool = True,
    memory: str = "normal",
    print_line: Print = print,
) -> "Pipeline":
    """Evaluate the networks of a pipeline by an engine; see `Pipeline.optimize`."""
    true_or_false("cache", cache)
    one_of("memory", memory, MEMORY)
    for reason, applies in (("memory='low'", memory == "low"), ("offload()", is_offloaded(pipe))):
        if applies and engine not in ("auto", "torch"):
            raise InvalidArgument(f"engine must be 'torch' with {reason}, got {engine!r}")
        engine = "torch" if applies else engine
    if engine not in ("auto", "torch"):
        require_images(pipe, "engines and export are")
    choice = choose(engine, dtype, pipe.device)
    check_weights(pipe)
    pipe.engines.clear()
    name = str(choice.dtype).removeprefix("torch.")
    low = ", low memory" if memory == "low" else ""
    print_line(f"engine {choice.engine}, {name}{low}: {choice.reason}")
    if choice.engine == "torch" and not low:
        pipe.dtype = choice.dtype
        return pipe
    make = partial(_make, choice=choice, cache=cache, print_line=print_line)
    try:
        attach(pipe, make, lambda error: print_line(f"{error}: torch evaluates it"))
    except EngineError as error:
        if engine != "auto":
            raise
        print_line(f"{error}: engine torch instead")
        pipe.engines.clear()
    return pipe


def check_weights(pipe: "Pipeline") -> None:
    """Refuse weights in another dtype than float32. Raises InvalidArgument."""
    for network in filter(None, (*pipe.unets, pipe.vae)):
        weights = next(network.parameters(), None)
        if weights is not None and weights.dtype != torch.float32:
            raise InvalidArgument(
                f"an engine needs weights in float32, got {weights.dtype}: leave out torch_dtype "
                "of from_pretrained"
            )


def attach(
    pipe: "Pipeline",
    make: Callable[[nn.Module, Role, dict[str, Any]], Graph],
    on_failure: Callable[[EngineError], None],
) -> None:
    """Put an engine into every part of a pipeline, with the graphs of an ordinary call.

    Args:
        pipe: pipeline, changed in place.
        make, on_failure: see `Engine`.
    Raises:
        EngineError: a graph cannot be made.
    """
    for network, role, arguments in parts(pipe):
        engine = Engine(network, role, make, on_failure)
        if arguments is not None:
            engine.graphs.append(make(network, role, arguments))
        pipe.engines[network] = engine
    if pipe.prompts is not None:
        encoders = {e: EngineEncoder(e, pipe.engines.pop(e)) for e in pipe.prompts.encoders}
        pipe.engines[pipe.prompts] = partial(_with_encoders, encoders=encoders)


def _with_encoders(prompts: Any, encoders: dict) -> Any:
    """Return prompts whose text encoders are evaluated by engines."""
    prompts = copy.copy(prompts)
    for name, value in vars(prompts).items():
        if isinstance(value, nn.Module) and value in encoders:
            setattr(prompts, name, encoders[value])
    return prompts


@torch.no_grad()
def parts(pipe: "Pipeline") -> list[tuple[nn.Module, Role, dict[str, Any] | None]]:
    """Return the networks of a pipeline with example arguments; None where a size is unknown.

    Raises:
        InvalidArgument: a pipeline of points or of a transformer, which has no U-Net.
    """
    require_images(pipe, "engines and export are")
    if not isinstance(pipe.unet, UNet):
        raise InvalidArgument(f"engines and export need a UNet, got {type(pipe.unet).__name__}")
    arguments = _unet_example(pipe) if pipe.unet.config.sample_size else None
    found = [(pipe.unet, UNET, arguments)]
    if pipe.guidance_network is not None:
        found.append((pipe.guidance_network, GUIDANCE, arguments))
    if isinstance(pipe.vae, AutoencoderKL):
        latents = None
        if arguments is not None:
            latents = VAE.arguments(arguments["sample"][:, : pipe.space.channels])
        found.append((pipe.vae, VAE, latents))
    if isinstance(pipe.prompts, PromptsXL):
        pairs = (("", pipe.prompts.tokenizer), ("_2", pipe.prompts.tokenizer_2))
        tokens = {suffix: tokenize(tokenizer, [""]) for suffix, tokenizer in pairs}
    else:
        tokens = {} if pipe.prompts is None else {"": pipe.prompts.tokens([""])}
    for suffix, ids in tokens.items():
        encoder = getattr(pipe.prompts, f"text_encoder{suffix}")
        role = text_role(encoder, f"text_encoder{suffix}")
        found.append((encoder, role, role.arguments(ids)))
    return found


def _unet_example(pipe: "Pipeline") -> dict[str, Any]:
    """Return the inputs of the U-Net in an ordinary call, for one image."""
    size = pipe.space.image_size(pipe.space.shape())
    words: Tensor | list[str] | None = None
    if pipe.class_names:
        words = torch.zeros(1, dtype=torch.int64)
    elif pipe.prompts is not None:
        words = [""]
    condition = network_inputs(pipe, words, size)
    if pipe.takes_guidance_scale:
        condition["timestep_cond"] = guidance_embedding(pipe, 1.0, 1)
    _, *sides = pipe.space.shape()
    noise = torch.Generator().manual_seed(0)
    x = torch.randn((1, pipe.unet.config.in_channels, *sides), generator=noise)
    return UNET.arguments(x.to(pipe.device), 1.0, **condition)


def _make(
    network: nn.Module,
    role: Role,
    arguments: dict[str, Any],
    *,
    choice: Choice,
    cache: bool,
    print_line: Print,
) -> Graph:
    """Return a graph of a network for the chosen engine, from the cache if it is there."""
    inputs = [Input.of(name, x) for name, x in flatten(arguments)]
    if choice.engine not in FORMAT_OF:
        return Graph(inputs, _in_process(network, role, arguments, choice))
    format = FORMAT_OF[choice.engine]

    def write(folder: Path) -> dict[str, Any]:
        print_line(f"exporting {role.name} for {choice.engine}, once")
        sides = "×".join("n" if side is None else str(side) for side in inputs[0].shape)
        title = f"{role.name} {sides}, {choice.engine}"
        return {"title": title, **write_graph(folder, network, role, arguments, format)}

    def read(folder: Path, index: dict[str, Any]) -> Graph:
        return read_graph(folder, index, choice.dtype)

    if cache:
        key = graph_cache.key_of(network, role.name, inputs, format)
        return graph_cache.fetch(key, write, read, print_line)
    folder = TemporaryDirectory(prefix="minidiff-", ignore_cleanup_errors=True)
    graph = read(Path(folder.name), write(Path(folder.name)))
    run = graph.run
    return Graph(graph.inputs, lambda tensors, keep=folder: run(tensors))  # files may be mapped


def _in_process(
    network: nn.Module, role: Role, arguments: dict[str, Any], choice: Choice
) -> Callable[[list[Tensor]], list[Tensor]]:
    """Return a network under torch.compile, as a CUDA graph, or in parts of less memory."""
    parts = in_parts(network) if choice.engine == "torch" else network
    flat: nn.Module = Flat(parts, role, arguments)
    if choice.engine == "compile":
        flat = torch.compile(flat)

    def function(*tensors: Tensor) -> list[Tensor]:
        narrow, device = choice.dtype != torch.float32, tensors[0].device.type
        with evaluating(parts), torch.autocast(device, choice.dtype, enabled=narrow):
            return [y.float() if y.is_floating_point() else y for y in flat(*tensors)]

    if choice.engine != "cuda-graph":
        return lambda tensors: function(*tensors)
    captured = CudaGraph(function)
    return lambda tensors: [y.clone() for y in captured(*tensors)]  # the next call overwrites y
