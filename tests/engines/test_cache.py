"""The cache: entries that are whole or rebuilt, bounded, listed and cleared."""

import json
import os

import pytest
import torch

from minidiff import cli
from minidiff.engines import cache
from minidiff.engines.graph import Input
from minidiff.errors import CheckpointError
from minidiff.runtime import files

INPUTS = [Input("sample", "float32", (None, 2, 8, 8))]


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    return tmp_path / "engines"


def fetch(key, content="graph", print_line=print):
    """Return the content of an entry, which is made if there is none."""

    def make(place):
        (place / "graph.txt").write_text(content)
        return {"title": f"unet {content}", "files": {
            "graph.txt": files.sha256(place / "graph.txt")}}  # fmt: skip

    return cache.fetch(key, make, lambda place, _: (place / "graph.txt").read_text(), print_line)


def test_an_entry_is_made_once(folder):
    assert fetch("a", "first") == fetch("a", "second") == "first"
    assert [entry.title for entry in cache.entries()] == ["unet first"]
    assert not [path for path in folder.iterdir() if files.is_temporary(path)]


@pytest.mark.parametrize("damage", ["content", "index", "missing", "name", "no index"])
def test_a_damaged_entry_is_rebuilt_with_a_word(folder, damage):
    fetch("a", "first")
    if damage == "content":
        (folder / "a" / "graph.txt").write_text("other")
    elif damage == "missing":
        (folder / "a" / "graph.txt").unlink()
    elif damage == "no index":
        (folder / "a" / cache.INDEX).unlink()
    elif damage == "index":
        (folder / "a" / cache.INDEX).write_text("{")
    else:
        index = {"files": {"../graph.txt": "0" * 64}}
        (folder / "a" / cache.INDEX).write_text(json.dumps(index))
    lines = []
    assert fetch("a", "second", lines.append) == "second"
    assert len(lines) == 1
    assert "is damaged" in lines[0]
    assert fetch("a", "third") == "second"


def test_the_least_recently_used_entries_are_deleted_beyond_the_bound(folder, monkeypatch):
    monkeypatch.setattr(cache, "MAX_BYTES", 2500)
    for i, key in enumerate("abc"):
        fetch(key, "x" * 400)
        os.utime(folder / key, (i, i))
    assert fetch("b", "new") == "x" * 400  # used just now
    fetch("d", "x" * 400)
    assert sorted(path.name for path in folder.iterdir()) == ["b", "d"]


def test_the_key_depends_on_all_that_the_graph_does(tiny):
    def key(network=tiny.unet, name="unet", inputs=INPUTS, format="onnx"):
        return cache.key_of(network, name, inputs, format)

    same = key()
    assert key() == same
    assert key(name="guidance_network") != same
    assert key(format="openvino") != same
    assert key(inputs=[INPUTS[0]._replace(shape=(None, 2, 16, 8))]) != same
    attention = tiny.unet.mid_block.attentions[0]
    attention.heads *= 2
    assert key() != same
    attention.heads //= 2
    assert key(tiny.unet.to(memory_format=torch.channels_last)) == same
    with torch.no_grad():
        tiny.unet.conv_in.weight[0, 0, 0, 0] += 1
    assert key() != same


def test_the_folder_is_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "minidiff" / "engines"


def test_a_folder_that_cannot_be_written_is_named(folder):
    folder.write_text("a file")
    with pytest.raises(CheckpointError, match=r"cache folder .*set MINIDIFF_CACHE to another"):
        fetch("a")


def test_the_command_lists_and_clears_entries_and_nothing_else(folder, capsys):
    fetch("abcdefghij")
    (folder / "notes").mkdir()
    assert cli.main(["cache", "list"]) == 0
    assert "abcdefgh" in (out := capsys.readouterr().out)
    assert "unet graph" in out
    assert "1 graphs" in out
    assert cli.main(["cache", "clear"]) == 0
    assert "deleted 1 graphs" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["notes"]
