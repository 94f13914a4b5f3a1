"""The tokenizer of whole words: its tokens, its warnings and its file."""

import json
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.text.words import BEGIN, END, FILE, PAD, WordTokenizer

WORDS = ("7", "a", "red", "seven")


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer(WORDS, 6)


def test_a_text_becomes_its_words_between_two_marks_and_padding(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = tokenizer.encode(["A red  7!", "", "red-seven, red\n7"])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [
        [BEGIN, 4, 5, 3, END, PAD],
        [BEGIN, END, PAD, PAD, PAD, PAD],
        [BEGIN, 5, 6, 5, 3, END],
    ]
    assert len(tokenizer) == 7


def test_unknown_words_are_left_out_and_named_once_each(tokenizer):
    message = r"left out: crimson, 77, zebra, café$"
    with pytest.warns(UserWarning, match=message):
        ids = tokenizer.encode(["a Crimson 77", "crimson zebra red café"])
    assert ids.tolist() == tokenizer.encode(["a", "red"]).tolist()


def test_a_long_text_is_cut_with_a_warning_that_names_its_end(tokenizer):
    message = r"at most 4 words; the end of 1 of 2 is cut off: 'red 7'"
    with pytest.warns(UserWarning, match=message):
        ids = tokenizer.encode(["a a a seven red 7", "a a a a"])
    assert ids[0].tolist() == [BEGIN, 4, 4, 4, 6, END]


def test_the_warning_names_the_file_of_the_caller(tokenizer):
    with pytest.warns(UserWarning, match="blue") as caught:
        tokenizer.encode(["blue"])
    assert caught[0].filename == __file__


@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=4), min_size=1, max_size=5))
def test_decoding_inverts_encoding(texts):
    tokenizer = WordTokenizer(WORDS, 6)
    texts = [" ".join(words) for words in texts]
    assert tokenizer.decode(tokenizer.encode(texts)) == texts


@given(st.text())
def test_any_text_is_encoded_as_one_sequence_of_the_vocabulary(text):
    tokenizer = WordTokenizer(WORDS, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = tokenizer.encode([text])
    assert set(ids.flatten().tolist()) <= set(range(len(tokenizer)))
    assert ids[0, 0] == BEGIN
    assert (ids == END).sum() == 1


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a red 7", "prompts must be a list of at least one text, got 'a red 7'"),
        ([], "prompts must be a list of at least one text"),
        (["red", 7], "prompts must hold texts, got 7"),
        (["\ud800"], "prompts must be Unicode text"),
    ],
)
def test_prompts_that_are_not_a_list_of_texts_are_refused(tokenizer, texts, message):
    with pytest.raises(InvalidArgument, match=message):
        tokenizer.encode(texts)


@pytest.mark.parametrize("number", [-1, 7])
def test_numbers_outside_the_vocabulary_are_not_decoded(tokenizer, number):
    with pytest.raises(InvalidArgument, match=r"ids must be in 0..6"):
        tokenizer.decode(torch.tensor([[1, number]]))


@pytest.mark.parametrize(
    ("words", "length", "message"),
    [
        ("red", 6, "words must be a list of at least one word, got 'red'"),
        ([], 6, "words must be a list of at least one word"),
        (["Red"], 6, "words must hold lower-case words, got 'Red'"),
        (["two words"], 6, "words must hold lower-case words, got 'two words'"),
        ([7], 6, "words must hold lower-case words, got 7"),
        (["red", "a", "red"], 6, "words must differ from each other, got 'red' twice"),
        (["red"], 2, "model_max_length must be in 3.."),
        (["red"], 6.0, "model_max_length must be a whole number"),
    ],
)
def test_an_invalid_vocabulary_is_refused(words, length, message):
    with pytest.raises(InvalidArgument, match=message):
        WordTokenizer(words, length)


def test_a_saved_tokenizer_is_read_back_unchanged(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = WordTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (again.words, again.model_max_length) == (tokenizer.words, tokenizer.model_max_length)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_class": "CLIPTokenizer"}, "of a WordTokenizer"),
        ({"extra": 1}, "must hold model_max_length, tokenizer_class, words .* got extra, "),
        ({"words": ["red", "red"]}, "'red' twice"),
        ({"words": {"red": 1}}, "words must be a list"),
        ({"model_max_length": "6"}, "model_max_length must be a whole number"),
    ],
)
def test_a_file_of_another_tokenizer_is_refused_with_its_name(tokenizer, tmp_path, change, message):
    tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(content | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        WordTokenizer.from_pretrained(tmp_path)
    assert str(tmp_path / FILE) in str(caught.value)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_a_damaged_or_missing_file_is_refused(tokenizer, tmp_path, damage):
    with pytest.raises(CheckpointError, match="no such file"):
        WordTokenizer.from_pretrained(tmp_path)
    (tmp_path / FILE).write_bytes(damage)
    with pytest.raises(CheckpointError, match=FILE):
        WordTokenizer.from_pretrained(tmp_path)
