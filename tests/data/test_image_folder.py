"""Folders of images: links, palettes, animations, and files with wrong names."""

import os
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from minidiff import data
from minidiff.errors import DataError


def save(path: Path, colour, mode: str = "RGB", size=(6, 4), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def test_links_are_followed_and_sorted_by_their_names(tmp_path):
    save(tmp_path / "elsewhere" / "deep" / "x.png", 30, "L")
    save(tmp_path / "photos" / "a" / "z.png", 10, "L")
    (tmp_path / "photos" / "a" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "a" / "c.png").symlink_to(tmp_path / "photos" / "a" / "z.png")
    (tmp_path / "photos" / "d").symlink_to(tmp_path / "elsewhere")
    held = data.load(tmp_path / "photos")
    assert held.class_names == ("a", "d")
    assert held.images[:, 0, 0, 0].tolist() == [30, 10, 10, 30]  # a/b/deep/x, a/c, a/z, d/deep/x


def test_a_broken_or_circular_link_is_named(tmp_path):
    save(tmp_path / "a" / "1.png", 10, "L")
    (tmp_path / "a" / "2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"2\.png: a link to nothing"):
        data.load(tmp_path)
    (tmp_path / "a" / "2.png").unlink()
    (tmp_path / "a" / "2.png").symlink_to(tmp_path / "a" / "1.png")
    save(tmp_path / "a" / "3.png", 20, "L")
    assert len(data.load(tmp_path)) == 3
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    with pytest.raises(DataError, match="up: is a link to a folder that it lies in"):
        data.load(tmp_path)


def test_no_image_is_ignored_silently(tmp_path):
    save(tmp_path / "1.png", 10, "L")
    (tmp_path / "notes.txt").write_text("these are passed over")
    (tmp_path / ".thumbnail.png").write_text("and these")
    assert len(data.load(tmp_path)) == 1
    (tmp_path / "2.HEIC").write_bytes(b"")
    with pytest.raises(DataError, match=r"2\.HEIC: images of this kind are not read"):
        data.load(tmp_path)
    (tmp_path / "2.HEIC").unlink()
    os.mkfifo(tmp_path / "2.png")
    with pytest.raises(DataError, match=r"2\.png: a link to nothing, or no ordinary file"):
        data.load(tmp_path)


@pytest.mark.parametrize("name", ["1.png", "1.jpg", "1.jfif", "1.bmp", "1.webp", "1.gif", "1.tiff",
                                  "1.ppm", "1.pnm"])  # fmt: skip
def test_every_supported_format_is_read(tmp_path, name):
    options = {"format": "JPEG"} if name == "1.jfif" else {}
    options |= {"format": "PPM"} if name == "1.pnm" else {}
    save(tmp_path / name, (200, 100, 0), **options)
    pixel = data.load(tmp_path).images[0, :, 2, 2].float()
    assert (pixel - torch.tensor([200, 100, 0])).abs().max() <= 4  # JPEG is lossy


def test_palettes_become_colours_and_animations_their_first_frame(tmp_path):
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "1.png")
    frames = [Image.new("RGB", (6, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "2.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "3.png", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "4.webp", save_all=True, append_images=frames[1:], lossless=True)
    clear = Image.new("P", (6, 4), 0)
    clear.putpalette([90, 90, 90])
    clear.save(tmp_path / "5.png", transparency=0)
    held = data.load(tmp_path)
    red = [255, 0, 0]
    assert held.images[:, :, 1, 1].tolist() == [[10, 20, 30], red, red, red, [0, 0, 0]]


def _deep_png(colour_type: int, channels: int) -> bytes:
    """Return a 6×4 PNG of 16 bits per channel, which Pillow cannot write in colour."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(
            ">I", zlib.crc32(kind + content)
        )  # fmt: skip

    header = struct.pack(">IIBBBBB", 6, 4, 16, colour_type, 0, 0, 0)
    pixels = (b"\0" + b"\x12\x34" * channels * 6) * 4
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (6, 4)])
def test_16_bit_pixels_are_refused_and_not_truncated(tmp_path, colour_type, channels):
    (tmp_path / "deep.png").write_bytes(_deep_png(colour_type, channels))
    with pytest.raises(DataError, match=r"deep\.png.*expected 8 bits"):
        data.load(tmp_path)


def test_the_format_is_that_of_the_bytes_and_no_program_is_run(tmp_path):
    save(tmp_path / "a.png", (9, 9, 9), format="BMP")
    assert data.load(tmp_path).images[0, :, 0, 0].tolist() == [9, 9, 9]
    (tmp_path / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\nshowpage\n")
    with pytest.raises(DataError, match=r"b\.png: not a readable image"):
        data.load(tmp_path)


def test_a_huge_image_is_refused_by_its_header(tmp_path):
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )
    (tmp_path / "bomb.png").write_bytes(bomb + _deep_png(2, 3)[33:])
    with pytest.raises(DataError, match=r"bomb\.png.*bomb"):
        data.load(tmp_path, image_size=8)


def test_two_unicode_spellings_of_one_class_name_are_refused(tmp_path):
    for form in ("NFC", "NFD"):
        save(tmp_path / unicodedata.normalize(form, "café") / "1.png", 1, "L")
    if len(list(tmp_path.iterdir())) == 2:  # not on file systems that see one name
        with pytest.raises(DataError, match="two class folders have one name"):
            data.load(tmp_path)


def test_the_same_file_names_in_two_classes_are_two_images(tmp_path):
    save(tmp_path / "a" / "1.png", 1, "L")
    save(tmp_path / "b" / "1.png", 2, "L")
    held = data.load(tmp_path)
    assert (held.images[:, 0, 0, 0].tolist(), held.labels.tolist()) == ([1, 2], [0, 1])


def outcome(folder: Path) -> str | tuple[int, ...]:
    """Return the error's message, or the shape of the images."""
    try:
        return tuple(data.load(folder, image_size=8).images.shape)
    except DataError as error:
        return str(error)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)
@pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning:PIL")
@given(
    kind=st.sampled_from(["png", "jpg", "gif", "bmp", "webp", "tiff"]),
    place=st.floats(0, 1),
    change=st.binary(min_size=0, max_size=8),
    cut=st.booleans(),
)
def test_a_damaged_image_is_named_or_has_the_right_shape(tmp_path, kind, place, change, cut):
    folder = tmp_path / "damaged"
    path = folder / f"x.{kind}"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    good = path.read_bytes()
    at = int(place * len(good))
    path.write_bytes(good[:at] + change + (b"" if cut else good[at + len(change) :]))
    result = outcome(folder)
    assert path.name in result if isinstance(result, str) else result == (1, 3, 8, 8)
