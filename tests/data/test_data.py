"""Data: bytes and floats, the order of training, and damaged files."""

import gzip
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import render_digits
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minidiff import data
from minidiff.data import ImageData, batches, digits
from minidiff.errors import DataError, InvalidArgument
from minidiff.images.pixels import to_float, to_uint8


def test_every_byte_survives_the_round_trip_through_floats():
    u = torch.arange(256, dtype=torch.uint8)
    x = to_float(u)
    assert x[0] == -1
    assert x[-1] == 1
    assert torch.equal(to_uint8(x), u)


def test_floats_outside_the_range_saturate():
    assert to_uint8(torch.tensor([-7.0, -1.001, 1.001, 9.0])).tolist() == [0, 0, 255, 255]


@settings(deadline=None)
@given(value=st.floats(-1, 1, width=32))
def test_rounding_is_off_by_half_a_level_at_most(value):
    back = to_float(to_uint8(torch.tensor(value)))
    assert abs(back.item() - value) <= 0.5 / 127.5 + 1e-6


def test_a_batch_is_the_chosen_images_as_floats():
    images = torch.arange(3 * 4, dtype=torch.uint8).reshape(3, 1, 2, 2)
    held = ImageData("three", images, torch.tensor([0, 1, 0]), ("a", "b"))
    x, labels = held.batch(torch.tensor([2, 0, 2]))
    assert torch.equal(x, images[[2, 0, 2]] / 127.5 - 1)
    assert labels.tolist() == [0, 0, 0]
    assert ImageData("bare", images, None, ()).batch(torch.tensor([1]))[1] is None


@pytest.mark.parametrize(
    ("images", "labels", "names"),
    [
        (torch.zeros(2, 1, 4, 4), None, ()),
        (torch.zeros(2, 2, 4, 4, dtype=torch.uint8), None, ()),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 2]), ("a", "b")),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0]), ("a",)),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), None, ("a",)),
        (None, None, ()),
        (np.zeros((2, 1, 4, 4), np.uint8), None, ()),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0, 1], ("a", "b")),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(images, labels, names):
    with pytest.raises(InvalidArgument):
        ImageData("wrong", images, labels, names)


def _stream(n, batch_size, seed, length):
    endless = batches(n, batch_size, seed)
    return torch.cat([next(endless) for _ in range(-(-length // batch_size))])[:length]


@settings(deadline=None)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 90), seed=st.integers(0, 2**40))
def test_batches_are_whole_permutations_cut_into_equal_lengths(n, batch_size, seed):
    endless = batches(n, batch_size, seed)
    some = [next(endless) for _ in range(3 * n // batch_size + 2)]
    assert {len(batch) for batch in some} == {batch_size}
    stream = torch.cat(some)
    for epoch in range(len(stream) // n):
        assert sorted(stream[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


@settings(deadline=None)
@given(n=st.integers(1, 40), sizes=st.tuples(*[st.integers(1, 90)] * 2), seed=st.integers(0, 99))
def test_the_stream_of_indices_does_not_depend_on_the_batch_size(n, sizes, seed):
    one, other = (_stream(n, size, seed, 3 * n) for size in sizes)
    assert torch.equal(one, other)


@settings(deadline=None)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 90), start=st.integers(0, 9))
def test_a_resumed_stream_continues_where_it_stopped(n, batch_size, start):
    endless, resumed = batches(n, batch_size, 5), batches(n, batch_size, 5, start)
    for _ in range(start):
        next(endless)
    for _ in range(4):
        assert torch.equal(next(endless), next(resumed))


def test_epochs_and_seeds_give_different_orders():
    orders = {
        tuple(_stream(50, 50, seed, 100)[e : e + 50].tolist()) for seed in (0, 1) for e in (0, 50)
    }
    assert len(orders) == 4


@pytest.mark.parametrize(
    "arguments", [(0, 1, 0), (1, 0, 0), (1, 1, -1), (1, 1, 0, -1), (1, 2.5, 0)]
)
def test_bad_arguments_of_batches_are_refused_at_the_call(arguments):
    with pytest.raises(InvalidArgument):
        batches(*arguments)


def test_embedded_digits_are_balanced_and_their_splits_disjoint():
    train, test = data.load("digits"), data.load("digits", "test")
    assert train.labels.bincount().tolist() == [1000] * 10
    assert test.labels.bincount().tolist() == [200] * 10
    assert train.images.shape[1:] == (1, 16, 16)
    assert (train.images.amin(), train.images.amax()) == (0, 255)
    seen = {image.numpy().tobytes() for image in train.images}
    assert not seen & {image.numpy().tobytes() for image in test.images}
    assert digits.FILE.stat().st_size < 1_000_000


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_script_reproduces_the_embedded_digits(split):
    indices = [0, 1, 17, 998, 1203, 1999]
    again = render_digits.render(indices, 0, split).astype(int)
    assert np.array_equal(again, render_digits.render(indices, 0, split))
    frozen = data.load("digits", split).images[indices, 0].numpy().astype(int) // 17
    # Bit-equal with the FreeType version that made the file. Another one may shift an outline by
    # 1/64 of a large pixel, which sometimes moves a mean across a rounding boundary.
    assert np.abs(again - frozen).max() <= 1
    assert (again != frozen).mean() <= 0.02


@pytest.mark.parametrize("damage", ["truncated", "not a zip", "wrong shape", "wrong levels"])
def test_a_damaged_digits_file_is_named(tmp_path, damage):
    path = tmp_path / "digits.npz"
    if damage == "truncated":
        path.write_bytes(digits.FILE.read_bytes()[:300_000])
    elif damage == "not a zip":
        path.write_bytes(b"digits")
    else:
        shape = (9, 16, 16) if damage == "wrong shape" else (10_000, 16, 16)
        np.savez(path, train=np.full(shape, 16, np.uint8))
    with pytest.raises(DataError, match=r"digits\.npz"):
        digits.load("train", path)


def _idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


PIXELS = np.arange(5 * 28 * 28).reshape(5, 28, 28) % 251
LABELS = np.array([3, 1, 4, 1, 9])


def _mnist(folder: Path, images: bytes, labels: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train-images-idx3-ubyte").write_bytes(images)
    (folder / "train-labels-idx1-ubyte").write_bytes(labels)
    return folder


@pytest.mark.parametrize("spelling", ["-", "."])
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("inside", ["", "mnist", "MNIST/raw", "raw"])
def test_mnist_is_read_under_each_of_its_names(tmp_path, spelling, suffix, inside):
    folder = tmp_path / inside
    folder.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if suffix else bytes
    (folder / f"t10k-images{spelling}idx3-ubyte{suffix}").write_bytes(pack(_idx(PIXELS)))
    (folder / f"t10k-labels{spelling}idx1-ubyte{suffix}").write_bytes(pack(_idx(LABELS)))
    held = data.load("mnist", "test", data_dir=tmp_path)
    assert np.array_equal(held.images[:, 0].numpy(), PIXELS)
    assert held.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("given", [".", "FashionMNIST", "FashionMNIST/raw"])
def test_fashion_mnist_is_known_by_its_folder_and_comes_after_mnist(tmp_path, given):
    _mnist(tmp_path / "FashionMNIST" / "raw", _idx(PIXELS), _idx(LABELS))
    held = data.load("mnist", data_dir=tmp_path / given)
    assert held.name == "fashion-mnist"
    assert held.class_names[9] == "Ankle boot"
    assert np.array_equal(held.images[:, 0].numpy(), PIXELS)
    if given == ".":
        _mnist(tmp_path / "MNIST" / "raw", _idx(PIXELS), _idx(LABELS))
        held = data.load("mnist", data_dir=tmp_path)
        assert (held.name, held.class_names[9]) == ("mnist", "9")


def test_mnist_is_found_through_the_environment(tmp_path, monkeypatch):
    _mnist(tmp_path / "mnist", _idx(PIXELS), _idx(LABELS))
    monkeypatch.setenv("MINIDIFF_DATA", str(tmp_path))
    assert len(data.load("mnist")) == 5
    monkeypatch.delenv("MINIDIFF_DATA")
    with pytest.raises(InvalidArgument, match=r"--data-dir.*MINIDIFF_DATA"):
        data.load("mnist")


GOOD = _idx(PIXELS)
TWISTED = {
    "empty": b"",
    "header cut": GOOD[:10],
    "pixels cut": GOOD[:-1],
    "trailing byte": GOOD + b"\0",
    "wrong magic": b"\0\0\x0d\x03" + GOOD[4:],
    "labels for images": _idx(LABELS),
    "wrong side": _idx(PIXELS[:, :27]),
    "another count": _idx(PIXELS[:4]),
    "absurd count": struct.pack(">4I", 0x0803, 2**32 - 1, 28, 28),
    "gzip cut": gzip.compress(GOOD)[:-20],
    "gzip cut in its checksum": gzip.compress(GOOD)[:-2],
    "gzip damaged": gzip.compress(GOOD)[:30] + bytes(8) + gzip.compress(GOOD)[38:],
    "gzip wrong checksum": gzip.compress(GOOD)[:-8] + bytes(8),
}


@pytest.mark.parametrize("damage", TWISTED)
def test_a_damaged_image_file_is_named(tmp_path, damage):
    folder = _mnist(tmp_path, TWISTED[damage], _idx(LABELS))
    with pytest.raises(DataError, match=r"train-(images|labels)-idx"):
        data.load("mnist", data_dir=folder)


@pytest.mark.parametrize("labels", [np.array([0, 1, 2, 3, 10]), np.array([0, 1, 2, 3])])
def test_labels_out_of_range_or_number_are_named(tmp_path, labels):
    folder = _mnist(tmp_path, GOOD, _idx(labels))
    with pytest.raises(DataError, match="train-labels-idx1-ubyte"):
        data.load("mnist", data_dir=folder)


def test_a_missing_mnist_file_is_named(tmp_path):
    _mnist(tmp_path, GOOD, _idx(LABELS)).joinpath("train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="train-labels-idx1-ubyte"):
        data.load("mnist", data_dir=tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        data.load("mnist", data_dir=tmp_path / "nowhere")


def _save(path: Path, colour, mode: str = "RGB", size=(6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def test_sub_folders_are_classes_in_sorted_order(tmp_path):
    for name, value in (("dog", 200), ("cat", 100), ("ant", 50)):
        _save(tmp_path / name / "deep" / "b.png", value, "L")
        _save(tmp_path / name / "a.PNG", value + 1, "L")
    (tmp_path / "notes").mkdir()
    _save(tmp_path / ".hidden" / "x.png", 0, "L")
    held = data.load(tmp_path)
    assert held.class_names == ("ant", "cat", "dog")
    assert held.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert held.images[:, 0, 0, 0].tolist() == [51, 50, 101, 100, 201, 200]
    assert held.images.shape == (6, 1, 4, 6)


def test_a_flat_folder_has_no_labels_and_one_colour_image_makes_all_colour(tmp_path):
    _save(tmp_path / "a.png", 7, "L")
    _save(tmp_path / "b.png", (1, 2, 3))
    held = data.load(str(tmp_path))
    assert held.labels is None
    assert held.num_classes == 0
    assert held.images[:, :, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3]]


def test_every_tenth_image_is_held_out_and_in_one_split_only(tmp_path):
    for i in range(25):
        _save(tmp_path / f"{i:02d}.png", i, "L")
    train, test = data.load(tmp_path), data.load(tmp_path, "test")
    assert test.images[:, 0, 0, 0].tolist() == [9, 19]
    assert sorted([*train.images[:, 0, 0, 0].tolist(), 9, 19]) == list(range(25))


def test_image_size_crops_the_centre_and_resizes(tmp_path):
    image = Image.new("L", (30, 10), 0)
    image.paste(255, (10, 0, 20, 10))  # the central square is white, the rest is black
    image.save(tmp_path / "wide.png")
    _save(tmp_path / "tall.png", 128, "L", (4, 9))
    held = data.load(tmp_path, image_size=5)
    assert held.images.shape == (2, 1, 5, 5)
    assert held.images.amin(dim=(1, 2, 3)).tolist() == [128, 255]
    with pytest.raises(DataError, match=r"(?s)tall.*wide.*image_size"):
        data.load(tmp_path)


def test_transparency_becomes_black_and_exif_orientation_is_applied(tmp_path):
    _save(tmp_path / "a.png", (200, 100, 50, 0), "RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (4, 6), (9, 9, 9)).save(tmp_path / "b.png", exif=exif)
    held = data.load(tmp_path)
    assert held.images.shape == (2, 3, 4, 6)
    assert held.images[0].amax() == 0


def test_unreadable_images_are_named(tmp_path, monkeypatch):
    good = _save(tmp_path / "good.png", 1, "L", (64, 64))
    for name, content in (("zero", b""), ("text", b"hello"), ("cut", good.read_bytes()[:50])):
        bad = tmp_path / f"{name}.png"
        bad.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.png"):
            data.load(tmp_path)
        bad.unlink()
    deep = tmp_path / "deep.png"
    Image.new("I;16", (64, 64), 40_000).save(deep)
    with pytest.raises(DataError, match=r"deep\.png.*8 bits"):
        data.load(tmp_path)
    deep.unlink()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with pytest.raises(DataError, match=r"good\.png.*bomb"):
        data.load(tmp_path)


def test_folders_without_a_data_set_are_refused(tmp_path):
    with pytest.raises(DataError, match="no images"):
        data.load(tmp_path)
    _save(tmp_path / "a.png", 1, "L")
    with pytest.raises(DataError, match="too few"):
        data.load(tmp_path, "test")
    _save(tmp_path / "class" / "b.png", 1, "L")
    with pytest.raises(DataError, match="beside folders"):
        data.load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cats"}, "digits, mnist, cifar10, captions, or the path"),
        ({"name": ""}, "digits, mnist, cifar10, captions, or the path"),
        ({"name": "digits", "split": "valid"}, "split must be one of train, test"),
        ({"name": "digits", "image_size": 32}, "image_size"),
        ({"name": "digits", "data_dir": "x"}, "data_dir"),
        ({"name": "mnist", "data_dir": 5}, "data_dir must be the path of a file or folder, got 5"),
        ({"name": "mnist", "data_dir": 0}, "data_dir must be the path of a file or folder, got 0"),
        ({"name": "cifar10", "data_dir": ["x"]}, "data_dir must be the path of a file or folder"),
        ({"name": 5}, "data must be a name or the path of a folder, got 5"),
        ({"name": ["digits"]}, "data must be a name or the path of a folder, got"),
        ({"name": np.zeros(2)}, "data must be a name or the path of a folder, got"),
    ],
)
def test_arguments_that_a_data_set_does_not_take_are_refused(arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        data.load(**arguments)


def test_importing_data_imports_no_image_library():
    code = (
        "import sys, minidiff.data; print([m for m in ('PIL', 'matplotlib') if m in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "[]"


def test_a_gzip_bomb_is_not_unpacked(tmp_path):
    header = struct.pack(">4I", 0x0803, 250_000, 28, 28 * 4096)
    bomb = gzip.compress(header + bytes(1 << 24), 1)
    folder = _mnist(tmp_path, bomb, _idx(LABELS))
    with pytest.raises(DataError, match=r"train-images.*expected 0\.\.300000 × 28 × 28"):
        data.load("mnist", data_dir=folder)
    (folder / "train-images-idx3-ubyte").write_bytes(gzip.compress(GOOD + bytes(1 << 24)))
    with pytest.raises(DataError, match="but more follow"):
        data.load("mnist", data_dir=folder)
