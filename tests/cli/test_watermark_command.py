"""minidiff watermark: what is written is read, and a sample can carry it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minidiff.cli import main


def test_a_sample_carries_it(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model", "mnist", "--class", "7", "--num", "1", "--steps", "2"]
    assert main(["sample", *model, "--watermark", "6d696e69", "--png", "seven.png"]) == 0
    assert main(["watermark", "read", "seven.png", "--message", "6d696e69"]) == 0
    assert "found, 32 of 32" in capsys.readouterr().out
    assert main(["watermark", "read", "seven.png", "--message", "6d696e68", "--key", "3"]) == 1
    assert "no watermark 6d696e68 in seven.png" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_picture_is_marked_and_read_back(mode: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save("photo.png")
    assert main(["watermark", "write", "photo.png", "marked.png", "--message", "1f"]) == 0
    with Image.open("marked.png") as marked:
        assert (marked.mode, marked.size) == (mode, (50, 40))
    assert main(["watermark", "read", "marked.png"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "marked.png: 0000001f"


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["write", "photo.png", "photo.png", "--message", "1"], "two files", 2),
        (["write", "photo.png", "m.jpg", "--message", "1"], "must be a .png file", 2),
        (["write", "photo.png", "--message", "1"], "takes two pictures", 2),
        (["write", "photo.png", "m.png"], "--message must be given", 2),
        (["write", "photo.png", "m.png", "--message", "hello"], "hexadecimal digits", 2),
        (["read", "none.png"], "no such file", 1),
        (["read", "small.png"], "at least 16×16", 2),
    ],
)
def test_a_wrong_call_is_one_line(
    words: list[str], message: str, code: int, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (32, 32)).save("photo.png")
    Image.new("L", (8, 32)).save("small.png")
    assert main(["watermark", *words]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("m.png").exists()
