"""Paths as people write them: "~", links, permissions, byte order marks."""

import os
import shlex

import pytest

from minidiff import Pipeline
from minidiff.cli import main
from minidiff.runtime import files


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_a_tilde_after_an_equals_sign_is_the_home_folder(home, run_folder, capsys):
    assert main(["sample", str(run_folder), "--num=1", "--steps=1", "--png=~/a.png"]) == 0
    assert (home / "a.png").is_file()
    pipe = Pipeline.from_pretrained(run_folder / "model")
    pipe.save_pretrained("~/model")
    assert Pipeline.from_pretrained("~/model").class_names == pipe.class_names
    pipe.unet.save_pretrained("~/unet")
    assert (home / "unet" / "config.json").is_file()
    assert not list((home / "work").iterdir())


def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path, pipe):
    (tmp_path / "disk").mkdir()
    pipe.save_pretrained(tmp_path / "disk" / "model")
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    pipe.guidance_scale = 3.0
    pipe.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").is_symlink()
    assert Pipeline.from_pretrained(tmp_path / "disk" / "model").guidance_scale == 3.0
    files.write_json(tmp_path / "disk" / "a.json", {})
    (tmp_path / "a.json").symlink_to(tmp_path / "disk" / "a.json")
    files.write_json(tmp_path / "a.json", {"new": 1})
    assert (tmp_path / "a.json").is_symlink()
    assert files.read_json(tmp_path / "disk" / "a.json") == {"new": 1}


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_a_private_file_or_folder_stays_private(tmp_path, mode):
    path = tmp_path / "a.json"
    files.write_json(path, {})
    path.chmod(mode)
    files.write_json(path, {"new": 1})
    assert path.stat().st_mode & 0o777 == mode
    folder = tmp_path / "folder"
    folder.mkdir(mode=mode | 0o100)
    with files.atomic_folder(folder) as temporary:
        (temporary / "a").write_text("a")
    assert folder.stat().st_mode & 0o777 == mode | 0o100


@pytest.mark.parametrize("exchanges", [True, False])
def test_replacing_a_folder_leaves_the_new_one_and_nothing_else(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for text in ("old", "new"):
        with files.atomic_folder(tmp_path / "model") as temporary:
            (temporary / "a").write_text(text)
    assert (tmp_path / "model" / "a").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_a_kill_left_aside_is_moved_back(tmp_path):
    aside = tmp_path / f".model.old.x{files.TEMPORARY}"
    (aside / "model").mkdir(parents=True)
    (aside / "model" / "a").write_text("old")
    files.clear_temporaries(tmp_path)
    assert (tmp_path / "model" / "a").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_byte_order_mark_is_not_part_of_a_config(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfsteps = 3\n")
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"steps": 3}')
    assert files.read_options(tmp_path / "a.toml") == {"steps": 3}
    assert files.read_options(tmp_path / "a.json") == {"steps": 3}


def test_where_folders_cannot_be_flushed_files_are_still_written(tmp_path, monkeypatch):
    opened, flags = os.open, []

    def windows(path, mode, *more, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        flags.append(mode)
        return opened(path, mode, *more, **options)

    monkeypatch.setattr(files.os, "open", windows)
    files.write_json(tmp_path / "a.json", {"a": 1})
    assert flags[-1] & os.O_RDWR  # Windows flushes only what is open for writing
    assert files.read_json(tmp_path / "a.json") == {"a": 1}


def test_the_next_command_can_be_pasted(tmp_path, capsys):
    out = tmp_path / "my run"
    command = ["train", "--data", "digits", "--steps", "1", "--channels", "8,8", "--device", "cpu"]
    assert main([*command, "--out", str(out)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(line.partition("Next: minidiff ")[2])
    assert words == ["sample", str(out), "--png", "samples.png"]
