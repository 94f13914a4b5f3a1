"""Time of one scheduler step, of minidiff and of diffusers, on a small sample without a network.

    python benchmarks/scheduler_step.py [--steps N] [--rounds N]

Each round takes N steps with the class of minidiff and with that of diffusers in turn, so that a
busy machine slows both. Printed are the median CPU time of a step in microseconds, the ratio of
the two, and quartiles of the ratios of each round.
"""

import argparse
import inspect
import statistics
import time
from typing import Any

import diffusers
import torch
from import_time import conditions

from minidiff.schedulers import SCHEDULERS

SHAPE = (1, 1, 32, 32)
CASES = {
    "DDPM": ("DDPMScheduler", {}),
    "DDIM": ("DDIMScheduler", {}),
    "DDIM inversion": ("DDIMInverseScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "PNDM": ("PNDMScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM-Solver++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "SDE-DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM-Solver++ 2S": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "UniPC 2": ("UniPCMultistepScheduler", {}),
    "UniPC 3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "EDM Euler": ("EDMEulerScheduler", {}),
    "EDM DPM-Solver++ 2M": ("EDMDPMSolverMultistepScheduler", {}),
    "flow matching, Euler": ("FlowMatchEulerDiscreteScheduler", {}),
}


def step_time(scheduler: Any, n: int) -> float:
    """Return the CPU microseconds of a step over n steps, called as by a pipeline."""
    scheduler.set_timesteps(n)
    options = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(0)
    x, out = torch.randn(SHAPE), torch.randn(SHAPE)
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(x, scheduler.timesteps[0])  # diffusers' Euler warns otherwise
    start = time.process_time()
    for t in scheduler.timesteps:
        x = scheduler.step(out, t, x, **options).prev_sample
    return 1e6 * (time.process_time() - start) / len(scheduler.timesteps)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="steps per round")
    parser.add_argument("--rounds", type=int, default=21, help="rounds, at least 2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{conditions(1, 'diffusers')}; {SHAPE}, CPU microseconds a step")
    print(f"{'':20}{'ours':>8}{'theirs':>8}{'ratio':>8}  quartiles")
    for name, (cls, arguments) in CASES.items():
        pair = SCHEDULERS[cls](**arguments), getattr(diffusers, cls)(**arguments)
        times = [[step_time(s, options.steps) for s in pair] for _ in range(options.rounds)]
        ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        low, _, high = statistics.quantiles([b / a for a, b in times], n=4)
        figures = f"{ours:8.1f}{theirs:8.1f}{theirs / ours:8.2f}  {low:.2f}-{high:.2f}"
        print(f"{name:20}{figures}", flush=True)


if __name__ == "__main__":
    main()
