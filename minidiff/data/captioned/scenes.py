"""Scenes of one or two coloured digits, and their images.

A scene is a function of random numbers u in [0, 1), one per choice: digit, colour, background, size
and position of one digit, or of two, one left of, right of, above or below the other. The digits
are the embedded ones (`minidiff.data.digits`), scaled and placed by their ink. Scaling is
separable, so the image of a digit is two small matrix products,

    a = min(1, 1.5·V·g·Hᵀ)    V, H (32, 16) from the resampling's kernel, g (16, 16) the glyph,

and the whole is background + a·(colour − background), the second digit over the first.

One digit–colour pair in ten is held out of training. A model that draws it has learned digits and
colours, not just their combinations.
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
# Row by row: position = 3·row + column.
POSITIONS = ("top left", "top", "top right", "left", "middle", "right")
POSITIONS += ("bottom left", "bottom", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")  # of the first digit to the second
NONE = -100  # label of a property that a scene lacks; torch's cross-entropy ignores it
# One pair per digit, and one per colour.
HELD_OUT = tuple((digit, (3 * digit + 2) % len(COLOURS)) for digit in range(DIGITS))

_TWO_DIGITS = 0.25  # fraction of the scenes with two digits
CONTRAST = 150  # minimum distance of a digit's colour from its background, of at most 441
_MARGIN = 1.0  # pixels around the ink; twice as many between two digits
_GAIN = 1.5  # factor on the ink, without which thin strokes fade in a small image
_DRIFT = 3.0  # maximum offset of two digits from the middle line, in pixels


class Scenes(NamedTuple):
    """The labels of B scenes, int64; NONE for a property that a scene lacks.

    Attributes:
        digit, colour, size: (B, 2), for the digit named first and the other one; in 0..9, indices
            of COLOURS, and of SIZES.
        background: (B,), index of COLOURS.
        position: (B,), index of POSITIONS; NONE for two digits.
        relation: (B,), index of RELATIONS; NONE for one digit.
    """

    digit: Tensor
    colour: Tensor
    size: Tensor
    background: Tensor
    position: Tensor
    relation: Tensor


class Glyphs(NamedTuple):
    """The embedded digits of a split with the boxes of their ink; glyph i is digit i mod 10.

    Attributes:
        ink: (N, 16, 16) in [0, 1].
        centre, extent: centre and size of the box around the ink in pixels, (N, 2), vertical
            before horizontal.
    """

    ink: Tensor
    centre: Tensor
    extent: Tensor


def glyphs(split: str) -> Glyphs:
    """Return the digits of one split of `minidiff.data.digits`, on the CPU."""
    ink = digits.load(split).images.squeeze(1).float().div_(255)
    edges = []
    for axis in (2, 1):  # rows with ink, then columns
        inked = (ink >= 0.5).any(dim=axis).int()
        edges.append((inked.argmax(dim=1), digits.SIDE - inked.flip(1).argmax(dim=1)))
    first, last = (torch.stack(edge, dim=1).float() for edge in zip(*edges, strict=True))
    return Glyphs(ink, (first + last) / 2, last - first)


class Rules(NamedTuple):
    """The constraints of scenes.

    Attributes:
        pairs: digit–colour pairs that occur, bool (digits, colours).
        contrast: backgrounds with enough contrast to a colour, bool (colours, backgrounds).
        palette: RGB values of the colours, (colours, 3) in 0..255.
        heights: minimum and maximum height of the ink in pixels, for a small digit, a big one,
            and a big one of two; (3, 2).
    """

    pairs: Tensor
    contrast: Tensor
    palette: Tensor
    heights: Tensor


def rules(seen: bool, held_out: bool) -> Rules:
    """Return the rules of scenes with the pairs of training, with those held out, or with both."""
    pairs = torch.full((DIGITS, len(COLOURS)), seen)
    for pair in HELD_OUT:
        pairs[pair] = held_out
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    heights = torch.tensor([[10.0, 11.0], [15.5, 19.5], [12.5, 14.0]], dtype=torch.float32)
    return Rules(pairs, torch.cdist(palette, palette) >= CONTRAST, palette, heights)


def draw(u: Tensor, rules: Rules) -> Scenes:
    """Draw scenes from random numbers u (B, 10) in [0, 1)."""
    two = u[:, 0] < _TWO_DIGITS
    digit = whole(u[:, 1:3], DIGITS)
    colour = _choose(u[:, 3:5], rules.pairs[digit])
    # Where there is no second digit, its colour must not exclude a background.
    colour[:, 1] = torch.where(two, colour[:, 1], colour[:, 0])
    background = _choose(u[:, 5], rules.contrast[colour].all(dim=1))
    size = whole(u[:, 6:8], len(SIZES))
    position, relation = whole(u[:, 8], len(POSITIONS)), whole(u[:, 9], len(RELATIONS))
    for label in (digit, colour, size):
        label[:, 1].masked_fill_(~two, NONE)
    position.masked_fill_(two, NONE)
    relation.masked_fill_(~two, NONE)
    return Scenes(digit, colour, size, background, position, relation)


# Questions about an image. "digit" is the only one, or the left or upper one, so the answers do not
# depend on which of two digits a caption names first.
ARRANGEMENTS = ("one digit", "side by side", "one above the other")
QUESTIONS = ("arrangement", "position", "digit", "colour", "size")
QUESTIONS += ("other digit", "other colour", "other size", "background")


def answers(scenes: Scenes) -> Tensor:
    """Return the answers to QUESTIONS, int64 (B, 9); NONE for those that do not apply."""
    two = scenes.relation != NONE
    arrangement = torch.where(two, 1 + scenes.relation // 2, 0)
    named = torch.stack([scenes.digit, scenes.colour, scenes.size], dim=2)  # (B, 2, 3)
    turned = (two & (scenes.relation % 2 == 1))[:, None, None]  # right of, below
    placed = torch.where(turned, named.flip(1), named)
    first = torch.stack([arrangement, scenes.position], dim=1)
    return torch.cat([first, placed.flatten(1), scenes.background[:, None]], dim=1)


def whole(u: Tensor, n: int) -> Tensor:
    """Return integers in 0..n−1, all equally likely, from uniform numbers in [0, 1)."""
    return (u * n).long()


def _choose(u: Tensor, allowed: Tensor) -> Tensor:
    """Return the index of an allowed entry, all equally likely.

    Args:
        u: uniform numbers (…) in [0, 1).
        allowed: bool (…, n), at least one of n true.
    """
    count = allowed.cumsum(dim=-1)
    return (count > (u * count[..., -1]).long()[..., None]).int().argmax(dim=-1)


class Places(NamedTuple):
    """The places of the two digits of B images.

    Attributes:
        scale: pixels of the image per pixel of the glyph, (B, 2).
        centre: centres of the ink in pixels, (B, 2, 2), vertical before horizontal.
    """

    scale: Tensor
    centre: Tensor


def place(u: Tensor, scenes: Scenes, extent: Tensor, rules: Rules) -> Places:
    """Place the digits of scenes.

    Args:
        u: uniform numbers (B, 6) in [0, 1).
        scenes: labels of the scenes.
        extent: sizes of the ink of their glyphs, (B, 2, 2), see `Glyphs`.
        rules: constraints of the scenes.
    """
    two = scenes.relation != NONE
    big = scenes.size.clamp(min=0)  # a missing digit gets a place too
    low, high = rules.heights[big + big * two[:, None]].unbind(-1)
    scale = torch.lerp(low, high, u[:, :2]) / extent[..., 0]
    extent = extent * scale[..., None]
    alone = _alone(u[:, 2:4], scenes.position, extent)
    beside = _beside(u[:, 2:6], scenes.relation, extent)
    return Places(scale, torch.where(two[:, None, None], beside, alone))


def _alone(u: Tensor, position: Tensor, extent: Tensor) -> Tensor:
    """Return centres of single digits, in the ninths of the image that are their positions."""
    free = SIDE / 2 - _MARGIN - extent / 2
    corner = torch.stack([position // 3 - 1, position % 3 - 1], dim=1).to(u.dtype)
    return SIDE / 2 + free * (0.8 * corner + 0.2 * (2 * u - 1))[:, None]


def _beside(u: Tensor, relation: Tensor, extent: Tensor) -> Tensor:
    """Return centres of two digits, one after the other along the axis of the relation."""
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
    """Render images, (B, 3, 32, 32), in the unit of the colours.

    Args:
        ink: glyphs (B, 2, 16, 16) in [0, 1]; zero for a missing digit.
        ink_centre: centres of the ink in the glyphs, (B, 2, 2), see `Glyphs`.
        places: places of the digits.
        colours: colours of the digits, (B, 2, 3).
        background: colours of the backgrounds, (B, 3).
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
    """Return the weight of each glyph pixel in each image pixel along one axis, (…, 32, 16).

    The kernel is a triangle, twice as wide as a pixel of the coarser grid.
    """
    scale = scale[..., None, None]
    pixel = torch.arange(SIDE, dtype=scale.dtype, device=scale.device)[:, None] + 0.5
    source = (pixel - centre[..., None, None]) / scale + ink_centre[..., None, None]
    distance = torch.arange(digits.SIDE, dtype=scale.dtype, device=scale.device) + 0.5 - source
    narrow = scale.clamp(max=1)
    return (1 - distance.abs_().mul_(narrow)).clamp_(min=0).mul_(narrow)
