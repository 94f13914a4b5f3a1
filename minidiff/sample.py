"""The sampling loop, as a generator: every step can be looked at.

    for step in trajectory(denoise, scheduler, x):
        print(step.t, step.x0.mean())

Nothing in the loop waits for the device: timesteps are host integers, and the scheduler's scalars
are Python floats.
"""

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.guidance import Denoiser
from minidiff.noise import Generators
from minidiff.schedulers import Scheduler


class Step(NamedTuple):
    """One step of the loop.

    Attributes:
        index: 0 … n−1.
        t: the training step at which the network was asked (for EDM its c_noise).
        x: the sample x_t that it was asked about, (B, C, *space).
        x0: x̂0, the clean sample that it implies, after clipping.
        output: what it said.
        next_x: the sample after this step; after the last one, the result.
    """

    index: int
    t: float
    x: Tensor
    x0: Tensor
    output: Tensor
    next_x: Tensor


def trajectory(
    denoise: Denoiser,
    scheduler: Scheduler,
    x: Tensor,
    generator: Generators = None,
    **step_options: Any,
) -> Iterator[Step]:
    """Walk from the noise x to a sample, one `Step` at a time.

    Args:
        denoise: (x_t, t) → network output, of the scheduler's prediction type.
        scheduler: after `set_timesteps`.
        x: standard normal noise times `scheduler.init_noise_sigma`, (B, C, *space).
        generator: source of the noise, see `minidiff.noise.randn`; methods without noise ignore it.
        step_options: passed to `scheduler.step`, such as DDIM's `eta`.
    Yields:
        n steps; the loop advances only as far as it is asked to.
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
        yield Step(index, t, x, x0, output, next_x)
        x = next_x
