"""Checking an answer: against the reference, and against the wrong answers that people give.

Nothing is sent or stored. Whatever an answer does, the result is one line.
"""

import inspect
import math
import traceback
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.teach.exercise import (
    ROUNDING,
    Case,
    Exercise,
    Mismatch,
    Wrong,
    agrees,
    distance,
    given,
    kind_of,
    leaves,
    words_of,
)


class Result(NamedTuple):
    """The result of a check.

    Attributes:
        name: exercise.
        passed: True if the answer agrees with the reference on every case.
        text: what is wrong, or nothing.
        slip: the known wrong answer that this one equals, or None.
    """

    name: str
    passed: bool
    text: str = ""
    slip: Wrong | None = None

    def __str__(self) -> str:
        mark = "✓" if self.passed else "≈" if self.slip and self.slip.harmless else "✗"
        return f"{mark} {self.name}" + (f": {self.text}" if self.text else "")


class _Failed(Exception):
    """An answer that cannot be compared."""


def grade(exercise: Exercise, answer: Any) -> Result:
    """Compare an answer with the reference, and if it differs with every known wrong answer."""
    cases = list(exercise.cases())
    try:
        _check_kind(exercise, answer, cases)
        results = [_run(exercise.measure, answer, case) for case in cases]
        wanted = [exercise.reference(*case) for case in cases]
        absolute = exercise.close >= ROUNDING
        pairs = zip(results, wanted, strict=True)
        fars = [_distance(got, want, absolute) for got, want in pairs]
    except _Failed as failure:
        slip = _recognize(exercise, answer, cases)
        text = f"{failure}. {_explain(slip)}" if slip else f"{failure}."
        return Result(exercise.name, False, text, slip)
    worst = max(range(len(fars)), key=fars.__getitem__)
    if fars[worst] <= exercise.close:
        return Result(exercise.name, True)
    slip = _recognize(exercise, answer, cases)
    text = _difference(results[worst], wanted[worst], fars[worst])
    if slip:
        return Result(exercise.name, False, f"{text}. {_explain(slip)}", slip)
    where = words_of(cases[worst])
    text += f" at {where}" if where else ""
    return Result(exercise.name, False, f"{text}. teach.hint({exercise.name!r}) helps.")


def _explain(slip: Wrong) -> str:
    harmless = "Harmless: no measure shows it. " if slip.harmless else ""
    return harmless + slip.hint + (f"  ({slip.source})" if slip.source else "")


def _difference(got: Any, want: Any, far: float) -> str:
    (mine, *more), (theirs, *_) = leaves(got), leaves(want)
    if not more and not isinstance(mine, str) and mine.numel() == 1:
        return f"{mine.item():.4g} instead of {theirs.item():.4g}"
    return f"{far:.2g} off" if far != math.inf else "not finite (NaN or infinity)"


def _recognize(exercise: Exercise, answer: Any, cases: list[Case]) -> Wrong | None:
    """Return the known wrong answer that agrees with this one on every case."""
    look = exercise.trace or exercise.measure
    close = min(exercise.close, 1e-4)
    try:
        mine = [_run(look, answer, case) for case in cases]
    except _Failed:
        return None
    for wrong in exercise.wrong:
        theirs = (_run(look, wrong.answer, case) for case in cases)
        if all(agrees(a, b, close) for a, b in zip(mine, theirs, strict=True)):
            return wrong
    return None


def _check_kind(exercise: Exercise, answer: Any, cases: list[Case]) -> None:
    """Refuse an answer of another kind than the solution. Raises _Failed."""
    if exercise.measure is given:
        if answer is None or answer is Ellipsis:
            raise _Failed("no answer yet")
        return
    wants_class = isinstance(exercise.solution, type)
    if not callable(answer) or (wants_class and not isinstance(answer, type)):
        raise _Failed(f"expected {exercise.expects}, got {kind_of(answer).split(';')[0]}")
    if wants_class:
        return
    wanted = inspect.signature(exercise.solution)
    try:
        mine = inspect.signature(answer)
        mine.bind(*wanted.parameters)
    except TypeError:
        raise _Failed(
            f"expected a function of {', '.join(wanted.parameters)}; yours takes "
            f"{', '.join(mine.parameters) or 'nothing'}"
        ) from None
    except ValueError:  # a built-in function without a signature
        pass


def _run(measure: Any, answer: Any, case: Case) -> Any:
    """Return the measure of an answer on a copy of the case. Raises _Failed."""
    copies = tuple(value.clone() if isinstance(value, Tensor) else value for value in case)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # answers that draw noise draw the same as each other
            result = measure(answer, *copies)
    except Exception as error:  # an answer may raise anything
        raise _Failed(f"your answer raised {_described(error)}") from None
    for before, after in zip(case, copies, strict=True):
        if isinstance(before, Tensor) and not torch.equal(before, after):
            raise _Failed("your function changes its argument; compute on a copy")
    return result


def _described(error: Exception) -> str:
    """Return type, message and line of an error, in one line."""
    message = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(torch.__path__[0])]
    where = f" (line {own[-1].lineno}: {own[-1].line})" if own and own[-1].line else ""
    return f"{type(error).__name__}: {message[:160]}{where}"


def _distance(got: Any, want: Any, absolute: bool) -> float:
    try:
        return distance(got, want, absolute=absolute)
    except Mismatch:
        raise _Failed(f"expected {kind_of(want)}, got {kind_of(got)}") from None
