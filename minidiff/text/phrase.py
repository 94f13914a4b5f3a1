"""Prompts that say more than a text: weights of words, a second text, a skipped layer, a mixture.

A `Phrase` is a text, so it goes wherever a prompt goes. Brackets have a meaning only inside of
`weighted`, because a plain prompt may hold brackets too:

    pipe(weighted("a big (seven:1.3) on [blue]"))
    pipe(mixed(["a red 7", "a blue 7"], [0.25, 0.75]))

The notation is that of the web interfaces of Stable Diffusion: (x) multiplies the weight of x by
1.1, [x] divides it by 1.1, (x:w) multiplies it by w; they nest, and a backslash keeps a bracket. A
weight w moves the encoder's vector h of a token along its line from the vector z of the empty text
at this place, z + w·(h − z). So 1 changes nothing and 0 takes the word's meaning away. What a
network reads beside the tokens (`pooled`) has no weight.

Source of the notation: https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features;
of z: https://github.com/comfyanonymous/ComfyUI.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, real_number
from minidiff.guidance import Condition
from minidiff.text.clip import tokenize
from minidiff.text.words import WordTokenizer

if TYPE_CHECKING:
    from minidiff.text.sd3 import AnyPrompts

STEP = 1.1  # factor of a pair of brackets
MAX_WEIGHT = 10.0  # more is noise, and probably a typing error
_TOKEN = re.compile(r"\\(.)|([()\[\]])|:\s*([^()\[\]:\\]*)\)|([^\\()\[\]:]+|[:\\])", re.S)

Segment = tuple[str, float]  # a piece of text and its weight


class Phrase(str):
    """A prompt with weights, a second text, a skipped layer or parts; the text itself is a str.

    Attributes:
        segments: pieces of the text with their weights; empty where all have weight 1.
        second, third: texts for the second and third encoder of Stable Diffusion XL and 3; None
            for the same.
        clip_skip: number of last layers of the text encoder that are left out, as in diffusers.
        parts: prompts with their shares, whose conditioning is mixed; empty for none.
    """

    segments: tuple[Segment, ...] = ()
    second: str | None = None
    third: str | None = None
    clip_skip: int | None = None
    parts: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, text: str) -> "Phrase":
        """Return a phrase as it is, and any other text as a phrase."""
        return text if isinstance(text, cls) else cls(text)

    def with_options(
        self, second: str | None, third: str | None, clip_skip: int | None
    ) -> "Phrase":
        """Return a copy with further texts and a skip. Raises InvalidArgument for a mixture."""
        if self.parts:
            raise InvalidArgument(
                "prompt_2, prompt_3 and clip_skip must be None for a mixture of prompts"
            )
        other = Phrase(self)
        other.segments, other.clip_skip = self.segments, clip_skip
        other.second, other.third = second, third
        return other


def weighted(prompt: str) -> Phrase:
    """Read a prompt with weights, (word), [word] and (word:1.3), see this module.

    Raises:
        InvalidArgument: not a text, a bracket without its other half, or a weight outside [0, 10].
    """
    if not isinstance(prompt, str):
        raise InvalidArgument(f"prompt must be a text, got {prompt!r}")
    segments: list[list] = []
    opened: list[tuple[str, int]] = []  # open brackets, and the first segment inside

    def scale(start: int, factor: float) -> None:
        for segment in segments[start:]:
            segment[1] *= factor

    def closed(bracket: str) -> int:
        if not opened or opened[-1][0] != bracket:
            raise InvalidArgument(f"prompt has a bracket without its other half: {prompt!r}")
        return opened.pop()[1]

    for escaped, bracket, weight, text in _TOKEN.findall(prompt):
        if weight or (not escaped and not bracket and not text):
            scale(closed("("), _weight(weight, prompt))
        elif bracket in ("(", "[") and bracket:
            opened.append((bracket, len(segments)))
        elif bracket == ")":
            scale(closed("("), STEP)
        elif bracket == "]":
            scale(closed("["), 1 / STEP)
        else:
            segments.append([escaped or text, 1.0])
    if opened:
        raise InvalidArgument(f"prompt has a bracket without its other half: {prompt!r}")
    phrase = Phrase("".join(text for text, _ in segments))
    if any(weight != 1 for _, weight in segments):
        phrase.segments = tuple((text, weight) for text, weight in segments)
    return phrase


def _weight(text: str, prompt: str) -> float:
    """Return the weight w of (x:w). Raises InvalidArgument."""
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight <= MAX_WEIGHT:
        raise InvalidArgument(
            f"a weight must be a number in 0..{MAX_WEIGHT:g}, got {text!r} in {prompt!r}"
        )
    return weight


def mixed(prompts: Sequence[str], shares: Sequence[float]) -> Phrase:
    """Return a prompt whose conditioning is Σ share · conditioning of each prompt.

    Args:
        prompts: texts or phrases; at least one.
        shares: one number each, with sum 1. Beyond 0 and 1 they extrapolate.
    Raises:
        InvalidArgument: other numbers, or not texts.
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise InvalidArgument(f"prompts must be a list of at least one text, got {prompts!r}")
    shares = [real_number("shares", share, -math.inf) for share in shares]
    if len(shares) != len(prompts) or abs(sum(shares) - 1) > 1e-6:
        raise InvalidArgument(f"shares must be {len(prompts)} numbers with sum 1, got {shares}")
    phrase = Phrase(" + ".join(f"{s:g}·({p})" for p, s in zip(prompts, shares, strict=True)))
    phrase.parts = tuple(zip(prompts, shares, strict=True))
    return phrase


def conditioning(prompts: "AnyPrompts", texts: Sequence[str], size: tuple[int, int]) -> Condition:
    """Return the conditioning on each prompt, some of them phrases; see `Prompts.condition`."""
    if not any(isinstance(text, Phrase) for text in texts):
        ids = [tokenize_with(t, texts) for t in prompts.tokenizers]
        return prompts.from_tokens(ids, size)
    return _combined(torch.cat, *(_one(prompts, text, size) for text in texts))


def _one(prompts: "AnyPrompts", text: str, size: tuple[int, int]) -> Condition:
    """Return the conditioning on one prompt, tensors (1, …)."""
    phrase = Phrase.of(text)
    if phrase.parts:
        shares = [share for _, share in phrase.parts]
        found = (_one(prompts, part, size) for part, _ in phrase.parts)
        return _combined(lambda x: sum(s * t for s, t in zip(shares, x, strict=True)), *found)
    others = (None, phrase.second, phrase.third)
    pairs = zip(prompts.tokenizers, others, strict=False)
    ids = [tokenize_with(t, [str(phrase) if other is None else other]) for t, other in pairs]
    found = prompts.from_tokens(ids, size, phrase.clip_skip)
    if not phrase.segments:
        return found
    empty = [tokenize_with(tokenizer, [""]) for tokenizer in prompts.tokenizers]
    z = prompts.from_tokens(empty, size, phrase.clip_skip)["encoder_hidden_states"]
    h, each = found["encoder_hidden_states"], []
    for tokenizer, encoder, numbers, other in zip(
        prompts.tokenizers, prompts.encoders, ids, others, strict=False
    ):
        length = numbers.shape[1]  # a further text has no weights
        row = torch.ones(length) if other is not None else _weights(tokenizer, phrase, length)
        width = encoder.config.get("d_model") or encoder.config.hidden_size  # T5's or CLIP's
        each.append(row[None, :, None].expand(-1, -1, width))
    w = prompts.joined(each).to(h)
    return {**found, "encoder_hidden_states": torch.where(w == 1, h, z + w * (h - z))}


def _weights(tokenizer: Any, phrase: Phrase, length: int) -> Tensor:
    """Return the weight of each token of a text, (length,); marks and padding have 1.

    Raises:
        InvalidArgument: a weight begins or ends inside of a word, so that it has no tokens.
    """
    row, pieces = torch.ones(length), [_numbers(tokenizer, text) for text, _ in phrase.segments]
    if [number for piece in pieces for number in piece] != _numbers(tokenizer, str(phrase)):
        raise InvalidArgument(f"weights must begin and end between words, got {phrase!r}")
    place = int(getattr(tokenizer, "bos_token", "") is not None)  # T5 marks the end alone
    for piece, (_, weight) in zip(pieces, phrase.segments, strict=True):
        row[place : min(place + len(piece), length - 1)] = weight
        place += len(piece)
    return row


def _numbers(tokenizer: Any, text: str) -> list[int]:
    """Return the token numbers of a text without marks and padding."""
    if isinstance(tokenizer, WordTokenizer):
        return tokenizer.numbers_of(text)
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def tokenize_with(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return the token numbers of each text, (B, L), by a tokenizer of either kind."""
    if isinstance(tokenizer, WordTokenizer):
        return tokenizer.encode(texts)
    return tokenize(tokenizer, [str(text) for text in texts])


def _combined(function: Any, *conditions: Condition) -> dict[str, Any]:
    """Return the condition whose tensors are the function of those of several conditions."""
    return {
        name: _combined(function, *(c[name] for c in conditions))
        if isinstance(value, Mapping)
        else function([c[name] for c in conditions])
        for name, value in conditions[0].items()
    }
