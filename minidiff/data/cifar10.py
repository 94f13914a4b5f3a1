"""CIFAR-10, read from its published binary version, unpacked or as the .tar.gz.

    data_batch_1.bin … data_batch_5.bin, test_batch.bin      10,000 records each

A record is a label byte, 0..9, and 3,072 pixel bytes: the red, the green and the blue plane of a
32×32 image, row by row. A file has no header, so only its length, that of 10,000 records, reveals
a truncation. The Python version of the data is a pickle and not read.

Source: A. Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images",
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from minidiff.data.images import ImageData
from minidiff.errors import DataError, one_of
from minidiff.runtime import archive

FOLDER = "cifar-10-batches-bin"  # the archive's only folder
ARCHIVE = "cifar-10-binary.tar.gz"
FILES = {"train": tuple(f"data_batch_{k}.bin" for k in range(1, 6)), "test": ("test_batch.bin",)}
NAMES_FILE = "batches.meta.txt"
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer",
               "dog", "frog", "horse", "ship", "truck")  # fmt: skip
SHAPE = (3, 32, 32)
RECORDS = 10_000
RECORD = 1 + 3 * 32 * 32
PLACES = ()  # further folders that the files may lie in
PICKLED = ("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1", "batches.meta")
MAX_UNPACKED_BYTES = 6 * RECORDS * RECORD + (1 << 20)  # of the archive with its two text files


def load(folder: str | Path, split: str = "train") -> ImageData:
    """Read one split.

    Args:
        folder: folder of the six files, of `cifar-10-batches-bin` with them, or of
            `cifar-10-binary.tar.gz`; the first of these that exists is read.
        split: "train" (50,000 images) or "test" (10,000).
    Returns:
        Images (N, 3, 32, 32) with labels 0..9.
    Raises:
        InvalidArgument: another split.
        DataError: names the file that is missing, truncated or of another kind.
    """
    one_of("split", split, FILES)
    folder, names = Path(folder), FILES[split]
    records = torch.empty(len(names), RECORDS, RECORD, dtype=torch.uint8)
    missing = dict(zip(names, records, strict=True))
    for name, size, file in _files(folder, names):
        if name == NAMES_FILE:
            _check_class_names(file, f"{folder}: {name}")
        elif name in missing:
            _read(file, size, missing.pop(name), f"{folder}: {name}")
    if missing:
        raise DataError(f"{folder}: no {', '.join(missing)} of CIFAR-10's binary version")
    flat = records.view(-1, RECORD)
    labels, images = flat[:, 0].long(), flat[:, 1:].reshape(-1, *SHAPE)
    return ImageData("cifar10", images, labels, CLASS_NAMES)


def is_in(folder: Path) -> bool:
    """Return True for a folder with CIFAR-10, or a part of it, in one of the three forms."""
    return _unpacked(folder) is not None or (folder / ARCHIVE).is_file()


def is_unpacked(folder: Path) -> bool:
    """Return True if the six files lie in the folder, or in `cifar-10-batches-bin` in it.

    Raises:
        DataError: only some of them do, or one has another length.
    """
    place = _unpacked(folder)
    if place is None:
        return False
    for name in FILES["train"] + FILES["test"]:
        path = place / name
        if not path.is_file() or path.stat().st_size != RECORDS * RECORD:
            raise DataError(f"{path}: missing or not {RECORDS * RECORD} bytes long, beside other "
                            f"files of CIFAR-10; delete {place} or complete it")  # fmt: skip
    return True


def _unpacked(folder: Path) -> Path | None:
    """Return the folder with the files, this one or the one in it; None without files."""
    known = FILES["train"] + FILES["test"]
    for place in (folder, folder / FOLDER):
        if any((place / name).is_file() for name in known):
            return place
    return None


def _files(folder: Path, names: tuple[str, ...]) -> Iterator[tuple[str, int, BinaryIO]]:
    """Yield the files of these names that exist, and the class names: name, size, content."""
    place = _unpacked(folder)
    if not is_in(folder):
        if pickled := next((name for name in PICKLED if (folder / name).exists()), None):
            raise DataError(
                f"{folder / pickled}: CIFAR-10's Python version, whose files are pickles and can "
                f"run code, is not read; fetch its binary version, {ARCHIVE}: "
                "--download / download=True"
            )
        raise DataError(
            f"{folder}: no {names[0]}, no {FOLDER}/{names[0]} and no {ARCHIVE}, "
            "expected CIFAR-10's binary version in one of these forms; "
            "--download / download=True fetches it"
        )
    if place is None:
        for member in archive.members(folder / ARCHIVE, FOLDER, MAX_UNPACKED_BYTES):
            yield member.path.as_posix(), member.size, member.file
        return
    for path in (place / name for name in (NAMES_FILE, *names)):
        if path.is_file():
            try:
                with path.open("rb") as file:
                    yield path.name, path.stat().st_size, file
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _read(file: BinaryIO, size: int, into: Tensor, named: str) -> None:
    """Fill the records (N, 3073) of one file and check their labels."""
    if size != into.numel():
        raise DataError(
            f"{named} has {size} bytes, expected {into.numel()}: {RECORDS} records of {RECORD}"
        )
    content = file.read(size)
    if len(content) != size:
        raise DataError(f"{named} is truncated: {len(content)} of {size} bytes")
    into.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8).view(into.shape))
    wrong = (into[:, 0] > 9).nonzero()
    if len(wrong):
        record = int(wrong[0])
        raise DataError(
            f"{named} has label {int(into[record, 0])} in record {record}, expected 0..9"
        )


def _check_class_names(file: BinaryIO, named: str) -> None:
    """Refuse other class names or another order, in which labels have another meaning."""
    names = tuple(file.read(4096).decode("utf-8", errors="replace").split())
    if names != CLASS_NAMES:
        raise DataError(f"{named} names the classes {', '.join(names)[:200]}, expected "
                        f"{', '.join(CLASS_NAMES)}")  # fmt: skip
