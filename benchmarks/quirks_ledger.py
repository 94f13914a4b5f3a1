"""The ledger of diffusers' departures: the effect of each, measured where the truth is known.

    python benchmarks/quirks_ledger.py > minidiff/schedulers/QUIRKS.md

A row is a method that `quirks.Diffusers` overrides. Its texts are the docstrings of the two
readings. Its cost is measured by sampling once with the exact reading and once with this one
departure switched on (`quirks.departing`). The network is optimal, for data with a known
probability flow or variance: see `minidiff.lab.order`.
"""

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from minidiff.lab.order import Method
from minidiff.schedulers.core.quirks import NEEDS, Diffusers, Exact, departing, departures

_SPACED = {"timestep_spacing": "linspace"}
_DDIM = {"clip_sample": False}
_ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
_SDE = {"algorithm_type": "sde-dpmsolver++"}

_MULTI, _SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
_EULER, _FLOWS = "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"


class Probe(NamedTuple):
    """A setting in which a departure is visible.

    Attributes:
        scheduler, options: class and options of its constructor.
        n: number of steps.
        weak: the error is that of the variance on Gaussian data, not of the end of a path.
        step: options of `step`.
        part: fraction of the steps after which the error is measured.
    """

    scheduler: str
    options: dict[str, Any]
    n: int = 20
    weak: bool = False
    step: Mapping[str, Any] = MappingProxyType({})
    part: float = 1.0

    def costs(self, name: str) -> tuple[float, float, float]:
        """Return the error without this departure and with it, and the distance between the
        results.
        """
        needs = NEEDS.get(name, ())
        method = Method(
            self.scheduler, self.options, 0, self.weak, {"part": self.part, **self.step}
        )
        exact, truth = method.result_of(method.build().reread(departing(*needs)), self.n)
        departed = method.build().reread(departing(name, *needs))
        departed, departed_truth = method.result_of(departed, self.n)
        errors = (exact - truth, departed - departed_truth, departed - exact)
        return tuple(e.abs().max().item() for e in errors)

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        step = "".join(f", {k}={v!r}" for k, v in self.step.items())
        quantity = "variance" if self.weak else "path"
        part = f" at {self.part:.0%}" if self.part < 1 else ""
        return f"`{self.scheduler}({options})`, {self.n} steps{step}: {quantity}{part}"


# A departure's probe, or why there is none.
PROBES: dict[str, Probe | str] = {
    "dtype": Probe("DDPMScheduler", _DDIM | _SPACED, 1000, weak=True),
    "laplace": Probe("DDIMScheduler", _DDIM | _SPACED | {"beta_schedule": "laplace"}, 100),
    "timesteps": "the grid is refused, or its only step starts at step 0",
    "solver_timesteps": Probe(
        _MULTI,
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -3.0,
         "timestep_spacing": "trailing"},
    ),
    "real_timesteps": "differs only for one step, and where “trailing” is refused",
    "spaced_sigmas": Probe(_EULER, {"interpolation_type": "log_linear"}),
    "table": Probe("DDPMScheduler", _DDIM | _SPACED, 1000, weak=True),
    "solver_schedule": Probe(_MULTI, _ZERO_SNR),
    "formula_timesteps": Probe(_MULTI, {"use_exponential_sigmas": True}),
    "lu_sigmas": Probe(_MULTI, {"use_lu_lambdas": True}),
    "steps_in_reach": "the caller chooses the range of a formula; λ is then not clipped",
    "flow_end": "sampling ends at another level, and is correct there",
    "preserving_levels": Probe(_MULTI, {"solver_order": 3}, 500),
    "exploding_levels": Probe("HeunDiscreteScheduler", {}, 500),
    "exploding_start": "the initial variance lacks 1/(1 + σ²) of itself: 4e-5 for “linear”",
    "euler_end": Probe(
        _EULER, {"use_karras_sigmas": True, "sigma_min": 0.001, "final_sigmas_type": "sigma_min"}
    ),
    "churned_sample": Probe(_EULER, {}, weak=True, step={"s_churn": 5.0}),
    "ancestral_sigmas": Probe("EulerAncestralDiscreteScheduler", {}, 5, weak=True),
    "check_ancestral": "an error names the option",
    "rounded_karras": Probe("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}),
    "geometric_mean": Probe("KDPM2DiscreteScheduler", {}, 500),
    "lms_sigmas": "terms are missing where image-to-image begins; the rest is rounding",
    "deis_weights": Probe("DEISMultistepScheduler", {"solver_order": 3}, 500),
    "edm_start": "the initial variance is wrong by (1 − σ_data²)/σ_max²: 1e-4 by default",
    "edm_sigmas": Probe("EDMDPMSolverMultistepScheduler", {"sigma_schedule": "exponential"}),
    "edm_end": "a single step does nothing",
    "check_edm_sigmas": "an error names the option",
    "check_edm_solver": "an error names the option",
    "edm_sample": "only the precision of the arithmetic differs",
    "velocity_level": "affects a target of training, not sampling: v of another timestep",
    "flow_levels": Probe(_FLOWS, {}, 500),
    "clean": "the same level, in the type of a float32 table",
    "ddim_levels": Probe("DDIMScheduler", _DDIM | _SPACED, 300),
    "ddim_direction": Probe(
        "DDIMScheduler", _DDIM | _SPACED | _ZERO_SNR, weak=True, step={"eta": 1.0}
    ),
    "posterior": Probe("DDPMScheduler", _DDIM | _SPACED, 1000, weak=True),
    "adds_noise_at_the_end": Probe(
        "DDPMScheduler",
        _DDIM | {"timestep_spacing": "trailing", "variance_type": "fixed_large"},
        weak=True,
    ),
    "solver_sample": Probe(_MULTI, {}, 500),
    "solver_row": Probe(_MULTI, _FLOW | {"prediction_type": "v_prediction"}),
    "expm1": Probe(_MULTI, {}, 500),
    "phi3": Probe(_MULTI, {"solver_order": 3}, 100, part=0.8),
    "singlestep_phi3": Probe(
        _SINGLE, _SDE | {"solver_order": 3, "solver_type": "heun"}, 30, weak=True
    ),
    "stage_noise": Probe(_SINGLE, _SDE | {"solver_order": 2}, weak=True),
    "unipc_moments": Probe("UniPCMultistepScheduler", {"solver_order": 3}, 500),
    "check_unipc": "an error names the option",
    "dynamic_shift": "only rounding differs",
    "inversion_grid": Probe("DDIMInverseScheduler", _DDIM),
    "inversion_levels": Probe("DDIMInverseScheduler", _DDIM | {"timestep_spacing": "trailing"}, 30),
    "consistency_end": "noise of the last level stays in the result",
    "pndm_levels": Probe("PNDMScheduler", {"skip_prk_steps": True, **_SPACED}),
    "runge_kutta_middle": Probe("PNDMScheduler", {"timestep_spacing": "trailing"}, 30),
    "average_noise": Probe("PNDMScheduler", {"skip_prk_steps": True,
                                             "prediction_type": "v_prediction"}),
    "transfer": Probe("PNDMScheduler", {"skip_prk_steps": True}, 500),
    "flow_line": Probe(_FLOWS, {"shift": 3.0}),
    "flow_sigmas_of": "with custom timesteps, the network is given a lower noise level than x has",
    "flow_path": "scale_noise and stochastic_sampling with invert_sigmas confuse noise and data",
    "flow_row": "cancels `flow_path` in a deterministic step",
    "token_output": "callers reverse the sign",
}  # fmt: skip

# Departures that are rounding alone, in float32: how far they move a result depends on the
# processor and on the build of torch. Only the magnitude is the same elsewhere.
ROUNDING = (
    "dtype", "table", "lu_sigmas", "preserving_levels", "exploding_levels", "ancestral_sigmas",
    "geometric_mean", "deis_weights", "edm_sigmas", "flow_levels", "ddim_direction", "posterior",
    "solver_sample", "expm1", "unipc_moments", "transfer",
)  # fmt: skip


def text_of(reading: type[Exact], name: str) -> str:
    """Return the docstring of a reading's method on one line."""
    if name == "dtype":
        return f"Tables of β and ᾱ are {reading.dtype}.".replace("torch.", "")
    return " ".join(inspect.getdoc(vars(reading)[name]).split())


def table() -> str:
    """Return the ledger in Markdown, with its costs measured now."""
    rows = [
        "| departure | the paper | diffusers 0.42.1 | measured in | without | with | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in departures():
        probe = PROBES[name]
        cost = "| | |"
        if isinstance(probe, Probe):
            cost = "".join(f"| {c:.1e} " for c in probe.costs(name)) + "|"
        texts = (text_of(Exact, name), text_of(Diffusers, name))
        cells = " | ".join(text.replace("|", "\\|") for text in texts)
        rows.append(f"| `{name}` | {cells} | {probe} {cost}")
    return "\n".join(rows)


HEAD = """\
# Where diffusers departs from the papers

This file is written by `python benchmarks/quirks_ledger.py`, so do not edit it. Its text comes from
`schedulers/core/quirks.py`, which has both versions of each departure. `compat="exact"` has none of
the departures, `compat="diffusers"` has all of them. To switch on a single one:

```python
from minidiff.schedulers import DDIMScheduler
from minidiff.schedulers.core.quirks import departing

scheduler = DDIMScheduler(compat="exact", timestep_spacing="linspace")
one_departure = scheduler.reread(departing("ddim_levels"))
```

The notation is that of the code. T is the number of training steps, n that of sampling steps. A
noisy sample is x = α·x0 + σ·ε, with ᾱ = α² for variance-preserving schedules, and λ = ln(α/σ).
The *grid* is the list of timesteps or noise levels that sampling visits.

The last three columns were measured at the end of sampling with a perfect network. They are the
error without the departure, the error with it, and the difference between the two results. A
*path* error is the distance from the exact path (the probability flow) of data from a mixture of
two Gaussians. A *variance* error is the difference from the right variance, ¼, for data from one
Gaussian. The error without the departure is due to the finite number of steps; a departure may
happen to reduce it. Where the departure is rounding to float32, the difference has another value
on another processor, but about the same magnitude.
"""

TAIL = """
## Refused, although diffusers accepts it

Some of diffusers' own tests pass there because an argument is ignored or a value is not checked.
Both readings refuse these by name:

- `thresholding` of `DDIMInverseScheduler`: diffusers drops unknown arguments of this class, so the
  option has no effect there.
- `trained_betas` of another length than `num_train_timesteps`: diffusers samples timesteps that the
  table does not have, or fails later.
- β of 1 or more, such as `beta_end=2`: ᾱ turns negative, and its root is NaN.
- `add_noise` of `EDMDPMSolverMultistepScheduler` at a timestep that is not on the grid: diffusers
  takes the last entry for it.
"""


def main() -> None:
    print(HEAD)
    print(table())
    print(TAIL.rstrip())


if __name__ == "__main__":
    main()
