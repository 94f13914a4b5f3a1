"""The sampling loop, as a generator that yields every step for inspection.

    for step in trajectory(denoise, scheduler, x):
        print(step.t, step.x0.mean())

Nothing in the loop waits for the device: timesteps and the scheduler's scalars are host numbers.
"""

import inspect
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.guidance import Denoiser, Meaning, Reader
from minidiff.noise import Generators
from minidiff.schedule import Level
from minidiff.schedulers import Scheduler


class Step(NamedTuple):
    """One step of the loop.

    Attributes:
        index: 0 … n−1.
        t: the training step at which the network was evaluated (for EDM its c_noise).
        x: the sample x_t at t, (B, C, *space), before scaling.
        x0: x̂0, the clean sample that the output implies, after clipping.
        output: the network's output.
        next_x: the sample after this step; after the last one, the result.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which is not needed
    t: float
    x: Tensor
    x0: Tensor
    output: Tensor
    next_x: Tensor


Change = Callable[[Step], Tensor]


def trajectory(
    denoise: Denoiser,
    scheduler: Scheduler,
    x: Tensor,
    generator: Generators = None,
    after_step: Change = attrgetter("next_x"),
    **step_options: Any,
) -> Iterator[Step]:
    """Sample from the noise x, one `Step` at a time.

    Args:
        denoise: function (x_t, t) → network output of the scheduler's prediction type.
        scheduler: scheduler, after `set_timesteps`.
        x: standard normal noise times `scheduler.init_noise_sigma`, (B, C, *space).
        generator: noise source, see `minidiff.noise.randn`; deterministic samplers ignore it.
        after_step: function called with every step; its result replaces the step's `next_x`.
        step_options: options of `scheduler.step`, such as DDIM's `eta`.
    Yields:
        n steps; the loop advances only when the next one is requested.
    Raises:
        InvalidArgument: the scheduler has no timesteps yet.
    """
    if scheduler.num_inference_steps is None:
        raise InvalidArgument("call scheduler.set_timesteps before sampling")
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_options["generator"] = generator
    for index, t in enumerate(scheduler.grid[scheduler.begin_index or 0 :]):
        output = denoise(scheduler.scale_model_input(x, t), t)
        next_x, x0 = scheduler.step(output, t, x, return_dict=False, **step_options)
        step = Step(index, t, x, x0, output, next_x)
        x = after_step(step)
        yield step._replace(next_x=x)


def meaning_of(scheduler: Scheduler) -> Reader:
    """Return the meaning of the network's output at each t, for guidance that works on x̂0.

    Args:
        scheduler: scheduler after `set_timesteps`; t is one of its timesteps.
    """
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def meaning(t: float) -> Meaning:
        level, _ = scheduler.grid_levels(t)
        scale = scheduler.scaled_input(one, level).item()  # tensors of the CPU: no sync
        row = (scheduler.target(one, zero, level), scheduler.target(zero, one, level))
        return Meaning(
            Level(scale * float(level.alpha), scale * float(level.sigma)),
            (row[0].item(), row[1].item()),
        )

    return meaning
