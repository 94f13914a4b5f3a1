"""Data sets by name or by folder, as bytes on the device.

load("digits")                      the digits embedded in the package: no download
load("mnist", data_dir="…")         the four published IDX files
load("cifar10", data_dir="…")       the published binary version
load("moons")                       points in a plane, see `minidiff.data.toys`
load("captions")                    coloured digits with captions, drawn batch by batch
load("path/to/folder")              any folder of images
"""

import os
from pathlib import Path

from minidiff.data import toys
from minidiff.data.images import ImageData
from minidiff.data.protocol import Data
from minidiff.data.stream import Stream, batches
from minidiff.data.toys import PointData
from minidiff.errors import DataError, InvalidArgument, one_of, suggestion, true_or_false
from minidiff.images.pixels import to_float, to_uint8
from minidiff.names import DATA_NAMES, DATA_VARIABLE, PUBLISHED, SPLITS
from minidiff.runtime.files import user_path

__all__ = [
    "DATA_VARIABLE", "NAMES", "PUBLISHED", "SPLITS", "TOYS", "Data", "ImageData", "PointData",
    "Stream", "batches", "load", "to_float", "to_uint8",
]  # fmt: skip

NAMES = DATA_NAMES
TOYS = toys.NAMES


def load(
    name: str | Path,
    split: str = "train",
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    download: bool = False,
) -> Data:
    """Load a data set.

    Args:
        name: "digits" (16×16 grey, embedded), "mnist" (28×28 grey), "cifar10" (32×32 RGB),
            "captions" (32×32 RGB, endless, with texts instead of labels), one of `TOYS` for
            points in a plane, or an existing folder of images.
        split: "train" or "test". The test split of a folder is every tenth image of its sorted
            order, see `minidiff.data.folder`.
        data_dir: folder of the published files of mnist or cifar10, or the parent of their folder
            "mnist" or "cifar10"; by default the environment variable MINIDIFF_DATA. The folders
            of torchvision, MNIST/raw and FashionMNIST/raw, are found in it as well.
        image_size: side to which the images of a folder are cropped and resized; by default they
            must all have one size. Named data sets have a fixed size.
        download: fetch missing files of mnist or cifar10 into that sub-folder, checked by size
            and SHA-256, see `minidiff.data.download`.

    Raises:
        InvalidArgument: an unknown name or split, or an argument that this data set does not take.
        DataError: a file is missing or damaged, or could not be downloaded.
        CheckpointError: a folder to download to cannot be written.
    """
    one_of("split", split, SPLITS)
    if data_dir is not None:
        user_path(data_dir, "data_dir")
    if not isinstance(name, str | Path):
        raise InvalidArgument(f"data must be a name or the path of a folder, got {name!r}")
    if str(name).startswith("~"):
        name = user_path(name)
    true_or_false("download", download)
    if name in (*NAMES, *TOYS) and image_size is not None:
        raise InvalidArgument(f"image_size is for folders of images, {name} has its own")
    if name not in PUBLISHED:
        for argument, given in (("data_dir", data_dir is not None), ("download", download)):
            if given:
                raise InvalidArgument(
                    f"{argument} is for {' and '.join(PUBLISHED)}; {name} does not read it"
                )
    if name in TOYS:
        return toys.load(name, split)
    # Imported here, so that Pillow and the embedded file are loaded only when needed.
    if name == "digits":
        from minidiff.data import digits

        return digits.load(split)
    if name == "captions":
        from minidiff.data.captioned import captions

        return captions.CaptionedDigits(split)
    if name in PUBLISHED:
        return _load_published(name, split, data_dir, download)
    if not (name and Path(name).is_dir()):  # Path("") is "."
        raise InvalidArgument(
            f"data must be one of {', '.join(NAMES)}, or the path of an existing folder of "
            f"images (or a toy: {', '.join(TOYS)}); got {str(name)!r}"
            f"{suggestion(str(name), (*NAMES, *TOYS))}"
        )
    from minidiff.data import folder

    return folder.load(name, split, image_size)


def _load_published(
    name: str, split: str, data_dir: str | Path | None, download: bool
) -> ImageData:
    """Read MNIST or CIFAR-10 from `data_dir` or MINIDIFF_DATA, or a folder of its name in it."""
    from minidiff.data import cifar10, mnist
    from minidiff.data.download import download as fetch

    given = data_dir or os.environ.get(DATA_VARIABLE)
    if not given:
        raise InvalidArgument(
            f"{name} is read from its published {PUBLISHED[name]}: pass --data-dir / data_dir= "
            f"with the folder that holds them, or set {DATA_VARIABLE}"
        )
    folder, module = user_path(given), {"mnist": mnist, "cifar10": cifar10}[name]
    if not folder.is_dir() and not download:
        raise DataError(f"{folder}: no such folder, expected the {PUBLISHED[name]} of {name} in it")
    inside = folder / name
    places = [folder / place for place in ("", name, *module.PLACES)]
    found = next((place for place in places if module.is_in(place)), None)
    if found or download or inside.is_dir():
        folder = found or inside
    if download:
        fetch(name, folder)
    return module.load(folder, split)
