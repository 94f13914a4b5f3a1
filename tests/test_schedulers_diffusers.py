"""Our schedulers beside diffusers' own: every step of whole trajectories, over all their options.

The network is a fixed smooth function of (x, t), so trajectories stay bounded and a wrong timestep
shows. Where diffusers cannot sample (it raises, yields NaN, or asks the network at a wrong or
repeated timestep) minidiff must refuse: `REFUSED` lists those cases, and the test proves each claim
about diffusers whenever an example falls into one.
"""

import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

import minidiff.schedulers as ours
from minidiff.errors import InvalidArgument
from minidiff.schedulers import SCHEDULERS, Scheduler

diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()

SHAPE = (2, 2, 3, 3)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 2e-5}


class Case(NamedTuple):
    """One example: a class, its options, and how it is used."""

    name: str
    options: dict[str, Any]
    n: int | None
    timesteps: list[int] | None
    step_options: dict[str, Any]
    dtype: torch.dtype


# --- the cases -------------------------------------------------------------------------------


@st.composite
def schedule_options(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """The noise schedule; sometimes a short table or one given as numbers."""
    steps = draw(st.sampled_from([1000, 1000, 1000, 100, 37]))
    options = {"num_train_timesteps": steps, "rescale_betas_zero_snr": draw(st.booleans())}
    if draw(st.integers(0, 5)) == 0:
        rising = st.lists(st.floats(1e-4, 0.2), min_size=steps, max_size=steps)
        options["num_train_timesteps"] = steps = min(steps, 37)
        betas = draw(rising if steps < 10 else st.just(np.linspace(2e-3, 0.15, steps) ** 1.5))
        return options | {"trained_betas": [float(b) for b in betas]}
    kinds = ["linear", "scaled_linear", "squaredcos_cap_v2"]
    options["beta_schedule"] = draw(st.sampled_from(kinds + ["sigmoid"] * (name == "DDPM")))
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
def cases(draw: st.DrawFn, name: str) -> Case:
    """A draw from the full product of options."""
    flag = st.booleans()
    options = draw(schedule_options(name))
    train_steps = options["num_train_timesteps"]
    options["prediction_type"] = draw(st.sampled_from(["epsilon", "sample", "v_prediction"]))
    options["timestep_spacing"] = draw(st.sampled_from(["linspace", "leading", "trailing"]))
    options["steps_offset"] = draw(st.sampled_from([0, 0, 1, 2]))
    if draw(flag):
        options["thresholding"] = True
        options["dynamic_thresholding_ratio"] = draw(st.sampled_from([0.5, 0.9, 0.995]))
        options["sample_max_value"] = draw(st.sampled_from([1.0, 1.5, 100.0]))
    step_options = {}
    if name != "DPMSolverMultistep":
        options["clip_sample"] = draw(flag)
        options["clip_sample_range"] = draw(st.sampled_from([0.5, 1.0, 3.0]))
    if name == "DDPM":
        kinds = ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"]
        options["variance_type"] = draw(st.sampled_from(kinds))
    elif name == "DDIM":
        options["set_alpha_to_one"] = draw(flag)
        step_options["eta"] = draw(st.sampled_from([0.0, 0.3, 1.0]))
        step_options["use_clipped_model_output"] = draw(flag)
    else:
        options["solver_order"] = draw(st.sampled_from([1, 2, 2, 3, 3]))
        options["algorithm_type"] = draw(st.sampled_from(["dpmsolver++", "sde-dpmsolver++"]))
        options["solver_type"] = draw(st.sampled_from(["midpoint", "heun"]))
        options["lower_order_final"] = draw(flag)
        options["euler_at_final"] = draw(flag)
        options["final_sigmas_type"] = draw(st.sampled_from(["zero", "sigma_min"]))
        options["lambda_min_clipped"] = draw(st.sampled_from([-float("inf"), -9.0, -5.1, -1.0]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    if name != "DDIM" and draw(st.integers(0, 7)) == 0:
        chosen = draw(st.sets(st.integers(0, train_steps - 1), min_size=1, max_size=20))
        return Case(name, options, None, sorted(chosen, reverse=True), step_options, dtype)
    return Case(name, options, draw(number_of_steps(train_steps)), None, step_options, dtype)


# --- one trajectory --------------------------------------------------------------------------


def network(channels: int) -> Callable[[Tensor, int], Tensor]:
    """A smooth stand-in for a U-Net: bounded, mixes pixels and channels, depends on t."""
    g = torch.Generator().manual_seed(7)
    mix = torch.randn(channels, SHAPE[1], generator=g, dtype=torch.float64)
    shift = torch.randn(channels, generator=g, dtype=torch.float64)[:, None, None]

    def f(x: Tensor, t: int) -> Tensor:
        mixed = torch.einsum("oc,bchw->bohw", mix.to(x.dtype), x + 0.3 * x.roll(1, -1))
        return 1.5 * torch.tanh(0.7 * mixed + (shift * np.cos(t / 150 + 1)).to(x.dtype))

    return f


def theirs_of(case: Case) -> Any:
    return getattr(diffusers, f"{case.name}Scheduler")(**case.options)


def ours_of(case: Case) -> Scheduler:
    return SCHEDULERS[f"{case.name}Scheduler"](**case.options)


def set_grid(scheduler: Any, case: Case) -> None:
    if case.timesteps is None:
        scheduler.set_timesteps(case.n)
    else:
        scheduler.set_timesteps(timesteps=case.timesteps)


def start(case: Case) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(SHAPE, generator=g, dtype=torch.float64).to(case.dtype)


def trajectory(scheduler: Any, case: Case) -> list[Tensor]:
    """x after every step. Noise comes from one seed, or is handed in where `step` takes it."""
    learned = case.options.get("variance_type") == "learned_range"
    f = network(SHAPE[1] * (2 if learned else 1))
    generator = torch.Generator().manual_seed(2)
    x, states = start(case), []
    for t in scheduler.timesteps.tolist():
        output = scheduler.step(f(x, t), t, x, generator=generator, **case.step_options)
        x = output.prev_sample
        states.append(x)
    return states


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference relative to the larger of 1 and the largest entry."""
    assert a.dtype == b.dtype
    assert torch.isfinite(a).all()
    assert torch.isfinite(b).all()  # a comparison with NaN would pass unseen
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


# --- where diffusers cannot sample -------------------------------------------------------------


def fails_in_diffusers(case: Case) -> str | None:
    """How diffusers fails on this case, by trying; None if its trajectory is sound."""
    train_steps = case.options["num_train_timesteps"]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        scheduler = theirs_of(case)
        try:
            set_grid(scheduler, case)
            grid = scheduler.timesteps
            if (grid < 0).any() or (grid >= train_steps).any():
                return "asks the network outside 0..T-1"
            if (grid.diff() >= 0).any():
                return "repeats timesteps"
            states = trajectory(scheduler, case)
        except (IndexError, ValueError, RuntimeError) as error:
            return f"raises {type(error).__name__}"
    return None if all(torch.isfinite(x).all() for x in states) else "yields NaN or infinity"
