"""An untrusted .tar.gz, read member by member.

A member is an ordinary file or a folder under one known top folder. A path outside it, a link, a
device, a duplicate name, or more bytes than allowed stops the reading before that member is used.
Bytes are counted at the output of the decompressor, so neither a large member nor a large header
can fill memory or disk (a "zip bomb").
"""

import contextlib
import gzip
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from minidiff.errors import DataError
from minidiff.runtime.files import atomic_folder

_SUSPICIOUS = ("\\", ":", "\0")  # path syntax of other systems, and the end of a C string


class Member(NamedTuple):
    """One file of an archive.

    Attributes:
        path: path relative to the top folder, without "..".
        size: size in bytes.
        file: content, to be read before the next member is requested.
    """

    path: PurePosixPath
    size: int
    file: "_Named"


def members(archive: Path, top: str, max_bytes: int) -> Iterator[Member]:
    """Yield the files of a .tar.gz below its folder `top`, in order.

    The checksum is at the end of an archive: content is verified only when the iterator ends.

    Args:
        archive: path of the archive.
        top: the one folder that all members must lie in.
        max_bytes: limit of the unpacked size, headers included.
    Raises:
        DataError: unreadable, damaged, larger than `max_bytes`, or a member that is not allowed;
            names the archive and the member. Reading a member raises it too.
    """
    seen = set()
    with (
        _naming(archive),
        gzip.open(archive) as unpacked,
        tarfile.open(fileobj=(counted := _Counted(unpacked, archive, max_bytes)), mode="r|") as tar,
    ):
        for entry in tar:
            path = _checked(archive, entry, top)
            if path in seen:
                raise DataError(f"{archive}: member {entry.name!r} comes twice")
            seen.add(path)
            if entry.isfile():
                yield Member(path, entry.size, _Named(tar.extractfile(entry), archive))
        while counted.read(1 << 16):  # up to gzip's checksum at the end
            pass


def unpack(archive: Path, folder: Path, top: str, max_bytes: int) -> None:
    """Write the files below `top` to `folder/top`, as a whole or not at all.

    Only names and contents are copied: no owner, mode or time. For the other arguments see
    `members`.

    Raises:
        DataError: an error of `members`.
        CheckpointError: the folder cannot be written.
    """
    with atomic_folder(folder / top) as temporary:
        for path, _, file in members(archive, top, max_bytes):
            target = temporary / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as out:
                shutil.copyfileobj(file, out)


@contextlib.contextmanager
def _naming(archive: Path) -> Iterator[None]:
    """Turn the errors of the decompressor and the unpacker into DataError."""
    try:
        yield
    except OSError as error:  # gzip's errors are of this class too
        raise DataError(f"{archive}: cannot be read ({error.strerror or error})") from error
    except (tarfile.TarError, EOFError, zlib.error, ValueError, OverflowError) as error:
        raise DataError(f"{archive}: truncated or damaged ({error})") from error


class _Named:
    """A member's content, whose errors name the archive."""

    def __init__(self, file: BinaryIO, archive: Path) -> None:
        self.file, self.archive = file, archive

    def read(self, count: int = -1) -> bytes:
        with _naming(self.archive):
            return self.file.read(count)


class _Counted(_Named):
    """The output of the decompressor, up to `max_bytes`."""

    def __init__(self, file: BinaryIO, archive: Path, max_bytes: int) -> None:
        super().__init__(file, archive)
        self.left = max_bytes

    def read(self, count: int) -> bytes:
        content = super().read(count)
        self.left -= len(content)
        if self.left < 0:
            raise DataError(f"{self.archive}: unpacks to more bytes than it should")
        return content


def _checked(archive: Path, entry: tarfile.TarInfo, top: str) -> PurePosixPath:
    """Return the path of a member below `top`, if the member is allowed."""
    named = f"{archive}: member {entry.name!r}"
    # A sparse file is small in the archive and declared as large.
    if not (entry.isfile() or entry.isdir()) or entry.issparse():
        raise DataError(f"{named} is a link, a device or sparse, expected files and folders only")
    path = PurePosixPath(entry.name)
    unsafe = path.is_absolute() or ".." in path.parts
    if unsafe or any(mark in entry.name for mark in _SUSPICIOUS) or path.parts[:1] != (top,):
        raise DataError(f"{named} lies outside of {top}/")
    return path.relative_to(top)
