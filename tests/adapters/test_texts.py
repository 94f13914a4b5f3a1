"""Captioned pictures: examples by formula, and folders as the datasets library has them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.adapters import examples, texts
from minidiff.data.captioned.scenes import COLOURS
from minidiff.errors import DataError, InvalidArgument
from minidiff.metrics import SceneEvaluator
from minidiff.text.words import WordTokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), 80 * i, np.uint8)).save(tmp_path / f"{i}.png")
    lines = [{"file_name": f"{i}.png", "text": f"a grey {i}"} for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def write(folder: Path, text: str) -> None:
    (folder / "metadata.jsonl").write_text(text)


def test_every_image_has_its_caption(folder):
    data = texts.load(folder)
    assert data.texts == ("a grey 0", "a grey 1", "a grey 2")
    assert data.images[:, 0, 0, 0].tolist() == [0, 80, 160]
    x, ids = data.batch(torch.tensor([2, 0]))
    assert x.shape == (2, 3, 8, 8)
    prompts = data.condition(type("Config", (), {"text_width": 8, "text_layers": 1})).prompts
    assert prompts.tokenizer.decode(ids) == ["a grey 2", "a grey 0"]


def test_one_caption_for_all(folder):
    (folder / "metadata.jsonl").unlink()
    assert set(texts.load(folder, "a photo").texts) == {"a photo"}
    with pytest.raises(InvalidArgument, match="caption must be given"):
        texts.load(folder)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "holds no captions"),
        ("{", "metadata.jsonl:1: not JSON"),
        ('{"text": "a"}', "must be {.file_name.: …"),
        ('{"file_name": "0.png"}', "0.png has no caption; give one as text, caption, prompt"),
        ('{"file_name": "0.png", "text": " "}', "0.png has no caption"),
        ('{"file_name": "0.png", "text": "a"}', r"an image has no caption: 1.png \(and 1 more"),
        ('{"file_name": "0.png", "text": "a"}\n' * 2, "names 0.png a second time"),
    ],
)
def test_damaged_captions_are_refused(content, text, folder):
    write(folder, content)
    with pytest.raises(DataError, match=text):
        texts.load(folder)


def test_captions_without_an_image_and_two_kinds_of_captions_are_refused(folder):
    lines = (folder / "metadata.jsonl").read_text()
    write(folder, lines + '\n{"file_name": "9.png", "text": "a"}')
    with pytest.raises(DataError, match="a caption has no image: 9"):
        texts.load(folder)
    write(folder, lines)
    with pytest.raises(InvalidArgument, match="caption must be left out"):
        texts.load(folder, "a photo")
    with pytest.raises(InvalidArgument, match="caption is for a folder of images, not for hearts"):
        examples.captioned("hearts", "a photo")


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_examples_depend_on_their_seed_alone(name):
    one, same, other = (examples.load(name, 4, seed) for seed in (0, 0, 1))
    assert torch.equal(one.images, same.images)
    assert one.texts == same.texts
    assert not torch.equal(one.images, other.images)


def test_a_heart_is_symmetric_and_points_down():
    ink = examples.shape("hearts")
    assert torch.allclose(ink, ink.flip(1), atol=1e-6)
    rows = ink.sum(dim=1)
    assert rows[3] > 2 * rows[12]


@pytest.mark.slow
def test_the_judge_of_real_scenes_reads_the_examples():
    """What is learned from them can then be judged by it: colours, and striped digits."""
    evaluator, names = SceneEvaluator(), list(COLOURS)
    hearts = examples.load("hearts", 100, seed=7)
    answers, _ = evaluator.read(hearts.images)
    right = [
        names[c] in t and names[b] in t
        for t, c, b in zip(
            hearts.texts, answers[:, 3].tolist(), answers[:, 8].tolist(), strict=True
        )
    ]
    assert np.mean(right) >= 0.98


# --- words of several tokens -----------------------------------------------------------------


def test_a_word_may_be_several_tokens_and_is_saved_so(tmp_path):
    tokenizer = WordTokenizer(["a", "red"], 8).extended({"heart": 3, "star": 1})
    ids = tokenizer.encode(["a red heart", "star"])
    assert ids[0].tolist() == [2, 3, 4, 5, 6, 7, 1, 0]
    assert ids[1].tolist()[:3] == [2, 8, 1]
    tokenizer.save_pretrained(tmp_path)
    again = WordTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(["a red heart", "star"]), ids)
    for word in ("red", "two words", "Star", "heartx2", ""):
        with pytest.raises(InvalidArgument, match="word must be"):
            tokenizer.extended({word: 1})
