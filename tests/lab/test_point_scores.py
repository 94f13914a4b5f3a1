"""Scores of points: the truth scores best, and each kind of fault lowers its own figure."""

import pytest
import torch

from minidiff.data import toys
from minidiff.errors import InvalidArgument
from minidiff.lab.points import compared, score, table


@pytest.mark.parametrize("name", toys.NAMES)
def test_fresh_points_are_near_their_data_and_noise_is_not(name):
    fresh = score(toys.load(name, count=4000).points, name)
    noise = score(torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)), name)
    assert fresh.near > 0.98
    assert fresh.distance < 0.05
    assert noise.near < fresh.near - 0.1
    assert noise.distance > 2 * fresh.distance


def test_a_missed_mode_and_a_shift_are_seen():
    ring = toys.load("ring", count=4000)
    found = score(ring.points[ring.labels != 3], "ring")
    assert (found.modes, score(ring.points, "ring").modes) == (7, 8)
    assert found.near > 0.98  # a missed mode does not show here
    assert score(ring.points + 0.2, "ring").near < 0.6


def test_the_table_has_modes_where_the_data_have_them():
    for name, modes in (("ring", True), ("moons", False)):
        text = table(compared(toys.load(name, count=500).points, name))
        assert ("modes covered" in text) == modes


@pytest.mark.parametrize(
    "points", [torch.zeros(5), torch.zeros(5, 3), torch.zeros(1, 2), torch.full((5, 2), torch.nan)]
)
def test_points_that_cannot_be_scored_are_refused(points):
    with pytest.raises(InvalidArgument, match=r"points must be \(N, 2\), N ≥ 2, without NaN"):
        compared(points, "ring")
