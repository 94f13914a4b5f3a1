"""Models that ship with the package: folders of `Pipeline`, weights rounded to float16.

    minidiff sample --model mnist --class 7
    minidiff sample --model digits-text "a green 5 on a white background"

The README describes how each was trained and evaluated.
"""

from pathlib import Path

from minidiff.errors import one_of

FOLDER = Path(__file__).with_name("models")
MODELS = {"mnist": "mnist", "digits-text": "captions"}  # name → its training data


def folder(name: str) -> Path:
    """Return the folder of a model, for `Pipeline.from_pretrained`. Raises InvalidArgument."""
    one_of("model", name, MODELS)
    return FOLDER / name
