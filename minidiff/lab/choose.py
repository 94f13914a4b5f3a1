"""Schedulers and their options by the words of a command line."""

import ast
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from minidiff.errors import InvalidArgument, one_of
from minidiff.lab.plugin import build, load_plugin
from minidiff.names import BETA_SCHEDULES, SAMPLERS
from minidiff.schedulers import SCHEDULERS, Scheduler
from minidiff.schedulers.core.names import sampler

SCHEDULES = (*BETA_SCHEDULES, "flow", "edm")

_WORDS = {"true": True, "false": False, "null": None}


def class_name(name: str) -> str:
    """Return the full name of a scheduler's class, such as "DDIM". Raises InvalidArgument."""
    short = name.removesuffix("Scheduler")
    one_of("scheduler", short, [full.removesuffix("Scheduler") for full in SCHEDULERS])
    return f"{short}Scheduler"


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Return options from texts "name=value"; a value is a number, True, False, None or a text.

    Raises:
        InvalidArgument: a text without "=" or name, or an option that is given twice.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals):
            raise InvalidArgument(f"--option must be NAME=VALUE, got {text!r}")
        if name in options:
            raise InvalidArgument(
                f"--option {name} is given twice: {options[name]!r} and {value!r}"
            )
        options[name] = _value(value)
    return options


def _value(text: str) -> Any:
    try:
        return _WORDS[text] if text in _WORDS else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def split_options(
    scheduler: type[Scheduler], options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of a scheduler's constructor and those of its `step` (eta, s_churn, …).

    Raises:
        InvalidArgument: neither has an option of this name.
    """
    stepping = step_options(scheduler)
    built = {name: value for name, value in options.items() if scheduler.has_option(name)}
    stepped = {name: value for name, value in options.items() if name in stepping}
    known = [*scheduler._defaults(), *stepping]
    for name in options:
        one_of(f"option of {scheduler.__name__}", name, known)
    return built, stepped


def step_options(scheduler: type[Scheduler]) -> list[str]:
    """Return the names of the numbers and switches that `step` takes."""
    signature = inspect.signature(scheduler.step).parameters
    passed = {"self", "model_output", "timestep", "sample", "generator", "variance_noise",
              "return_dict"}  # fmt: skip
    return [name for name in signature if name not in passed]


class Chosen(NamedTuple):
    """A scheduler with its title and with options of its `step`."""

    title: str
    scheduler: Scheduler
    step_options: dict[str, Any]


def choose(name: str, like: Scheduler, options: Mapping[str, Any] | None = None) -> Chosen:
    """Return a scheduler for the levels and the prediction type of another one.

    Args:
        name: name of `SAMPLERS`, a class such as "PNDM", or FILE:CLASS of a plug-in.
        like: other scheduler, usually the one that a model was trained with.
        options: options of its constructor or of its `step`.
    Raises:
        InvalidArgument: an unknown name or option, a value outside its range, or a plug-in that
            fails a conformance test.
    """
    if name in SAMPLERS:
        title, scheduler = SAMPLERS[name].title, sampler(name, like)
    elif ":" in name:
        title, scheduler = name.rpartition(":")[2], build(load_plugin(name), like)
    else:
        short = name.removesuffix("Scheduler")
        classes = [full.removesuffix("Scheduler") for full in SCHEDULERS]
        one_of("sampler", short, [*SAMPLERS, *classes, "FILE:CLASS"])
        title, scheduler = short, build(SCHEDULERS[f"{short}Scheduler"], like)
    built, stepped = split_options(type(scheduler), options or {})
    if built:
        scheduler = type(scheduler).from_config(scheduler.config, **built)
    return Chosen(title, scheduler, stepped)


def like_schedule(name: str) -> Scheduler:
    """Return a scheduler that has a noise schedule: one of `SCHEDULES`. Raises InvalidArgument."""
    one_of("schedule", name, SCHEDULES)
    if name == "flow":
        return SCHEDULERS["FlowMatchEulerDiscreteScheduler"](compat="exact")
    if name == "edm":
        return SCHEDULERS["EDMEulerScheduler"](compat="exact")
    options = {"beta_schedule": name, "prediction_type": "v_prediction", "compat": "exact"}
    return SCHEDULERS["DDIMScheduler"](**options, clip_sample=False)
