"""`minidiff diff` names the departures that separate a scheduler from diffusers."""

import builtins
import functools
import json
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from minidiff.cli import main
from minidiff.errors import InvalidArgument, MinidiffError
from minidiff.lab.choose import class_name, parse_options, split_options
from minidiff.lab.diff import AS_CLOSE, FLOOR, Difference, Run, diff, gap_of, gaps_of
from minidiff.schedulers import SCHEDULERS, DDIMScheduler, EulerDiscreteScheduler
from minidiff.schedulers.core.quirks import NEEDS, departing, departures

pytest.importorskip("diffusers")
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from quirks_ledger import PROBES, Probe

NOT_IN_DIFFUSERS = {"laplace"}  # DDIM lacks this schedule there
MEASURED = [n for n, p in PROBES.items() if isinstance(p, Probe) and n not in NOT_IN_DIFFUSERS]
SHORT = [n for n in MEASURED if PROBES[n].n <= 300]
LONG = [n for n in MEASURED if PROBES[n].n > 300]  # minutes together


@functools.cache
def _found(scheduler: str, n: int, options: str) -> Difference:
    return diff(scheduler, n, json.loads(options))


def found(name: str) -> Difference:
    """Return the difference in the setting in which the ledger shows a departure."""
    probe = PROBES[name]
    return _found(probe.scheduler, probe.n, json.dumps(probe.options | probe.step))


def check_answer(name: str) -> bool | None:
    """Return whether a departure is in the answer; None where nothing diverges.

    The answer must close the gap, and leaving out any of it must open the gap again.
    """
    result = found(name)
    if result.first is None:
        assert result.causes == []
        return None
    built, stepped = split_options(SCHEDULERS[result.scheduler], result.options)
    exact = SCHEDULERS[result.scheduler](**built, compat="exact")
    run = Run(result.steps, stepped, 1, torch.float64)
    allowed = max(AS_CLOSE * gap_of(result.departed, result.theirs), FLOOR)
    assert gap_of(run(exact.reread(departing(*result.names))), result.theirs) <= allowed
    for without in result.names:
        rest = [n for n in result.names if n != without and without not in NEEDS.get(n, ())]
        with suppress(InvalidArgument):  # a grid that cannot be sampled is no agreement
            assert gap_of(run(exact.reread(departing(*rest))), result.theirs) > allowed, without
    return name in result.names


@pytest.mark.parametrize("name", SHORT)
def test_the_departure_that_a_probe_of_the_ledger_shows_is_in_the_answer(name: str) -> None:
    assert check_answer(name)


@pytest.mark.slow
def test_the_answers_of_all_probes_name_the_departure_wherever_the_samples_diverge() -> None:
    verdicts = {name: check_answer(name) for name in MEASURED}
    diverging = {name: verdict for name, verdict in verdicts.items() if verdict is not None}
    assert len(diverging) >= 29
    assert sum(diverging.values()) >= len(diverging) - 2, diverging


def test_the_causes_add_up_from_the_gap_of_the_exact_reading_to_that_of_diffusers() -> None:
    result = found("inversion_levels")
    left = [max(gaps_of(result.exact, result.theirs)), *(c.left for c in result.causes)]
    assert left == sorted(left, reverse=True)
    assert left[-1] <= AS_CLOSE * max(gaps_of(result.departed, result.theirs)) + FLOOR
    assert result.names[:2] == ["inversion_grid", "inversion_levels"]


def test_rounding_below_the_tolerance_is_named_apart() -> None:
    result = diff("DPMSolverMultistep", 20, {"solver_order": 3})
    assert result.summary.startswith("phi3; below the tolerance: ")
    assert set(result.names) == set(re.findall(r"\w+", result.summary)) - {
        "below", "the", "tolerance",
    }  # fmt: skip
    assert all(cause.what.endswith(".") for cause in result.causes)


def test_a_scheduler_that_agrees_has_no_causes() -> None:
    result = diff("DDIM", 20, {"clip_sample": False, "eta": 0.5})
    assert result.first is None
    assert result.causes == []
    assert "both readings agree" in str(result)


def test_a_departure_that_changes_the_number_of_steps_is_found() -> None:
    probe = PROBES["solver_timesteps"]
    result = diff(probe.scheduler, 40, probe.options)
    assert (len(result.theirs), len(result.exact)) == (39, 40)
    assert "solver_timesteps" in result.names
    assert f"diffusers takes {len(result.theirs)} steps, exact {len(result.exact)}" in str(result)


@pytest.mark.parametrize("name", departures())
def test_every_departure_can_be_switched_on_by_itself_with_what_it_needs(name: str) -> None:
    for spacing in ("leading", "linspace", "trailing"):
        options = {"timestep_spacing": spacing, "compat": "exact"}
        for cls in (DDIMScheduler, EulerDiscreteScheduler):
            run = Run(10, {}, 1, torch.float64)
            visits = run(cls(**options).reread(departing(name, *NEEDS.get(name, ()))))
            assert all(visit.x.isfinite().all() for visit in visits)


def test_the_command_names_the_departure_and_fails(
    capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    words = ["diff", "DDIM", "--steps", "300", "--option", "timestep_spacing=linspace"]
    assert main([*words, "--json", str(tmp_path / "diff.json")]) == 1
    out, err = capsys.readouterr()
    assert "first over 1e-06" in out
    assert err.startswith("minidiff: DDIMScheduler diverges from diffusers in step 2: ddim_levels")
    content = json.loads((tmp_path / "diff.json").read_text())
    assert content["departures"][0]["name"] == "ddim_levels"
    assert content["first_diverging_step"] == 2
    assert len(content["gaps"]["compat=exact"]) == 300
    assert set(content) == {
        "scheduler", "options", "steps", "tolerance", "first_diverging_step", "timesteps", "gaps",
        "departures",
    }  # fmt: skip


def test_the_command_succeeds_where_both_agree(capsys: pytest.CaptureFixture) -> None:
    assert main(["diff", "FlowMatchEulerDiscrete", "--steps", "5"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ddim"], "did you mean DDIM?"),
        (["DDIM", "--steps", "0"], "steps must be at least 1, got 0"),
        (["DDIM", "--steps", "2000"], "num_inference_steps must be in 1..1000, got 2000"),
        (["DDIM", "--option", "spacing=linspace"], "did you mean timestep_spacing?"),
        (["DDIM", "--option", "steps_offset=few"], "steps_offset must be a whole number"),
        (["DDIM", "--option", "clip_sample=1"], "clip_sample must be True or False, got 1"),
        (["DDIM", "--option", "eta"], "--option must be NAME=VALUE, got 'eta'"),
        (["DDIM", "--option", "eta=1", "--option", "eta=0"], "--option eta is given twice"),
        (["DDIM", "--option", "compat=exact"], "both readings run"),
        (["DDIM", "--option", "eta=often"], "eta"),
        (["DDIM", "--tolerance", "-1"], "tolerance must be finite and at least 0, got -1"),
        (["DDIM", "--dtype", "float16"], "dtype must be one of float64, float32; got 'float16'"),
        (["DDIM", "--device", "cuda"], "--device must be one of auto, cpu"),
    ],
)
def test_a_wrong_call_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["diff", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_what_diffusers_cannot_do_is_named() -> None:
    with pytest.raises(MinidiffError, match="of diffusers raises NotImplementedError: laplace"):
        diff("DDIM", 20, {"beta_schedule": "laplace"})
    with pytest.raises(InvalidArgument, match="gives NaN in diffusers"):
        diff("UniPCMultistep", 20, {"solver_type": "bh1"})


def test_without_diffusers_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    really_import = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name == "diffusers":
            raise ImportError(name)
        return really_import(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["diff", "DDIM"]) == 1
    assert 'pip install "minidiff[test]"' in capsys.readouterr().err


def test_options_are_numbers_words_and_lists() -> None:
    texts = ["a=1", "b=0.5", "c=true", "d=False", "e=none", "f=None", "g=[1, 2]", "h=x=y"]
    assert parse_options(texts) == {
        "a": 1, "b": 0.5, "c": True, "d": False, "e": "none", "f": None, "g": [1, 2], "h": "x=y",
    }  # fmt: skip
    assert class_name("DDIM") == class_name("DDIMScheduler") == "DDIMScheduler"


def test_nothing_of_the_search_depends_on_the_order_in_which_sets_are_read() -> None:
    options = {"solver_order": 3}
    first, second = (diff("DPMSolverMultistep", 20, options).names for _ in range(2))
    assert first == second
