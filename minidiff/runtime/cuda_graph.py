"""CUDA graphs: the kernels of a function are captured once and replayed by one launch.

A step of a small network consists of about a thousand kernels, which a GPU runs in microseconds
each. Python takes longer to launch them, and the GPU waits. A CUDA graph is the list of kernels
with all their addresses, and launching it is one call.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs, "whole-network capture".
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WARM_UP = 3  # calls before the capture, in which libraries choose kernels and allocate memory

Results = Sequence[Tensor | None]


class Capture(NamedTuple):
    """A captured graph, with the memory of its inputs and of its results."""

    graph: torch.cuda.CUDAGraph
    given: list[Tensor]
    results: Results


class CudaGraph:
    """A function that is captured at the first call with tensors of some shapes, then replayed.

    The results are memory of the graph, which the next call overwrites.

    Args:
        function: function from tensors on one GPU to a sequence of tensors and None. It launches
            the same kernels whenever the shapes are the same and never waits for the GPU. It is
            called several times before the capture, so its side effects must be repeatable. Random
            numbers of the default generator are drawn again in every replay.
    """

    def __init__(self, function: Callable[..., Results]) -> None:
        self.function = function
        self.captures: dict[tuple, Capture] = {}

    def __call__(self, *given: Tensor) -> Results:
        """Return the function's results for these tensors."""
        key = tuple((x.shape, x.stride(), x.dtype) for x in given)
        if key not in self.captures:
            self.captures[key] = self._capture([x.detach().clone() for x in given])
        capture = self.captures[key]
        torch._foreach_copy_(capture.given, list(given))
        capture.graph.replay()
        return capture.results

    def _capture(self, given: list[Tensor]) -> Capture:
        """Capture the function for inputs of these shapes."""
        device, graph = given[0].device, torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.random.fork_rng(devices=[device]):  # a replay draws as a plain call does
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.function(*given)
            torch.cuda.current_stream(device).wait_stream(stream)
            with torch.cuda.graph(graph, stream=stream):
                results = self.function(*given)
        return Capture(graph, given, results)
