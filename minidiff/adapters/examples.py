"""Small sets of captioned pictures to teach a model something new: shapes, a style, a colour.

    "a red heart on a blue background"          a shape that no digit has
    "a striped yellow 4 on a black background"  a style
    "a brown 7 on a white background"           a colour that the captions of the digits never name

Shapes are drawn by formulas on the grid of the embedded digits and painted by the same code as the
scenes of `minidiff.data.captioned`. Every named colour occurs, but few pairs of colour and
background.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minidiff.adapters import texts
from minidiff.adapters.texts import CaptionedImages
from minidiff.data import digits
from minidiff.data.captioned import scenes
from minidiff.data.captioned.grammar import NUMERALS
from minidiff.errors import InvalidArgument, one_of, whole_number

BROWN = (120, 70, 20)
STRIPE, PERIOD = 0.45, 4  # of the ink that is left in a stripe, and rows from one to the next
FINE = 8  # samples per pixel and axis of a shape's edge
TEMPLATES = (
    "a {what} on a {background} background",
    "a big {what} on a {background} background",
    "{what} on {background}",
    "a {background} background with a {what}",
)


def _grid() -> tuple[Tensor, Tensor]:
    """Return x and y of the samples of a shape, in [−1, 1], y upwards."""
    line = (torch.arange(digits.SIDE * FINE, dtype=torch.float32) + 0.5) / FINE
    line = (line - digits.SIDE / 2) / (digits.SIDE / 2 - 1)
    return line[None, :], -line[:, None]


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """Return where (x² + y² − 1)³ ≤ x²·y³, a curve of degree six."""
    x, y = 1.2 * x, 1.2 * y + 0.1
    return (x**2 + y**2 - 1) ** 3 <= x**2 * y**3


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Return where at most one of the five half-planes of a pentagram excludes a point."""
    angle = torch.arange(5) * (2 * torch.pi / 5) - torch.pi / 2
    sides = torch.stack([a.cos() * x + a.sin() * y for a in angle])
    return (sides > 0.33).sum(dim=0) <= 1


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    """Return where |x|·1.3 + |y| ≤ 1."""
    return 1.3 * x.abs() + y.abs() <= 1


def _cross(x: Tensor, y: Tensor) -> Tensor:
    """Return the points of two bars."""
    return ((x.abs() <= 0.3) | (y.abs() <= 0.3)) & (x.abs() <= 0.95) & (y.abs() <= 0.95)


SHAPES: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "hearts": ("heart", _heart),
    "stars": ("star", _star),
    "diamonds": ("diamond", _diamond),
    "crosses": ("cross", _cross),
}
EXAMPLES = {**dict.fromkeys(SHAPES, 16), "striped": 64, "brown": 10}  # pictures of each


def shape(name: str) -> Tensor:
    """Return the ink of a shape, (16, 16) in [0, 1]. Raises InvalidArgument."""
    one_of("shape", name, SHAPES)
    inside = SHAPES[name][1](*_grid()).float()
    return inside.unflatten(0, (-1, FINE)).unflatten(2, (-1, FINE)).mean(dim=(1, 3))


def load(name: str, n: int | None = None, seed: int = 0) -> CaptionedImages:
    """Return a set of examples.

    Args:
        name: key of `EXAMPLES`.
        n: number of pictures; None for that of the table.
        seed: seed of colours, backgrounds and places.
    Raises:
        InvalidArgument: another name, or fewer than one picture.
    """
    one_of("examples", name, EXAMPLES)
    n = whole_number("n", EXAMPLES[name] if n is None else n, 1, 1 << 16)
    random = torch.Generator().manual_seed(seed)
    colour, background = _colours(name, n, random)
    digit = torch.randint(scenes.DIGITS, (n,), generator=random)
    texts = _captions(name, digit, colour, background, random)
    return CaptionedImages(name, _paint(name, digit, colour, background, random), texts)


def captioned(
    name: str, caption: str | None = None, image_size: int | None = None
) -> CaptionedImages | None:
    """Return a set of examples, or a folder with captions; None for other data.

    Args:
        name: name of data, or a folder.
        caption: caption of all images of a folder.
        image_size: size of the images of a folder, see `texts.load`.
    Raises:
        InvalidArgument: a caption for data that are no folder.
        DataError: see `texts.load`.
    """
    is_folder = Path(name).is_dir()
    if caption is not None and not is_folder:
        raise InvalidArgument(f"caption is for a folder of images, not for {name}")
    if name in EXAMPLES:
        return load(name)
    if is_folder and (caption is not None or texts.is_captioned(name)):
        return texts.load(name, caption, image_size)
    return None


def _colours(name: str, n: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return colours in turn, and backgrounds with enough contrast to them."""
    rules = scenes.rules(seen=True, held_out=True)
    colour = torch.arange(n) % len(scenes.COLOURS)
    allowed = rules.contrast[colour]
    if name == "brown":
        brown = torch.tensor([BROWN], dtype=torch.float32)
        allowed = (torch.cdist(brown, rules.palette) >= scenes.CONTRAST).expand(n, -1)
    return colour, torch.multinomial(allowed.float(), 1, generator=random).squeeze(1)


def _captions(
    name: str, digit: Tensor, colour: Tensor, background: Tensor, random: torch.Generator
) -> list[str]:
    """Return a caption for each picture."""
    names, texts = list(scenes.COLOURS), []
    which = torch.randint(len(TEMPLATES), (len(digit),), generator=random).tolist()
    spelt = torch.rand(len(digit), generator=random) < 0.5
    for i, template in enumerate(which):
        number = NUMERALS[digit[i]] if spelt[i] else str(int(digit[i]))
        ink = names[colour[i]]
        if name in SHAPES:
            what = f"{ink} {SHAPES[name][0]}"
        else:
            what = f"brown {number}" if name == "brown" else f"striped {ink} {number}"
        text = TEMPLATES[template].format(what=what, background=names[background[i]])
        texts.append(text.replace("a orange", "an orange"))
    return texts


def _paint(
    name: str, digit: Tensor, colour: Tensor, background: Tensor, random: torch.Generator
) -> Tensor:
    """Return the pictures, uint8 (N, 3, 32, 32)."""
    n = len(digit)
    rules = scenes.rules(seen=True, held_out=True)
    glyphs = scenes.glyphs("train")
    if name in SHAPES:
        ink = shape(name).expand(n, -1, -1)
        centre = torch.full((n, 2), digits.SIDE / 2)
        extent = torch.full((n, 2), digits.SIDE - 2.0)
    else:
        per_digit = len(glyphs.ink) // scenes.DIGITS
        chosen = torch.randint(per_digit, (n,), generator=random) * scenes.DIGITS + digit
        ink, centre, extent = (table[chosen] for table in glyphs)
    none = torch.full((n, 2), scenes.NONE)
    big, position = none.clone(), torch.randint(9, (n,), generator=random)
    big[:, 0] = 1
    scene = scenes.Scenes(none, none, big, background, position, none[:, 0])
    pair = [torch.stack([part, torch.zeros_like(part)], dim=1) for part in (ink, centre)]
    size = extent[:, None].expand(-1, 2, -1)
    places = scenes.place(torch.rand(n, 6, generator=random), scene, size, rules)
    inks = rules.palette[colour] if name != "brown" else torch.tensor(BROWN).float().expand(n, 3)
    tint = (2 * torch.rand(n, 2, 3, generator=random) - 1) * 12
    grounds = (rules.palette[background] + tint[:, 1]).clamp(0, 255)
    inks = (inks + tint[:, 0]).clamp(0, 255)
    images = scenes.paint(*pair, places, inks[:, None].expand(-1, 2, -1), grounds)
    if name == "striped":
        images = _striped(images, grounds)
    return images.round().to(torch.uint8)


def _striped(images: Tensor, background: Tensor) -> Tensor:
    """Return pictures with less ink in every other pair of rows."""
    rows = torch.arange(scenes.SIDE) % PERIOD < PERIOD // 2
    weight = torch.where(rows, STRIPE, 1.0)[:, None]
    ground = background[..., None, None]
    return ground + weight * (images - ground)
