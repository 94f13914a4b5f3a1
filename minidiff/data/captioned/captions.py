"""Captioned digits: an endless stream of images of coloured digits with captions.

    "a red seven on a blue background"
    "a small green 3 to the left of a large yellow 8"

`scenes` draws the content and the images, `grammar` the captions. Image i and its caption depend on
(seed, split, i) alone: their random numbers are the outputs i·n … i·n + n − 1 of SplitMix64. Each
output is a function of its number, so any batch is drawn at once.

Source: Steele, Lea & Flood 2014, "Fast Splittable Pseudorandom Number Generators",
https://doi.org/10.1145/2660193.2660195, figure 16; the mixing function is Stafford's 13th variant.
"""

import copy

import numpy as np
import torch
from torch import Tensor

from minidiff.data import digits
from minidiff.data.captioned import scenes
from minidiff.data.captioned.grammar import CHOICES, PHRASES, compose, grammar, tokenizer
from minidiff.data.captioned.scenes import NONE, Scenes
from minidiff.data.protocol import Data
from minidiff.errors import InvalidArgument, one_of, whole_number
from minidiff.images.pixels import to_float
from minidiff.runtime.cuda_graph import CudaGraph
from minidiff.text.conditioning import Captions, ConditionConfig
from minidiff.text.prompts import WordPrompts
from minidiff.text.words import WordTokenizer

EPOCH = 1 << 20
PAIRS = ("seen", "held out", "all")
MAX_INDEX = (1 << 53) - 1
_JITTER = 12  # maximum change of each channel of a colour, in bytes
# The random numbers of an image, by their use.
_SCENE, _GLYPH, _PLACE, _TINT = slice(0, 10), slice(10, 12), slice(12, 18), slice(18, 27)
_CAPTION = slice(27, 27 + CHOICES)
_DRAWS = _CAPTION.stop


class CaptionedDigits(Data):
    """Images of one or two coloured digits, uint8 (3, 32, 32), with captions.

    Args:
        split: "train" or "test", with different glyphs and random numbers.
        pairs: pairs of digit and colour that occur: "seen" in training, "held out" of it
            (`scenes.HELD_OUT`), or "all".
        seed: seed of the stream.
        length: images per epoch; every epoch has other images.
    Raises:
        InvalidArgument: a value that is not allowed.
    """

    name = "captions"
    class_names = ()
    shape = (3, scenes.SIDE, scenes.SIDE)

    def __init__(
        self, split: str = "train", pairs: str = "seen", seed: int = 0, length: int = EPOCH
    ) -> None:
        one_of("split", split, digits.COUNTS)
        one_of("pairs", pairs, PAIRS)
        self.split, self.pairs, self.seed = split, pairs, whole_number("seed", seed, 0)
        self.length = whole_number("length", length, 1, MAX_INDEX)
        which = list(digits.COUNTS).index(split)
        self._key = np.random.default_rng((seed, which)).integers(1 << 64, dtype=np.uint64)
        self._rules = scenes.rules(seen=pairs != "held out", held_out=pairs != "seen")
        self._glyphs, self._grammar = scenes.glyphs(split), grammar()
        self._draw = self._drawn

    def __len__(self) -> int:
        return self.length

    @property
    def tokenizer(self) -> WordTokenizer:
        """Tokenizer of the captions."""
        return tokenizer()

    def to(self, device: torch.device | str) -> "CaptionedDigits":
        """Return the data with its batches drawn on `device`."""
        moved = copy.copy(self)
        moved._draw = moved._drawn
        for name in ("_rules", "_glyphs", "_grammar"):
            tables = getattr(self, name)
            setattr(moved, name, type(tables)(*(table.to(device) for table in tables)))
        return moved

    def condition(self, config: ConditionConfig) -> Captions:
        """Return a fresh text encoder of the width and the layers of `config`."""
        return Captions(WordPrompts.fresh(self.tokenizer, config.text_width, config.text_layers))

    def example_prompts(self, n: int) -> list[str]:
        """Return the captions of the first n images."""
        return self.captions(torch.arange(n))

    def digests(self) -> dict[str, str]:
        """Return the parameters that the images depend on."""
        return {"split": self.split, "pairs": self.pairs, "seed": str(self.seed)}

    def captured(self) -> "CaptionedDigits":
        """Return data on a GPU whose batches are drawn by replaying a CUDA graph."""
        other = copy.copy(self)
        other._draw = CudaGraph(self._drawn)
        return other

    def batch(self, index: Tensor, position: int = 0) -> tuple[Tensor, Tensor]:
        """Return the images at `index` as inputs of a network, and their captions.

        Args:
            index: image numbers, int64 (B,) in 0..MAX_INDEX; those above the length are allowed.
            position: position of the first of them in the stream, see `minidiff.data.protocol`.
                Epoch e has the images numbered index + e·length.
        Returns:
            x0 float32 (B, 3, 32, 32) in [−1, 1], and token numbers int64 (B, MAX_LENGTH), both on
            the device of the data.
        Raises:
            InvalidArgument: a number outside that range.
        """
        images, ids = self._draw(self._random(self._number(index, position)))
        return to_float(images), ids.clone()  # a CUDA graph reuses the memory of its outputs

    def scenes(self, index: Tensor) -> Scenes:
        """Return the scenes of the images at `index`; see `batch`."""
        return scenes.draw(self._random(index)[:, _SCENE], self._rules)

    def images(self, index: Tensor) -> Tensor:
        """Return the images at `index`, uint8 (B, 3, 32, 32); see `batch`."""
        u = self._random(index)
        return self._render(u, scenes.draw(u[:, _SCENE], self._rules))

    def captions(self, index: Tensor) -> list[str]:
        """Return the captions of the images at `index`; see `batch`."""
        u = self._random(index)
        scene = scenes.draw(u[:, _SCENE], self._rules)
        return tokenizer().decode(compose(u[:, _CAPTION], scene, self._grammar).ids)

    def caption_answers(self, index: Tensor) -> Tensor:
        """Return the answers to `scenes.QUESTIONS` that each caption implies, int64 (B, 9).

        NONE marks an answer that the caption leaves open. Without their relation, all answers
        about two digits are open.
        """
        u = self._random(index)
        scene = scenes.draw(u[:, _SCENE], self._rules)
        mentions = compose(u[:, _CAPTION], scene, self._grammar).mentions
        named = dict(zip(PHRASES, mentions.T, strict=True))
        known = {
            name: torch.where(
                torch.stack([named[name], named[f"other {name}"]], dim=1), label, NONE
            )
            for name, label in zip(("digit", "colour", "size"), scene[:3], strict=True)
        }
        for name in ("background", "position"):
            known[name] = torch.where(named[name], getattr(scene, name), NONE)
        answers = scenes.answers(Scenes(**known, relation=scene.relation))
        two = scene.relation != NONE
        unclear = torch.where(two, ~named["relation"], ~named["digit"])
        answers[:, 0].masked_fill_(unclear, NONE)
        answers[:, 1:-1].masked_fill_((unclear & two)[:, None], NONE)
        return answers

    def _number(self, index: Tensor, position: int) -> Tensor:
        """Return the numbers of images in the endless stream."""
        epoch = (position + torch.arange(len(index))) // self.length
        return index.cpu() + epoch * self.length

    def _random(self, index: Tensor) -> Tensor:
        """Return the random numbers of the images at `index`, float32 (B, _DRAWS) in [0, 1)."""
        numbers = index.cpu().numpy()
        if numbers.size and not 0 <= numbers.min() <= numbers.max() <= MAX_INDEX:
            raise InvalidArgument(
                f"index must be in 0..{MAX_INDEX}, got {numbers.min()}..{numbers.max()}"
            )
        first = numbers.astype(np.uint64)[:, None] * np.uint64(_DRAWS)
        top = _split_mix(self._key, first + np.arange(_DRAWS, dtype=np.uint64)) >> np.uint64(42)
        # 22 bits, two fewer than float32 has, keep n·u below n after rounding.
        u = torch.from_numpy(top.astype(np.float32)).mul_(2**-22)
        return u.to(self._rules.palette.device, non_blocking=True)

    def _drawn(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return images, uint8 (B, 3, 32, 32), and token numbers."""
        scene = scenes.draw(u[:, _SCENE], self._rules)
        return self._render(u, scene), compose(u[:, _CAPTION], scene, self._grammar).ids

    def _render(self, u: Tensor, scene: Scenes) -> Tensor:
        digit = scene.digit.clamp(min=0)
        per_digit = len(self._glyphs.ink) // scenes.DIGITS
        glyph = scenes.whole(u[:, _GLYPH], per_digit) * scenes.DIGITS + digit
        ink, centre, extent = (table[glyph] for table in self._glyphs)
        ink = ink * (scene.digit != NONE)[..., None, None]
        places = scenes.place(u[:, _PLACE], scene, extent, self._rules)
        colours = self._rules.palette[
            torch.cat([scene.colour.clamp(min=0), scene.background[:, None]], dim=1)
        ]
        tint = (2 * u[:, _TINT].unflatten(1, (3, 3)) - 1) * _JITTER
        colours = (colours + tint).clamp_(0, 255)
        images = scenes.paint(ink, centre, places, colours[:, :2], colours[:, 2])
        return images.round_().to(torch.uint8)


class Questions(Data):
    """The images of `CaptionedDigits` with answers to `scenes.QUESTIONS` instead of captions.

    Args:
        split, pairs, length: arguments of `CaptionedDigits`.
    Attributes:
        images, labels: first epoch, uint8 (length, 3, 32, 32) and int64 (length, 9), drawn at
            each access.
    """

    name, shape = CaptionedDigits.name, CaptionedDigits.shape
    class_names = tuple(str(answer) for answer in range(max(scenes.DIGITS, len(scenes.COLOURS))))
    labels_per_item = len(scenes.QUESTIONS)

    def __init__(self, split: str = "train", pairs: str = "all", length: int = EPOCH) -> None:
        self._digits = CaptionedDigits(split, pairs, length=length)

    def __len__(self) -> int:
        return len(self._digits)

    def to(self, device: torch.device | str) -> "Questions":
        """Return the data with its batches drawn on `device`."""
        moved = copy.copy(self)
        moved._digits = self._digits.to(device)
        return moved

    def batch(self, index: Tensor, position: int = 0) -> tuple[Tensor, Tensor]:
        """Return the images at `index` and labels int64 (B, 9); see `CaptionedDigits.batch`."""
        number = self._digits._number(index, position)
        return to_float(self._digits.images(number)), scenes.answers(self._digits.scenes(number))

    @property
    def images(self) -> Tensor:
        return torch.cat([self._digits.images(part) for part in self._parts()])

    @property
    def labels(self) -> Tensor:
        return torch.cat([scenes.answers(self._digits.scenes(part)) for part in self._parts()])

    def _parts(self) -> tuple[Tensor, ...]:
        return torch.arange(len(self)).split(1000)  # drawing an image takes 100 kB


def _split_mix(key: np.uint64, number: np.ndarray) -> np.ndarray:
    """Return the outputs of SplitMix64 with these numbers, uint64; arithmetic is modulo 2⁶⁴."""
    z = key + (number + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
