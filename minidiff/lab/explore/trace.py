"""A network as a list of operators, which a small interpreter in the page runs.

    graph = trace(network, (x, t, labels))
    replay(graph, (x, t, labels))          the same numbers, from the list alone

`torch.export` writes down the operators of one evaluation, with all their arguments. The page has
a function for each of `OPERATORS`; a network with another one is refused by the operator's name.
Matrices are rounded to int8 with a scale per output channel, `quantized`.
"""

import base64
import operator
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from minidiff.errors import MinidiffError

OPERATORS = {
    "add", "sub", "mul", "div", "neg", "exp", "sin", "cos", "sqrt", "silu", "gelu", "relu", "tanh",
    "sigmoid", "softmax", "linear", "matmul", "conv2d", "group_norm", "layer_norm",
    "scaled_dot_product_attention", "embedding", "view", "reshape", "flatten", "unflatten",
    "expand", "transpose", "permute", "unsqueeze", "squeeze", "cat", "split", "chunk", "slice",
    "select", "clone", "contiguous", "arange", "pad", "upsample_nearest2d", "pixel_shuffle",
    "getitem",
}  # fmt: skip
IGNORED = ("_assert_tensor_metadata", "_assert_scalar")
UNUSED = {"dtype", "layout", "device", "pin_memory", "memory_format", "requires_grad"}
MAX_WEIGHTS = 2_450_000  # about 3.3 MB of base64: the page stays below 4 MB


class Untraceable(MinidiffError):
    """A network that the page cannot run; the message names the operator or the reason."""


class Graph(NamedTuple):
    """The operators of one evaluation.

    Attributes:
        nodes: in order; each is ["input"], ["weight", index] or [operator, *arguments], where an
            argument {"r": i} is the result of node i.
        weights: tensors of the ["weight", …] nodes.
        output: number of the node that is the result.
    """

    nodes: list[list[Any]]
    weights: list[Tensor]
    output: int


@torch.no_grad()
def trace(network: nn.Module, inputs: Sequence[Tensor]) -> Graph:
    """Return the operators of network(*inputs), for inputs of these shapes.

    Args:
        network: module whose result is one tensor.
        inputs: example of its arguments.
    Raises:
        Untraceable: `torch.export` fails, or an operator is not one of `OPERATORS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(network, tuple(inputs), strict=False)
            exported = exported.run_decompositions({})  # inlines autocast regions, no more
    except Exception as error:  # torch.export raises whatever it meets
        line = (str(error).strip().splitlines() or ["no message"])[0]
        raise Untraceable(f"torch.export failed: {type(error).__name__}: {line}") from error
    kept = {**exported.state_dict, **exported.constants}
    inside = exported.graph_signature
    named = inside.inputs_to_parameters | inside.inputs_to_buffers
    named = named | inside.inputs_to_lifted_tensor_constants
    nodes: list[list[Any]] = []
    weights: list[Tensor] = []
    number: dict[str, int] = {}
    for node in exported.graph.nodes:
        if node.op == "output":
            break
        if node.op == "call_function" and _name(node.target) in IGNORED:
            continue
        number[node.name] = len(nodes)
        if node.op != "placeholder":
            nodes.append(_call(node, number))
        elif node.name in named:
            nodes.append(["weight", len(weights)])
            weights.append(kept[named[node.name]].detach().float())
        else:
            nodes.append(["input"])
    return Graph(nodes, weights, number[inside.user_outputs[0]])


def _name(target: Any) -> str:
    """Return the name of an operator: "silu" for aten.silu_.default."""
    if target is operator.getitem:
        return "getitem"
    name = str(target).removeprefix("aten.").split(".")[0]
    return name if name.startswith("_") else name.rstrip("_")


def _call(node: torch.fx.Node, number: dict[str, int]) -> list[Any]:
    """Return a node of `Graph`, with the arguments in the order of the operator's schema."""
    name = _name(node.target)
    if name not in OPERATORS or node.op != "call_function":
        raise Untraceable(f"the page has no operator {node.target}")
    if name == "getitem":
        return [name, *(_argument(a, number) for a in node.args)]
    arguments = []
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.name in UNUSED:
            continue
        value = node.kwargs.get(argument.name, argument.default_value)
        value = node.args[place] if place < len(node.args) else value
        arguments.append(_argument(value, number))
    if name == "scaled_dot_product_attention":
        _check_attention(arguments)
    return [name, *arguments]


def _check_attention(arguments: list[Any]) -> None:
    """Refuse masks and dropout. Raises Untraceable."""
    _, _, _, mask, dropout, causal, *_ = arguments
    if mask is not None or dropout or causal:
        raise Untraceable("the page has no attention with a mask or dropout")


def _argument(value: Any, number: dict[str, int]) -> Any:
    """Return an argument as JSON can hold it."""
    if isinstance(value, torch.fx.Node):
        return {"r": number[value.name]}
    if isinstance(value, list | tuple):
        return [_argument(v, number) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise Untraceable(f"the page has no argument of type {type(value).__name__}")


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values and a float32 scale per output channel (dimension 0)."""
    rows = weight.reshape(len(weight), -1)
    scale = rows.abs().amax(dim=1) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
    return (rows / scale[:, None]).round().to(torch.int8).reshape(weight.shape), scale


def dequantized(weight: Tensor) -> Tensor:
    """Return the weight as the page has it: rounded, if it is a matrix or a filter."""
    if weight.ndim < 2:
        return weight
    values, scale = quantized(weight)
    return values.float() * scale.reshape(-1, *[1] * (weight.ndim - 1))


@torch.no_grad()
def round_weights(network: nn.Module) -> nn.Module:
    """Round the weights of a network in place to those of the page, and return it."""
    for weight in network.parameters():
        weight.copy_(dequantized(weight.float()))
    return network


def packed(graph: Graph) -> dict[str, Any]:
    """Return the graph as JSON: nodes, and all weights in one base64 text.

    A weight node becomes ["q", shape, offset, offset of scales] for int8 or ["f", shape, offset]
    for float32, in bytes.

    Raises:
        Untraceable: the network has more than `MAX_WEIGHTS` weights.
    """
    number = sum(weight.numel() for weight in graph.weights)
    if number > MAX_WEIGHTS:
        raise Untraceable(f"{number:,} weights are more than the page's {MAX_WEIGHTS:,}")
    blob, places = bytearray(), []
    for weight in graph.weights:
        if weight.ndim < 2:
            places.append(["f", list(weight.shape), _append(blob, weight.numpy())])
        else:
            values, scale = quantized(weight)
            where = (_append(blob, values.numpy()), _append(blob, scale.numpy()))
            places.append(["q", list(weight.shape), *where])
    nodes = [places[node[1]] if node[0] == "weight" else node for node in graph.nodes]
    return {
        "nodes": nodes,
        "output": graph.output,
        "weights": base64.b64encode(bytes(blob)).decode(),
    }


def _append(blob: bytearray, values: np.ndarray) -> int:
    """Append numbers at a multiple of four bytes, and return their offset."""
    blob.extend(bytes(-len(blob) % 4))
    offset = len(blob)
    kind = "<f4" if values.dtype == np.float32 else values.dtype
    blob.extend(values.astype(kind).tobytes())
    return offset


@torch.no_grad()
def replay(graph: Graph, inputs: Sequence[Tensor], rounded: bool = False) -> Tensor:
    """Run the list of operators, as the page does.

    Args:
        graph: operators and weights from `trace`.
        inputs: arguments of the network, of the shapes that it was traced with.
        rounded: whether matrices are those of the page, in int8.
    """
    given, results = iter(inputs), []
    for name, *arguments in graph.nodes:
        if name == "input":
            results.append(next(given))
        elif name == "weight":
            weight = graph.weights[arguments[0]]
            results.append(dequantized(weight) if rounded else weight)
        else:
            results.append(_run(name, [_resolved(a, results) for a in arguments]))
    return results[graph.output]


def _resolved(argument: Any, results: list[Any]) -> Any:
    if isinstance(argument, dict):
        return results[argument["r"]]
    if isinstance(argument, list):
        return [_resolved(a, results) for a in argument]
    return argument


def _run(name: str, arguments: list[Any]) -> Any:
    """Run one operator on arguments in the order of its schema."""
    if name == "getitem":
        return arguments[0][arguments[1]]
    for overload in map(
        getattr(torch.ops.aten, name).__getattr__, getattr(torch.ops.aten, name).overloads()
    ):
        known = [a for a in overload._schema.arguments if a.name not in UNUSED]
        if len(known) != len(arguments):
            continue
        by_name = {a.name: v for a, v in zip(known, arguments, strict=True)}
        try:
            return overload(**by_name)
        except RuntimeError:  # arguments of another overload
            continue
    raise Untraceable(f"no overload of {name} takes {len(arguments)} arguments")
