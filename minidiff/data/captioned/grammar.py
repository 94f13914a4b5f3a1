"""Captions of scenes of digits.

A caption is a template whose slots are filled with phrases; some phrases are empty. It is composed
in token numbers, for a whole batch at once: the phrases of a caption are gathered from a table, one
after the other with gaps, and the gaps are removed. `WordTokenizer.encode` returns the same numbers
for the text.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.data.captioned.scenes import COLOURS, NONE, POSITIONS, Scenes, whole
from minidiff.text.words import BEGIN, END, PAD, WordTokenizer, words_of

MAX_LENGTH = 20  # tokens of the longest caption

# Templates with their relative frequencies.
ONE_DIGIT = {
    "a {size} {colour} {digit} on a {background} background": 5,
    "a {size} {colour} {digit} {position} on a {background} background": 3,
    "{colour} {digit} on {background}": 2,
    "the digit {digit} in {colour} on a {background} background": 2,
    "a {background} background with a {size} {colour} {digit} {position}": 2,
    "a {size} {colour} {digit} {position}": 2,
    "a {size} {digit} on a {background} background": 1,
    "{colour}": 1,
    "{digit}": 1,
    "{background} background": 1,
}
_BOTH = "a {size} {colour} {digit} {relation} a {other size} {other colour} {other digit}"
TWO_DIGITS = {
    _BOTH: 4,
    f"{_BOTH} on a {{background}} background": 6,
    "{colour} {digit} {relation} {other colour} {other digit} on {background}": 2,
    "a {background} background with a {colour} {digit} and a {other colour} {other digit}": 2,
}

NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PLACES = {
    name: (f"in the {name} corner", f"at the {name}") if " " in name else (f"at the {name}",) * 2
    for name in POSITIONS
}
_PLACES |= {"middle": ("in the middle", "in the center", "in the centre", "")}
_PLACES |= {name: (f"on the {name}", f"at the {name}") for name in ("left", "right")}
# The phrases of every value of a slot, equally likely; "" leaves the slot out.
_DIGITS = [(str(digit), word) for digit, word in enumerate(NUMERALS)]
_NAMES = [(colour,) for colour in COLOURS]
_SIZES = [("small", "little", "", ""), ("big", "large", "", "")]
PHRASES = {
    "digit": _DIGITS,
    "colour": _NAMES,
    "size": _SIZES,
    "other digit": _DIGITS,
    "other colour": _NAMES,
    "other size": _SIZES,
    "background": _NAMES,
    "position": [(*_PLACES[name], "", "")[:4] for name in POSITIONS],
    "relation": [
        ("left of", "to the left of"),
        ("right of", "to the right of"),
        ("above", "over"),
        ("below", "under"),
    ],
}
CHOICES = 1 + len(PHRASES)  # random numbers per caption
_AN = ("8", "eight", "orange")  # words that follow "an"
_SLOT_OR_WORD = re.compile(r"\{(.+?)\}|(\w+)")
_GAP = -1  # no token


class Grammar(NamedTuple):
    """Templates and phrases in token numbers, −1 for no token.

    Attributes:
        words, slots: word, or index of the slot, at each place of the templates, (templates, W).
        one, two: cumulative frequencies of the templates for one digit and for two.
        phrases: (slots, values, phrases, P).
        takes_an: True for words that follow "an", bool (vocabulary,).
    """

    words: Tensor
    slots: Tensor
    one: Tensor
    two: Tensor
    phrases: Tensor
    takes_an: Tensor


@cache
def tokenizer() -> WordTokenizer:
    """Return the tokenizer of the captions, with all their words in alphabetical order."""
    texts = [re.sub(r"\{.+?\}", "", text) for text in (*ONE_DIGIT, *TWO_DIGITS)]
    texts += [text for values in PHRASES.values() for value in values for text in value]
    return WordTokenizer(sorted({"an", *words_of(" ".join(texts))}), MAX_LENGTH)


def grammar() -> Grammar:
    """Return the tables of the captions, on the CPU."""
    numbers, names = tokenizer().numbers, list(PHRASES)
    places = [_SLOT_OR_WORD.findall(text) for text in (*ONE_DIGIT, *TWO_DIGITS)]
    takes_an = torch.zeros(len(tokenizer()), dtype=torch.bool)
    takes_an[[numbers[word] for word in _AN]] = True
    return Grammar(
        _padded([[_GAP if slot else numbers[word] for slot, word in row] for row in places]),
        _padded([[names.index(slot) if slot else _GAP for slot, _ in row] for row in places]),
        torch.tensor(list(ONE_DIGIT.values())).cumsum(0),
        torch.tensor(list(TWO_DIGITS.values())).cumsum(0),
        _phrases(),
        takes_an,
    )


def _phrases() -> Tensor:
    """Return the token numbers of the phrases, (slots, values, phrases, P)."""
    numbers = tokenizer().numbers
    values = max(map(len, PHRASES.values()))
    phrases = max(len(value) for slot in PHRASES.values() for value in slot)
    # Phrases are repeated and values added until all have the same number.
    texts = [
        text
        for slot in PHRASES.values()
        for value in [*slot, *[("",)] * (values - len(slot))]
        for text in value * (phrases // len(value))
    ]
    table = _padded([[numbers[word] for word in words_of(text)] for text in texts])
    return table.view(len(PHRASES), values, phrases, -1)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return rows of numbers as a table, with gaps at their ends."""
    table = torch.full((len(rows), max(map(len, rows))), _GAP)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = torch.tensor(row)
    return table


class CaptionBatch(NamedTuple):
    """The captions of B scenes.

    Attributes:
        ids: token numbers, int64 (B, MAX_LENGTH).
        mentions: True for the slots that a caption mentions, bool (B, slots) in order of PHRASES.
    """

    ids: Tensor
    mentions: Tensor


def compose(u: Tensor, scenes: Scenes, grammar: Grammar) -> CaptionBatch:
    """Compose captions of B scenes from random numbers u (B, CHOICES) in [0, 1)."""
    two = scenes.relation != NONE
    one = torch.bucketize(u[:, 0] * grammar.one[-1], grammar.one, right=True)
    other = torch.bucketize(u[:, 0] * grammar.two[-1], grammar.two, right=True)
    template = torch.where(two, len(grammar.one) + other, one)
    value = torch.stack(
        [
            *(label[:, i] for i in (0, 1) for label in (scenes.digit, scenes.colour, scenes.size)),
            *(scenes.background, scenes.position, scenes.relation),
        ],
        dim=1,
    ).clamp(min=0)  # (B, slots)
    every = torch.arange(len(PHRASES), device=u.device)
    phrases = grammar.phrases[every, value, whole(u[:, 1:], grammar.phrases.shape[2])]
    words, slots = grammar.words[template], grammar.slots[template]  # (B, W)
    ids = phrases.gather(1, slots.clamp(min=0)[..., None].expand(-1, -1, phrases.shape[2]))
    ids = ids.masked_fill(slots[..., None] == _GAP, _GAP)
    ids[..., 0] = torch.where(slots == _GAP, words, ids[..., 0])
    mentions = (slots[..., None] == every).any(dim=1) & (phrases[..., 0] != _GAP)
    return CaptionBatch(_without_gaps(ids.flatten(1), grammar.takes_an), mentions)


def _without_gaps(ids: Tensor, takes_an: Tensor) -> Tensor:
    """Return token numbers (B, n) in the tokenizer's form: marks, no gaps, padding."""
    is_token = ids != _GAP
    place = is_token.cumsum(dim=1)
    out = ids.new_full((len(ids), MAX_LENGTH + 1), PAD)
    out.scatter_(1, place.masked_fill(~is_token, MAX_LENGTH), ids)  # gaps go to an extra column
    out[:, 0] = BEGIN
    out.scatter_(1, place[:, -1:] + 1, END)
    out = out[:, :MAX_LENGTH]
    a, an = (tokenizer().numbers[article] for article in ("a", "an"))
    wrong = (out[:, :-1] == a) & takes_an[out[:, 1:]]
    out[:, :-1].masked_fill_(wrong, an)
    return out
