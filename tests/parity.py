"""How a scheduler of ours is held against diffusers' of the same name: every step of a trajectory.

The network is a fixed smooth function of (x, t), so trajectories stay bounded and a wrong timestep
shows. Where diffusers cannot sample (it raises, divides by zero, or asks the network at a wrong or
repeated timestep) minidiff must refuse or be right: each family of schedulers has a written list of
such `Corner`s, and no example may fail in diffusers or be refused by minidiff outside that list.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.schedule import Level
from minidiff.schedulers import SCHEDULERS, Scheduler

diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()

QUICK = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class Case(NamedTuple):
    """One example: a class, its options, and how it is used.

    Attributes:
        name: the class without "Scheduler".
        options: of its constructor.
        grid: the arguments of set_timesteps.
        step_options: of step.
        dtype: of the sample.
    """

    name: str
    options: dict[str, Any]
    grid: dict[str, Any]
    step_options: dict[str, Any]
    dtype: torch.dtype

    @property
    def n(self) -> int | None:
        return self.grid.get("num_inference_steps")

    @property
    def timesteps(self) -> list[int] | None:
        return self.grid.get("timesteps")


# --- drawing cases ------------------------------------------------------------------------------

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@st.composite
def schedule_options(
    draw: st.DrawFn, beta_schedules: Sequence[str] = BETA_SCHEDULES, rescale: bool = True
) -> dict[str, Any]:
    """The noise schedule; sometimes a short table or one given as numbers."""
    steps = draw(st.sampled_from([1000, 1000, 1000, 100, 37]))
    options: dict[str, Any] = {"num_train_timesteps": steps}
    if rescale:
        options["rescale_betas_zero_snr"] = draw(st.booleans())
    if draw(st.integers(0, 5)) == 0:
        rising = st.lists(st.floats(1e-4, 0.2), min_size=steps, max_size=steps)
        options["num_train_timesteps"] = steps = min(steps, 37)
        betas = draw(rising if steps < 10 else st.just(np.linspace(2e-3, 0.15, steps) ** 1.5))
        return options | {"trained_betas": [float(b) for b in betas]}
    options["beta_schedule"] = draw(st.sampled_from(beta_schedules))
    if draw(st.booleans()):
        options["beta_start"], options["beta_end"] = draw(
            st.sampled_from([(0.00085, 0.012), (0.0005, 0.03), (0.002, 0.002)])
        )
    return options


@st.composite
def number_of_steps(draw: st.DrawFn, train_steps: int) -> int:
    """Any of 1 … T, mostly few."""
    few, some = st.integers(1, min(20, train_steps)), st.integers(1, min(60, train_steps))
    many = st.sampled_from(
        [n for n in (64, 99, 128, 250, 333, 999, 1000) if n <= train_steps] or [1]
    )
    ends = st.sampled_from([train_steps, max(1, train_steps - 1)])
    return draw([few, few, few, some, some, some, some, some, many, ends][draw(st.integers(0, 9))])


@st.composite
def thresholds(draw: st.DrawFn) -> dict[str, Any]:
    """Dynamic thresholding, half of the time."""
    if not draw(st.booleans()):
        return {}
    return {
        "thresholding": True,
        "dynamic_thresholding_ratio": draw(st.sampled_from([0.5, 0.9, 0.995])),
        "sample_max_value": draw(st.sampled_from([1.0, 1.5, 100.0])),
    }


@st.composite
def falling_timesteps(draw: st.DrawFn, train_steps: int) -> list[int]:
    """Up to 20 training steps of one's own choice."""
    chosen = draw(st.sets(st.integers(0, train_steps - 1), min_size=1, max_size=20))
    return sorted(chosen, reverse=True)


dtypes = st.sampled_from([torch.float32, torch.float64])


# --- one trajectory -----------------------------------------------------------------------------


def channels(case: Case) -> tuple[int, int]:
    """Of the sample and of the output; a learned variance doubles it, for diffusers' solvers 3."""
    variance = case.options.get("variance_type")
    if variance == "learned_range" and case.name == "DDPM":
        return 2, 4
    return (3, 6) if variance in ("learned", "learned_range") else (2, 2)


def network(case: Case) -> Callable[[Tensor, Any], Tensor]:
    """A smooth stand-in for a U-Net: bounded, mixes pixels and channels, depends on t."""
    into, out = channels(case)
    g = torch.Generator().manual_seed(7)
    mix = torch.randn(out, into, generator=g, dtype=torch.float64)
    shift = torch.randn(out, generator=g, dtype=torch.float64)[:, None, None]

    def f(x: Tensor, t: Any) -> Tensor:
        mixed = torch.einsum("oc,bchw->bohw", mix.to(x.dtype), x + 0.3 * x.roll(1, -1))
        return 1.5 * torch.tanh(0.7 * mixed + (shift * np.cos(float(t) / 150 + 1)).to(x.dtype))

    return f


def theirs_of(case: Case) -> Any:
    return getattr(diffusers, f"{case.name}Scheduler")(**case.options)


def ours_of(case: Case, **options: Any) -> Scheduler:
    return SCHEDULERS[f"{case.name}Scheduler"](**case.options, **options)


def start(case: Case, scheduler: Any) -> Tensor:
    """Standard normal noise of the size that the scheduler asks for."""
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(2, channels(case)[0], 3, 3, generator=g, dtype=torch.float64)
    return (noise * float(getattr(scheduler, "init_noise_sigma", 1))).to(case.dtype)


def outputs(
    scheduler: Any,
    case: Case,
    steps: int | None = None,
    walked: Sequence[Tensor] = (),
    jitter: float = 0.0,
) -> list[Any]:
    """What each of the first steps returns (all by default), with noise from one seed.

    walked: the x from which each step but the first is taken, instead of where the last one led.
    jitter moves every x up or down by this share of itself before the step.
    """
    f = network(case)
    options = dict(case.step_options)
    if "generator" in scheduler.step.__code__.co_varnames:
        options["generator"] = torch.Generator().manual_seed(2)
    x, found = start(case, scheduler), []
    sign = 1 - 2 * torch.randint(2, x.shape, generator=torch.Generator().manual_seed(3))
    for i, t in enumerate(scheduler.timesteps[:steps]):
        x = x * (1 + jitter * sign) if jitter else x
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        found.append(scheduler.step(f(scaled, t), t, x, **options))
        x = walked[i] if walked else found[-1].prev_sample
    return found


def trajectory(scheduler: Any, case: Case, steps: int | None = None) -> list[Tensor]:
    """x after each of the first steps (all by default), with noise from one seed."""
    return [output.prev_sample for output in outputs(scheduler, case, steps)]


def clean_sample(output: Any) -> Tensor | None:
    """The clean sample that a step predicted, where diffusers returns one."""
    name = "denoised" if hasattr(output, "denoised") else "pred_original_sample"  # LCM's name
    return getattr(output, name, None)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference relative to the larger of 1 and the largest entry."""
    assert a.dtype == b.dtype
    assert torch.isfinite(a).all()
    assert torch.isfinite(b).all()  # a comparison with NaN would pass unseen
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


# --- where diffusers cannot sample --------------------------------------------------------------


class Corner(NamedTuple):
    """A case in which diffusers has no sound trajectory."""

    failure: str  # how diffusers fails, as `failure_in_diffusers` says it
    message: str | None  # of minidiff's refusal; None where minidiff does the right thing instead
    reason: str
    applies: Callable[[Case], bool]


def grid_of(case: Case) -> Tensor:
    """diffusers' timesteps."""
    theirs = theirs_of(case)
    theirs.set_timesteps(**case.grid)
    return theirs.timesteps


def failure_in_diffusers(case: Case) -> str | None:
    """How diffusers fails on this case, by trying; None if its trajectory is sound.

    "raises …" (with the type of the exception), "outside 0..T-1", "repeats timesteps" (on a grid
    that is not a formula's) or "divides by zero".
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            scheduler = theirs_of(case)
            scheduler.set_timesteps(**case.grid)
        except Exception as error:
            return f"raises {type(error).__name__}"
        grid = scheduler.timesteps
        if case.options.get("timestep_type") == "continuous":  # what is told are no steps
            grid = grid_of(case._replace(options=case.options | {"timestep_type": "discrete"}))
        steps = case.options.get("num_train_timesteps", 1000)
        formula = any(v is True and k.startswith("use_") for k, v in case.options.items())
        if not formula and not grid.is_floating_point():
            if (grid < 0).any() or (grid >= steps).any():
                return "outside 0..T-1"
            if (grid.diff() >= 0).any() and case.name not in ("PNDM", "DDIMInverse"):
                return "repeats timesteps"
        elif "EDM" not in case.name:
            real = case.name in ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete")
            if (grid < 0).any() or (grid > (steps - 1 if real else steps)).any():
                return "outside 0..T-1"
        unclipped = {k: v for k, v in case.options.items() if k != "thresholding"}
        if "clip_sample" in unclipped:
            unclipped["clip_sample"] = False  # it would turn infinity into the edge of the range
        try:
            states = trajectory(scheduler, case)
            again = case._replace(options=unclipped)
            scheduler = theirs_of(again)
            scheduler.set_timesteps(**case.grid)
            states += trajectory(scheduler, again, steps=1)
        except Exception as error:
            return f"raises {type(error).__name__}"
    return None if all(torch.isfinite(x).all() for x in states) else "divides by zero"


class Rounding(NamedTuple):
    """A case in which one step of diffusers loses digits, so that a right one differs by more.

    Attributes:
        reason: what is lost, and where.
        applies: whether a case is such a one.
        allowed: the relative error that this makes of a rounding.
        cap: what the error may not exceed, whatever `allowed` says; at most 1e-2.
    """

    reason: str
    applies: Callable[[Case], bool]
    allowed: Callable[[Case], float]
    cap: float


CHAOTIC = 2e-3  # 5 times this is 1e-2


def sensitivity(case: Case, roundings: float = 1.0) -> float:
    """How far diffusers' own trajectory moves when every x on the way is off by that many.

    Most trajectories damp it. Some amplify: x0 = (x − σ·ε)/α at small α, a threshold that divides
    by the median, a thousand steps of either.
    """
    runs = []
    for jitter in (0.0, roundings * 2**-23):
        scheduler = theirs_of(case)
        scheduler.set_timesteps(**case.grid)
        runs.append(outputs(scheduler, case, jitter=jitter))
    return max(distances(*runs))


def levels_of(case: Case) -> list[Level]:
    """The levels that ours visits, the last one included."""
    mine = ours_of(case)
    mine.set_timesteps(**case.grid)
    return mine.levels


def tolerance(case: Case, roundings: Sequence[Rounding] = ()) -> float:
    """2e-5 in float32 and 1e-6 in float64, or what the written corners allow."""
    allowed = [2e-5 if case.dtype == torch.float32 else 1e-6]
    for rounding in roundings:
        assert rounding.cap <= 1e-2
        if rounding.applies(case):
            allowed.append(min(rounding.allowed(case), rounding.cap))
    return max(allowed)


def distances(mine: Sequence[Any], theirs: Sequence[Any]) -> list[float]:
    """How far x is off after every step, and then x̂0 in every step that returns one."""
    pairs = list(zip(mine, theirs, strict=True))
    far = [difference(a.prev_sample, b.prev_sample) for a, b in pairs]
    clean = [(clean_sample(a), clean_sample(b)) for a, b in pairs]
    return far + [difference(a, b) for a, b in clean if b is not None]


def compare(
    case: Case,
    corners: Sequence[Corner],
    roundings: Sequence[Rounding] = (),
) -> None:
    """One example: the same grid and the same trajectory, or a corner of the list."""
    failure = failure_in_diffusers(case)
    if failure is None:
        compare_trajectories(case, roundings)
        return
    corner = next((c for c in corners if c.failure == failure and c.applies(case)), None)
    assert corner is not None, f"diffusers {failure}: no corner of the list"
    event(corner.reason)
    if corner.message is not None:
        with pytest.raises(InvalidArgument, match=corner.message):
            ours_of(case).set_timesteps(**case.grid)
        return
    mine = ours_of(case)
    mine.set_timesteps(**case.grid)
    assert all(torch.isfinite(x).all() for x in trajectory(mine, case))


def sample_or_refuse(case: Case, refusals: str) -> None:
    """One example of the exact reading: a sound trajectory, or a refusal of this pattern."""
    scheduler, refusal = ours_of(case, compat="exact"), ""
    try:
        scheduler.set_timesteps(**case.grid)
    except InvalidArgument as error:
        refusal = str(error)
    if refusal:
        assert re.search(refusals, refusal), refusal
        return
    assert case.n is None or len(scheduler.timesteps) == case.n
    assert all(torch.isfinite(x).all() for x in trajectory(scheduler, case))


def compare_noising(case: Case, mine: Any, theirs: Any) -> None:
    """add_noise at the first and last entry of the grid."""
    x0, eps = torch.randn(2, 2, 2, 3, 3, generator=torch.Generator().manual_seed(4)).to(case.dtype)
    a, b = (s.add_noise(x0, eps, s.timesteps[[0, -1]]) for s in (mine, theirs))
    assert difference(a, b) < 1e-6


def compare_trajectories(case: Case, roundings: Sequence[Rounding]) -> None:
    mine, theirs = ours_of(case), theirs_of(case)
    mine.set_timesteps(**case.grid)
    theirs.set_timesteps(**case.grid)
    assert mine.timesteps.dtype == theirs.timesteps.dtype
    torch.testing.assert_close(mine.timesteps, theirs.timesteps, rtol=1e-6, atol=1e-6)
    if hasattr(theirs, "sigmas"):
        atol = 1e-7 if "FlowMatch" in case.name else 0  # 1 − σ is rounded where σ is
        torch.testing.assert_close(mine.sigmas, theirs.sigmas, rtol=1e-6, atol=atol)
    expected = float(getattr(theirs, "init_noise_sigma", 1))  # FlowMatch has none
    assert float(mine.init_noise_sigma) == pytest.approx(expected, rel=1e-6)
    if hasattr(theirs, "add_noise"):
        compare_noising(case, mine, theirs)
    assert len(mine.grid) == len(theirs.timesteps)
    expected = outputs(theirs, case)
    far = distances(outputs(mine, case), expected)
    allowed = tolerance(case, roundings)
    if max(far) > allowed:
        compare_step_by_step(case, expected, allowed, max(far))


def compare_step_by_step(case: Case, expected: Sequence[Any], allowed: float, far: float) -> None:
    """Where a trajectory amplifies rounding, and leaves diffusers' for that reason alone.

    It is then no further away than five times what rounding every x does to diffusers' own, unless
    that is more than a comparison of trajectories can bear; and each step, taken from diffusers' x,
    is diffusers' step.
    """
    event("amplifies rounding")
    moved = sensitivity(case, allowed / tolerance(case))
    assert far <= 5 * moved or moved > CHAOTIC, f"{far:.1e}, but rounding moves it {moved:.1e}"
    mine = ours_of(case)
    mine.set_timesteps(**case.grid)
    steps = distances(outputs(mine, case, walked=[o.prev_sample for o in expected]), expected)
    at = int(np.argmax(steps))
    assert max(steps) <= allowed, f"{max(steps):.1e} in step {at % len(expected)}"
