"""MNIST, read from its four published IDX files, gzipped or not, and Fashion-MNIST like it.

An IDX file is a header of big-endian 32-bit words, then bytes: a magic number 0x0000_08_0d
(type 08 = unsigned byte, d dimensions), d sizes, and their product in bytes.

Fashion-MNIST has files of the same names and sizes; it is known by its folder, FashionMNIST, which
torchvision makes.

Sources: Y. LeCun, C. Cortes, C. Burges, The MNIST database of handwritten digits; H. Xiao,
K. Rasul, R. Vollgraf 2017, Fashion-MNIST, https://arxiv.org/abs/1708.07747 (class names: table 2).
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from minidiff.data.images import ImageData
from minidiff.errors import DataError, one_of

_PREFIX = {"train": "train", "test": "t10k"}
_SIDE = 28
PLACES = ("MNIST/raw", "raw", "FashionMNIST/raw")  # of torchvision, in the folder that it is given
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
           "Bag", "Ankle boot")  # fmt: skip
_MAX_COUNT = 300_000  # limits the damage of a bad header or a gzip bomb


def load(folder: str | Path, split: str = "train") -> ImageData:
    """Read one split from the folder that holds the published files.

    Args:
        folder: folder of train-images-idx3-ubyte and its three siblings, each with or without
            `.gz`; the spelling train-images.idx3-ubyte is also found.
        split: "train" (60,000 images as published) or "test" (10,000).

    Returns:
        Images (N, 1, 28, 28) with labels 0..9; named "fashion-mnist" from a folder FashionMNIST.

    Raises:
        InvalidArgument: another split.
        DataError: names the file that is missing, truncated or of another kind.
    """
    one_of("split", split, _PREFIX)
    folder, prefix = Path(folder), _PREFIX[split]
    image_file = find(folder, f"{prefix}-images", 3)
    label_file = find(folder, f"{prefix}-labels", 1)
    images, labels = read_idx(image_file, (_SIDE, _SIDE)), read_idx(label_file, ())
    if len(images) != len(labels):
        raise DataError(
            f"{label_file}: {len(labels)} labels, "
            f"expected {len(images)}, one for each image of {image_file.name}"
        )
    if len(labels) and int(labels.max()) > 9:
        raise DataError(f"{label_file}: holds label {int(labels.max())}, expected 0..9")
    fashion = "FashionMNIST" in folder.absolute().parts[-2:]
    names = FASHION if fashion else tuple(str(digit) for digit in range(10))
    name = "fashion-mnist" if fashion else "mnist"
    return ImageData(name, images.unsqueeze(1), labels.long(), names)


def is_in(folder: Path) -> bool:
    """Return True if the folder has a file with a name like those of the four."""
    return any(folder.glob("*-ubyte*"))


def find(folder: Path, stem: str, dimensions: int) -> Path:
    """Find the file of `stem` under one of its four known names. Raises DataError."""
    kind = f"idx{dimensions}-ubyte"
    names = [f"{stem}{dot}{kind}{gz}" for dot in "-." for gz in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"{folder}: no MNIST file {names[0]}[.gz] or {names[2]}[.gz] in this folder; "
        "--download / download=True fetches it"
    )


def read_idx(path: Path, item: tuple[int, ...]) -> Tensor:
    """Read an IDX file of unsigned bytes, uint8 (N, *item), to the last byte.

    Raises:
        DataError: an unexpected magic number, size or length.
    """
    dimensions = 1 + len(item)
    with open_idx(path) as file:
        try:
            header = file.read(4 * (1 + dimensions))
            if len(header) < 4 * (1 + dimensions):
                raise DataError(f"{path}: {len(header)} bytes, too short for an IDX header")
            magic, *shape = struct.unpack(f">{1 + dimensions}I", header)
            if magic != 0x0800 + dimensions:
                raise DataError(
                    f"{path}: magic number {magic:#010x}, expected {0x0800 + dimensions:#010x} "
                    f"(unsigned bytes, {dimensions} dimensions)"
                )
            if shape[0] > _MAX_COUNT or tuple(shape[1:]) != item:
                expected = " × ".join(map(str, (f"0..{_MAX_COUNT}", *item)))
                raise DataError(f"{path}: declares sizes {shape}, expected {expected}")
            length = math.prod(shape)
            content = file.read(length + 1)  # one more, to notice bytes after the end
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: truncated or damaged ({error})") from error
    if len(content) != length:
        found = "more" if len(content) > length else f"{len(content)}"
        raise DataError(f"{path}: declares {shape}, so {length} bytes, but {found} follow")
    return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(shape).copy())


def open_idx(path: Path) -> BinaryIO:
    """Open a file, uncompressing it if its first bytes are gzip's. Raises DataError.

    The name is not used, because names are often wrong.
    """
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        return gzip.open(path) if compressed else path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
