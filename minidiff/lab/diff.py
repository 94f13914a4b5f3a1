"""Where and why a scheduler's samples are not those of diffusers.

    print(diff("DDIM", 300, {"timestep_spacing": "linspace"}))

The same noise and the same stand-in network run through diffusers and through both readings of
minidiff's scheduler of the same name. The gap between two trajectories is the largest difference
of x after a step, relative to max(1, |x|). The departures of `schedulers/core/quirks.py` that
explain the gap of `compat="exact"` are found by peeling: the departure that closes most of what is
left is added, until the rest agrees with diffusers as closely as `compat="diffusers"` does.
Departures that turn out not to be needed are then dropped, so that leaving out any of the answer
opens the gap again.
"""

import inspect
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, MinidiffError, one_of, real_number, whole_number
from minidiff.lab.choose import class_name, split_options
from minidiff.schedulers import SCHEDULERS, Scheduler
from minidiff.schedulers.core.quirks import NEEDS, Diffusers, departing, departures

TOLERANCES = {"float64": 1e-6, "float32": 2e-5}  # of samples, where the arithmetic is the same
FLOOR = 1e-14  # gap that rounding in float64 leaves
AS_CLOSE = 1.25  # gap of an answer as a multiple of that of compat="diffusers"


class Visit(NamedTuple):
    """A step of a trajectory: the timestep of the network, and x after the step."""

    t: float
    x: Tensor


class Peeled(NamedTuple):
    """A departure in the answer.

    Attributes:
        name: method of `quirks.Diffusers`.
        left: gap that is left with this departure and those before it.
        without: gap with all of the answer but this departure.
        what: what diffusers does.
    """

    name: str
    left: float
    without: float
    what: str


@dataclass(frozen=True)
class Difference:
    """What `diff` found.

    Attributes:
        scheduler, options: class, and arguments of its constructor and of `step`.
        steps: number of steps.
        theirs, departed, exact: trajectories of diffusers, of compat="diffusers" and of "exact".
        tolerance: gap from which on two trajectories diverge.
        causes: departures that explain the gap, the largest first; empty where there is none.
    """

    scheduler: str
    options: dict[str, Any]
    steps: int
    theirs: list[Visit]
    departed: list[Visit]
    exact: list[Visit]
    tolerance: float
    causes: list[Peeled]

    @property
    def first(self) -> int | None:
        """The first step at which compat="exact" diverges, counted from 0; None for none."""
        gaps = gaps_of(self.exact, self.theirs)
        beyond = [i for i, gap in enumerate(gaps) if gap > self.tolerance]
        if beyond or len(self.exact) == len(self.theirs):
            return beyond[0] if beyond else None
        return len(gaps)

    @property
    def names(self) -> list[str]:
        """The names of the departures in the answer."""
        return [cause.name for cause in self.causes]

    @property
    def summary(self) -> str:
        """The names of the departures, those whose absence stays below the tolerance apart."""
        large = [cause.name for cause in self.causes if cause.without > self.tolerance]
        small = [cause.name for cause in self.causes if cause.without <= self.tolerance]
        below = f"; below the tolerance: {', '.join(small)}" if small else ""
        return f"{', '.join(large)}{below}"

    def as_json(self) -> dict[str, Any]:
        """Return everything that is printed, and the gaps of every step."""
        return {
            "scheduler": self.scheduler,
            "options": self.options,
            "steps": self.steps,
            "tolerance": self.tolerance,
            "first_diverging_step": None if self.first is None else self.first + 1,
            "timesteps": {"diffusers": [v.t for v in self.theirs],
                          "exact": [v.t for v in self.exact]},
            "gaps": {"compat=diffusers": gaps_of(self.departed, self.theirs),
                     "compat=exact": gaps_of(self.exact, self.theirs)},
            "departures": [cause._asdict() for cause in self.causes],
        }  # fmt: skip

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        lines = [
            f"{self.scheduler}({options}), {self.steps} steps: the same noise and network",
            f"{'step':>5}{'t':>10}{'t exact':>10}{'compat=diffusers':>19}{'compat=exact':>15}",
        ]
        near = gaps_of(self.departed, self.theirs)
        far = gaps_of(self.exact, self.theirs)
        last = min(len(near), len(far)) - 1
        some = {0, 1, last // 4, last // 2, 3 * last // 4, last, self.first or 0}
        for i in sorted(some & set(range(last + 1))):
            mark = f"   ← first over {self.tolerance:.0e}" if i == self.first else ""
            lines.append(f"{i + 1:>5}{self.theirs[i].t:>10.6g}{self.exact[i].t:>10.6g}"
                         f"{near[i]:>19.1e}{far[i]:>15.1e}{mark}")  # fmt: skip
        if len(self.theirs) != len(self.exact):
            lines.append(f"diffusers takes {len(self.theirs)} steps, exact {len(self.exact)}")
        return "\n".join(lines + self._answer())

    def _answer(self) -> list[str]:
        """Return the lines that name the departures."""
        if not self.causes:
            return ["both readings agree with diffusers"]
        total = max(gaps_of(self.exact, self.theirs), default=math.inf)
        lines = ["", f"{'departure':<26}{'gap left':>10}{'without it':>12}",
                 f"{'none':<26}{total:>10.1e}"]  # fmt: skip
        for name, left, without, _ in self.causes:
            lines.append(f"{name:<26}{left:>10.1e}{without:>12.1e}")
        for cause in self.causes:
            text = f"{cause.name}: {cause.what}"
            lines += ["", *textwrap.wrap(text, 92, subsequent_indent="    ")]
        return lines


def diff(
    name: str,
    steps: int,
    options: Mapping[str, Any] | None = None,
    *,
    seed: int = 1,
    tolerance: float | None = None,
    dtype: str = "float64",
) -> Difference:
    """Compare a scheduler with that of diffusers, and find the departures that explain the gap.

    Args:
        name: class, such as "DDIM" or "DDIMScheduler".
        steps: number of steps.
        options: arguments of the constructor, and of `step` (eta, s_churn, …).
        seed: seed of the start and of the steps' noise.
        tolerance: gap above which two trajectories diverge; by default `TOLERANCES[dtype]`.
        dtype: number type of the samples, "float64" or "float32".
    Raises:
        InvalidArgument: an unknown class or option, or a value outside its range.
        MinidiffError: diffusers is not installed or fails, or minidiff refuses to follow it.
    """
    name = class_name(name)
    one_of("dtype", dtype, TOLERANCES)
    tolerance = real_number("tolerance", TOLERANCES[dtype] if tolerance is None else tolerance, 0)
    if "compat" in (options := dict(options or {})):
        raise InvalidArgument("compat is what is compared: both readings run; leave it out")
    mine = SCHEDULERS[name]
    built, stepped = split_options(mine, options)
    run = Run(whole_number("steps", steps, 1), stepped, seed, getattr(torch, dtype))
    departed = run(mine(**built, compat="diffusers"))
    exact = run(exact_scheduler := mine(**built, compat="exact"))
    theirs = in_diffusers(name, built, run)
    answer: list[Peeled] = []
    if gap_of(exact, theirs) > tolerance:
        closed = max(AS_CLOSE * gap_of(departed, theirs), FLOOR)
        answer = Peeling(exact_scheduler, run, theirs, closed).answer()
    return Difference(name, options, steps, theirs, departed, exact, tolerance, answer)


class Run:
    """A trajectory with the same noise and the same stand-in network for every scheduler."""

    def __init__(
        self, steps: int, step_options: Mapping[str, Any], seed: int, dtype: torch.dtype
    ) -> None:
        self.steps, self.options = steps, step_options
        self.noise, self.dtype = seed, dtype

    def __call__(self, scheduler: Any) -> list[Visit]:
        """Return every step of a scheduler of either library."""
        scheduler.set_timesteps(self.steps)
        options = dict(self.options)
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = torch.Generator().manual_seed(self.noise + 1)
        start = torch.Generator().manual_seed(self.noise)
        x = torch.randn(2, 2, 3, 3, generator=start, dtype=torch.float64)
        x = (x * float(getattr(scheduler, "init_noise_sigma", 1))).to(self.dtype)
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        visits = []
        for t in scheduler.timesteps:
            x = scheduler.step(network(scale(x, t), float(t)), t, x, **options)[0]
            visits.append(Visit(float(t), x))
        return visits


def network(x: Tensor, t: float) -> Tensor:
    """Return a smooth, bounded output that depends on the neighbouring pixels and on t."""
    return 1.5 * torch.tanh(0.7 * (x + 0.3 * x.roll(1, -1)) + math.cos(t / 150 + 1))


def in_diffusers(name: str, options: Mapping[str, Any], run: Run) -> list[Visit]:
    """Return the trajectory of diffusers. Raises MinidiffError if there is none."""
    try:
        import diffusers
    except ImportError:
        raise MinidiffError(
            'diff needs diffusers, which is not installed: pip install "minidiff[test]"'
        ) from None
    diffusers.logging.set_verbosity_error()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            visits = run(getattr(diffusers, name)(**options))
        except Exception as error:  # whatever it raises is the finding
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise MinidiffError(f"{name} of diffusers raises {reason}") from error
    bad = next((i for i, visit in enumerate(visits) if not visit.x.isfinite().all()), None)
    if bad is not None:
        raise MinidiffError(f"{name} of diffusers gives NaN or infinity in step {bad + 1}")
    return visits


def gaps_of(mine: Sequence[Visit], theirs: Sequence[Visit]) -> list[float]:
    """Return the gap after every step that both trajectories have."""
    return [
        ((a.x - b.x).abs().max() / b.x.abs().max().clamp(min=1)).item()
        for a, b in zip(mine, theirs, strict=False)
    ]


def gap_of(mine: Sequence[Visit], theirs: Sequence[Visit]) -> float:
    """Return the largest gap; infinity where a trajectory is longer or not finite."""
    gaps = gaps_of(mine, theirs)
    whole = len(mine) == len(theirs) and not any(map(math.isnan, gaps))
    return max(gaps) if whole else math.inf


class Peeling:
    """The search for the departures that close the gap of the exact reading to diffusers."""

    def __init__(self, exact: Scheduler, run: Run, theirs: Sequence[Visit], closed: float) -> None:
        """Prepare a search.

        Args:
            exact: scheduler with compat="exact".
            run: noise, network and number of steps.
            theirs: trajectory of diffusers.
            closed: gap up to which a trajectory agrees with diffusers.
        """
        self.exact, self.run, self.theirs, self.closed = exact, run, theirs, closed
        self._gaps: dict[frozenset[str], float] = {}

    def answer(self) -> list[Peeled]:
        """Return departures that close the gap and are all needed, the largest effect first."""
        needed, chosen, peeled = self._needed(), frozenset[str](), []
        while open_ones := [
            n for n in needed - chosen if not (needed - chosen).intersection(NEEDS.get(n, ()))
        ]:
            name = min(sorted(open_ones), key=lambda n: self.gap(chosen | {n}))
            chosen |= {name}
            without = self.gap(without_one(needed, name))
            peeled.append(Peeled(name, self.gap(chosen), without, what_it_does(name)))
        return peeled

    def gap(self, names: frozenset[str]) -> float:
        """Return the gap of the exact reading with these departures; infinity if it fails."""
        if names not in self._gaps:
            try:
                visits = self.run(self.exact.reread(departing(*names)))
                self._gaps[names] = gap_of(visits, self.theirs)
            except InvalidArgument:  # such as a grid that repeats a timestep
                self._gaps[names] = math.inf
        return self._gaps[names]

    def _needed(self) -> frozenset[str]:
        """Drop every departure without which the gap stays closed, starting from all of them."""
        needed, before = self._consulted(), None
        while needed != before:
            before = needed
            for name in sorted(needed, key=lambda n: n not in NEEDS):
                rest = without_one(needed, name)
                if name in needed and self.gap(rest) <= self.closed:
                    needed = rest
        return needed

    def _consulted(self) -> frozenset[str]:
        """Return the departures that this trajectory meets in diffusers' reading."""
        met = {"dtype"}  # an attribute: of the tables, which every scheduler has

        def recorded(name: str) -> Callable:
            method = vars(Diffusers)[name]

            def call(*arguments: Any, **named: Any) -> Any:
                met.add(name)
                return method(*arguments, **named)

            return call

        methods = {name: recorded(name) for name in departures() if name != "dtype"}
        self.run(self.exact.reread(type("Recording", (Diffusers,), methods)()))
        return frozenset(met)


def without_one(names: frozenset[str], name: str) -> frozenset[str]:
    """Return the departures but this one, and but those that need it."""
    return frozenset(n for n in names if n != name and name not in NEEDS.get(n, ()))


def what_it_does(name: str) -> str:
    """Return the first sentence of what diffusers does, from `quirks.Diffusers`."""
    if name == "dtype":
        return "Keep the tables of β and ᾱ in float32."
    text = " ".join((inspect.getdoc(vars(Diffusers)[name]) or "").split())
    return re.match(r".*?\.(?= |$)", text)[0]
