"""CIFAR-10's binary version: the content of a record, and damaged files."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from minidiff import data
from minidiff.data import cifar10
from minidiff.errors import DataError

FILES = (*cifar10.FILES["train"], *cifar10.FILES["test"])
RECORDS = 4


@pytest.fixture
def records(monkeypatch) -> dict[str, np.ndarray]:
    """Return files of a few records each, by name: uint8 (N, 3073)."""
    monkeypatch.setattr(cifar10, "RECORDS", RECORDS)
    rng = np.random.default_rng(0)
    made = {name: rng.integers(0, 256, (RECORDS, 3073), dtype=np.uint8) for name in FILES}
    for content in made.values():
        content[:, 0] %= 10
    return made


def write(folder: Path, records: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in records.items():
        (folder / name).write_bytes(content.tobytes())
    return folder


def archived(folder: Path, records: dict[str, np.ndarray]) -> Path:
    with tarfile.open(folder / cifar10.ARCHIVE, "w:gz") as tar:
        tar.add(write(folder / "made", records), cifar10.FOLDER)
    return folder


@pytest.mark.parametrize("place", ["", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_pixels_and_labels_come_from_the_records_in_order(tmp_path, records, place, split):
    write(tmp_path / place, records)
    held = data.load("cifar10", split, data_dir=tmp_path)
    expected = np.concatenate([records[name] for name in cifar10.FILES[split]])
    assert held.labels.tolist() == expected[:, 0].tolist()
    # Byte 1 + 1024·c + 32·y + x of a record is channel c at row y, column x.
    assert held.images[1, 2, 5, 7] == expected[1, 1 + 2 * 1024 + 5 * 32 + 7]
    assert np.array_equal(held.images.numpy().reshape(len(held), -1), expected[:, 1:])
    assert held.class_names[3] == "cat"
    assert held.shape == (3, 32, 32)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_members_of_the_archive_may_have_any_order(tmp_path, records, split):
    plain = data.load("cifar10", split, data_dir=write(tmp_path / "plain", records))
    backwards = dict(reversed(records.items()))
    packed = data.load("cifar10", split, data_dir=archived(tmp_path, backwards))
    assert torch.equal(plain.images, packed.images)
    assert torch.equal(plain.labels, packed.labels)


@pytest.mark.parametrize("how", [write, archived])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[:-1], "has 9219 bytes, expected 12292"),  # cut at a record's end
        (lambda r: r.reshape(-1)[:-1], "has 12291 bytes"),
        (lambda r: np.append(r, r[:1], 0), "has 15365 bytes"),
        (lambda r: r[:0], "has 0 bytes"),
        (lambda r: np.where(np.arange(3073) == 0, [[3], [3], [10], [255]], r).astype(np.uint8),
         "label 10 in record 2"),
        (None, "no data_batch_3.bin"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, records, how, change, message):
    if change is None:
        del records["data_batch_3.bin"]
    else:
        records["data_batch_3.bin"] = change(records["data_batch_3.bin"])
    with pytest.raises(DataError, match=rf"(?s)data_batch_3.*{message}|{message}"):
        data.load("cifar10", data_dir=how(tmp_path, records))


def test_the_list_of_class_names_may_be_missing_but_not_wrong(tmp_path, records):
    write(tmp_path, records)
    names = tmp_path / cifar10.NAMES_FILE
    names.write_text("\n".join(cifar10.CLASS_NAMES) + "\n\n")
    assert len(data.load("cifar10", "test", data_dir=tmp_path)) == RECORDS
    for wrong in (reversed(cifar10.CLASS_NAMES), cifar10.CLASS_NAMES[:9], ["ant\xff"]):
        names.write_text("\n".join(wrong), encoding="latin-1")
        with pytest.raises(DataError, match=r"batches\.meta\.txt.*expected airplane, automobile"):
            data.load("cifar10", "test", data_dir=tmp_path)


def test_the_error_for_a_folder_without_cifar10_names_the_files_expected(tmp_path):
    with pytest.raises(DataError, match=r"data_batch_1\.bin.*cifar-10-binary\.tar\.gz.*--download"):
        data.load("cifar10", data_dir=tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        data.load("cifar10", data_dir=tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["cifar-10-batches-py/data_batch_1", "cifar-10-python.tar.gz", "data_batch_1"]
)
@pytest.mark.parametrize("inside", ["", "cifar10"])
def test_the_pickled_version_is_refused_and_the_binary_one_named(tmp_path, name, inside):
    place = tmp_path / inside / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"\x80\x02}q\x01.")
    message = r"Python version, whose files are pickles .*cifar-10-binary\.tar\.gz: --download"
    with pytest.raises(DataError, match=message):
        data.load("cifar10", data_dir=tmp_path)


@pytest.mark.slow
@pytest.mark.skipif("MINIDIFF_DATA" not in os.environ, reason="needs the real images")
def test_the_real_images_are_read(tmp_path):
    script = Path(os.environ["MINIDIFF_DATA"]) / "unpack_cifar10.py"
    subprocess.run([sys.executable, script, tmp_path], check=True)
    train, test = data.load("cifar10", data_dir=tmp_path), data.load("cifar10", "test", tmp_path)
    assert train.labels.bincount().tolist() == [5000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    # The published means of the training set, 0.4914, 0.4822, 0.4465, up to the error of JPEG.
    mean = train.images.double().mean((0, 2, 3)) / 255
    assert mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.002)
