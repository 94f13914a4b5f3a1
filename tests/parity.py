"""Parity with diffusers: every step of a trajectory, by schedulers of the same name.

The network is a fixed smooth function of (x, t), so trajectories stay bounded and a wrong timestep
changes them. Where diffusers cannot sample (it raises, divides by zero, or evaluates the network at
a wrong or repeated timestep) minidiff must refuse the case or sample correctly. The tests of each
family of schedulers list such cases as `Corner`s. Outside that list no example may fail in
diffusers or be refused by minidiff.
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
    """One example: a class of scheduler, its options and the arguments of its calls.

    Attributes:
        name: name of the class, without "Scheduler".
        options: arguments of the constructor.
        grid: arguments of `set_timesteps`.
        step_options: arguments of `step`.
        dtype: number type of the sample.
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
    """Draw the options of a noise schedule; sometimes a short one, or explicit betas."""
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
    """Draw a number of steps in 1 … T, usually a small one."""
    few, some = st.integers(1, min(20, train_steps)), st.integers(1, min(60, train_steps))
    many = st.sampled_from(
        [n for n in (64, 99, 128, 250, 333, 999, 1000) if n <= train_steps] or [1]
    )
    ends = st.sampled_from([train_steps, max(1, train_steps - 1)])
    return draw([few, few, few, some, some, some, some, some, many, ends][draw(st.integers(0, 9))])


@st.composite
def seldom_many_steps(draw: st.DrawFn, train_steps: int) -> int:
    """Draw as `number_of_steps` in a quarter of the examples, and at most 20 in the others."""
    often = st.integers(1, min(20, train_steps))
    return draw(number_of_steps(train_steps) if draw(st.integers(0, 3)) == 2 else often)


@st.composite
def thresholds(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the options of dynamic thresholding, in half of the examples."""
    if not draw(st.booleans()):
        return {}
    return {
        "thresholding": True,
        "dynamic_thresholding_ratio": draw(st.sampled_from([0.5, 0.9, 0.995])),
        "sample_max_value": draw(st.sampled_from([1.0, 1.5, 100.0])),
    }


@st.composite
def falling_timesteps(draw: st.DrawFn, train_steps: int) -> list[int]:
    """Draw up to 20 custom timesteps, in falling order."""
    timesteps = draw(st.sets(st.integers(0, train_steps - 1), min_size=1, max_size=20))
    return sorted(timesteps, reverse=True)


dtypes = st.sampled_from([torch.float32, torch.float64])


# --- one trajectory -----------------------------------------------------------------------------


def channels(case: Case) -> tuple[int, int]:
    """Return the channels of the sample and of the network's output.

    A learned variance doubles the output. The solvers of diffusers then assume 3 channels.
    """
    variance = case.options.get("variance_type")
    if variance == "learned_range" and case.name == "DDPM":
        return 2, 4
    return (3, 6) if variance in ("learned", "learned_range") else (2, 2)


def network(case: Case) -> Callable[[Tensor, Any], Tensor]:
    """Return a smooth, bounded stand-in for a U-Net that mixes pixels and channels."""
    in_channels, out_channels = channels(case)
    g = torch.Generator().manual_seed(7)
    mix = torch.randn(out_channels, in_channels, generator=g, dtype=torch.float64)
    shift = torch.randn(out_channels, generator=g, dtype=torch.float64)[:, None, None]

    def f(x: Tensor, t: Any) -> Tensor:
        mixed = torch.einsum("oc,bchw->bohw", mix.to(x.dtype), x + 0.3 * x.roll(1, -1))
        return 1.5 * torch.tanh(0.7 * mixed + (shift * np.cos(float(t) / 150 + 1)).to(x.dtype))

    return f


def their_scheduler(case: Case) -> Any:
    """Return the scheduler of diffusers."""
    return getattr(diffusers, f"{case.name}Scheduler")(**case.options)


def our_scheduler(case: Case, **options: Any) -> Scheduler:
    """Return the scheduler of minidiff, with further options."""
    return SCHEDULERS[f"{case.name}Scheduler"](**case.options, **options)


def initial_sample(case: Case, scheduler: Any) -> Tensor:
    """Return the initial sample: normal noise times the scheduler's `init_noise_sigma`."""
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(2, channels(case)[0], 3, 3, generator=g, dtype=torch.float64)
    return (noise * float(getattr(scheduler, "init_noise_sigma", 1))).to(case.dtype)


def outputs(
    scheduler: Any,
    case: Case,
    steps: int | None = None,
    states: Sequence[Tensor] = (),
    jitter: float = 0.0,
) -> list[Any]:
    """Return the outputs of the first steps (all by default), with noise from one seed.

    Args:
        scheduler: scheduler of either library, after `set_timesteps`.
        case: example that the scheduler was built for.
        steps: number of steps; None takes all.
        states: x before each step but the first; empty continues from the previous step's result.
        jitter: relative change of every entry of x before each step, of random sign.
    """
    f = network(case)
    options = dict(case.step_options)
    if "generator" in scheduler.step.__code__.co_varnames:
        options["generator"] = torch.Generator().manual_seed(2)
    x, results = initial_sample(case, scheduler), []
    sign = 1 - 2 * torch.randint(2, x.shape, generator=torch.Generator().manual_seed(3))
    for i, t in enumerate(scheduler.timesteps[:steps]):
        x = x * (1 + jitter * sign) if jitter else x
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        results.append(scheduler.step(f(scaled, t), t, x, **options))
        x = states[i] if states else results[-1].prev_sample
    return results


def trajectory(scheduler: Any, case: Case, steps: int | None = None) -> list[Tensor]:
    """Return x after each of the first steps (all by default), with noise from one seed."""
    return [output.prev_sample for output in outputs(scheduler, case, steps)]


def clean_sample(output: Any) -> Tensor | None:
    """Return the clean sample that a step predicted, or None if its output has none."""
    name = "denoised" if hasattr(output, "denoised") else "pred_original_sample"  # LCM's name
    return getattr(output, name, None)


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference, divided by max(1, the largest entry of b)."""
    assert a.dtype == b.dtype
    assert torch.isfinite(a).all()
    assert torch.isfinite(b).all()  # NaN in both would pass a comparison
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


# --- where diffusers cannot sample --------------------------------------------------------------


class Corner(NamedTuple):
    """A kind of case in which diffusers has no valid trajectory.

    Attributes:
        failure: failure of diffusers, as `failure_in_diffusers` returns it.
        message: pattern of minidiff's error; None where minidiff samples correctly instead.
        reason: cause of the failure.
        applies: whether a case is of this kind.
    """

    failure: str
    message: str | None
    reason: str
    applies: Callable[[Case], bool]


def their_timesteps(case: Case) -> Tensor:
    """Return the timesteps of diffusers."""
    theirs = their_scheduler(case)
    theirs.set_timesteps(**case.grid)
    return theirs.timesteps


def failure_in_diffusers(case: Case) -> str | None:
    """Sample with diffusers and return how it fails on this case; None if it does not.

    The failures are "raises …" (with the type of the exception), "outside 0..T-1", "repeats
    timesteps" (for integer timesteps without a `use_…` option) and "divides by zero".
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            scheduler = their_scheduler(case)
            scheduler.set_timesteps(**case.grid)
        except Exception as error:
            return f"raises {type(error).__name__}"
        grid = scheduler.timesteps
        if case.options.get("timestep_type") == "continuous":  # ln(σ)/4, not timesteps
            grid = their_timesteps(
                case._replace(options=case.options | {"timestep_type": "discrete"})
            )
        steps = case.options.get("num_train_timesteps", 1000)
        by_formula = any(v is True and k.startswith("use_") for k, v in case.options.items())
        if not by_formula and not grid.is_floating_point():
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
            unclipped["clip_sample"] = False  # clipping would hide infinities
        try:
            states = trajectory(scheduler, case)
            again = case._replace(options=unclipped)
            scheduler = their_scheduler(again)
            scheduler.set_timesteps(**case.grid)
            states += trajectory(scheduler, again, steps=1)
        except Exception as error:
            return f"raises {type(error).__name__}"
    return None if all(torch.isfinite(x).all() for x in states) else "divides by zero"


class Rounding(NamedTuple):
    """A kind of case in which one step of diffusers loses digits, so that a correct step differs.

    Attributes:
        reason: the cancellation or division that loses the digits.
        applies: whether a case is of this kind.
        allowed: relative error that results from rounding.
        cap: upper limit of `allowed`; at most 1e-2.
    """

    reason: str
    applies: Callable[[Case], bool]
    allowed: Callable[[Case], float]
    cap: float


CHAOTIC = 2e-3  # sensitivity above which only single steps are compared; 5 times this is 1e-2


def sensitivity(case: Case, roundings: float = 1.0) -> float:
    """Return how far the trajectory of diffusers moves if every x changes by this many roundings.

    Most trajectories damp the change. Some amplify it: x0 = (x − σ·ε)/α at small α, a threshold
    that divides by the median, or a thousand steps of either.
    """
    runs = []
    for jitter in (0.0, roundings * 2**-23):
        scheduler = their_scheduler(case)
        scheduler.set_timesteps(**case.grid)
        runs.append(outputs(scheduler, case, jitter=jitter))
    return max(distances(*runs))


def visited_levels(case: Case) -> list[Level]:
    """Return the levels that minidiff visits, including the last one."""
    mine = our_scheduler(case)
    mine.set_timesteps(**case.grid)
    return mine.levels


def tolerance(case: Case, roundings: Sequence[Rounding] = ()) -> float:
    """Return 2e-5 in float32 and 1e-6 in float64, or more where one of `roundings` allows it."""
    allowed = [2e-5 if case.dtype == torch.float32 else 1e-6]
    for rounding in roundings:
        assert rounding.cap <= 1e-2
        if rounding.applies(case):
            allowed.append(min(rounding.allowed(case), rounding.cap))
    return max(allowed)


def distances(mine: Sequence[Any], theirs: Sequence[Any]) -> list[float]:
    """Return the differences of x after every step, then those of x̂0 where a step returns it."""
    pairs = list(zip(mine, theirs, strict=True))
    far = [difference(a.prev_sample, b.prev_sample) for a, b in pairs]
    clean = [(clean_sample(a), clean_sample(b)) for a, b in pairs]
    return far + [difference(a, b) for a, b in clean if b is not None]


def compare(
    case: Case,
    corners: Sequence[Corner],
    roundings: Sequence[Rounding] = (),
) -> None:
    """Assert that the grid and the trajectory are those of diffusers, or that a corner applies.

    In a corner, minidiff must raise the error of the corner or sample finite numbers.
    """
    failure = failure_in_diffusers(case)
    if failure is None:
        compare_trajectories(case, roundings)
        return
    corner = next((c for c in corners if c.failure == failure and c.applies(case)), None)
    assert corner is not None, f"diffusers {failure}, but no corner lists it"
    event(corner.reason)
    if corner.message is not None:
        with pytest.raises(InvalidArgument, match=corner.message):
            our_scheduler(case).set_timesteps(**case.grid)
        return
    mine = our_scheduler(case)
    mine.set_timesteps(**case.grid)
    assert all(torch.isfinite(x).all() for x in trajectory(mine, case))


def sample_or_refuse(case: Case, refusals: str) -> None:
    """Assert that `compat="exact"` samples finite numbers or raises an error of this pattern."""
    scheduler, refusal = our_scheduler(case, compat="exact"), ""
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
    """Assert that add_noise agrees at the first and the last timestep of the grid."""
    x0, eps = torch.randn(2, 2, 2, 3, 3, generator=torch.Generator().manual_seed(4)).to(case.dtype)
    a, b = (s.add_noise(x0, eps, s.timesteps[[0, -1]]) for s in (mine, theirs))
    assert difference(a, b) < 1e-6


def compare_trajectories(case: Case, roundings: Sequence[Rounding]) -> None:
    """Assert that the grid and every step of the trajectory are those of diffusers."""
    mine, theirs = our_scheduler(case), their_scheduler(case)
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
    """Assert that a trajectory differs from that of diffusers only because it amplifies rounding.

    The difference must be at most five times the sensitivity of diffusers' own trajectory to
    rounding, unless that exceeds `CHAOTIC`. Each step from diffusers' x must be diffusers' step.
    """
    event("amplifies rounding")
    moved = sensitivity(case, allowed / tolerance(case))
    assert far <= 5 * moved or moved > CHAOTIC, (
        f"off by {far:.1e}, but rounding moves it by {moved:.1e}"
    )
    mine = our_scheduler(case)
    mine.set_timesteps(**case.grid)
    steps = distances(outputs(mine, case, states=[o.prev_sample for o in expected]), expected)
    worst = int(np.argmax(steps))
    assert max(steps) <= allowed, f"{max(steps):.1e} in step {worst % len(expected)}"
