"""A function on a GPU as one launch: its kernels are recorded once and replayed.

A step of a small network is some thousand kernels, which a GPU runs in microseconds each; Python
takes longer to ask for them, and the GPU waits. A CUDA graph is the list of them with all their
addresses, and asking for the list is one call.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs, "whole-network capture".
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WARM_UP = 3  # calls before recording, in which libraries choose their kernels and take memory

Results = Sequence[Tensor | None]


class Recording(NamedTuple):
    """A CUDA graph, where it reads what it is given, and where it leaves its results."""

    graph: torch.cuda.CUDAGraph
    given: list[Tensor]
    results: Results


class CudaGraph:
    """A function that is recorded at the first call with tensors of these shapes, then replayed.

    The results are memory of the recording, which the next call writes to.

    Args:
        function: from tensors on one GPU to a sequence of tensors and None. It asks for the same
            kernels whenever the shapes are the same, never waits for the GPU, and what it changes
            it may change again: it is called some times before it is recorded. Random numbers of
            the default generator are drawn anew in every replay.
    """

    def __init__(self, function: Callable[..., Results]) -> None:
        self.function = function
        self.recordings: dict[tuple, Recording] = {}

    def __call__(self, *given: Tensor) -> Results:
        """What the function makes of these tensors."""
        key = tuple((x.shape, x.stride(), x.dtype) for x in given)
        if key not in self.recordings:
            self.recordings[key] = self._record([x.detach().clone() for x in given])
        recording = self.recordings[key]
        torch._foreach_copy_(recording.given, list(given))
        recording.graph.replay()
        return recording.results

    def _record(self, given: list[Tensor]) -> Recording:
        device, graph = given[0].device, torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.random.fork_rng(devices=[device]):  # a replay draws as a plain call would
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.function(*given)
            torch.cuda.current_stream(device).wait_stream(stream)
            with torch.cuda.graph(graph, stream=stream):
                results = self.function(*given)
        return Recording(graph, given, results)
