"""A resumable download over HTTP, verified by its checksum.

    FOLDER/name.part         bytes received so far
    FOLDER/name.part.json    their URL, and the server's validator of that version
    FOLDER/name              the whole file, after its size and SHA-256 are verified

An interrupted transfer is resumed by a Range request (RFC 9110, section 14), conditional on the
validator (If-Range, section 13.1.5). If a server sends the whole file instead, the transfer begins
again; another range is refused. Mirrors take turns.
"""

import contextlib
import hashlib
import http.client
import os
import re
import socket
import threading
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
MIN_BYTES = 1 << 14  # that a server must send in that time
PAUSE = 1.0  # seconds
MAX_REDIRECTS = 5
BLOCK = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (408, 416, 425, 429)  # client errors after which another request can succeed


class Source(NamedTuple):
    """A published file.

    Attributes:
        name: file name.
        size: size in bytes.
        sha256: SHA-256 in hexadecimal.
        urls: mirrors, in the order of use.
    """

    name: str
    size: int
    sha256: str
    urls: tuple[str, ...]


class _Timely:
    """A connection whose header as a whole must arrive in time; a socket limits each packet."""

    def getresponse(self) -> http.client.HTTPResponse:
        """Return the response. Raises TimeoutError where its header drips."""
        late, connection = threading.Event(), self.sock

        def end() -> None:
            late.set()
            with contextlib.suppress(OSError):  # the server may have closed it
                connection.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self.timeout, end)
        timer.start()
        try:
            return super().getresponse()
        finally:
            timer.cancel()
            if late.is_set():
                raise TimeoutError(f"sent no whole header in {self.timeout:g} seconds")


class _Http(_Timely, http.client.HTTPConnection):
    """A connection by http."""


class _Https(_Timely, http.client.HTTPSConnection):
    """A connection by https."""


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Http, request)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Https, request)


class _Refused(OSError):
    """A response without the file, or the part of it, that was requested."""


class _Hopeless(_Refused):
    """A response that another request would not change."""


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
        source: file to download.
        folder: existing folder, where an interrupted download is resumed.
        attempts: number of requests over all mirrors, which take turns.
        timeout: seconds in which a server must send at least 16 KiB.
        pause: seconds before a mirror is used again, doubled every time.
    Raises:
        DataError: no mirror delivered the file; the message has URLs, size, checksum and place,
            for fetching it by hand. Or the folder cannot be written.
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
    reasons = "; ".join(f"{url}: {reason}" for url, reason in failures.items())
    raise DataError(
        f"{source.name} could not be downloaded ({reasons}). Fetch it by other means from "
        f"{' or '.join(source.urls)} ({source.size} bytes, SHA-256 {source.sha256}) and put it "
        f"into {folder}"
    )


def sha256_of(file: BinaryIO, max_bytes: int) -> str:
    """Return the SHA-256 of an open file in hexadecimal; reading stops after `max_bytes`."""
    digest, count = hashlib.sha256(), 0
    while count <= max_bytes and (block := file.read(BLOCK)):
        digest.update(block)
        count += len(block)
    return digest.hexdigest()


# --- one transfer ----------------------------------------------------------------------------


def _transfer(url: str, source: Source, part: Path, timeout: float) -> None:
    """Complete `part` from this URL and check it.

    When the connection breaks, the bytes received stay in `part`, unless they cannot be right.
    """
    have = part.stat().st_size if part.is_file() else 0
    if have < source.size:
        with _response(url, _request_headers(url, part, have), timeout) as response:
            if response.status == 416:  # no such range: our part belongs to another file
                _forget(part)
            begin = _body_offset(response, source, have)
            _save_note(url, part, response)
            _append(response, source, part, begin, timeout)
    with _open(part, "rb") as file:
        if sha256_of(file, source.size) == source.sha256:
            return
    _forget(part)
    raise _Refused("sent a file of another SHA-256")


def _request_headers(url: str, part: Path, have: int) -> dict[str, str]:
    """Return the headers of a request for the missing bytes, if the file has not changed."""
    headers = {"User-Agent": "minidiff", "Accept-Encoding": "identity"}
    if not have:
        return headers
    headers["Range"] = f"bytes={have}-"
    try:
        note = read_json(_note_path(part))
    except CheckpointError:
        return headers  # without a validator the checksum alone decides
    # Another mirror has other validators and would send everything: the checksum decides there.
    if note.get("url") == url and isinstance(note.get("mark"), str):
        headers["If-Range"] = note["mark"]
    return headers


def _response(url: str, headers: dict[str, str], timeout: float) -> http.client.HTTPResponse:
    """Send a request and follow a few redirections, to http and https only."""
    opener = urllib.request.OpenerDirector()  # the default one reads file: and ftp: URLs too
    for handler in (urllib.request.ProxyHandler, _HttpHandler, _HttpsHandler):
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
        response.close()  # unread: the body may be endless
    raise _Hopeless(f"redirects more than {MAX_REDIRECTS} times")


def _body_offset(response: http.client.HTTPResponse, source: Source, have: int) -> int:
    """Return the offset of the body in the file. Raises _Refused for another file or range."""
    begin = 0
    if response.status == 206:
        given = response.headers["Content-Range"] or ""
        span = re.fullmatch(r"bytes (\d{1,20})-\d{1,20}/(\d{1,20}|\*)", given)
        if not span or int(span[1]) != have or span[2] not in ("*", str(source.size)):
            raise _Refused(f"sent the range {given!r}, expected bytes {have}- of {source.size}")
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
    """Write the body at `begin`, with limits on its length and time, and a bar on a terminal."""
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
    """Yield the body in blocks; a server that sends too slowly times out like a silent one."""
    since, count = time.monotonic(), 0
    # read1 returns one packet, so that the time is checked between packets.
    while block := response.read1(BLOCK):
        yield block
        count += len(block)
        if time.monotonic() - since > timeout:
            if count < MIN_BYTES:
                raise TimeoutError(f"sent only {count} bytes in {timeout:g} seconds")
            since, count = time.monotonic(), 0


# --- local files: their errors are not those of a mirror --------------------------------------


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


def _note_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _save_note(url: str, part: Path, response: http.client.HTTPResponse) -> None:
    """Save the server's validator of this version: a strong ETag, or the last modification."""
    etag = response.headers["ETag"]
    weak = etag is None or etag.startswith("W/")  # not allowed by RFC 9110, section 13.1.5
    mark = response.headers["Last-Modified"] if weak else etag
    write_json(_note_path(part), {"url": url, "mark": mark})


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note_path(part).unlink(missing_ok=True)
