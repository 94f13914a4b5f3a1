"""Downloads from faulty servers on this machine, and malicious archives."""

import gzip
import hashlib
import io
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from minidiff import data
from minidiff.data import cifar10, download, fetch
from minidiff.data.fetch import Source
from minidiff.errors import CheckpointError, DataError, InvalidArgument
from minidiff.runtime import archive

CONTENT = np.random.default_rng(0).bytes(200_000)
HALF = len(CONTENT) // 2
ETAG = '"one"'


class Server:
    """A server that answers the k-th request by the k-th act, and further ones by the last."""

    def __init__(self) -> None:
        self.acts: list[Callable] = [whole]
        self.requests: list = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                act = server.acts[min(len(server.requests), len(server.acts) - 1)]
                server.requests.append((self.path, dict(self.headers)))
                act(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/file.bin"

    @property
    def ranges(self) -> list[str | None]:
        """Ranges of the requests so far."""
        return [headers.get("Range") for _, headers in self.requests]


def send(handler: BaseHTTPRequestHandler, status: int, headers: dict, body: bytes = b"") -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, str(value))
    handler.end_headers()
    handler.wfile.write(body)


def whole(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 200, {"Content-Length": len(CONTENT), "ETag": ETAG}, CONTENT)


def half(handler: BaseHTTPRequestHandler) -> None:
    """Announce the whole file and hang up in the middle."""
    send(handler, 200, {"Content-Length": len(CONTENT), "ETag": ETAG}, CONTENT[:HALF])


def rest(handler: BaseHTTPRequestHandler) -> None:
    """Send the requested range."""
    begin = int(handler.headers["Range"].removeprefix("bytes=").rstrip("-"))
    span = f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}"
    send(handler, 206, {"Content-Range": span, "ETag": ETAG}, CONTENT[begin:])


def status(code: int) -> Callable:
    return lambda handler: send(handler, code, {"Content-Length": 4}, b"oops")


def redirect(to: str) -> Callable:
    return lambda handler: send(handler, 302, {"Location": to, "Content-Length": 0})


def corrupt(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 200, {"Content-Length": len(CONTENT)}, CONTENT[:-1] + b"!")


def endless(handler: BaseHTTPRequestHandler) -> None:
    """Send an endless body without a length."""
    send(handler, 200, {})
    try:
        while True:
            handler.wfile.write(CONTENT)
    except OSError:
        pass


def silent(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 200, {"Content-Length": len(CONTENT)}, CONTENT[:HALF])
    time.sleep(2)


def dripping(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 200, {"Content-Length": len(CONTENT)})
    try:
        while True:
            handler.wfile.write(b"x")
            time.sleep(0.02)
    except OSError:
        pass


def dripping_header(handler: BaseHTTPRequestHandler) -> None:
    """Send a header without end, faster than any limit on a packet."""
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-Drip: ")
    try:
        while True:
            handler.wfile.write(b"x")
            time.sleep(0.02)
    except OSError:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def source_at(*urls: str) -> Source:
    return Source("file.bin", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), urls)


def get(folder: Path, *urls: str, attempts: int = 4) -> bytes:
    path = fetch.fetch(source_at(*urls), folder, attempts=attempts, timeout=0.3, pause=0)
    return path.read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_fetched_and_nothing_else_remains(tmp_path, server):
    assert get(tmp_path, server.url) == CONTENT
    assert names(tmp_path) == ["file.bin"]
    assert server.ranges == [None]


def test_an_interrupted_transfer_is_resumed(tmp_path, server):
    server.acts = [half, rest]
    assert get(tmp_path, server.url) == CONTENT
    assert server.ranges == [None, f"bytes={HALF}-"]
    assert server.requests[1][1]["If-Range"] == ETAG
    assert names(tmp_path) == ["file.bin"]


def test_a_later_call_resumes_an_earlier_one(tmp_path, server):
    server.acts = [half, rest]
    with pytest.raises(DataError, match=rf"broke off after {HALF} of {len(CONTENT)}"):
        get(tmp_path, server.url, attempts=1)
    assert names(tmp_path) == ["file.bin.part", "file.bin.part.json"]
    assert get(tmp_path, server.url) == CONTENT
    assert server.ranges == [None, f"bytes={HALF}-"]


@pytest.mark.parametrize("again", [whole, status(416), corrupt])
def test_the_whole_file_is_fetched_if_ranges_are_ignored_or_it_has_changed(tmp_path, server, again):
    server.acts = [half, again, whole]
    assert get(tmp_path, server.url) == CONTENT


@pytest.mark.parametrize(
    "span", [f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}", f"bytes {HALF}-9/999999", "bytes", ""]
)
def test_a_range_that_was_not_requested_is_not_appended(tmp_path, server, span):
    def wrong(handler: BaseHTTPRequestHandler) -> None:
        send(handler, 206, {"Content-Range": span} if span else {}, CONTENT)

    server.acts = [half, wrong, rest]
    assert get(tmp_path, server.url) == CONTENT
    assert server.ranges == [None, f"bytes={HALF}-", f"bytes={HALF}-"]


def test_a_part_of_another_file_is_detected_and_deleted(tmp_path, server):
    (tmp_path / "file.bin.part").write_bytes(b"x" * HALF)
    server.acts = [rest, whole]
    assert get(tmp_path, server.url) == CONTENT
    (tmp_path / "file.bin").unlink()
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"longer")
    (tmp_path / "file.bin.part.json").write_text("not JSON")
    assert get(tmp_path, server.url) == CONTENT


def test_a_complete_part_needs_no_server(tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert get(tmp_path, "http://127.0.0.1:9/file.bin") == CONTENT


def test_the_next_mirror_continues_the_transfer_of_the_first(tmp_path, server):
    other = Server()
    server.acts, other.acts = [half], [rest]
    assert get(tmp_path, server.url, other.url) == CONTENT
    assert other.ranges == [f"bytes={HALF}-"]
    assert "If-Range" not in other.requests[0][1]  # the mark of another server
    other.http.shutdown()
    other.http.server_close()


@pytest.mark.parametrize(
    ("act", "requests", "message"),
    [
        (status(404), 1, "HTTP status 404"),
        (status(403), 1, "HTTP status 403"),
        (status(500), 4, "HTTP status 500"),
        (status(429), 4, "HTTP status 429"),
        (status(204), 4, "HTTP status 204"),
        (corrupt, 4, "another SHA-256"),
        (endless, 4, "more than the 200000 bytes"),
        (dripping, 4, "sent only"),
        (dripping_header, 4, "sent no whole header in 0.3 seconds"),
        (silent, 4, "timed out|SHA-256"),
        (lambda h: send(h, 200, {"Content-Length": 5}, b"hello"), 4, "announced 5 bytes"),
        (lambda h: send(h, 200, {"Content-Length": "many"}, b"hello"), 4, "announced many bytes"),
        (lambda h: send(h, 200, {}, b"hello"), 4, "broke off after 5"),
        (lambda h: h.wfile.write(b"220 mail.example.org\r\n"), 4, "mail.example.org"),
        (lambda h: None, 4, "closed|Disconnected|disconnected"),
        (redirect("/file.bin"), 6, "redirects more than 5 times"),
        (redirect("file:///etc/passwd"), 1, "file:///etc/passwd, expected http or https"),
        (redirect("ftp://127.0.0.1/file.bin"), 1, "expected http or https"),
        (redirect(""), 6, "redirects"),
        (redirect("http://127.0.0.1:bad/"), 4, "port"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_error_without_a_mirror_has_all_that_a_manual_download_needs(
    tmp_path, server, act, requests, message
):
    server.acts = [act]
    with pytest.raises(DataError, match=message) as caught:
        get(tmp_path, server.url)
    assert len(server.requests) == requests
    source, message = source_at(server.url), str(caught.value)
    assert f"({source.size} bytes, SHA-256 {source.sha256})" in message
    assert message.count(server.url) == 2
    assert message.endswith(f"put it into {tmp_path}")
    assert not (tmp_path / "file.bin").exists()


def test_redirections_are_followed_with_the_requested_range(tmp_path, server):
    server.acts = [half, redirect("elsewhere/file.bin"), redirect(server.url), rest]
    assert get(tmp_path, server.url) == CONTENT
    assert [path for path, _ in server.requests[1:]] == [
        "/file.bin", "/elsewhere/file.bin", "/file.bin"
    ]  # fmt: skip
    assert server.ranges[1:] == [f"bytes={HALF}-"] * 3


def test_without_a_network_the_error_is_immediate(tmp_path, monkeypatch):
    def nowhere(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.setenv("no_proxy", "*")
    pauses = []
    monkeypatch.setattr(fetch.time, "sleep", pauses.append)
    with pytest.raises(DataError, match="Name or service not known"):
        fetch.fetch(source_at("http://a.example/f", "http://b.example/f"), tmp_path, pause=60)
    assert not pauses


def test_a_folder_that_cannot_be_written_is_not_blamed_on_a_mirror(tmp_path, server):
    (tmp_path / "file.bin.part").mkdir()
    with pytest.raises((DataError, CheckpointError), match=r"file\.bin\.part"):
        get(tmp_path, server.url)
    assert len(server.requests) == 1
    with pytest.raises(DataError, match="cannot be made"):
        blocker = tmp_path / "blocker"
        blocker.write_text("")
        download.download("mnist", blocker / "deep")


# --- archives ----------------------------------------------------------------------------------


def sparse(name: str, size: int) -> tuple[tarfile.TarInfo, bytes]:
    """Write a sparse file of one byte."""
    info = tarfile.TarInfo(name)
    info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(size)}
    return info, b"x"


def packed(path: Path, *entries: tuple[tarfile.TarInfo | str, bytes]) -> Path:
    """Write a .tar.gz of these members with their names unchecked."""
    with tarfile.open(path, "w:gz") as tar:
        for info, content in entries:
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def test_an_archive_is_unpacked_under_its_one_folder(tmp_path):
    file = packed(
        tmp_path / "a.tar.gz",
        special("top", tarfile.DIRTYPE),
        ("top/a.bin", b"a"),
        ("./top/deep/b.bin", b"bb"),
    )
    archive.unpack(file, tmp_path / "out", "top", 1 << 20)
    found = sorted((tmp_path / "out").rglob("*.bin"))
    assert [path.read_bytes() for path in found] == [b"a", b"bb"]
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "out/top/a.bin", "out/top/deep/b.bin"
    ]  # fmt: skip


ATTACKS = {
    "absolute": ("/tmp/minidiff-evil", b"x"),
    "upwards": ("top/../../evil", b"x"),
    "beside": ("other/evil", b"x"),
    "drive": ("top/C:evil", b"x"),
    "backslash": ("top\\..\\evil", b"x"),
    "symbolic link": special("top/link", tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": special("top/link", tarfile.LNKTYPE, "top/first"),
    "device": special("top/null", tarfile.CHRTYPE),
    "pipe": special("top/pipe", tarfile.FIFOTYPE),
    "sparse": sparse("top/sparse", 10**7),
    "the same again": ("top/first", b"x"),
    "the same, spelt otherwise": ("top/./first", b"x"),
    "over a file": ("top/first/under", b"x"),
    "large": ("top/large", bytes(1 << 20)),
    "large header": ("top/" + "n" * 600_000, b""),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_malicious_archive_is_refused_and_leaves_nothing(tmp_path, attack):
    file = packed(tmp_path / "a.tar.gz", ("top/first", b"1"), ATTACKS[attack])
    with pytest.raises((DataError, CheckpointError), match=r"a\.tar\.gz|top"):
        archive.unpack(file, tmp_path / "out", "top", 500_000)
    assert list((tmp_path / "out").iterdir()) == []
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("damage", ["no gzip", "cut", "bit", "empty", "a gzip, but no tar"])
def test_a_damaged_archive_is_named(tmp_path, damage):
    content = np.random.default_rng(1).bytes(100_000)
    file = packed(tmp_path / "a.tar.gz", ("top/a", content))
    good = file.read_bytes()
    file.write_bytes({
        "no gzip": b"hello" * 1000,
        "cut": good[:50_000],
        "bit": good[:50_000] + bytes([good[50_000] ^ 16]) + good[50_001:],
        "empty": b"",
        "a gzip, but no tar": gzip.compress(content),
    }[damage])  # fmt: skip
    with pytest.raises(DataError, match=r"a\.tar\.gz"):
        archive.unpack(file, tmp_path / "out", "top", 1 << 20)
    assert list((tmp_path / "out").iterdir()) == []


# --- data sets ---------------------------------------------------------------------------------


@pytest.fixture
def published(server, monkeypatch) -> dict[str, bytes]:
    """Serve small files instead of the published ones; return their contents by name."""
    idx = {
        3: b"\0\0\x08\3\0\0\0\2\0\0\0\x1c\0\0\0\x1c" + bytes(2 * 784),
        1: b"\0\0\x08\1\0\0\0\2\1\2",
    }
    files, table = {}, []
    for stem, dimensions in (("train-images", 3), ("train-labels", 1),
                             ("t10k-images", 3), ("t10k-labels", 1)):  # fmt: skip
        content = gzip.compress(idx[dimensions], mtime=7)
        name = f"{stem}-idx{dimensions}-ubyte.gz"
        files[name] = content
        source = Source(
            name,
            len(content),
            hashlib.sha256(content).hexdigest(),
            (server.url.replace("file.bin", name),),
        )
        unpacked = hashlib.sha256(idx[dimensions]).hexdigest()
        table.append(download.IdxFile(stem, dimensions, source, unpacked))
    monkeypatch.setattr(download, "MNIST", tuple(table))
    server.acts = [lambda handler: send(handler, 200, {}, files[handler.path[1:]])]
    return files


def test_mnist_is_downloaded_once_and_then_read(tmp_path, server, published):
    held = data.load("mnist", "test", data_dir=tmp_path / "new", download=True)
    assert held.labels.tolist() == [1, 2]
    assert len(server.requests) == 4
    assert names(tmp_path / "new" / "mnist") == sorted(published)
    assert len(data.load("mnist", data_dir=tmp_path / "new", download=True)) == 2
    assert len(data.load("mnist", data_dir=tmp_path / "new")) == 2
    assert len(server.requests) == 4


def test_processes_that_share_a_folder_download_once(tmp_path, server, published):
    def slowly(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.05)
        send(handler, 200, {}, published[handler.path[1:]])

    server.acts = [slowly]
    with ThreadPoolExecutor(4) as pool:  # each opens the folder and locks it for itself
        calls = [
            pool.submit(data.load, "mnist", data_dir=tmp_path, download=True) for _ in range(4)
        ]
        assert [len(call.result()) for call in calls] == [2] * 4
    assert len(server.requests) == 4


def test_recompressed_or_unpacked_files_are_accepted_and_other_files_kept(
    tmp_path, server, published
):
    first, second, third, fourth = published
    (tmp_path / first).write_bytes(gzip.compress(gzip.decompress(published[first]), 1))
    (tmp_path / second.removesuffix(".gz")).write_bytes(gzip.decompress(published[second]))
    (tmp_path / third).write_bytes(published[third])
    data.load("mnist", data_dir=tmp_path, download=True)
    assert [path for path, _ in server.requests] == [f"/{fourth}"]
    for wrong in (b"my own notes", published[fourth][:-4], gzip.compress(b"zeros" * 999)):
        (tmp_path / fourth).write_bytes(wrong)
        with pytest.raises(DataError, match=rf"{fourth}.*not the published.*move it away"):
            data.load("mnist", data_dir=tmp_path, download=True)
        assert (tmp_path / fourth).read_bytes() == wrong


@pytest.fixture
def small_cifar10(server, monkeypatch, tmp_path) -> bytes:
    """Serve an archive of two records per file, and return its bytes."""
    monkeypatch.setattr(cifar10, "RECORDS", 2)
    record = bytes([3]) + bytes(3072)
    entries = [(f"{cifar10.FOLDER}/{name}", record * 2)
               for name in cifar10.FILES["train"] + cifar10.FILES["test"]]  # fmt: skip
    meta = "\n".join(cifar10.CLASS_NAMES) + "\n\n"
    entries.append((f"{cifar10.FOLDER}/{cifar10.NAMES_FILE}", meta.encode()))
    content = packed(tmp_path / "made.tar.gz", *entries).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    source = Source(cifar10.ARCHIVE, len(content), digest, (server.url,))
    monkeypatch.setattr(download, "CIFAR10", source)
    server.acts = [lambda handler: send(handler, 200, {}, content)]
    return content


def test_cifar10_is_downloaded_unpacked_and_read(tmp_path, server, small_cifar10):
    held = data.load("cifar10", data_dir=tmp_path / "new", download=True)
    assert held.labels.tolist() == [3] * 10
    assert names(tmp_path / "new" / "cifar10") == [cifar10.FOLDER]
    assert len(data.load("cifar10", "test", data_dir=tmp_path / "new", download=True)) == 2
    assert len(server.requests) == 1


def test_an_existing_archive_is_read_and_unpacked_instead_of_downloaded(
    tmp_path, server, small_cifar10
):
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / cifar10.ARCHIVE).write_bytes(small_cifar10)
    assert data.load("cifar10", "test", data_dir=folder).labels.tolist() == [3, 3]
    assert names(folder) == [cifar10.ARCHIVE]
    assert len(data.load("cifar10", data_dir=folder, download=True)) == 10
    assert names(folder) == [cifar10.FOLDER]
    assert server.requests == []
    (folder / cifar10.FOLDER / "test_batch.bin").unlink()
    with pytest.raises(DataError, match=r"test_batch\.bin: missing"):
        data.load("cifar10", data_dir=folder, download=True)
    (tmp_path / cifar10.ARCHIVE).write_bytes(small_cifar10[:-1])
    with pytest.raises(DataError, match="not the published"):
        data.load("cifar10", data_dir=tmp_path, download=True)
    assert server.requests == []


def test_the_table_of_published_files_is_complete():
    sources = [*(file.source for file in download.MNIST), download.CIFAR10]
    for source in sources:
        assert len(bytes.fromhex(source.sha256)) == 32
        assert all(url.startswith("https://") and url.endswith(source.name) for url in source.urls)
    assert cifar10.MAX_UNPACKED_BYTES > 6 * 30_730_000


def test_only_published_data_sets_are_downloaded(tmp_path):
    with pytest.raises(InvalidArgument, match="download is for mnist and cifar10"):
        data.load("digits", download=True)
    with pytest.raises(InvalidArgument, match="download is for"):
        data.load(tmp_path, download=True)
    with pytest.raises(InvalidArgument, match="download must be True or False"):
        data.load("mnist", download="yes")
    with pytest.raises(InvalidArgument, match="download must be one of mnist, cifar10"):
        download.download("digits", tmp_path)
