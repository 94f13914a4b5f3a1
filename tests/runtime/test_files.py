"""Files and folders: written as a whole or not at all, and checked when read."""

import json
import math
import os

import numpy as np
import pytest
import torch
from torch import nn

from minidiff.errors import CheckpointError
from minidiff.runtime.files import (
    MAX_JSON_BYTES,
    announced,
    atomic_file,
    atomic_folder,
    ensure_writable,
    existing_folder,
    read_json,
    write_json,
    write_npz,
)
from minidiff.runtime.tensors import load_weights, read_headers, read_tensor, write_tensors


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "config.json"
    write_json(target, {"version": 1})
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        temporary.write_text("half of i")
        raise RuntimeError
    assert read_json(target) == {"version": 1}
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with atomic_folder(target) as temporary:
        (temporary / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(target) as temporary:
        (temporary / "new").write_text("new")
        raise RuntimeError
    assert os.listdir(target) == ["old"]
    with atomic_folder(target) as temporary:
        (temporary / "new").write_text("new")
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["model"]


def test_a_written_file_has_ordinary_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    write_json(tmp_path / "ours.json", {})
    assert (tmp_path / "ours.json").stat().st_mode == plain.stat().st_mode


def test_tensors_are_read_back_bit_for_bit(tmp_path):
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.arange(5),
        "c": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "d": torch.randn(7).bfloat16(),
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    stored = read_headers([tmp_path / "x.safetensors"])
    read = {name: read_tensor(entry) for name, entry in stored.items()}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in tensors.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[1, 2]", "expected a JSON object, got list"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b" " * (MAX_JSON_BYTES + 1), "a config has at most"),
    ],
)
def test_json_that_is_not_a_config_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("damage", ["truncate", "empty", "text", "giant header"])
def test_a_damaged_weights_file_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.randn(100)})
    whole = path.read_bytes()
    path.write_bytes(
        {
            "truncate": whole[:-8],
            "empty": b"",
            "text": b"not tensors at all",
            "giant header": (2**62).to_bytes(8, "little") + whole[8:],
        }[damage]
    )
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_headers([path])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("bias"), "1 missing tensors: bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "1 unexpected tensors: extra"),
        (lambda t: t.update(bias=torch.zeros(3)), r"bias has shape \(3,\), expected \(2,\)"),
        (
            lambda t: t.update(bias=torch.zeros(2, dtype=torch.int64)),
            "bias is I64, expected torch.float32",
        ),
        (lambda t: t.update(bias=torch.tensor([0.0, float("nan")])), "bias holds NaN"),
        (lambda t: t.update(bias=torch.full((2,), 1e300, dtype=torch.float64)), "bias holds NaN"),
        (
            lambda t: t.update(bias=torch.full((2,), math.nan).to(torch.float8_e4m3fn)),
            "bias holds NaN",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    layer = nn.Linear(4, 2)
    before = layer.weight.clone()
    tensors = {name: torch.zeros_like(value) for name, value in layer.state_dict().items()}
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        write_tensors(tmp_path / "x.safetensors", tensors)
        load_weights(layer, read_headers([tmp_path / "x.safetensors"]))
    assert torch.equal(layer.weight, before)  # no tensor was loaded


def test_paths_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "under", tmp_path):
        with pytest.raises(CheckpointError, match=str(path)):
            ensure_writable(path)
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_json(tmp_path / "file" / "config.json", {})
    with pytest.raises(CheckpointError, match="is a file"), atomic_folder(tmp_path / "file"):
        pass


def test_npz_holds_plain_arrays(tmp_path):
    write_npz(tmp_path / "x.npz", images=np.zeros((2, 3), np.uint8), labels=np.arange(2))
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        assert set(file) == {"images", "labels"}


def test_json_is_sorted_and_ends_with_a_newline(tmp_path):
    write_json(tmp_path / "x.json", {"b": 1, "a": [1, 2]})
    text = (tmp_path / "x.json").read_text()
    assert text.endswith("}\n")
    assert list(json.loads(text)) == ["a", "b"]


def test_devices_and_pipes_are_never_replaced_by_a_file(tmp_path):
    """A rename over /dev/null by root would remove it for every other program."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (ensure_writable, lambda path: write_json(path, {})):
        with pytest.raises(CheckpointError, match="device or a pipe"):
            write(pipe)
    assert pipe.is_fifo()


@pytest.mark.parametrize("name", ["null\0byte", "x" * 300])
def test_invalid_file_names_are_refused(tmp_path, name):
    for write in (ensure_writable, lambda path: write_json(path, {})):
        with pytest.raises(CheckpointError, match="cannot be written"):
            write(tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be written"), atomic_folder(tmp_path / name):
        pass


def test_a_full_disk_is_reported_and_leaves_no_partial_file(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"x\.safetensors: cannot be written"):
            write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(100_000)})
        with pytest.raises(CheckpointError, match=r"x\.npz: cannot be written"):
            write_npz(tmp_path / "x.npz", a=np.random.default_rng(0).random(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not os.listdir(tmp_path)


def test_a_file_that_is_replaced_is_announced_as_such(tmp_path, capsys):
    path = tmp_path / "a.json"
    for note in ("", " (2 bytes)"):
        with announced(path, note):
            write_json(path, {})
    with pytest.raises(CheckpointError), announced(tmp_path / "b"):
        raise CheckpointError
    assert capsys.readouterr().out == f"wrote {path}\nreplaced {path} (2 bytes)\n"


def test_a_misspelt_folder_is_answered_by_its_neighbour_and_not_by_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "ring").mkdir(parents=True)
    for given, message in {
        "runs/rign": "runs/rign: no such folder; did you mean ring?",
        "run": "run: no such folder; did you mean runs?",
        "runs/x": "runs/x: no such folder",
    }.items():
        with pytest.raises(CheckpointError) as caught:
            existing_folder(given)
        assert str(caught.value) == message
    with pytest.raises(CheckpointError, match="hf download org/model"):
        existing_folder("org/model")
