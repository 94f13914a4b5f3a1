"""The evaluation table, printed and as JSON.

A row is a figure, a column the images that it is measured on, a cell one value or one per seed.
"""

import statistics
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minidiff.metrics import Scores

MODEL, UNGUIDED, HELD_OUT, TRAINING = "model", "unguided", "held out", "training"
COLUMNS = (MODEL, UNGUIDED, HELD_OUT, TRAINING)


class Figure(NamedTuple):
    """The form of a row in print: its title, a factor, and the number of decimal places."""

    title: str
    factor: float
    digits: int


FIGURES = {
    "accuracy": Figure("accuracy, %", 100, 2),
    "fd": Figure("Fréchet distance, ‰", 1, 2),
    "kd": Figure("kernel distance, ‰", 1, 2),
    "density": Figure("density", 1, 3),
    "coverage": Figure("coverage", 1, 3),
    "learnt": Figure("accuracy learnt from them, %", 100, 2),
    "copying": Figure("nearest training image", 1, 3),
    "bound": Figure("bits/dimension, bound", 1, 3),
    "flow": Figure("bits/dimension, flow", 1, 3),
    "evaluations": Figure("evaluations per image", 1, 1),
}


@dataclass
class EvaluationTable:
    """The result of `minidiff.metrics.protocol.evaluate`.

    Attributes:
        about: protocol, data, settings, seeds and digest of the model, on which figures depend.
        cells: values by figure and column: one per seed, or one where no seed enters.
        absent: reason by figure or part that could not be measured.
        seconds: duration by part.
    """

    about: dict[str, Any]
    cells: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, figure: str, column: str, value: float) -> None:
        """Add a value after those of earlier seeds."""
        self.cells.setdefault(figure, {}).setdefault(column, []).append(value)

    def add_scores(self, column: str, scores: Scores) -> None:
        """Add all figures that are computed on features."""
        for figure, value in scores._asdict().items():
            if value is not None:
                self.add(figure, column, value)

    def as_json(self) -> dict[str, Any]:
        """Return everything for a file: each value, and mean and standard deviation over seeds."""
        figures = {
            figure: {
                column: {"values": values, "mean": statistics.fmean(values), "std": _std(values)}
                for column, values in columns.items()
            }
            for figure, columns in self.cells.items()
        }
        return {**self.about, "figures": figures, "absent": self.absent, "seconds": self.seconds}

    def __str__(self) -> str:
        columns = [c for c in COLUMNS if any(c in found for found in self.cells.values())]
        titles = {HELD_OUT: "real, held out", TRAINING: "real, training"}
        lines = [" " * 30 + "".join(f"{titles.get(c, c):>18}" for c in columns)]
        for name, figure in FIGURES.items():
            found = self.cells.get(name)
            if found:
                cells = [_cell(found.get(column), figure) for column in columns]
                lines.append(f"{figure.title:<30}" + "".join(f"{cell:>18}" for cell in cells))
        lines += [f"not measured: {name}: {why}" for name, why in self.absent.items()]
        took = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in self.seconds.items())
        return "\n".join([*lines, f"took: {took}"])


def _std(values: list[float]) -> float | None:
    """Return the standard deviation over seeds, None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def _cell(values: list[float] | None, figure: Figure) -> str:
    """Return mean ± standard deviation as text, a dash where nothing was measured."""
    if values is None:
        return "–"
    mean, std = statistics.fmean(values), _std(values)
    text = f"{figure.factor * mean:.{figure.digits}f}"
    return text if std is None else f"{text} ± {figure.factor * std:.{figure.digits}f}"
