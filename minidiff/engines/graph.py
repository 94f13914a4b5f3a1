"""A network as a graph of tensor operations, with named inputs, by torch.export.

The arguments of a network are tensors and mappings of tensors; those of a graph are a flat list.
`flatten` gives every tensor a name: `added_cond_kwargs.text_embeds`. The number of images may vary
in a graph, and on request the sides of the images.

Source: https://docs.pytorch.org/docs/stable/export.html.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiff.errors import MinidiffError

Run = Callable[[list[Tensor]], list[Tensor]]  # inputs of a graph → its outputs


class EngineError(MinidiffError):
    """A network cannot be exported, or its graph differs from it."""


class Role(NamedTuple):
    """A part of a pipeline, and how it is evaluated.

    Attributes:
        name: "unet", "vae_decoder", …; the name of its files.
        arguments: from the arguments of a call to those of the graph by name, each a tensor, or a
            mapping or sequence of tensors.
        call: (network, **arguments) → tensors, possibly in tuples.
        result: from the outputs of the graph to what the network returns.
        sizes: axes of the first input that may vary besides the number of images.
    """

    name: str
    arguments: Callable[..., dict[str, Any]]
    call: Callable[..., Any]
    result: Callable[[list[Tensor]], Any]
    sizes: tuple[int, ...] = ()


class Input(NamedTuple):
    """An input of a graph: its name, dtype such as "float32", and shape with None for any."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    @classmethod
    def of(cls, name: str, x: Tensor, free: Sequence[int] = (0,)) -> "Input":
        """Return the input that takes x, of any size in the axes `free`."""
        shape = tuple(None if axis in free else side for axis, side in enumerate(x.shape))
        return cls(name, str(x.dtype).removeprefix("torch."), shape)

    def takes(self, name: str, x: Tensor) -> bool:
        """Return True if a tensor of this name fits."""
        sides = zip(self.shape, x.shape, strict=False)
        return (
            name == self.name
            and str(x.dtype) == f"torch.{self.dtype}"
            and x.dim() == len(self.shape)
            and all(side in (None, given) for side, given in sides)
        )


def flatten(value: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """Return the tensors of nested mappings and sequences with their dotted names."""
    if isinstance(value, Tensor):
        return [(name, value)]
    if value is None:
        return []
    entries = value.items() if isinstance(value, Mapping) else enumerate(value)
    return [
        leaf
        for key, entry in entries
        for leaf in flatten(entry, f"{name}.{key}" if name else str(key))
    ]


def rebuild(like: Any, tensors: Iterator[Tensor]) -> Any:
    """Return `like` with other tensors in their places, the inverse of `flatten`."""
    if isinstance(like, Tensor):
        return next(tensors)
    if like is None:
        return None
    if isinstance(like, Mapping):
        return {name: rebuild(entry, tensors) for name, entry in like.items()}
    return [rebuild(entry, tensors) for entry in like]


class Flat(nn.Module):
    """A network with a flat list of tensors as its arguments, and a tuple as its result.

    Args:
        network: network.
        role: how it is evaluated.
        arguments: example of the arguments by name, for their structure.
    """

    def __init__(self, network: nn.Module, role: Role, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.network, self.role, self.arguments = network, role, arguments

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Evaluate the network."""
        arguments = rebuild(self.arguments, iter(tensors))
        return tuple(x for _, x in flatten(self.role.call(self.network, **arguments)))


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, without gradients."""
    was = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(was)


def export_graph(
    network: nn.Module, role: Role, arguments: Mapping[str, Any], *, sizes: bool = False
) -> tuple[torch.export.ExportedProgram, list[Input]]:
    """Return the graph of a network and its inputs.

    Args:
        network: network on the CPU.
        role: how it is evaluated.
        arguments: example by name, with two images or more: 1 would be taken for a constant.
        sizes: whether the sizes of the role may vary too, where the network allows it.
    Raises:
        EngineError: torch.export cannot express the network.
    """
    leaves = flatten(arguments)
    free = [(0, *role.sizes) if sizes and i == 0 else (0,) for i in range(len(leaves))]
    dynamic = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in free)
    try:
        with evaluating(network):
            program = torch.export.export(
                Flat(network, role, arguments),
                tuple(x for _, x in leaves),
                dynamic_shapes=(dynamic,),
            )
    except Exception as error:  # torch.export raises many kinds
        if sizes:
            return export_graph(network, role, arguments)
        raise EngineError(f"{role.name} cannot be exported: {reason_of(error)}") from error
    inputs = [Input.of(name, x, axes) for (name, x), axes in zip(leaves, free, strict=True)]
    return program, inputs


_OPERATOR = re.compile(r"OpOverload\(op='([\w.:]+)'|\b(aten::\w+)|<OpOverload: ([\w.:]+)")


def reason_of(error: BaseException | None) -> str:
    """Return why an export failed in one line: the operator if one is named, or the message."""
    first = " ".join(str(error).split())[:200] or type(error).__name__
    while error is not None:
        if found := _OPERATOR.search(str(error)):
            return f"the operator {found[found.lastindex]} cannot be expressed"
        error = error.__cause__
    return first
