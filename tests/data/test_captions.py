"""Captioned digits: captions describe their images, and neither depends on the batch."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

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
def scene(data) -> scenes.Scenes:
    return data.scenes(SOME)


@pytest.mark.parametrize("seed", [0, 2**64 - 1, 1234567])
def test_the_random_numbers_are_those_of_splitmix64(seed):
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
def test_the_largest_random_number_gives_the_last_choice(n):
    assert scenes.whole(torch.tensor(1 - 2**-22), n) == n - 1


@settings(max_examples=20, deadline=None)
@given(index=st.lists(st.integers(0, MAX_INDEX), min_size=1, max_size=8))
def test_an_image_does_not_depend_on_its_batch(index):
    data = CaptionedDigits(seed=5)
    x0, ids = data.batch(torch.tensor(index))
    for row, i in enumerate(index):
        alone_x0, alone_ids = data.batch(torch.tensor([i]))
        assert torch.equal(x0[row], alone_x0[0])
        assert torch.equal(ids[row], alone_ids[0])


def test_seeds_splits_and_indices_give_different_images():
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


def test_the_article_fits_the_next_word(data):
    for text in data.captions(SOME):
        words = text.split()
        for article, word in pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (word in ("8", "eight", "orange")), text


def _digit_of(word):
    return int(word) if word.isdigit() else NUMERALS.index(word)


def test_captions_describe_their_scenes(data, scene):
    numerals = {*NUMERALS, *map(str, range(10))}
    sizes = {"small": 0, "little": 0, "big": 1, "large": 1}
    relations = {"above": 2, "over": 2, "below": 3, "under": 3}
    for row, text in enumerate(data.captions(SOME)):
        words = text.split()
        mentioned = [_digit_of(word) for word in words if word in numerals]
        assert mentioned == scene.digit[row, : len(mentioned)].tolist()
        colours = [list(COLOURS)[i] for i in scene.colour[row].tolist() if i != NONE]
        background = list(COLOURS)[scene.background[row]]
        for before, word in zip(["", *words], words, strict=False):
            if word in COLOURS:
                assert word in (*colours, background), text
            if word == "background" and before in COLOURS:
                assert before == background
        named_sizes = [sizes[word] for word in words if word in sizes]
        if len(named_sizes) == int((scene.digit[row] != NONE).sum()):
            assert named_sizes == scene.size[row, : len(named_sizes)].tolist()
        for word, relation in relations.items():
            assert word not in words or scene.relation[row] == relation
        for side, relation in (("left of", 0), ("right of", 1)):
            assert side not in text or scene.relation[row] == relation
        if scene.relation[row] != NONE:
            continue
        for corner in (name for name in POSITIONS if " " in name):
            assert corner not in text or POSITIONS[scene.position[row]] == corner


def test_training_has_all_pairs_but_those_held_out(scene):
    def pairs(scenes):
        there = scenes.digit != NONE
        return set(zip(scenes.digit[there].tolist(), scenes.colour[there].tolist(), strict=True))

    assert len(HELD_OUT) == 10
    assert {digit for digit, _ in HELD_OUT} == {colour for _, colour in HELD_OUT} == set(range(10))
    every = {(digit, colour) for digit in range(10) for colour in range(len(COLOURS))}
    assert pairs(scene) == every - set(HELD_OUT)
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


def test_the_answers_do_not_depend_on_which_digit_is_named_first(scene):
    read = scenes.answers(scene)
    assert read.shape == (len(SOME), len(scenes.QUESTIONS))
    for row, answer in enumerate(read.tolist()):
        answers = dict(zip(scenes.QUESTIONS, answer, strict=True))
        relation = int(scene.relation[row])
        first, other = zip(*(part[row].tolist() for part in scene[:3]), strict=True)
        if relation == NONE:
            arrangement = "one digit"
        elif RELATIONS[relation] in ("left of", "right of"):
            arrangement = "side by side"
        else:
            arrangement = "one above the other"
        if relation != NONE and RELATIONS[relation] in ("right of", "below"):
            first, other = other, first
        assert scenes.ARRANGEMENTS[answers["arrangement"]] == arrangement
        assert (answers["digit"], answers["colour"], answers["size"]) == first
        assert (answers["other digit"], answers["other colour"], answers["other size"]) == other
        assert (answers["position"] == NONE) == (arrangement != "one digit")
        assert answers["background"] == scene.background[row]


def test_the_answers_of_a_caption_are_those_that_it_mentions(data, scene):
    every, implied = scenes.answers(scene), data.caption_answers(SOME)
    open_ = implied == NONE
    assert torch.equal(implied.masked_fill(open_, 0), every.masked_fill(open_, 0))
    names = list(COLOURS)
    for row, (text, answer) in enumerate(zip(data.captions(SOME), implied.tolist(), strict=True)):
        answers = dict(zip(scenes.QUESTIONS, answer, strict=True))
        words = text.split()
        if " and " in text:
            assert {name for name, label in answers.items() if label != NONE} == {"background"}
            continue
        digits = [word for word in words if word.isdigit() or word in NUMERALS]
        mentioned = [_digit_of(word) for word in digits]
        two = int(scene.relation[row] != NONE)
        assert (answers["arrangement"] != NONE) == bool(digits), text
        assert sorted(mentioned) == sorted(
            answers[name] for name in ("digit", "other digit") if answers[name] != NONE
        )
        colours = [answers[name] for name in ("colour", "other colour", "background")]
        colours = sorted(names[colour] for colour in colours if colour != NONE)
        assert colours == sorted(word for word in words if word in names), text
        sizes = [word for word in words if word in ("small", "little", "big", "large")]
        assert len(sizes) == sum(answers[name] != NONE for name in ("size", "other size"))
        places = ("corner", "at", "middle", "center", "centre")
        assert (answers["position"] != NONE) == (
            (not two and any(word in words for word in places)) or "on the " in text
        ), text


def test_every_digit_contrasts_with_its_background(scene):
    for i in (0, 1):
        there = scene.colour[:, i] != NONE
        colour, background = scene.colour[there, i], scene.background[there]
        assert (PALETTE[colour] - PALETTE[background]).norm(dim=1).min() > 120


def _places(data, index):
    """Return the places of the digits, the ink of their glyphs and its centre."""
    u, scene = data._random(index), data.scenes(index)
    glyph = scenes.whole(u[:, 10:12], 1000) * 10 + scene.digit.clamp(min=0)
    ink, centre, extent = (table[glyph] for table in data._glyphs)
    places = scenes.place(u[:, 12:18], scene, extent, data._rules)
    return places, extent * places.scale[..., None], ink, centre


def _ink(data, index, one):
    """Return the fraction of each pixel that digit number `one` covers, (B, 32, 32)."""
    places, _, ink, centre = _places(data, index)
    ink = ink * torch.eye(2)[one][None, :, None, None]
    white, black = torch.ones(len(index), 2, 3), torch.zeros(len(index), 3)
    return scenes.paint(ink, centre, places, white, black)[:, 0]


def _middle(mask):
    """Return the centre of the ink, vertical and horizontal, (B, 2)."""
    axis = torch.arange(scenes.SIDE) + 0.5
    weight = mask.sum(dim=(1, 2))
    return torch.stack(
        [(mask.sum(2) * axis).sum(1) / weight, (mask.sum(1) * axis).sum(1) / weight], 1
    )


def test_digits_are_at_their_positions_and_in_their_relations(data, scene):
    first, second = (_middle(_ink(data, SOME, one)) for one in (0, 1))
    row, column = scene.position // 3, scene.position % 3
    alone = scene.relation == NONE
    for axis, place in ((0, row), (1, column)):
        for before in (0, 1):
            low = first[alone & (place == before), axis].mean()
            assert low + 3 < first[alone & (place == before + 1), axis].mean()
    apart = first - second
    for relation, axis, sign in ((0, 1, -1), (1, 1, 1), (2, 0, -1), (3, 0, 1)):
        assert (sign * apart[scene.relation == relation, axis]).min() > 5, RELATIONS[relation]


def test_ink_has_the_height_of_its_size_and_is_not_cut_off(data, scene):
    places, extent, _, _ = _places(data, SOME)
    two = (scene.relation != NONE)[:, None].expand(-1, 2)
    for size, several, low, high in ((0, False, 10, 11), (0, True, 10, 11), (1, False, 15.5, 19.5),
                                     (1, True, 12.5, 14)):  # fmt: skip
        height = extent[..., 0][(scene.size == size) & (two == several)]
        assert low - 1e-4 <= height.min() < low + 0.1
        assert high - 0.1 < height.max() <= high + 1e-4
    there = scene.digit != NONE
    assert (places.centre - extent / 2)[there].min() > 0.5
    assert (places.centre + extent / 2)[there].max() < scenes.SIDE - 0.5
    mask = _ink(data, SOME, 0)
    assert mask.min() >= 0
    assert mask.max() == 1


def test_two_digits_do_not_cover_each_other(data, scene):
    two = SOME[scene.relation != NONE]
    one, other = (_ink(data, two, i) > 0.5 for i in (0, 1))
    assert not (one & other).any()


def test_images_have_the_colours_of_their_scene(data, scene):
    pictures = data.images(SOME).float()
    mask = _ink(data, SOME, 0)
    ink = (pictures * (mask > 0.95)[:, None]).sum(dim=(2, 3))
    pixels = (mask > 0.95).sum(dim=(1, 2))
    # A second digit covers the first, and thin small digits have no pixel of full ink.
    clear = (pixels >= 4) & (scene.relation == NONE)
    assert clear.float().mean() > 0.5
    colour = (ink / pixels[:, None])[clear]
    assert torch.equal(torch.cdist(colour, PALETTE).argmin(1), scene.colour[clear, 0])
    corner = pictures[:, :, 0, 0]  # background, unless there is ink
    right = torch.cdist(corner, PALETTE).argmin(1) == scene.background
    assert right.float().mean() > 0.97


def test_a_batch_is_the_images_as_floats_on_any_device(data):
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
def test_indices_outside_the_stream_are_refused(data, index):
    with pytest.raises(InvalidArgument, match=f"index must be in 0..{MAX_INDEX}"):
        data.batch(torch.tensor([0, index]))


def test_no_word_of_the_tokenizer_ends_a_clip_text_by_accident():
    assert len(tokenizer()) == 3 + len(tokenizer().words) < 100


class Counted(TorchDispatchMode):
    """Counts the operations on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_batch_takes_as_many_operations_for_any_number_of_images(data):
    counts = []
    for size in (8, 128):
        with Counted() as counted:
            data.batch(torch.arange(size))
        counts.append(counted.count)
    assert 0 < counts[0] == counts[1]
