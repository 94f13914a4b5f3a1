"""What an exercise is, and how an answer to it is compared.

An exercise has a reference, which is a function of minidiff, never a copy of one; cases on which an
answer is compared with it; and the wrong answers that people really give, each with a hint and the
place where it was seen. A planted bug is an exercise whose first wrong answer is the starting
point.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.schedule import Level
from minidiff.schedulers import Scheduler

Case = tuple[Any, ...]


def called(answer: Callable, *case: Any) -> Any:
    """Return the answer's result for a case: the measure of an exercise about a function."""
    return answer(*case)


def given(answer: Any) -> Any:
    """Return the answer itself: the measure of an exercise whose answer is a value."""
    return answer


class Wrong(NamedTuple):
    """A wrong answer that people give.

    Attributes:
        answer: the answer.
        hint: what is wrong, in a sentence or two.
        source: where it was seen, such as an issue; empty where it is only plausible.
        harmless: True if no measure tells it from the right answer.
    """

    answer: Any
    hint: str
    source: str = ""
    harmless: bool = False


class Exercise(NamedTuple):
    """A task with a reference to compare with.

    Attributes:
        name: name for `teach.check`.
        notebook: number of the notebook that it belongs to.
        task: what to write, with its equation and paper.
        reference: function of a case that returns the right result, computed by minidiff.
        cases: returns the cases, the same ones every time.
        solution: a right answer to read.
        hint: help that does not give the solution away.
        wrong: wrong answers, recognized by their results.
        close: largest difference from the reference. Below 0.01 it is one of rounding, relative to
            the size of the reference where that is above 1.
        measure: result of an answer on a case; by default the answer is called.
        trace: result by which wrong answers are recognized; None for that of `measure`.
    """

    name: str
    notebook: int
    task: str
    reference: Callable
    cases: Callable[[], Iterable[Case]]
    solution: Any
    hint: str
    wrong: tuple[Wrong, ...]
    close: float = 1e-6
    measure: Callable = called
    trace: Callable | None = None

    @property
    def expects(self) -> str:
        """The kind of answer: a function with its arguments, a class, or a value."""
        if isinstance(self.solution, type):
            of = " derived from minidiff.schedulers.Scheduler"
            return f"a class{of if issubclass(self.solution, Scheduler) else ''}"
        if callable(self.solution):
            return f"a function {inspect.signature(self.solution)}"
        return kind_of(self.solution)


class Bug(NamedTuple):
    """A planted bug: an exercise that starts from a wrong answer, and what its samples look like.

    Attributes:
        exercise: the exercise; its first wrong answer is the planted bug.
        title: the bug in a few words, for those who have found it.
        look: picture group of the field guide, a key of `guide.LOOKS`.
        cause: why the samples look like this.
        measure: measure that finds the bug.
        remedy: the correction.
        seen: what was measured at the strength at which people write the bug.
    """

    exercise: Exercise
    title: str
    look: str
    cause: str
    measure: str
    remedy: str
    seen: str

    @property
    def name(self) -> str:
        """Name for `teach.planted` and `teach.check`."""
        return self.exercise.name

    @property
    def planted(self) -> Any:
        """The function or the class with the bug."""
        return self.exercise.wrong[0].answer

    @property
    def source(self) -> str:
        """Where it was seen."""
        return self.exercise.wrong[0].source


# --- comparing results ---------------------------------------------------------------------------


ROUNDING = 0.01  # the largest tolerance that is about rounding


class Mismatch(Exception):
    """The result is of another kind than the reference's."""


def leaves(value: Any) -> list[Tensor | str]:
    """Return the tensors, numbers and texts in a result, in order; numbers as float64 tensors.

    Raises:
        Mismatch: the result holds something else.
    """
    if isinstance(value, Tensor):
        return [value.detach().cpu().to(torch.float64)]
    if isinstance(value, bool | int | float | np.ndarray | np.generic):
        array = np.asarray(value)
        if array.dtype.kind in "buif":
            return [torch.from_numpy(array.astype(np.float64))]
    if isinstance(value, str):
        return [value]
    if isinstance(value, list | tuple) and value:
        return [leaf for part in value for leaf in leaves(part)]
    raise Mismatch(kind_of(value))


def distance(got: Any, want: Any, *, absolute: bool = False) -> float:
    """Return the largest difference of two results.

    Args:
        got, want: the results.
        absolute: False to divide it by the size of `want`, where that is above 1.
    Raises:
        Mismatch: they differ in kind or shape.
    """
    mine, theirs = leaves(got), leaves(want)
    shapes = [getattr(leaf, "shape", str) for leaf in mine]
    if shapes != [getattr(leaf, "shape", str) for leaf in theirs]:
        raise Mismatch(kind_of(got))
    far = 0.0
    for a, b in zip(mine, theirs, strict=True):
        if isinstance(a, str):
            far = max(far, float(a != b))
        elif b.numel():
            same = (a == b) | (a.isnan() & b.isnan())
            gap = torch.where(same, 0.0, (a - b).abs()) / (1.0 if absolute else max(1.0, _size(b)))
            far = max(far, gap.nan_to_num(nan=math.inf, posinf=math.inf).max().item())
    return far


def _size(x: Tensor) -> float:
    finite = x[x.isfinite()]
    return finite.abs().max().item() if len(finite) else 1.0


def agrees(got: Any, want: Any, close: float) -> bool:
    """Return True if two results are of one kind and shape, and close."""
    try:
        return distance(got, want, absolute=close >= ROUNDING) <= close
    except Mismatch:
        return False


def kind_of(value: Any) -> str:
    """Return a description of a result: a shape, a number, or a type."""
    if value is None or value is Ellipsis:
        return "nothing; end your function with `return`"
    if isinstance(value, Tensor | np.ndarray):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, bool | int | float | np.generic):
        return "a number"
    if isinstance(value, list | tuple):
        return f"{len(value)} values: {', '.join(map(kind_of, value))}"
    return f"a {type(value).__name__}"


def words_of(case: Case) -> str:
    """Return the numbers and levels of a case, to name it in a message."""
    parts = []
    for value in case:
        if isinstance(value, Level):
            parts.append(f"α {float(value.alpha):.3g}, σ {float(value.sigma):.3g}")
        elif isinstance(value, bool | int | float | str):
            parts.append(f"{value:.3g}" if isinstance(value, float) else f"{value}")
    return " → ".join(parts)


# --- cases that several exercises share ----------------------------------------------------------


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal numbers in float64, the same ones for a shape and a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def level(alpha: float) -> Level:
    """Return the variance-preserving level of this α."""
    return Level(alpha, (1 - alpha**2) ** 0.5)


LEVELS = tuple(map(level, (0.1, 0.4, 0.8, 0.98)))
IMAGES = (4, 1, 2, 2)


def images_at_levels() -> Iterable[Case]:
    """Yield (x0, ε, level) at four levels."""
    for seed, at in enumerate(LEVELS):
        yield noise(*IMAGES, seed=2 * seed), noise(*IMAGES, seed=2 * seed + 1), at


def steps() -> Iterable[Case]:
    """Yield (x, x0, now, nxt) for three steps towards the data."""
    for seed, (now, nxt) in enumerate(pairwise(LEVELS)):
        yield noise(*IMAGES, seed=2 * seed), noise(*IMAGES, seed=2 * seed + 1), now, nxt
