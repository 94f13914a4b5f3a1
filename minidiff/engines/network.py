"""A network evaluated by an engine: function in, function out.

    Engine(unet, UNET, make)(plain)        (x, t, **condition) → output, like `plain`

A graph belongs to a set of named inputs and their sizes. It is made when a call first needs it.
Where derivatives are wanted, or no graph can be made, the network is evaluated by torch.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiff.engines.graph import EngineError, Flat, Input, Role, Run, evaluating, flatten
from minidiff.errors import InvalidArgument
from minidiff.nn.blocks.embeddings import expand_times
from minidiff.nn.text import TextEncoder, TextEncoding


class Graph(NamedTuple):
    """A graph that can be run: its inputs, and the function; None if torch must be used."""

    inputs: list[Input]
    run: Run | None


Make = Callable[[nn.Module, Role, dict[str, Any]], Graph]


def _floats(value: Any) -> Any:
    """Return tensors in float32, integers in int64, on the device where they are."""
    if isinstance(value, Tensor):
        return value.to(torch.float32 if value.is_floating_point() else torch.int64)
    if isinstance(value, dict):
        return {name: _floats(entry) for name, entry in value.items()}
    return value if value is None else [_floats(entry) for entry in value]


def _unet_arguments(x: Tensor, t: Any, **condition: Any) -> dict[str, Any]:
    given = {name: value for name, value in condition.items() if value is not None}
    return _floats({"sample": x, "timestep": expand_times(x, t), **given})


def _first(outputs: list[Tensor]) -> Tensor:
    return outputs[0]


UNET = Role("unet", _unet_arguments, lambda unet, **given: unet(**given), _first, (2, 3))
GUIDANCE = UNET._replace(name="guidance_network")
VAE = Role(
    "vae_decoder",
    lambda z: _floats({"latents": z}),
    lambda vae, latents: vae.from_latents(latents),
    _first,
    (2, 3),
)


def text_role(encoder: TextEncoder, name: str) -> Role:
    """Return the role of a text encoder; without a projection, its output is not there twice."""
    projects = not isinstance(encoder.text_projection, nn.Identity)

    def call(network: nn.Module, input_ids: Tensor) -> list[Tensor]:
        last, pooled, embeds, hidden = network(input_ids)
        return [last, pooled, *hidden, *((embeds,) if projects else ())]

    def result(outputs: list[Tensor]) -> TextEncoding:
        last, pooled, *hidden = outputs
        return TextEncoding(last, pooled, hidden.pop() if projects else pooled, tuple(hidden))

    return Role(name, lambda ids: {"input_ids": ids.to(torch.int64)}, call, result)


class Engine:
    """A network that an engine evaluates.

    Args:
        network: network.
        role: how it is evaluated.
        make: function that makes a graph for arguments; raises EngineError where it cannot.
        on_failure: called with the error of a graph that cannot be made; torch then evaluates
            such calls.
    """

    def __init__(
        self,
        network: nn.Module,
        role: Role,
        make: Make,
        on_failure: Callable[[EngineError], None],
    ) -> None:
        self.network, self.role, self.make, self.on_failure = network, role, make, on_failure
        self.graphs: list[Graph] = []
        self.state = _state(network)

    def __deepcopy__(self, memo: dict) -> "Engine":
        """Return an engine for the copied network, without graphs, which are made again."""
        network = copy.deepcopy(self.network, memo)
        return Engine(network, self.role, self.make, self.on_failure)

    def __call__(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """Return `plain` evaluated by the engine.

        Args:
            plain: the same function in torch.
        Raises:
            InvalidArgument: the network's weights or modules changed since the engine was made.
        """
        if _state(self.network) != self.state:
            raise InvalidArgument(
                f"the weights of {self.role.name} must be those that pipe.optimize() saw, but "
                "they changed since: call it again"
            )

        def evaluate(x: Tensor, *more: Any, **condition: Any) -> Any:
            # Whoever wants slices or tiles of large images wants less memory than a graph needs.
            in_parts = getattr(self.network, "use_tiling", False) or getattr(
                self.network, "use_slicing", False
            )
            if in_parts or (x.requires_grad and torch.is_grad_enabled()):
                return plain(x, *more, **condition)
            arguments = self.role.arguments(x, *more, **condition)
            run = self.graph_for(arguments).run
            if run is None:
                return plain(x, *more, **condition)
            result = self.role.result(run([tensor for _, tensor in flatten(arguments)]))
            return result.to(x.dtype) if isinstance(result, Tensor) else result

        return evaluate

    def graph_for(self, arguments: dict[str, Any]) -> Graph:
        """Return the graph for these arguments, made if there is none."""
        leaves = flatten(arguments)
        for graph in self.graphs:
            if len(graph.inputs) == len(leaves) and all(
                i.takes(name, x) for i, (name, x) in zip(graph.inputs, leaves, strict=True)
            ):
                return graph
        try:
            graph = self.make(self.network, self.role, arguments)
        except EngineError as error:
            self.on_failure(error)
            graph = Graph([Input.of(name, x) for name, x in leaves], None)
        self.graphs.append(graph)
        return graph


def _state(network: nn.Module) -> list[tuple[int, int]]:
    """Return the identity and the version of all parameters and buffers."""
    tensors = (*network.parameters(), *network.buffers())
    return [(id(tensor), tensor._version) for tensor in tensors]


class EngineEncoder:
    """A text encoder that an engine evaluates; all else is that of the encoder."""

    def __init__(self, encoder: nn.Module, engine: Engine) -> None:
        self.encoder, self.engine = encoder, engine

    def __call__(self, input_ids: Tensor) -> TextEncoding:
        """Encode token numbers (B, L)."""
        return self.engine(self.encoder)(input_ids)

    def __getattr__(self, name: str) -> Any:
        if name == "encoder":  # a copy that is not initialised yet
            raise AttributeError(name)
        return getattr(self.encoder, name)


def doubled(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of at least two images, each repeated: 1 would become a constant."""
    if isinstance(arguments, Tensor):
        return torch.cat([arguments, arguments])
    if isinstance(arguments, dict):
        return {name: doubled(value) for name, value in arguments.items()}
    return [doubled(value) for value in arguments]


def relative_error(network: nn.Module, role: Role, arguments: dict[str, Any], run: Run) -> float:
    """Return the largest relative distance of the outputs of a graph from those of torch."""
    tensors = [x for _, x in flatten(arguments)]
    with evaluating(network):
        expected = Flat(network, role, arguments)(*tensors)
    pairs = zip(run(tensors), expected, strict=True)
    return max(((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in pairs)
