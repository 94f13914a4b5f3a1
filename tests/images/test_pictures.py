"""Image files as people have them: orientation, broken metadata, transparency, 16 bits."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from minidiff.cli import main
from minidiff.data import load
from minidiff.errors import DataError
from minidiff.images.pixels import read_image, read_mask

RAMP = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)  # 6 wide, 4 high


def exif(value: int, tag: int = 0x0112) -> bytes:
    """Return EXIF with one SHORT, the orientation, after its header."""
    entry = struct.pack("<HHIHH", tag, 3, 1, value, 0)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1) + entry + b"\0\0\0\0"


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("turned", range(1, 9))
def test_a_turned_tiff_is_read_upright_and_not_squashed(tmp_path, compression, turned):
    tags = Image.Exif()
    tags[0x0112] = turned
    Image.fromarray(RAMP).save(tmp_path / "x.tif", compression=compression, exif=tags)
    with Image.open(io.BytesIO((tmp_path / "x.tif").read_bytes())) as image:
        image.load()
        upright = np.asarray(image)  # Pillow turns a TIFF from memory when it decodes it
    assert upright.shape == ((6, 4) if turned >= 5 else (4, 6))
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.tif", "L")), upright)
    assert np.array_equal(load(tmp_path).images[0, 0].numpy(), upright)


@pytest.mark.parametrize("value", [0, 9, 255, 65535])
@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
def test_an_orientation_out_of_range_turns_nothing(tmp_path, kind, value):
    options = {"lossless": True} if kind == "webp" else {}
    Image.fromarray(RAMP).convert("RGB").save(tmp_path / f"x.{kind}", exif=exif(value), **options)
    assert load(tmp_path).images.shape[2:] == (4, 6)
    assert read_image(tmp_path / f"x.{kind}", "L").size == (6, 4)


@pytest.mark.parametrize("metadata", [b"garbage", b"Exif\0\0", b"Exif\0\0" + bytes(40), b"II*"])
@pytest.mark.parametrize("kind", ["png", "webp"])
def test_metadata_that_cannot_be_read_do_not_stop_the_pixels(tmp_path, kind, metadata):
    options = {"lossless": True} if kind == "webp" else {}
    path = tmp_path / f"x.{kind}"
    Image.fromarray(RAMP).convert("RGB").save(path, exif=metadata, **options)
    assert np.array_equal(np.asarray(read_image(path, "L")), RAMP)
    assert np.array_equal(load(tmp_path).images[0, 0].numpy(), RAMP)


XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


@pytest.mark.parametrize("kind", ["png", "tif", "webp"])
def test_an_orientation_in_xmp_turns_the_image(tmp_path, kind):
    note = PngImagePlugin.PngInfo()
    note.add_itxt("XML:com.adobe.xmp", XMP)
    options = {"png": {"pnginfo": note}, "tif": {"tiffinfo": {700: XMP.encode()}},
               "webp": {"xmp": XMP.encode(), "lossless": True}}[kind]  # fmt: skip
    Image.fromarray(RAMP).convert("RGB").save(tmp_path / f"x.{kind}", **options)
    turned = np.rot90(RAMP, -1)
    assert np.array_equal(np.asarray(read_image(tmp_path / f"x.{kind}", "L")), turned)
    assert np.array_equal(load(tmp_path).images[0, 0].numpy(), turned)


def test_exif_behind_the_pixels_of_a_png_never_squashes_them(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    body = b"eXIf" + exif(6)[6:]
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "x.png").write_bytes(data[:-12] + chunk + data[-12:])
    with pytest.raises(DataError, match="its pixels are 4×6, its header says 6×4"):
        load(tmp_path)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_pixels_are_refused_by_name_and_not_clipped(tmp_path, mode):
    kind = "png" if mode == "I;16" else "tif"
    numbers = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    Image.fromarray(RAMP.astype(numbers) * 257).save(tmp_path / f"x.{kind}")
    for read in (lambda path: read_image(path, "L"), read_mask):
        with pytest.raises(DataError, match="expected 8 bits per channel"):
            read(tmp_path / f"x.{kind}")


def test_a_16_bit_ppm_is_refused_like_a_16_bit_png(tmp_path):
    (tmp_path / "x.ppm").write_bytes(b"P6 2 1 65535\n" + bytes(range(12)))
    with pytest.raises(DataError, match="16 bits"):
        load(tmp_path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_black_in_an_image_and_refused_in_a_mask(tmp_path, mode):
    white = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    white.paste((255, 255, 255, 255), (0, 0, 2, 4))
    white.convert(mode).save(tmp_path / "x.png")
    assert np.asarray(read_image(tmp_path / "x.png", "L"))[0].tolist() == [255, 255, 0, 0]
    with pytest.raises(DataError, match="has transparency"):
        read_mask(tmp_path / "x.png")


def test_a_mask_of_zeros_and_ones_is_refused_and_one_of_bits_read(tmp_path):
    Image.fromarray((RAMP > 100).astype(np.uint8)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match="its largest value is 1"):
        read_mask(tmp_path / "x.png")
    Image.fromarray(RAMP > 100).save(tmp_path / "x.png")
    assert np.array_equal(np.asarray(read_mask(tmp_path / "x.png")), (RAMP > 100) * 255)


@pytest.mark.parametrize("names", [("train", "val"), ("Train", "test", "valid")])
def test_parts_of_a_data_set_are_refused_as_classes(tmp_path, names):
    for name in names:
        (tmp_path / name / "cat").mkdir(parents=True)
        Image.fromarray(RAMP).save(tmp_path / name / "cat" / "1.png")
    with pytest.raises(DataError, match="are parts of a data set, not classes"):
        load(tmp_path)
    assert load(tmp_path / names[0]).class_names == ("cat",)


def test_thumbnails_of_file_systems_are_not_images(tmp_path):
    for name in ("cat", "dog", "@eaDir", "__MACOSX", "cat/@eaDir"):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.fromarray(RAMP).save(tmp_path / name / "1.png")
    data = load(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert len(data) == 2


def test_images_that_are_black_everywhere_are_refused(tmp_path):
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "icon.png")
    with pytest.raises(DataError, match="all pixels are of one colour"):
        load(tmp_path)


@pytest.mark.parametrize("colour", [128, (10, 20, 30)])
def test_images_of_one_colour_are_refused(tmp_path, colour):
    for i in range(3):
        Image.new("L" if colour == 128 else "RGB", (4, 4), colour).save(tmp_path / f"{i}.png")
    with pytest.raises(DataError, match="all pixels are of one colour"):
        load(tmp_path)
    Image.new("RGB", (4, 4), (10, 20, 31)).save(tmp_path / "another.png")
    assert len(load(tmp_path)) == 4


def sample(*arguments: str) -> int:
    return main(["sample", "--model", "mnist", "--steps", "2", "--device", "cpu", *arguments])


def test_one_sample_is_written_one_to_one_and_can_be_fed_back(tmp_path, capsys):
    six, half = str(tmp_path / "six.png"), str(tmp_path / "half.png")
    assert sample("--class", "6", "--num", "1", "--png", six) == 0
    assert Image.open(six).size == (28, 28)
    mask = np.zeros((28, 28), dtype=np.uint8)
    mask[14:] = 255
    Image.fromarray(mask).save(half)
    again = ("--class", "0", "--num", "1", "--png", str(tmp_path / "again.png"))
    assert sample("--image", six, "--mask", half, *again) == 0
    kept = [np.asarray(Image.open(path))[:14] for path in (six, tmp_path / "again.png")]
    assert np.array_equal(*kept)
    assert sample("--num", "1", "--scale", "3", "--png", six) == 0
    assert Image.open(six).size == (84, 84)
    capsys.readouterr()
    assert sample("--image", six, *again) == 2
    assert "--image must have 28×28 pixels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--png", "x.jpg"), "--png must be a .png file, got x.jpg"),
        (("--npz", "x.png"), "--npz must be a .npz file, got x.png"),
        (("--class", "seven"), "--class must be one of 0, 1,"),
        (("--class", "10"), "--class must be one of 0, 1,"),
        (("--scale", "0"), "scale must be in 1..64, got 0"),
    ],
)
def test_a_name_that_lies_is_refused(tmp_path, monkeypatch, arguments, message, capsys):
    monkeypatch.chdir(tmp_path)
    assert sample(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
