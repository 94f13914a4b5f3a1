"""Figures for notebooks: densities, fields and paths in a plane, losses, and source code.

    from minidiff.lab import plot
    plot.density(ring, level)
    plot.field(ring.denoise, level)

Functions that take `axes` draw into them, or into pyplot's current ones, and return them. What
`minidiff.images.plot` draws is here as well.
"""

import inspect
import io
import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.exact import GaussianMixture
from minidiff.images import plot as images_plot
from minidiff.images.plot import as_array, save
from minidiff.runs.folder import LOG
from minidiff.runtime.files import atomic_file, user_path
from minidiff.schedule import CLEAN, Level

__all__ = [
    "as_array", "density", "field", "grid", "loss", "paths", "points", "save", "save_gif",
    "show", "source",
]  # fmt: skip


def grid(
    images: np.ndarray | Sequence[Any] | Tensor,
    columns: int | Sequence[str] = 10,
    scale: int = 2,
    gap: int = 1,
    *,
    rows: Sequence[str] = (),
) -> Image.Image:
    """Arrange images in a grid, row by row, with labels.

    Args:
        images: uint8 (N, H, W, C) with C = 1 or 3; or PIL images of one size; or float images
            (N, C, H, W) in [−1, 1].
        scale, gap: see `minidiff.images.plot.grid`.
        columns: images per row, or a label above each column.
        rows: a label beside each row; none by default.
    Raises:
        InvalidArgument: another kind of images, or another number of labels than rows.
    """
    if isinstance(images, Tensor):
        images = as_array(images)
    elif isinstance(images, list | tuple):
        images = np.stack([np.atleast_3d(np.asarray(image)) for image in images])
    above: Sequence[str] = () if isinstance(columns, int) else columns
    width = columns if isinstance(columns, int) else len(columns)
    sheet = images_plot.grid(images, width, scale, gap)
    count = -(-len(images) // width)
    if rows and len(rows) != count:
        raise InvalidArgument(f"rows must have a label for each of {count} rows, got {len(rows)}")
    # The last column and row have no gap.
    cell = tuple(
        (side + scale * gap) // n for side, n in zip(sheet.size, (width, count), strict=False)
    )
    return _labelled(sheet, cell, above, rows) if above or rows else sheet


def _labelled(
    sheet: Image.Image, cell: tuple[float, float], above: Sequence[str], beside: Sequence[str]
) -> Image.Image:
    """Put labels in a white margin above the columns and beside the rows of a sheet."""
    import matplotlib

    face = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # has Greek letters
    font = ImageFont.truetype(str(face), 11)

    def lines(label: str) -> str:
        """Return a label broken between words where it is wider than its column."""
        done = ""
        for word in label.split():
            longer = f"{done} {word}" if done else word
            fits = font.getlength(longer.rpartition("\n")[2]) <= cell[0] - 2
            done = longer if fits or not done else f"{done}\n{word}"
        return done

    texts = [lines(label) for label in above]
    left = 8 + max((int(font.getlength(label)) for label in beside), default=-8)
    top = 4 + 14 * max((text.count("\n") + 1 for text in texts), default=0)
    picture = Image.new(sheet.mode, (left + sheet.width, top + sheet.height), "white")
    picture.paste(sheet, (left, top))
    pen = ImageDraw.Draw(picture)
    for i, text in enumerate(texts):
        x = left + i * cell[0] + cell[0] // 2
        pen.multiline_text((x, top - 4), text, "black", font, anchor="md", align="center")
    for i, label in enumerate(beside):
        pen.text((left - 5, top + i * cell[1] + cell[1] // 2), label, "black", font, anchor="rm")
    return picture


def save_gif(frames: Sequence[Image.Image], path: str | Path, seconds: float = 3.0) -> None:
    """Write a looping GIF that plays `frames` in `seconds` and then holds the last one.

    Noise does not compress well, so only 16 colours are kept, which is not visible in motion.
    """
    each = 1000 * seconds / len(frames)
    durations = [each] * (len(frames) - 1) + [1500]
    frames = [frame.quantize(16, dither=Image.Dither.NONE) for frame in frames]
    with atomic_file(path) as temporary:
        frames[0].save(
            temporary, format="GIF", save_all=True, append_images=list(frames[1:]),
            duration=durations, loop=0, optimize=True,
        )  # fmt: skip


# --- points in a plane -------------------------------------------------------------------------

EXTENT = 2.4  # half the side of the plane that is drawn


def _plane(axes: Any, extent: float = EXTENT, title: str = "") -> Any:
    """Return square axes of the plane without ticks; pyplot's current ones for None."""
    if axes is None:
        from matplotlib import pyplot

        axes = pyplot.gca()
    axes.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", xticks=[], yticks=[])
    if title:
        axes.set_title(title)
    return axes


def _mesh(extent: float, n: int) -> Tensor:
    """Return n×n points of the plane, row by row from below, float64 (n², 2)."""
    line = torch.linspace(-extent, extent, n, dtype=torch.float64)
    return torch.cartesian_prod(line, line).flip(1)


def points(
    x: Tensor, axes: Any = None, *, labels: Tensor | None = None, title: str = "", most: int = 3000
) -> Any:
    """Draw points of a plane, coloured by their labels.

    Args:
        x: points (N, 2).
        axes: axes of matplotlib.
        labels: int64 (N,), or None.
        title: title of the axes.
        most: number of points that are drawn, the first ones.
    Raises:
        InvalidArgument: points in other dimensions.
    """
    _check_plane("x", x)
    extent = max(EXTENT, 1.05 * float(x[:most].abs().nan_to_num(0, 0, 0).max()))
    axes, colours = _plane(axes, extent, title), None if labels is None else labels[:most].cpu()
    colouring = {} if colours is None else {"c": colours, "cmap": "tab10"}
    axes.scatter(*x[:most].cpu().T, s=2, linewidths=0, **colouring)
    return axes


def density(mixture: GaussianMixture, level: Level = CLEAN, axes: Any = None, **more: Any) -> Any:
    """Draw the density of a mixture in the plane at a noise level.

    Args:
        mixture: mixture of two dimensions.
        level: noise level; that of the data by default.
        axes: axes of matplotlib.
        more: arguments of `Axes.imshow`, such as cmap.
    Raises:
        InvalidArgument: a mixture in other dimensions.
    """
    _check_plane("mixture", mixture.means)
    axes, n = _plane(axes), 200
    values = mixture.log_prob(_mesh(EXTENT, n), level).exp().view(n, n)
    options = {"cmap": "Greys", "interpolation": "bilinear"} | more
    axes.imshow(values.numpy(), extent=(-EXTENT, EXTENT) * 2, origin="lower", **options)
    return axes


def field(
    denoise: Callable[[Tensor, Level], Tensor], level: Level, axes: Any = None, n: int = 18
) -> Any:
    """Draw where a denoiser moves the points of a plane: an arrow from x towards α·x̂0.

    Args:
        denoise: function (x, level) → x̂0, such as `GaussianMixture.denoise`.
        level: noise level.
        axes: axes of matplotlib.
        n: arrows along each side.
    """
    axes, x = _plane(axes), _mesh(EXTENT, n)
    move = level.alpha * denoise(x, level) - x
    axes.quiver(*x.T, *move.T, move.norm(dim=1), angles="xy", cmap="viridis", width=0.004)
    return axes


def paths(states: Sequence[Tensor] | Tensor, axes: Any = None, **more: Any) -> Any:
    """Draw the paths of points through the plane, with a dot where each ends.

    Args:
        states: samples (N, 2) of every step, in order.
        axes: axes of matplotlib.
        more: arguments of `Axes.plot`, such as color.
    Raises:
        InvalidArgument: points in other dimensions, or no steps.
    """
    lines = torch.stack(list(states)) if len(states) else torch.zeros(0, 0, 0)
    _check_plane("states", lines[-1] if len(lines) else lines)
    extent = max(EXTENT, 1.05 * float(lines.abs().max()))
    axes, style = _plane(axes, extent), {"lw": 0.6, "alpha": 0.6, "color": "tab:blue"} | more
    axes.plot(*lines.unbind(-1), **style)
    axes.plot(*lines[-1].T, ".", ms=3, color=style["color"])
    return axes


def _check_plane(name: str, x: Tensor) -> None:
    if x.ndim != 2 or x.shape[1] != 2:
        raise InvalidArgument(f"{name} must be points of a plane, (N, 2), got {tuple(x.shape)}")


# --- notebooks ---------------------------------------------------------------------------------


def loss(run: str | Path | Iterable[Mapping[str, Any]], axes: Any = None) -> Any:
    """Draw the loss of a run over its steps, on logarithmic axes.

    Args:
        run: folder of a run, or the rows of a log.
        axes: axes of matplotlib.
    Raises:
        CheckpointError: the folder has no readable log.jsonl.
    """
    if axes is None:
        from matplotlib import pyplot

        axes = pyplot.gca()
    if isinstance(run, str | Path):
        path = user_path(run) / LOG
        try:
            run = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not the log of a run ({error})") from error
    steps, losses = zip(*((row["step"], row["loss"]) for row in run), strict=True)
    axes.loglog(steps, losses)
    axes.set(xlabel="step", ylabel="loss")
    return axes


def show(picture: Any, alt: str = "", dpi: int = 90) -> Any:
    """Return a picture for the last line of a cell, which the notebook stores as PNG alone.

    Without it, images of PIL are stored as JPEG as well.

    Args:
        picture: image of PIL, or axes or a figure of matplotlib, which is then closed.
        alt: what the picture shows, for those who cannot see it.
        dpi: resolution of a figure.
    Raises:
        InvalidArgument: neither of these.
    """
    buffer, figure = io.BytesIO(), getattr(picture, "figure", picture)
    if isinstance(picture, Image.Image):
        picture.save(buffer, format="PNG", optimize=True)
    elif hasattr(figure, "savefig"):
        from matplotlib import pyplot

        figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")
        pyplot.close(figure)
    else:
        kind = type(picture).__name__
        raise InvalidArgument(f"picture must be an image, axes or a figure, got {kind}")
    from IPython.display import Image as Shown

    return Shown(buffer.getvalue(), format="png", alt=alt)


def source(thing: Any) -> None:
    """Print where a function or class stands, as file:line, and its code.

    Raises:
        InvalidArgument: a thing without source code, such as a number.
    """
    try:
        thing = inspect.unwrap(thing)
        code, line = inspect.getsourcelines(thing)
        path = Path(inspect.getsourcefile(thing) or "")
    except (TypeError, OSError) as error:
        raise InvalidArgument(f"thing must have source code, got {thing!r}") from error
    root = Path(__file__).parents[2]
    place = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
    print(f"{place}:{line}\n{textwrap.dedent(''.join(code))}", end="")
