"""Captioned digits: what the picture shows is what the caption says, whatever the batch."""

import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiff.data.captioned import scenes
from minidiff.data.captioned.captions import MAX_INDEX, CaptionedDigits, _split_mix
from minidiff.data.captioned.grammar import MAX_LENGTH, NUMERALS, ONE_DIGIT, TWO_DIGITS, tokenizer
from minidiff.data.captioned.scenes import COLOURS, HELD_OUT, NONE, POSITIONS, RELATIONS, SIZES
from minidiff.errors import InvalidArgument

SOME = torch.arange(4000)
PALETTE = torch.tensor(list(COLOURS.values())).float()


@pytest.fixture(scope="module")
def data() -> CaptionedDigits:
    return CaptionedDigits()


@pytest.fixture(scope="module")
def shown(data) -> scenes.Scenes:
    return data.scenes(SOME)


@pytest.mark.parametrize("seed", [0, 2**64 - 1, 1234567])
def test_the_random_numbers_are_those_of_split_mix_64(seed):
    def split_mix(state):  # one after the other, as published
        while True:
            state = (state + 0x9E3779B97F4A7C15) % 2**64
            z = state
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
            yield z ^ z >> 31

    stream = split_mix(seed)
    ours = _split_mix(np.uint64(seed), np.arange(50, dtype=np.uint64))
    assert ours.tolist() == [next(stream) for _ in range(50)]


@pytest.mark.parametrize("n", [2, 3, 10, 17, 1000])
def test_the_greatest_random_number_is_still_the_last_choice(n):
    assert scenes.whole(torch.tensor(1 - 2**-22), n) == n - 1


@settings(max_examples=20, deadline=None)
@given(index=st.lists(st.integers(0, MAX_INDEX), min_size=1, max_size=8))
def test_a_picture_does_not_depend_on_its_batch(index):
    data = CaptionedDigits(seed=5)
    x0, ids = data.batch(torch.tensor(index))
    for row, i in enumerate(index):
        alone_x0, alone_ids = data.batch(torch.tensor([i]))
        assert torch.equal(x0[row], alone_x0[0])
        assert torch.equal(ids[row], alone_ids[0])


def test_seeds_splits_and_numbers_give_different_pictures():
    firsts = {
        CaptionedDigits(split, seed=seed).images(torch.tensor([i])).numpy().tobytes()
        for split in ("train", "test")
        for seed in (0, 1)
        for i in (0, 1)
    }
    assert len(firsts) == 8


def test_the_tokens_are_those_of_the_text(data):
    _, ids = data.batch(SOME)
    texts = data.captions(SOME)
    assert torch.equal(data.tokenizer.encode(texts), ids)
    assert ids.shape == (len(SOME), MAX_LENGTH)


def test_every_word_and_template_is_used(data):
    texts = data.captions(SOME)
    used = {word for text in texts for word in text.split()}
    assert used == set(data.tokenizer.words)
    assert len(ONE_DIGIT) + len(TWO_DIGITS) >= 6


def test_the_article_fits_the_word_behind_it(data):
    for text in data.captions(SOME):
        words = text.split()
        for article, word in pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (word in ("8", "eight", "orange")), text


def _digit_of(word):
    return int(word) if word.isdigit() else NUMERALS.index(word)


def test_what_a_caption_says_is_what_the_scene_has(data, shown):
    numerals = {*NUMERALS, *map(str, range(10))}
    sizes = {"small": 0, "little": 0, "big": 1, "large": 1}
    relations = {"above": 2, "over": 2, "below": 3, "under": 3}
    for row, text in enumerate(data.captions(SOME)):
        words = text.split()
        said = [_digit_of(word) for word in words if word in numerals]
        assert said == shown.digit[row, : len(said)].tolist()
        scene = [list(COLOURS)[i] for i in shown.colour[row].tolist() if i != NONE]
        background = list(COLOURS)[shown.background[row]]
        for before, word in zip(["", *words], words, strict=False):
            if word in COLOURS:
                assert word in (*scene, background), text
            if word == "background" and before in COLOURS:
                assert before == background
        told = [sizes[word] for word in words if word in sizes]
        if len(told) == int((shown.digit[row] != NONE).sum()):
            assert told == shown.size[row, : len(told)].tolist()
        for word, relation in relations.items():
            assert word not in words or shown.relation[row] == relation
        for side, relation in (("left of", 0), ("right of", 1)):
            assert side not in text or shown.relation[row] == relation
        if shown.relation[row] != NONE:
            continue
        for corner in (name for name in POSITIONS if " " in name):
            assert corner not in text or POSITIONS[shown.position[row]] == corner


def test_training_never_shows_a_pair_that_is_held_out_and_shows_all_others(shown):
    def pairs(scenes):
        there = scenes.digit != NONE
        return set(zip(scenes.digit[there].tolist(), scenes.colour[there].tolist(), strict=True))

    assert len(HELD_OUT) == 10
    assert {digit for digit, _ in HELD_OUT} == {colour for _, colour in HELD_OUT} == set(range(10))
    every = {(digit, colour) for digit in range(10) for colour in range(len(COLOURS))}
    assert pairs(shown) == every - set(HELD_OUT)
    assert pairs(CaptionedDigits(pairs="held out").scenes(SOME)) == set(HELD_OUT)
    assert pairs(CaptionedDigits(pairs="all").scenes(SOME)) == every


def test_all_values_of_every_attribute_are_equally_frequent():
    drawn = CaptionedDigits(pairs="all", seed=3).scenes(torch.arange(40_000))
    for name, values in (
        ("digit", 10), ("size", len(SIZES)), ("position", len(POSITIONS)),
        ("relation", len(RELATIONS)), ("colour", len(COLOURS)),
    ):  # fmt: skip
        label = getattr(drawn, name).flatten()
        count = label[label != NONE].bincount(minlength=values).double()
        expected = count.sum() / values
        # Five standard deviations of a count.
        assert (count - expected).abs().max() < 5 * expected.sqrt(), name


def test_the_answers_do_not_depend_on_which_digit_is_named_first(shown):
    read = scenes.answers(shown)
    assert read.shape == (len(SOME), len(scenes.QUESTIONS))
    for row, answer in enumerate(read.tolist()):
        asked = dict(zip(scenes.QUESTIONS, answer, strict=True))
        relation = int(shown.relation[row])
        first, other = zip(*(part[row].tolist() for part in shown[:3]), strict=True)
        if relation == NONE:
            arrangement = "one digit"
        elif RELATIONS[relation] in ("left of", "right of"):
            arrangement = "side by side"
        else:
            arrangement = "one above the other"
        if relation != NONE and RELATIONS[relation] in ("right of", "below"):
            first, other = other, first
        assert scenes.ARRANGEMENTS[asked["arrangement"]] == arrangement
        assert (asked["digit"], asked["colour"], asked["size"]) == first
        assert (asked["other digit"], asked["other colour"], asked["other size"]) == other
        assert (asked["position"] == NONE) == (arrangement != "one digit")
        assert asked["background"] == shown.background[row]


def test_what_is_wanted_of_a_picture_is_what_its_caption_says(data, shown):
    every, wanted = scenes.answers(shown), data.caption_answers(SOME)
    open_ = wanted == NONE
    assert torch.equal(wanted.masked_fill(open_, 0), every.masked_fill(open_, 0))
    names = list(COLOURS)
    for row, (text, answer) in enumerate(zip(data.captions(SOME), wanted.tolist(), strict=True)):
        asked = dict(zip(scenes.QUESTIONS, answer, strict=True))
        words = text.split()
        if " and " in text:
            assert {name for name, label in asked.items() if label != NONE} == {"background"}
            continue
        digits = [word for word in words if word.isdigit() or word in NUMERALS]
        said = [_digit_of(word) for word in digits]
        two = int(shown.relation[row] != NONE)
        assert (asked["arrangement"] != NONE) == bool(digits), text
        assert sorted(said) == sorted(
            asked[name] for name in ("digit", "other digit") if asked[name] != NONE
        )
        colours = [asked[name] for name in ("colour", "other colour", "background")]
        colours = sorted(names[colour] for colour in colours if colour != NONE)
        assert colours == sorted(word for word in words if word in names), text
        sizes = [word for word in words if word in ("small", "little", "big", "large")]
        assert len(sizes) == sum(asked[name] != NONE for name in ("size", "other size"))
        places = ("corner", "at", "middle", "center", "centre")
        assert (asked["position"] != NONE) == (
            (not two and any(word in words for word in places)) or "on the " in text
        ), text


def test_backgrounds_set_off_every_digit(shown):
    for i in (0, 1):
        there = shown.colour[:, i] != NONE
        colour, background = shown.colour[there, i], shown.background[there]
        assert (PALETTE[colour] - PALETTE[background]).norm(dim=1).min() > 120


def _places(data, index):
    """How the digits are placed, their glyphs' ink and the centre of it."""
    u, shown = data._random(index), data.scenes(index)
    glyph = scenes.whole(u[:, 10:12], 1000) * 10 + shown.digit.clamp(min=0)
    ink, centre, extent = (table[glyph] for table in data._glyphs)
    places = scenes.place(u[:, 12:18], shown, extent, data._rules)
    return places, extent * places.scale[..., None], ink, centre


def _ink(data, index, one):
    """How much of each pixel the digit of number `one` covers, (B, 32, 32)."""
    places, _, ink, centre = _places(data, index)
    ink = ink * torch.eye(2)[one][None, :, None, None]
    white, black = torch.ones(len(index), 2, 3), torch.zeros(len(index), 3)
    return scenes.paint(ink, centre, places, white, black)[:, 0]


def _middle(mask):
    """Centre of the ink, vertical and horizontal, (B, 2)."""
    axis = torch.arange(scenes.SIDE) + 0.5
    weight = mask.sum(dim=(1, 2))
    return torch.stack(
        [(mask.sum(2) * axis).sum(1) / weight, (mask.sum(1) * axis).sum(1) / weight], 1
    )


def test_positions_and_relations_are_where_they_say(data, shown):
    first, second = (_middle(_ink(data, SOME, one)) for one in (0, 1))
    row, column = shown.position // 3, shown.position % 3
    alone = shown.relation == NONE
    for axis, place in ((0, row), (1, column)):
        for before in (0, 1):
            low = first[alone & (place == before), axis].mean()
            assert low + 3 < first[alone & (place == before + 1), axis].mean()
    apart = first - second
    for relation, axis, sign in ((0, 1, -1), (1, 1, 1), (2, 0, -1), (3, 0, 1)):
        assert (sign * apart[shown.relation == relation, axis]).min() > 5, RELATIONS[relation]


def test_ink_has_the_height_of_its_size_and_is_not_cut_off(data, shown):
    places, extent, _, _ = _places(data, SOME)
    two = (shown.relation != NONE)[:, None].expand(-1, 2)
    for size, several, low, high in ((0, False, 10, 11), (0, True, 10, 11), (1, False, 15.5, 19.5),
                                     (1, True, 12.5, 14)):  # fmt: skip
        height = extent[..., 0][(shown.size == size) & (two == several)]
        assert low - 1e-4 <= height.min() < low + 0.1
        assert high - 0.1 < height.max() <= high + 1e-4
    there = shown.digit != NONE
    assert (places.centre - extent / 2)[there].min() > 0.5
    assert (places.centre + extent / 2)[there].max() < scenes.SIDE - 0.5
    mask = _ink(data, SOME, 0)
    assert mask.min() >= 0
    assert mask.max() == 1


def test_two_digits_do_not_cover_each_other(data, shown):
    two = SOME[shown.relation != NONE]
    one, other = (_ink(data, two, i) > 0.5 for i in (0, 1))
    assert not (one & other).any()


def test_pictures_have_the_colours_of_their_scene(data, shown):
    pictures = data.images(SOME).float()
    mask = _ink(data, SOME, 0)
    ink = (pictures * (mask > 0.95)[:, None]).sum(dim=(2, 3))
    pixels = (mask > 0.95).sum(dim=(1, 2))
    # A second digit is painted over the first, and thin small digits have no pixel of full ink.
    clear = (pixels >= 4) & (shown.relation == NONE)
    assert clear.float().mean() > 0.5
    colour = (ink / pixels[:, None])[clear]
    assert torch.equal(torch.cdist(colour, PALETTE).argmin(1), shown.colour[clear, 0])
    corner = pictures[:, :, 0, 0]  # background, unless there is ink
    right = torch.cdist(corner, PALETTE).argmin(1) == shown.background
    assert right.float().mean() > 0.97


def test_a_batch_is_the_pictures_as_floats_and_the_same_on_another_device(data):
    index = torch.tensor([3, 1, 3])
    x0, ids = data.batch(index)
    assert torch.equal(x0, data.images(index) / 127.5 - 1)
    assert torch.equal(ids[0], ids[2])
    assert tuple(x0.shape[1:]) == data.shape
    moved = data.to("cpu")
    assert torch.equal(moved.batch(index)[0], x0)
    assert (len(data), data.name) == (1 << 20, "captions")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "validation"}, "split must be one of train, test; got 'validation'"),
        ({"pairs": "none"}, "pairs must be one of seen, held out, all; got 'none'"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"length": 0}, "length must be in 1.."),
    ],
)
def test_options_outside_their_range_are_refused(options, message):
    with pytest.raises(InvalidArgument, match=message):
        CaptionedDigits(**options)


@pytest.mark.parametrize("index", [-1, MAX_INDEX + 1])
def test_numbers_outside_the_stream_are_refused(data, index):
    with pytest.raises(InvalidArgument, match=f"index must be in 0..{MAX_INDEX}"):
        data.batch(torch.tensor([0, index]))


def test_the_tokenizer_has_no_word_that_ends_a_clip_text_by_accident():
    assert len(tokenizer()) == 3 + len(tokenizer().words) < 100


@pytest.mark.slow
def test_five_thousand_pictures_a_second(data):
    index = torch.arange(128)
    data.batch(index)
    started = time.perf_counter()
    for _ in range(40):
        data.batch(index)
    assert 40 * 128 / (time.perf_counter() - started) > 5000
