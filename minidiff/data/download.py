"""The published files of MNIST and CIFAR-10: their URLs, checksums, and download.

Existing files are accepted by their checksum: for MNIST that of the unpacked bytes, so that a copy
that was unpacked, or compressed again, is accepted like the published one.

Sources: Y. LeCun, C. Cortes, C. Burges, The MNIST database of handwritten digits, from the mirrors
that torchvision and TensorFlow use; A. Krizhevsky, https://www.cs.toronto.edu/~kriz/cifar.html
(MD5 c32a1d4ab5d03f1284b67883e8d87530).
"""

import zlib
from pathlib import Path
from typing import NamedTuple

from minidiff.data import cifar10, mnist
from minidiff.data.fetch import Source, fetch, sha256_of
from minidiff.errors import DataError, one_of
from minidiff.runtime import archive
from minidiff.runtime.files import locked

NAMES = ("mnist", "cifar10")
_MAX_BYTES = 1 << 28  # longer than any of these files

_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)


class IdxFile(NamedTuple):
    """One of MNIST's files.

    Attributes:
        stem, dimensions: arguments of `mnist.find`.
        source: published file.
        unpacked: SHA-256 of the unpacked bytes.
    """

    stem: str
    dimensions: int
    source: Source
    unpacked: str


def _idx(stem: str, dimensions: int, size: int, sha256: str, unpacked: str) -> IdxFile:
    name = f"{stem}-idx{dimensions}-ubyte.gz"
    urls = tuple(mirror + name for mirror in _MIRRORS)
    return IdxFile(stem, dimensions, Source(name, size, sha256, urls), unpacked)


MNIST = (
    _idx("train-images", 3, 9_912_422,
         "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
         "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    _idx("train-labels", 1, 28_881,
         "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
         "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    _idx("t10k-images", 3, 1_648_877,
         "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
         "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    _idx("t10k-labels", 1, 4_542,
         "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
         "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
)  # fmt: skip
CIFAR10 = Source(
    cifar10.ARCHIVE,
    170_052_171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    (f"https://www.cs.toronto.edu/~kriz/{cifar10.ARCHIVE}",),
)


def download(name: str, folder: str | Path) -> None:
    """Fetch a data set into a folder, unless it is there. Processes that share it take turns.

    MNIST's four files stay gzipped. CIFAR-10's archive is unpacked to `cifar-10-batches-bin` and
    then deleted; six files of the right length are accepted as they are.

    Args:
        name: "mnist" or "cifar10".
        folder: folder for the files, made if missing.
    Raises:
        InvalidArgument: another name.
        DataError: no mirror delivered a file; the message has its URL, size, checksum and place,
            for fetching it by hand. Or an existing file is not the published one.
        CheckpointError: the folder cannot be written.
    """
    one_of("download", name, NAMES)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error.strerror})") from error
    with locked(folder, wait=True):  # a part written by two processes fails its checksum
        if name == "mnist":
            for file in MNIST:
                if not _has(folder, file):
                    fetch(file.source, folder)
        elif not cifar10.is_unpacked(folder):
            _unpack_cifar10(folder)


def _unpack_cifar10(folder: Path) -> None:
    packed = folder / CIFAR10.name
    if not packed.exists():
        fetch(CIFAR10, folder)
    elif _sha256(packed) != CIFAR10.sha256:
        raise _other(packed, CIFAR10.sha256)
    archive.unpack(packed, folder, cifar10.FOLDER, cifar10.MAX_UNPACKED_BYTES)
    packed.unlink()


def _has(folder: Path, idx: IdxFile) -> bool:
    """Return True if a file of MNIST exists under any of its names, compressed or not.

    Raises:
        DataError: it exists with other bytes.
    """
    try:
        path = mnist.find(folder, idx.stem, idx.dimensions)
    except DataError:
        return False
    with mnist.open_idx(path) as file:
        try:
            same = sha256_of(file, _MAX_BYTES) == idx.unpacked
        except (OSError, EOFError, zlib.error):
            same = False
    if not same:
        raise _other(path, f"{idx.unpacked}, unpacked")
    return True


def _other(path: Path, sha256: str) -> DataError:
    return DataError(
        f"{path}: is not the published file (its SHA-256 is not {sha256}); delete it or move it "
        "away to download it"
    )


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file. Raises DataError."""
    try:
        with path.open("rb") as file:
            return sha256_of(file, _MAX_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
