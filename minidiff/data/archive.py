"""A .tar.gz whose author is not trusted, read member by member.

What a member may be: an ordinary file, or a folder, under one known top folder. A path that leaves
it, a link, a device, a name that comes twice, or more bytes than were allowed stops the reading,
before anything of that member is used. The bytes are counted where they leave the decompressor, so
neither a large member nor a large header can take memory or disk (a "zip bomb").
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
        path: below the top folder, relative, without "..".
        size: in bytes.
        file: its content, to be read before the next member is asked for.
    """

    path: PurePosixPath
    size: int
    file: "_Named"


def members(archive: Path, top: str, most: int) -> Iterator[Member]:
    """The files of a .tar.gz below its folder `top`, in their order.

    Args:
        archive: the file.
        top: the one folder that everything must lie in.
        most: bytes that the whole archive may unpack to, headers included.
    Raises:
        DataError: it cannot be read, is damaged, larger than `most`, or holds a member that is
            not allowed; names the archive and the member. So does reading a member's content. The
            checksum comes last: what was read before is good only when the iterator has ended.
    """
    seen = set()
    with (
        _naming(archive),
        gzip.open(archive) as unpacked,
        tarfile.open(fileobj=(counted := _Counted(unpacked, archive, most)), mode="r|") as tar,
    ):
        for entry in tar:
            path = _checked(archive, entry, top)
            if path in seen:
                raise DataError(f"{archive}: member {entry.name!r} comes twice")
            seen.add(path)
            if entry.isfile():
                yield Member(path, entry.size, _Named(tar.extractfile(entry), archive))
        while counted.read(1 << 16):  # to the end, where gzip's checksum is
            pass


def unpack(archive: Path, folder: Path, top: str, most: int) -> None:
    """Write what lies in `top` to `folder/top`, as a whole or not at all.

    Only names and contents are taken over: no owner, mode or time. Arguments as of `members`.

    Raises:
        DataError: as `members`.
        CheckpointError: the folder cannot be written.
    """
    with atomic_folder(folder / top) as temporary:
        for path, _, file in members(archive, top, most):
            target = temporary / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as out:
                shutil.copyfileobj(file, out)


@contextlib.contextmanager
def _naming(archive: Path) -> Iterator[None]:
    """Turn what the decompressor and the unpacker say of bad bytes into one error."""
    try:
        yield
    except OSError as error:  # gzip's own errors are of this kind
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
    """What comes out of the decompressor, to `most` bytes and no further."""

    def __init__(self, file: BinaryIO, archive: Path, most: int) -> None:
        super().__init__(file, archive)
        self.left = most

    def read(self, count: int) -> bytes:
        content = super().read(count)
        self.left -= len(content)
        if self.left < 0:
            raise DataError(f"{self.archive}: unpacks to more bytes than it should")
        return content


def _checked(archive: Path, entry: tarfile.TarInfo, top: str) -> PurePosixPath:
    """The path of a member below `top`, if it is one that may be there."""
    named = f"{archive}: member {entry.name!r}"
    # Of a sparse file the archive holds little and says that it is large.
    if not (entry.isfile() or entry.isdir()) or entry.issparse():
        raise DataError(f"{named} is a link, a device or sparse, expected files and folders only")
    path = PurePosixPath(entry.name)
    unsafe = path.is_absolute() or ".." in path.parts
    if unsafe or any(mark in entry.name for mark in _SUSPICIOUS) or path.parts[:1] != (top,):
        raise DataError(f"{named} lies outside of {top}/")
    return path.relative_to(top)
