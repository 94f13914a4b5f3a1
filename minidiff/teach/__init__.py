"""Exercises that check themselves, and bugs to find.

    from minidiff import teach

    teach.task("ddim-step")              what to write
    teach.check("ddim-step", my_step)    ✓, or what is wrong; a known slip is named
    teach.hint("ddim-step")
    teach.solution("ddim-step")          prints a right answer, and returns it
    teach.planted("B3")                  a sampler or a function with a bug that people wrote
    teach.check("B3", fixed)

`python -m minidiff.teach --list` lists all of them. Nothing is sent or stored.
"""

import inspect
import textwrap
from typing import Any, Literal, overload

from minidiff.errors import one_of
from minidiff.teach.exercise import Bug, Exercise, Wrong
from minidiff.teach.exercises import (
    ddim,
    ddpm,
    denoiser,
    edits,
    evaluation,
    flow,
    guidance,
    latents,
    noise,
    order,
    prediction,
    sampler,
    training,
    unet,
)
from minidiff.teach.grading import Result, grade

__all__ = ["BUGS", "EXERCISES", "Bug", "Exercise", "Result", "Wrong", "check", "hint", "planted",
           "solution", "task"]  # fmt: skip

_TOPICS = (noise, denoiser, prediction, training, ddpm, ddim, order, flow, unet, guidance, latents,
           edits, evaluation, sampler)  # fmt: skip
EXERCISES: dict[str, Exercise] = {
    one.name: one
    for one in sorted((e for topic in _TOPICS for e in topic.EXERCISES), key=lambda e: e.notebook)
}
BUGS: dict[str, Bug] = {
    bug.name: bug
    for bug in sorted((b for topic in _TOPICS for b in topic.BUGS), key=lambda b: int(b.name[1:]))
}


def find(name: str) -> Exercise:
    """Return an exercise or the exercise of a planted bug. Raises InvalidArgument."""
    one_of("name", name, [*EXERCISES, *BUGS])
    return EXERCISES[name] if name in EXERCISES else BUGS[name].exercise


@overload
def check(name: str, answer: Any, *, quiet: Literal[False] = False) -> None: ...
@overload
def check(name: str, answer: Any, *, quiet: Literal[True]) -> Result: ...
def check(name: str, answer: Any, *, quiet: bool = False) -> Result | None:
    """Compare an answer with the reference, and print one line.

    Args:
        name: exercise or planted bug.
        answer: a function, a class or a value, as `task` describes it. It runs in this process, so
            grade strangers' answers in a separate one.
        quiet: True to return the result instead of printing it, for graders.
    Returns:
        None, or the result.
    Raises:
        InvalidArgument: there is no such exercise.
    """
    result = grade(find(name), answer)
    if quiet:
        return result
    print(result)
    return None


def task(name: str) -> None:
    """Print what to write. Raises InvalidArgument."""
    one = find(name)
    print(textwrap.fill(f"{one.name} (notebook {one.notebook:02d}): {one.task}", 100))


def hint(name: str) -> None:
    """Print help that does not give the solution away. Raises InvalidArgument."""
    print(textwrap.fill(find(name).hint, 100))


def solution(name: str) -> Any:
    """Print a right answer, and return it. Raises InvalidArgument."""
    answer = find(name).solution
    print(inspect.getsource(answer).rstrip().rstrip(",") if callable(answer) else answer)
    return answer


def planted(name: str) -> Any:
    """Return the function or the scheduler class with a planted bug, "B1" to "B16".

    A class is a sampler: `pipe.scheduler = planted("B3").from_config(pipe.scheduler.config)`, or
    `ring.sampled(planted("B3")(**ring.OPTIONS))`.

    Raises:
        InvalidArgument: there is no such bug.
    """
    one_of("name", name, BUGS)
    return BUGS[name].planted
