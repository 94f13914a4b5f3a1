"""Right answers pass, wrong ones fail and are named, and nothing an answer does is a traceback."""

import inspect
import subprocess
import sys

import pytest
import torch

from minidiff import teach
from minidiff.errors import InvalidArgument
from minidiff.schedulers import Scheduler
from minidiff.teach.exercise import given

ALL = {**teach.EXERCISES, **{name: bug.exercise for name, bug in teach.BUGS.items()}}
ROWS = [(name, i) for name, one in ALL.items() for i in range(len(one.wrong))]


@pytest.mark.parametrize("name", ALL)
def test_the_solution_passes(name):
    result = teach.check(name, ALL[name].solution, quiet=True)
    assert result.passed, result


@pytest.mark.parametrize(("name", "row"), ROWS, ids=lambda v: str(v))
def test_every_wrong_answer_fails_and_is_named_with_its_hint(name, row):
    wrong = ALL[name].wrong[row]
    result = teach.check(name, wrong.answer, quiet=True)
    assert not result.passed
    assert result.slip is wrong, result
    assert wrong.hint in result.text
    assert wrong.source in result.text


def stub(one):
    """Return what stands in a notebook before anyone has solved the exercise."""
    if one.measure is given:
        return ...
    if isinstance(one.solution, type):
        return type("Mine", (Scheduler,) if issubclass(one.solution, Scheduler) else (), {})
    names = ", ".join(inspect.signature(one.solution).parameters)
    return eval(f"lambda {names}: ...")


@pytest.mark.parametrize("name", ALL)
def test_an_unsolved_exercise_fails(name):
    result = teach.check(name, stub(ALL[name]), quiet=True)
    assert not result.passed
    assert result.slip is None
    assert "\n" not in str(result)


def test_the_course_has_the_numbers_that_were_promised():
    assert len(teach.EXERCISES) >= 30
    assert len(teach.BUGS) >= 12
    assert {one.notebook for one in teach.EXERCISES.values()} == set(range(15))
    hints = {wrong.hint for one in teach.EXERCISES.values() for wrong in one.wrong}
    assert len(hints) >= 60
    assert len(hints) == sum(len(one.wrong) for one in teach.EXERCISES.values())
    assert all(bug.source for bug in teach.BUGS.values())


def test_a_slip_without_consequence_is_called_harmless(capsys):
    result = teach.check("B8", teach.planted("B8"), quiet=True)
    assert result.slip.harmless
    assert "Harmless" in result.text
    assert str(result).startswith("≈ B8")


def add(x0, eps, level):
    return level.alpha * x0 + level.sigma * eps


def in_place(x0, eps, level):
    x0 *= level.alpha
    return x0 + level.sigma * eps


def failing(x0, eps, level):
    return 1 / 0


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (None, "expected a function (x0, eps, level), got nothing"),
        (..., "expected a function (x0, eps, level), got nothing"),
        (3, "expected a function (x0, eps, level), got a number"),
        (lambda x0, eps: x0, "expected a function of x0, eps, level; yours takes x0, eps"),
        (lambda: None, "yours takes nothing"),
        (lambda x0, eps, level: None, "got nothing; end your function with `return`"),
        (lambda x0, eps, level: "x", "expected a tensor of shape (4, 1, 2, 2), got a str"),
        (lambda x0, eps, level: {}, "got a dict"),
        (lambda x0, eps, level: [], "got 0 values"),
        (lambda x0, eps, level: x0[:2], "got a tensor of shape (2, 1, 2, 2)"),
        (lambda x0, eps, level: x0.mean(), "got a tensor of shape ()"),
        (lambda x0, eps, level: x0 * float("nan"), "not finite (NaN or infinity)"),
        (lambda x0, eps, level: x0 / 0, "not finite (NaN or infinity)"),
        (failing, "your answer raised ZeroDivisionError: division by zero (line"),
        (in_place, "your function changes its argument; compute on a copy"),
        (lambda x0, eps, level: 2 * x0, "teach.hint('add-noise') helps."),
    ],
)
def test_an_answer_that_cannot_be_right_gets_one_clear_line(answer, text):
    result = teach.check("add-noise", answer, quiet=True)
    assert not result.passed
    assert text in result.text
    assert "\n" not in result.text


def test_a_class_is_expected_where_a_sampler_is_to_be_written():
    result = teach.check("B3", lambda x: x, quiet=True)
    assert "expected a class derived from minidiff.schedulers.Scheduler" in result.text


def test_numpy_arrays_and_float32_are_accepted():
    quick = teach.check("add-noise", lambda x0, eps, level: add(x0, eps, level).float(), quiet=True)
    assert quick.passed
    array = teach.check("add-noise", lambda x0, eps, level: add(x0, eps, level).numpy(), quiet=True)
    assert array.passed


def test_other_names_of_arguments_and_defaults_are_accepted():
    result = teach.check("add-noise", lambda a, b, c, more=1: add(a, b, c), quiet=True)
    assert result.passed


def test_a_check_prints_one_line_and_returns_nothing(capsys):
    assert teach.check("add-noise", add) is None
    assert capsys.readouterr().out == "✓ add-noise\n"


def test_a_check_leaves_the_random_numbers_of_the_caller_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    teach.check("add-noise", lambda x0, eps, level: torch.randn_like(x0), quiet=True)
    assert torch.equal(torch.rand(3), expected)


def test_hint_task_and_solution_are_printed(capsys):
    teach.task("ddim-step")
    teach.hint("ddim-step")
    step = teach.solution("ddim-step")
    out = capsys.readouterr().out
    assert "DDIM eq. 12" in out
    assert "def ddim_step(x, x0, now, nxt):" in out
    assert teach.check("ddim-step", step, quiet=True).passed
    assert teach.solution("decided") == ALL["decided"].solution


@pytest.mark.parametrize("act", [teach.task, teach.hint, teach.solution, teach.planted])
def test_unknown_names_are_refused(act):
    with pytest.raises(InvalidArgument, match=r"name must be one of .*; got 'no'"):
        act("no")
    with pytest.raises(InvalidArgument, match="name must be one of"):
        teach.check("no", None)


def test_an_exercise_has_no_planted_version():
    with pytest.raises(InvalidArgument, match="name must be one of B1, B2"):
        teach.planted("ddim-step")


def test_the_references_are_functions_of_the_library_not_the_solutions():
    for one in ALL.values():
        assert one.reference is not one.solution, one.name


def test_the_list_names_everything_and_gives_no_bug_away():
    command = [sys.executable, "-m", "minidiff.teach", "--list"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ALL:
        assert f"  {name} " in out
    for bug in teach.BUGS.values():
        assert bug.title not in out


def test_the_command_refuses_what_it_cannot_do(tmp_path):
    command = [sys.executable, "-m", "minidiff.teach"]
    nothing = subprocess.run(command, capture_output=True, text=True, check=False)
    assert nothing.returncode == 2
    assert "Traceback" not in nothing.stderr
