"""Figures: labels of grids, points in a plane, and what notebooks store."""

import io
import json

import matplotlib as mpl
import numpy as np
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from matplotlib.figure import Figure
from PIL import Image

from minidiff import shipped
from minidiff.data import toys
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.lab import plot
from minidiff.schedule import CLEAN, Level

mpl.use("Agg")
RING = toys.mixture("ring")
IMAGES = np.arange(6 * 5 * 4, dtype=np.uint8).reshape(6, 5, 4, 1)


@pytest.mark.parametrize("columns", [["α = 1", "β", "γ"], ["a b c d e f g"] * 3])
def test_labels_are_drawn_around_the_pixels_of_the_plain_grid(columns: list[str]) -> None:
    plain = np.asarray(plot.grid(IMAGES, 3, 8))
    labelled = np.asarray(plot.grid(IMAGES, columns, 8, rows=["first", "second"]))
    high, wide = plain.shape
    assert (labelled[-high:, -wide:] == plain).all()
    assert (labelled[:-high] < 128).any()  # above
    assert (labelled[-high:, :-wide] < 128).any()  # beside
    assert (labelled[:-high, :-wide] == 255).all()  # the corner is empty


def test_a_grid_takes_arrays_pictures_and_tensors_alike() -> None:
    pictures = [Image.fromarray(image[..., 0]) for image in IMAGES]
    floats = torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 127.5 - 1
    first, *others = (np.asarray(plot.grid(x, 3)) for x in (IMAGES, pictures, floats))
    assert all((first == other).all() for other in others)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": 3, "rows": ["one"]}, "rows must have a label for each of 2 rows, got 1"),
        ({"columns": 0}, "columns must be at least 1"),
        ({"columns": []}, "columns must be at least 1"),
    ],
)
def test_labels_that_do_not_fit_a_grid_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        plot.grid(IMAGES, **arguments)


def test_a_density_is_brightest_at_the_modes_and_integrates_to_one() -> None:
    (image,) = plot.density(RING, CLEAN, Figure().subplots()).get_images()
    values = image.get_array()
    assert values.sum() * (2 * plot.EXTENT / 199) ** 2 == pytest.approx(1, abs=1e-3)
    row, column = np.unravel_index(values.argmax(), values.shape)
    brightest = torch.tensor([column, row]) / 199 * 2 * plot.EXTENT - plot.EXTENT
    assert float((RING.means - brightest).norm(dim=1).min()) < 0.03


def test_the_arrows_of_a_field_point_from_x_to_the_prediction() -> None:
    level = Level(0.8, 0.6)
    axes = plot.field(RING.denoise, level, Figure().subplots(), n=4)
    (arrows,) = axes.collections
    x = torch.from_numpy(np.stack([arrows.X, arrows.Y], 1))
    move = torch.from_numpy(np.stack([arrows.U, arrows.V], 1))
    torch.testing.assert_close(x + move, 0.8 * RING.denoise(x, level))


def test_paths_end_where_their_dots_are() -> None:
    states = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
    *lines, dots = plot.paths(states, Figure().subplots()).get_lines()
    assert len(lines) == 3
    ends = np.stack([line.get_xydata()[-1] for line in lines])
    np.testing.assert_allclose(dots.get_xydata(), ends)


@pytest.mark.parametrize("draw", [plot.points, lambda x: plot.paths([x])])
def test_points_outside_a_plane_are_refused(draw) -> None:
    with pytest.raises(InvalidArgument, match=r"points of a plane, \(N, 2\), got \(4, 3\)"):
        draw(torch.zeros(4, 3))


def test_the_loss_of_a_run_is_read_from_its_log(tmp_path) -> None:
    rows = [{"step": 10 * k, "loss": 1 / k} for k in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (line,) = plot.loss(tmp_path, Figure().subplots()).get_lines()
    np.testing.assert_allclose(line.get_xydata(), [[10, 1], [20, 1 / 2], [30, 1 / 3]])
    with pytest.raises(CheckpointError, match="not the log of a run"):
        plot.loss(tmp_path / "missing", Figure().subplots())


def test_a_notebook_stores_a_picture_as_png_alone() -> None:
    for picture in (plot.grid(IMAGES, 3), Figure(), Figure().subplots()):
        shown = plot.show(picture)
        formats, _ = DisplayFormatter().format(shown)
        assert set(formats) == {"image/png", "text/plain"}
        Image.open(io.BytesIO(shown.data)).verify()
    with pytest.raises(InvalidArgument, match="picture must be an image, axes or a figure"):
        plot.show(3)


def test_source_prints_where_a_thing_stands_and_its_code(capsys) -> None:
    plot.source(shipped.load)
    place, first, *_ = capsys.readouterr().out.splitlines()
    file, line = place.split(":")
    assert file == "minidiff/shipped.py"
    root = plot.Path(plot.__file__).parents[2]
    assert (root / file).read_text().splitlines()[int(line) - 1] == first
    with pytest.raises(InvalidArgument, match="must have source code, got 3"):
        plot.source(3)
