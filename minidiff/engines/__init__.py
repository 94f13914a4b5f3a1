"""Inference engines: the networks of a pipeline, evaluated by something faster than eager torch.

    graph      a network as a graph of tensor operations, by torch.export
    backends   the engines: how a graph becomes a file, and a file a function
    cache      converted graphs in the user's cache folder
    network    network in, network out: which graph a call needs, and torch where none fits
    optimize   `pipe.optimize`: the choice of an engine, and its place in a pipeline
    exported   `pipe.export`: folders of graphs that other programs run

There is one implementation of every layer, in `nn`; an engine runs its graph. A graph is compared
with torch before it is used.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minidiff.pipeline import Pipeline

__all__ = ["use"]


def use(pipe: "Pipeline", folder: str | Path, engine: str | None) -> None:
    """Evaluate the networks of a pipeline by an engine, or by the graphs of its folder.

    Args:
        pipe: pipeline read from the folder, changed in place.
        folder: folder of a pipeline, perhaps an exported one.
        engine: see `Pipeline.optimize`; None for the graphs of an exported folder, else torch.
    Raises:
        MinidiffError: see `Pipeline.optimize` and `exported.use_graphs`.
    """
    from minidiff.engines import exported

    dtype = str(pipe.dtype).removeprefix("torch.")
    if engine is not None:
        pipe.optimize(engine, dtype)
    elif exported.is_exported(folder) and not pipe.adapters:  # graphs of the base alone
        exported.use_graphs(pipe, folder, dtype)
