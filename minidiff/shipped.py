"""Models that ship with the package: folders of `Pipeline`, weights rounded to float16.

    minidiff sample --model mnist --class 7
    minidiff sample --model mnist-fast --steps 2
    minidiff sample --model digits-text "a green 5 on a white background"
    pipe = shipped.load("mnist")

The README describes how each was trained and evaluated.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from minidiff.errors import one_of

if TYPE_CHECKING:
    from minidiff.pipeline import Pipeline

FOLDER = Path(__file__).with_name("models")
MODELS = {
    "mnist": "mnist",
    "mnist-fast": "mnist",
    "digits-text": "captions",
}  # name → its training data


def folder(name: str) -> Path:
    """Return the folder of a model, for `Pipeline.from_pretrained`. Raises InvalidArgument."""
    one_of("model", name, MODELS)
    return FOLDER / name


def load(name: str) -> "Pipeline":
    """Return the pipeline of a model. Raises InvalidArgument for another name."""
    from minidiff.pipeline import Pipeline  # here, so that naming a model needs no torch

    return Pipeline.from_pretrained(folder(name))
