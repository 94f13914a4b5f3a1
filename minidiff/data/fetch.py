"""Fetch a file over HTTP, resumable, and believe nothing but its checksum.

    FOLDER/name.part         what has come so far
    FOLDER/name.part.json    where it came from, and the server's mark of that version
    FOLDER/name              the whole file, once its size and SHA-256 are the expected ones

A transfer that breaks off is taken up where it stopped, by a Range request (RFC 9110, section 14),
conditional on the mark (If-Range, section 13.1.5). A server that answers with the whole file is
obeyed, one that answers with another part is refused; neither is appended. Mirrors take turns.
"""

import hashlib
import http.client
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import urljoin, urlsplit

from minidiff.errors import CheckpointError, DataError
from minidiff.runtime.files import atomic_file, read_json, write_json

ATTEMPTS = 5  # over all mirrors
TIMEOUT = 30.0  # seconds
LEAST = 1 << 14  # bytes that a server must send in that time
PAUSE = 1.0  # seconds
MAX_REDIRECTS = 5
BLOCK = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (408, 416, 425, 429)  # client errors after which asking again can help


class Source(NamedTuple):
    """A published file.

    Attributes:
        name: of the file.
        size: in bytes.
        sha256: of the file.
        urls: where it is, the first being asked first.
    """

    name: str
    size: int
    sha256: str
    urls: tuple[str, ...]


class _Refused(OSError):
    """A server's answer that is not the file, or the part of it, that was asked for."""


class _Hopeless(_Refused):
    """An answer that will be the same next time."""


def fetch(
    source: Source,
    folder: str | Path,
    *,
    attempts: int = ATTEMPTS,
    timeout: float = TIMEOUT,
    pause: float = PAUSE,
) -> Path:
    """Download one file to `folder/source.name` and return its path.

    Args:
        source: what and where from.
        folder: exists; what an earlier call left there is gone on with.
        attempts: how often to ask, mirrors taking turns.
        timeout: seconds after which a server that sends nothing, or less than 16 KiB, is left.
        pause: seconds before a mirror is asked again, doubled every time.
    Raises:
        DataError: no mirror gave the file; the message has URLs, size, checksum and place, for
            fetching it by hand. Or the folder cannot be written.
    """
    part = Path(folder, f"{source.name}.part")
    mirrors, failures = list(source.urls), {}
    for _ in range(attempts):
        if not mirrors:
            break
        url = mirrors.pop(0)
        if url in failures:
            time.sleep(pause)
            pause *= 2
        try:
            _transfer(url, source, part, timeout)
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures[url] = " ".join((str(error) or type(error).__name__).split())
            if not isinstance(error, _Hopeless):
                mirrors.append(url)
        else:
            target = part.with_name(source.name)
            with atomic_file(target) as temporary:
                os.replace(part, temporary)
            _forget(part)
            return target
    told = "; ".join(f"{url}: {reason}" for url, reason in failures.items())
    raise DataError(
        f"{source.name} could not be downloaded ({told}). Fetch it by other means from "
        f"{' or '.join(source.urls)} ({source.size} bytes, SHA-256 {source.sha256}) and put it "
        f"into {folder}"
    )


def sha256_of(file: BinaryIO, most: int) -> str:
    """SHA-256 of an open file in hexadecimal; after `most` bytes and a few it reads no further."""
    digest, come = hashlib.sha256(), 0
    while come <= most and (block := file.read(BLOCK)):
        digest.update(block)
        come += len(block)
    return digest.hexdigest()


# --- one transfer ----------------------------------------------------------------------------


def _transfer(url: str, source: Source, part: Path, timeout: float) -> None:
    """Bring `part` to its whole length from this URL and check it.

    What has come stays in `part` when the connection breaks, unless it cannot be right.
    """
    have = part.stat().st_size if part.is_file() else 0
    if have < source.size:
        with _answer(url, _asking(url, part, have), timeout) as response:
            if response.status == 416:  # no such part there: what is here is of another file
                _forget(part)
            begin = _begin(response, source, have)
            _note(url, part, response)
            _append(response, source, part, begin, timeout)
    with _open(part, "rb") as file:
        if sha256_of(file, source.size) == source.sha256:
            return
    _forget(part)
    raise _Refused("sent a file of another SHA-256")


def _asking(url: str, part: Path, have: int) -> dict[str, str]:
    """The headers that ask for what is missing, on condition that the file has not changed."""
    headers = {"User-Agent": "minidiff", "Accept-Encoding": "identity"}
    if not have:
        return headers
    headers["Range"] = f"bytes={have}-"
    try:
        note = read_json(_note_of(part))
    except CheckpointError:
        return headers  # without a mark the checksum alone decides
    # Another mirror has marks of its own and would send everything: the checksum decides there.
    if note.get("url") == url and isinstance(note.get("mark"), str):
        headers["If-Range"] = note["mark"]
    return headers


def _answer(url: str, headers: dict[str, str], timeout: float) -> http.client.HTTPResponse:
    """Ask, and follow a few redirections, to http and https only."""
    opener = urllib.request.OpenerDirector()  # the usual one would read file: and ftp: URLs too
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
    ):
        opener.add_handler(handler())
    for _ in range(1 + MAX_REDIRECTS):
        if urlsplit(url).scheme not in ("http", "https"):
            raise _Hopeless(f"leads to {url[:200]}, expected http or https")
        try:
            response = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
        except urllib.error.URLError as error:
            known = not isinstance(error.reason, socket.gaierror)  # else: no such host, no network
            raise (_Refused if known else _Hopeless)(str(error.reason)) from error
        if response.status not in _REDIRECTS:
            return response
        url = urljoin(url, response.headers["Location"] or "")
        response.close()  # unread: it may never end
    raise _Hopeless(f"redirects more than {MAX_REDIRECTS} times")


def _begin(response: http.client.HTTPResponse, source: Source, have: int) -> int:
    """Where in the file the body begins. Raises _Refused if it is of another file or place."""
    begin = 0
    if response.status == 206:
        given = response.headers["Content-Range"] or ""
        span = re.fullmatch(r"bytes (\d{1,20})-\d{1,20}/(\d{1,20}|\*)", given)
        if not span or int(span[1]) != have or span[2] not in ("*", str(source.size)):
            raise _Refused(f"sent the range {given!r}, asked for bytes {have}- of {source.size}")
        begin = have
    elif response.status != 200:
        lasting = 400 <= response.status < 500 and response.status not in _BUSY
        raise (_Hopeless if lasting else _Refused)(f"HTTP status {response.status}")
    length = response.headers["Content-Length"]
    if length is not None and length != str(source.size - begin):
        raise _Refused(f"announced {length} bytes, expected {source.size - begin}")
    return begin


def _append(
    response: http.client.HTTPResponse, source: Source, part: Path, begin: int, timeout: float
) -> None:
    """Write the body at `begin`, watching its length and its pace, and show a bar on a terminal."""
    from tqdm import tqdm

    bar = tqdm(total=source.size, initial=begin, unit="B", unit_scale=True, desc=source.name,
               disable=None)  # fmt: skip
    with bar, _open(part, "ab") as file:
        file.truncate(begin)
        for block in _paced(response, timeout):
            begin += len(block)
            if begin > source.size:
                _forget(part)
                raise _Refused(f"sent more than the {source.size} bytes of the file")
            _write(file, block)
            bar.update(len(block))
    if begin < source.size:
        raise _Refused(f"broke off after {begin} of {source.size} bytes")


def _paced(response: http.client.HTTPResponse, timeout: float) -> Iterator[bytes]:
    """The body in blocks; a server that drips a byte now and then times out as a silent one."""
    since, come = time.monotonic(), 0
    # read1 returns what one packet brought, so that the clock is looked at between packets.
    while block := response.read1(BLOCK):
        yield block
        come += len(block)
        if time.monotonic() - since > timeout:
            if come < LEAST:
                raise TimeoutError(f"sent only {come} bytes in {timeout:g} seconds")
            since, come = time.monotonic(), 0


# --- the files on this side: what is wrong with them is no mirror's fault ---------------------


def _open(part: Path, mode: str) -> BinaryIO:
    try:
        return part.open(mode, buffering=0)
    except OSError as error:
        raise DataError(f"{part}: cannot be opened ({error.strerror})") from error


def _write(file: BinaryIO, block: bytes) -> None:
    try:
        while block := block[file.write(block) :]:
            pass
    except OSError as error:
        raise DataError(f"{file.name}: cannot be written ({error.strerror})") from error


def _note_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _note(url: str, part: Path, response: http.client.HTTPResponse) -> None:
    """Keep the server's mark of this version: a strong ETag, or the date of the last change."""
    etag = response.headers["ETag"]
    weak = etag is None or etag.startswith("W/")  # which RFC 9110, section 13.1.5, forbids
    mark = response.headers["Last-Modified"] if weak else etag
    write_json(_note_of(part), {"url": url, "mark": mark})


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note_of(part).unlink(missing_ok=True)
