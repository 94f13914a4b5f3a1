"""Data sets by name or by folder, as bytes on the device.

load("digits")                      the digits embedded in the package: no download
load("mnist", data_dir="…")         the four published IDX files
load("path/to/folder")              any folder of images
"""

import os
from pathlib import Path

from minidiff.data.images import ImageData, to_float, to_uint8
from minidiff.data.stream import Stream, batches
from minidiff.errors import DataError, InvalidArgument, one_of

__all__ = ["NAMES", "SPLITS", "ImageData", "Stream", "batches", "load", "to_float", "to_uint8"]

NAMES = ("digits", "mnist")
SPLITS = ("train", "test")
_ENVIRONMENT = "MINIDIFF_DATA"


def load(
    name: str | Path,
    split: str = "train",
    data_dir: str | Path | None = None,
    image_size: int | None = None,
) -> ImageData:
    """Load a data set.

    Args:
        name: "digits" (16×16 grey, embedded), "mnist" (28×28 grey), or an existing folder of
            images.
        split: "train" or "test". A folder has no test split of its own: every tenth image of
            its sorted order is held out for it, see `minidiff.data.folder`.
        data_dir: for mnist, the folder that holds the IDX files, or whose sub-folder `mnist`
            does; by default the environment variable MINIDIFF_DATA.
        image_size: for a folder, the side to which images are cropped and resized; by default
            they must all have one size. Named data sets have the size they have.

    Raises:
        InvalidArgument: an unknown name or split, or an argument that this data set has no
            use for.
        DataError: a file is missing or damaged.
    """
    one_of("split", split, SPLITS)
    if name in NAMES and image_size is not None:
        raise InvalidArgument(f"image_size is for folders of images, {name} has its own")
    if name != "mnist" and data_dir is not None:
        raise InvalidArgument(f"data_dir is for mnist; {name} does not read it")
    # Imported here: neither Pillow nor the embedded file costs anything until asked for.
    if name == "digits":
        from minidiff.data import digits

        return digits.load(split)
    if name == "mnist":
        from minidiff.data import mnist

        return mnist.load(_mnist_folder(data_dir), split)
    if not (isinstance(name, str | Path) and name and Path(name).is_dir()):  # Path("") is "."
        raise InvalidArgument(
            f"data must be one of {', '.join(NAMES)}, or the path of an existing folder of "
            f"images; got {str(name)!r}"
        )
    from minidiff.data import folder

    return folder.load(name, split, image_size)


def _mnist_folder(data_dir: str | Path | None) -> Path:
    """The folder to look in: `data_dir` or MINIDIFF_DATA, or the `mnist` folder inside it."""
    given = data_dir or os.environ.get(_ENVIRONMENT)
    if not given:
        raise InvalidArgument(
            "mnist is read from its published IDX files: pass --data-dir / data_dir= with the "
            f"folder that holds them, or set {_ENVIRONMENT}"
        )
    folder = Path(given)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected the IDX files of MNIST in it")
    inside = folder / "mnist"
    return inside if inside.is_dir() and not any(folder.glob("*-ubyte*")) else folder
