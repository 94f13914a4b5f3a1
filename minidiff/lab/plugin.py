"""Samplers from a user's file: loaded by FILE:CLASS, and tested before anything relies on them.

    cls = load_plugin("examples.py:AdamsBashforth")
    scheduler = build(cls, pipe.scheduler)

A file is code and is run as such; load only what you would run.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.runtime.files import user_path
from minidiff.schedulers import FlowMatchEulerDiscreteScheduler, Scheduler
from minidiff.schedulers.edm import EDMSigmas

STEPS = 7  # odd, and more than any history
_TAKEN = ("num_train_timesteps", "prediction_type", "compat", "beta_start", "beta_end",
          "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "variance_type")  # fmt: skip
_TAKEN_EDM = ("sigma_min", "sigma_max", "sigma_data", "rho")
_OTHER_LEVELS = (EDMSigmas, FlowMatchEulerDiscreteScheduler)


def load_plugin(spec: str) -> type[Scheduler]:
    """Return the scheduler class that FILE:CLASS names, after it passed the conformance tests.

    Args:
        spec: path of a Python file and the name of a class in it, "mine.py:AdamsBashforth".
    Raises:
        InvalidArgument: no such file or class, the file raises, the class is no `Scheduler`, it
            cannot be built without arguments, or a test of `CONFORMANCE` fails; the message names
            the test.
    """
    path, colon, name = spec.rpartition(":") if isinstance(spec, str) else ("", "", "")
    if not (colon and path and name.isidentifier()):
        raise InvalidArgument(f"plugin must be FILE:CLASS, such as mine.py:MySampler; got {spec!r}")
    file = user_path(path, "plugin")
    if not file.is_file():
        raise InvalidArgument(f"plugin {spec}: there is no file {path}")
    cls = _class_of(_run(file, spec), name, spec)
    conform(cls, spec)
    return cls


def build(sampler: type[Scheduler], like: Scheduler, **options: Any) -> Scheduler:
    """Return a plug-in's scheduler for the levels and the prediction type of another one.

    As with `names.sampler`, nothing is clipped, and timesteps are "trailing" where the class has
    the option.

    Args:
        sampler: class from `load_plugin`.
        like: other scheduler, usually the one that a model was trained with.
        options: further options of the constructor, such as those of `--option`.
    Raises:
        InvalidArgument: the class lacks an option, or the levels of `like`.
    """
    for name in options:
        if not sampler.has_option(name):
            has = ", ".join(sampler._defaults()) or "none"
            raise InvalidArgument(f"{sampler.__name__} has no option {name!r}; it has {has}")
    own: dict[str, Any] = {"clip_sample": False, "timestep_spacing": "trailing"}
    config = {name: like.config[name] for name in _TAKEN if name in like.config}
    lacks = f"{sampler.__name__} does not have the noise levels of"
    if isinstance(like, EDMSigmas):
        if not issubclass(sampler, EDMSigmas):
            raise InvalidArgument(f"{lacks} EDM")
        config |= {name: like.config[name] for name in _TAKEN_EDM}
    elif isinstance(like, FlowMatchEulerDiscreteScheduler) or like.config.get("use_flow_sigmas"):
        shift = like.config.get("flow_shift", like.config.get("shift", 1.0))
        if issubclass(sampler, FlowMatchEulerDiscreteScheduler):
            own |= {"shift": shift}
        elif sampler.has_option("use_flow_sigmas"):
            own |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
            own |= {"flow_shift": shift}
        else:
            raise InvalidArgument(f"{lacks} flow matching")
    elif issubclass(sampler, _OTHER_LEVELS):
        raise InvalidArgument(f"{lacks} {type(like).__name__}")
    for name, lost in (("rescale_betas_zero_snr", True), ("variance_type", "learned_range")):
        if config.get(name) == lost and not sampler.has_option(name):
            raise InvalidArgument(
                f"{sampler.__name__} has no {name}, but the model was trained with {name}={lost}"
            )
    if config.get("variance_type") != "learned_range":
        config.pop("variance_type", None)
    chosen = config | own | options
    return sampler(**{name: value for name, value in chosen.items() if sampler.has_option(name)})


def conform(sampler: type[Scheduler], name: str | None = None) -> None:
    """Run the tests of `CONFORMANCE` on a class of scheduler.

    Args:
        sampler: class of scheduler that can be built without arguments.
        name: how messages call it; by default its name.
    Raises:
        InvalidArgument: it cannot be built, or fails a test, which the message names.
    """
    name = name or sampler.__name__
    with _named(f"plugin {name}: building {sampler.__name__}()"):
        options = {"compat": "exact", "clip_sample": False}
        options = {option: v for option, v in options.items() if sampler.has_option(option)}
        make = partial(sampler, **options)
        make()
    for title, test in CONFORMANCE.items():
        with _named(f"plugin {name}: conformance test {title!r}"):
            test(make)


class _Failed(Exception):
    """A conformance test did not hold."""


Make = Callable[..., Scheduler]


def _grid(make: Make) -> None:
    scheduler = make()
    scheduler.set_timesteps(STEPS)
    timesteps, levels = len(scheduler.grid), len(scheduler.levels)
    if not timesteps or levels != timesteps + 1:
        raise _Failed(f"{timesteps} timesteps need {timesteps + 1} levels, got {levels}")


def _finite(make: Make) -> None:
    for dtype in (torch.float64, torch.float32):
        for x in _run_sampler(make(), dtype=dtype):
            if not isinstance(x, Tensor) or x.shape != (3, 2) or x.dtype != dtype:
                got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise _Failed(f"a step of {dtype} (3, 2) must return the same, got {got}")
            if not torch.isfinite(x).all():
                raise _Failed("a step returned values that are not finite")


def _inputs(make: Make) -> None:
    scheduler = make()
    scheduler.set_timesteps(STEPS)
    scheduler.noise_source = torch.ones_like
    x = _start(scheduler)
    for t in scheduler.grid:
        out = _network(scheduler.scale_model_input(x, t), t)
        before, out_before = x.clone(), out.clone()
        new = scheduler.step(out, t, x, return_dict=False)[0]
        if not (torch.equal(x, before) and torch.equal(out, out_before)):
            raise _Failed("update changed its input in place; write x = x + … for x += …")
        x = new


def _again(make: Make) -> None:
    scheduler = make()
    if not all(map(torch.equal, _run_sampler(scheduler), _run_sampler(scheduler))):
        raise _Failed("a second sampling differs: keep earlier steps in self.past, not in self")


def _images(make: Make) -> None:
    together = _run_sampler(make())
    for i in range(3):
        for x, alone in zip(together, _run_sampler(make(), slice(i, i + 1)), strict=True):
            if not torch.allclose(x[i : i + 1], alone, rtol=1e-9, atol=1e-9):
                raise _Failed("a sample depends on the others of its batch")


def _conversions(make: Make) -> None:
    cls = type(make())
    if not cls.has_option("prediction_type"):
        return
    one, *others = cls.choices.get("prediction_type", ("epsilon", "v_prediction", "sample"))
    scheduler = make()
    scheduler.set_timesteps(STEPS)
    if not scheduler.levels[0].sigma:  # inversion: x̂0 does not determine the noise of a clean x
        others = [kind for kind in others if kind != "sample"]
    ends = [_run_sampler(make(prediction_type=one), converted=True)[-1]]
    for other in others:
        ends.append(_run_sampler(make(prediction_type=other), converted=True)[-1])
        if not torch.allclose(ends[0], ends[-1], rtol=1e-6, atol=1e-6):
            raise _Failed(f"samples differ between prediction types {one} and {other}")


CONFORMANCE: dict[str, Callable[[Make], None]] = {
    "grid": _grid,  # n timesteps, n + 1 levels
    "finite": _finite,  # steps keep shape and dtype, and are finite
    "inputs unchanged": _inputs,  # x and the output are not changed in place
    "same again": _again,  # a second sampling equals the first
    "one by one": _images,  # images do not depend on their batch
    "prediction types": _conversions,  # agree when the network's output is converted
}


def _run_sampler(
    scheduler: Scheduler,
    part: slice = slice(None),
    dtype: torch.dtype = torch.float64,
    converted: bool = False,
) -> list[Tensor]:
    """Return x after every step of a smooth network, for part of three start points."""
    scheduler.set_timesteps(STEPS)
    scheduler.noise_source = lambda like: torch.full_like(like, 0.3)
    x, states = _start(scheduler)[part].to(dtype), []
    for i, t in enumerate(scheduler.grid):
        scaled = scheduler.scale_model_input(x, t)
        out = _network(scaled, t)
        if converted:
            level = scheduler.levels[i]
            x0 = torch.tanh(out)
            eps = (x - level.alpha * x0) / level.sigma if level.sigma else torch.zeros_like(x)
            out = scheduler.target(x0, eps, level)
        x = scheduler.step(out, t, x, return_dict=False)[0]
        states.append(x)
    return states


def _start(scheduler: Scheduler) -> Tensor:
    """Return three start points in two dimensions."""
    points = [[-1.2, 0.4], [0.3, -0.7], [0.9, 1.6]]
    return torch.tensor(points, dtype=torch.float64) * scheduler.init_noise_sigma


def _network(x: Tensor, t: float) -> Tensor:
    return torch.tanh(1.3 * x - 0.2) * (0.6 + 0.4 * float(t) / 1000)


def _run(file: Path, spec: str) -> ModuleType:
    """Run a file as a module."""
    name = f"minidiff_plugin_{file.stem}"
    found = importlib.util.spec_from_file_location(name, file)
    if found is None or found.loader is None:
        raise InvalidArgument(f"plugin {spec}: {file.name} is not a Python file (.py)")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look their module up
    with _named(f"plugin {spec}: running {file.name}"):
        found.loader.exec_module(module)
    return module


def _class_of(module: ModuleType, name: str, spec: str) -> type[Scheduler]:
    """Return a class of scheduler from a module."""
    found = getattr(module, name, None)
    if found is None:
        classes = [k for k, v in vars(module).items() if isinstance(v, type)]
        mine = [k for k in classes if vars(module)[k].__module__ == module.__name__]
        has = f"it has {', '.join(mine)}" if mine else "it has no class"
        raise InvalidArgument(f"plugin {spec}: there is no class {name!r} in the file; {has}")
    if not (isinstance(found, type) and issubclass(found, Scheduler)):
        is_class = isinstance(found, type)
        kind = f"a subclass of {found.__base__.__name__}" if is_class else type(found).__name__
        raise InvalidArgument(
            f"plugin {spec}: {name} must be a subclass of minidiff.schedulers.Scheduler, got {kind}"
        )
    return found


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Turn whatever foreign code raises into one line that begins with `what`."""
    try:
        yield
    except _Failed as error:
        raise InvalidArgument(f"{what} failed: {error}") from None
    except (Exception, SystemExit) as error:
        line = " ".join(str(error).split()) or "no message"
        raise InvalidArgument(f"{what} raised {type(error).__name__}: {line}") from error
