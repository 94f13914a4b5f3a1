"""Models that come with the package: folders of `Pipeline`, weights rounded to float16.

    minidiff sample --model mnist --class 7
    minidiff sample --model digits-text "a green 5 on a white background"

How each was trained, and what it scores, is in the README.
"""

from pathlib import Path

from minidiff.errors import one_of

FOLDER = Path(__file__).with_name("models")
MODELS = {"mnist": "mnist", "digits-text": "captions"}  # name → the data it was trained on


def folder(name: str) -> Path:
    """The folder of a model, for `Pipeline.from_pretrained`. Raises InvalidArgument."""
    one_of("model", name, MODELS)
    return FOLDER / name
