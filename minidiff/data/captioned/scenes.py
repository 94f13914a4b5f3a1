"""Scenes of one or two coloured digits: what is in a picture, and the picture of it.

A scene is made of random numbers u in [0, 1), one a choice: digit, colour, background, size and
place of one digit, or of two of which one is left of, right of, above or below the other. Digits
are those of the package (`minidiff.data.digits`), scaled and placed by their ink. Scaling is
separable, so the picture of a digit is two small matrix products,

    a = min(1, 1.5·V·g·Hᵀ)    V, H (32, 16) from the resampling's kernel, g (16, 16) the glyph,

and the whole is background + a·(colour − background), the second digit over the first.

One digit–colour pair in ten is held out: training never shows it, so that a model which draws it
has learnt what a digit is and what a colour is, and not what a red seven is.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.data import digits

SIDE = 32
DIGITS = 10
COLOURS = {
    "red": (215, 30, 35),
    "orange": (255, 125, 0),
    "yellow": (250, 225, 40),
    "green": (35, 150, 50),
    "cyan": (60, 215, 225),
    "blue": (35, 70, 220),
    "purple": (135, 40, 165),
    "pink": (255, 145, 195),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
SIZES = ("small", "big")
# Row by row, so that position = 3·row + column.
POSITIONS = ("top left", "top", "top right", "left", "middle", "right")
POSITIONS += ("bottom left", "bottom", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")  # of the first digit to the second
NONE = -100  # the label of what a scene does not have; torch's cross-entropy passes over it
# One pair a digit and one a colour.
HELD_OUT = tuple((digit, (3 * digit + 2) % len(COLOURS)) for digit in range(DIGITS))

_TWO_DIGITS = 0.25  # share of the scenes
_CONTRAST = 150  # least distance of a digit's colour from its background, of 441
_MARGIN = 1.0  # around the ink, in pixels; between two digits it is twice as wide
_GAIN = 1.5  # of ink: thin strokes would fade in a small picture
_DRIFT = 3.0  # of two digits from the line through the middle, in pixels, at most


class Scenes(NamedTuple):
    """What is in B pictures, int64 labels; NONE for what a scene does not have.

    Attributes:
        digit, colour, size: (B, 2), of the digit that is named first and of the other. Numbers in
            0..9, COLOURS and SIZES.
        background: (B,), a number in COLOURS.
        position: (B,), a number in POSITIONS; NONE for two digits.
        relation: (B,), a number in RELATIONS; NONE for one digit.
    """

    digit: Tensor
    colour: Tensor
    size: Tensor
    background: Tensor
    position: Tensor
    relation: Tensor


class Glyphs(NamedTuple):
    """The embedded digits of a split, and where their ink is; glyph i shows digit i mod 10.

    Attributes:
        ink: (N, 16, 16) in [0, 1].
        centre, extent: (N, 2) of the box around the ink in pixels, vertical before horizontal.
    """

    ink: Tensor
    centre: Tensor
    extent: Tensor


def glyphs(split: str) -> Glyphs:
    """The digits of one split of `minidiff.data.digits`, on the CPU."""
    ink = digits.load(split).images.squeeze(1).float().div_(255)
    edges = []
    for axis in (2, 1):  # without its columns a picture is its rows
        inked = (ink >= 0.5).any(dim=axis).int()
        edges.append((inked.argmax(dim=1), digits.SIDE - inked.flip(1).argmax(dim=1)))
    first, last = (torch.stack(edge, dim=1).float() for edge in zip(*edges, strict=True))
    return Glyphs(ink, (first + last) / 2, last - first)


class Rules(NamedTuple):
    """What scenes are drawn by.

    Attributes:
        pairs: the digit–colour pairs that occur, bool (digits, colours).
        contrast: which backgrounds set off a digit of a colour, bool (colours, backgrounds).
        palette: the colours, (colours, 3) in 0..255.
        heights: the least and the greatest height of ink in pixels, of a small digit, a big one,
            and a big one of two; (3, 2).
    """

    pairs: Tensor
    contrast: Tensor
    palette: Tensor
    heights: Tensor


def rules(seen: bool, held_out: bool) -> Rules:
    """The rules of scenes with the pairs that training shows, with those held out, or with both."""
    pairs = torch.full((DIGITS, len(COLOURS)), seen)
    for pair in HELD_OUT:
        pairs[pair] = held_out
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    heights = torch.tensor([[10.0, 11.0], [15.5, 19.5], [12.5, 14.0]])
    return Rules(pairs, torch.cdist(palette, palette) >= _CONTRAST, palette, heights)


def draw(u: Tensor, rules: Rules) -> Scenes:
    """Scenes from random numbers u (B, 10) in [0, 1)."""
    two = u[:, 0] < _TWO_DIGITS
    digit = whole(u[:, 1:3], DIGITS)
    colour = _choose(u[:, 3:5], rules.pairs[digit])
    # A second digit that is not there must not rule out a background.
    colour[:, 1] = torch.where(two, colour[:, 1], colour[:, 0])
    background = _choose(u[:, 5], rules.contrast[colour].all(dim=1))
    size = whole(u[:, 6:8], len(SIZES))
    position, relation = whole(u[:, 8], len(POSITIONS)), whole(u[:, 9], len(RELATIONS))
    for label in (digit, colour, size):
        label[:, 1].masked_fill_(~two, NONE)
    position.masked_fill_(two, NONE)
    relation.masked_fill_(~two, NONE)
    return Scenes(digit, colour, size, background, position, relation)


# What can be asked of a picture. The digit is the only one, or the one on the left or above;
# asked like this, it does not matter which of two is named first.
ARRANGEMENTS = ("one digit", "side by side", "one above the other")
QUESTIONS = ("arrangement", "position", "digit", "colour", "size")
QUESTIONS += ("other digit", "other colour", "other size", "background")


def answers(scenes: Scenes) -> Tensor:
    """The labels of the QUESTIONS, int64 (B, 9); NONE for those that do not arise."""
    two = scenes.relation != NONE
    arrangement = torch.where(two, 1 + scenes.relation // 2, 0)
    named = torch.stack([scenes.digit, scenes.colour, scenes.size], dim=2)  # (B, 2, 3)
    turned = (two & (scenes.relation % 2 == 1))[:, None, None]  # right of, below
    placed = torch.where(turned, named.flip(1), named)
    first = torch.stack([arrangement, scenes.position], dim=1)
    return torch.cat([first, placed.flatten(1), scenes.background[:, None]], dim=1)


def whole(u: Tensor, n: int) -> Tensor:
    """Numbers of [0, 1) as whole numbers in 0..n−1, all equally likely."""
    return (u * n).long()


def _choose(u: Tensor, allowed: Tensor) -> Tensor:
    """The number of an allowed entry, all equally likely.

    Args:
        u: (…) in [0, 1).
        allowed: bool (…, n), at least one of them true.
    """
    count = allowed.cumsum(dim=-1)
    return (count > (u * count[..., -1]).long()[..., None]).int().argmax(dim=-1)


class Places(NamedTuple):
    """Where the two digits of B pictures are.

    Attributes:
        scale: (B, 2), pixels of the picture a pixel of the glyph.
        centre: (B, 2, 2) of the ink in pixels, vertical before horizontal.
    """

    scale: Tensor
    centre: Tensor


def place(u: Tensor, scenes: Scenes, extent: Tensor, rules: Rules) -> Places:
    """Find room for the digits of scenes.

    Args:
        u: (B, 6) in [0, 1).
        extent: (B, 2, 2) of the ink of their glyphs, see `Glyphs`.
    """
    two = scenes.relation != NONE
    big = scenes.size.clamp(min=0)  # a digit that is not there has a place too
    low, high = rules.heights[big + big * two[:, None]].unbind(-1)
    scale = torch.lerp(low, high, u[:, :2]) / extent[..., 0]
    extent = extent * scale[..., None]
    alone = _alone(u[:, 2:4], scenes.position, extent)
    beside = _beside(u[:, 2:6], scenes.relation, extent)
    return Places(scale, torch.where(two[:, None, None], beside, alone))


def _alone(u: Tensor, position: Tensor, extent: Tensor) -> Tensor:
    """Centres of single digits, within the ninths of the picture that their positions name."""
    free = SIDE / 2 - _MARGIN - extent / 2
    corner = torch.stack([position // 3 - 1, position % 3 - 1], dim=1)
    return SIDE / 2 + free * (0.8 * corner + 0.2 * (2 * u - 1))[:, None]


def _beside(u: Tensor, relation: Tensor, extent: Tensor) -> Tensor:
    """Centres of two digits, one after the other along the axis that the relation names."""
    upright = (relation >= 2)[:, None]  # above and below
    along, across = (
        torch.where(upright, extent[..., axis], extent[..., 1 - axis]) for axis in (0, 1)
    )
    room = (SIDE - 4 * _MARGIN - along.sum(dim=1)).clamp(min=0)
    start = _MARGIN + room * u[:, 0]
    after = start + 2 * _MARGIN + room * (1 - u[:, 0]) * u[:, 1]
    follows = torch.stack([relation % 2 == 1, relation % 2 == 0], dim=1)
    ahead = torch.where(follows, after[:, None] + along.flip(1), start[:, None]) + along / 2
    free = (SIDE / 2 - _MARGIN - across / 2).clamp(0, _DRIFT)
    aside = SIDE / 2 + free * (2 * u[:, 2:4] - 1)
    return torch.where(
        upright[..., None], torch.stack([ahead, aside], dim=2), torch.stack([aside, ahead], dim=2)
    )


def paint(
    ink: Tensor, ink_centre: Tensor, places: Places, colours: Tensor, background: Tensor
) -> Tensor:
    """The pictures, (B, 3, 32, 32), in the unit of the colours.

    Args:
        ink: (B, 2, 16, 16) in [0, 1]; zero for a digit that is not there.
        ink_centre: (B, 2, 2), see `Glyphs`.
        colours: (B, 2, 3), of the digits.
        background: (B, 3).
    """
    rows, columns = (
        _resampling(places.scale, places.centre[..., axis], ink_centre[..., axis])
        for axis in (0, 1)
    )
    cover = (rows @ ink @ columns.mT).mul_(_GAIN).clamp_(max=1)
    picture = background[..., None, None].expand(-1, -1, SIDE, SIDE)
    for i in (0, 1):
        picture = torch.lerp(picture, colours[:, i, :, None, None], cover[:, i, None])
    return picture


def _resampling(scale: Tensor, centre: Tensor, ink_centre: Tensor) -> Tensor:
    """What each glyph pixel adds to each pixel of the picture along one axis, (…, 32, 16).

    The kernel is a triangle, twice as wide as a pixel of the coarser grid.
    """
    scale = scale[..., None, None]
    pixel = torch.arange(SIDE, device=scale.device)[:, None] + 0.5
    looks_at = (pixel - centre[..., None, None]) / scale + ink_centre[..., None, None]
    away = torch.arange(digits.SIDE, device=scale.device) + 0.5 - looks_at
    narrow = scale.clamp(max=1)
    return (1 - away.abs_().mul_(narrow)).clamp_(min=0).mul_(narrow)
