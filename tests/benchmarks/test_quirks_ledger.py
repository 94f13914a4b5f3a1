"""The ledger of departures is complete, and its printed form matches the code and its costs."""

import re
import sys
from pathlib import Path

import pytest

import minidiff
from minidiff.errors import InvalidArgument
from minidiff.schedulers import DDIMScheduler
from minidiff.schedulers.core.quirks import Diffusers, Exact, departing, departures

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from quirks_ledger import HEAD, PROBES, ROUNDING, TAIL, Probe, table

PRINTED = Path(minidiff.__file__).parent / "schedulers" / "QUIRKS.md"


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of the Markdown table by departure."""
    cells = [re.split(r"(?<!\\) ?\| ?", line) for line in text.splitlines() if line[:3] == "| `"]
    return {row[1].strip(" `"): row[2:-1] for row in cells}


def test_every_departure_has_a_cost_or_a_reason_for_none() -> None:
    assert set(PROBES) == set(departures())
    assert all(isinstance(p, Probe) or len(p) > 10 for p in PROBES.values())


@pytest.mark.parametrize("name", departures())
def test_both_readings_have_docstrings(name: str) -> None:
    if name != "dtype":
        assert vars(Exact)[name].__doc__
        assert vars(Diffusers)[name].__doc__


def test_the_printed_ledger_matches_the_code_and_its_measured_costs() -> None:
    printed = PRINTED.read_text(encoding="utf-8")
    assert printed.startswith(HEAD)
    assert printed.endswith(TAIL)
    now, then = rows(table()), rows(printed)
    assert list(now) == list(then) == departures()
    for name, cells in now.items():
        assert cells[:3] == then[name][:3], f"{name}: run python benchmarks/quirks_ledger.py"
        if not any(then[name][3:]):
            continue
        exact, departed, moved = map(float, cells[3:])
        printed_exact, printed_departed, printed_moved = map(float, then[name][3:])
        assert exact == pytest.approx(printed_exact, rel=0.02), name
        if name in ROUNDING:  # the last bits differ between processors, the magnitude does not
            assert 0.1 < moved / printed_moved < 10, name
            assert departed == pytest.approx(printed_departed, rel=0.02, abs=10 * printed_moved)
        else:
            assert departed == pytest.approx(printed_departed, rel=0.02), name
            assert moved == pytest.approx(printed_moved, rel=0.02), name


def test_each_measured_departure_moves_its_result() -> None:
    moved = {
        name: float(cells[-1]) for name, cells in rows(PRINTED.read_text()).items() if cells[-1]
    }
    assert set(moved) == {name for name, probe in PROBES.items() if isinstance(probe, Probe)}
    assert min(moved.values()) > 0
    # Rounding moves results little, except where DEIS subtracts antiderivatives that cancel.
    assert all(moved[name] < 1e-4 for name in ROUNDING if name != "deis_weights")


def test_one_departure_can_be_switched_on_alone() -> None:
    options = {"timestep_spacing": "linspace", "clip_sample": False}
    scheduler = DDIMScheduler(**options, compat="exact")
    departed = scheduler.reread(departing("ddim_levels"))
    departed.set_timesteps(300)
    scheduler.set_timesteps(300)
    t = scheduler.grid[1]
    assert departed._levels_at(t)[1] == scheduler.level(t - 3)
    assert scheduler._levels_at(t)[1] == scheduler.level(scheduler.grid[2])
    assert scheduler.reading is not departed.reading


def test_an_unknown_departure_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match="ddim_steps"):
        departing("ddim_steps")
