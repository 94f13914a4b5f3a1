"""A pipeline's sampling, one step at a time: `Pipeline.walk`."""

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.pipeline.request import Request
from minidiff.pipeline.start import InitialState
from minidiff.sample import Step

if TYPE_CHECKING:
    from minidiff.pipeline.pipeline import Pipeline


class WalkedStep:
    """A step of the loop with what it looks like.

    Attributes:
        index, t, x, x0, output, next_x: see `minidiff.sample.Step`.
        level: α and σ of x.
        change: root mean square by which x̂0 differs from that of the step before; of the first
            step, from 0.
    """

    def __init__(
        self, pipe: "Pipeline", request: Request, start: InitialState, step: Step, before: Tensor
    ) -> None:
        self.index, self.t, self.x, self.x0, self.output, self.next_x = step
        self.level = pipe.scheduler.grid_levels(step.t)[0]
        self.change = float((step.x0 - before).square().mean().sqrt())
        self._decoding = pipe, request, start

    @cached_property
    def images(self) -> Any:
        """Images of x̂0, decoded when they are first read, of the call's `output_type`."""
        return self._decoded(self.x0)

    @cached_property
    def next_images(self) -> Any:
        """Images of `next_x`, still noisy before the last step, of the call's `output_type`."""
        return self._decoded(self.next_x)

    @torch.no_grad()
    def _decoded(self, z: Tensor) -> Any:
        pipe, request, start = self._decoding
        images = z if request.output_type == "latent" else start.finish(pipe.decode(z))
        return pipe.output(request, [images]).images


def walked(pipe: "Pipeline", own: "Pipeline", request: Request) -> Iterator[WalkedStep]:
    """Return an iterator over the steps of a request. Raises InvalidArgument, see `walk`."""
    if len(request.batches) > 1:
        raise InvalidArgument(
            f"batch_size must be at least the number of images, {request.batches[-1].stop}, for "
            f"a walk; got {request.batches[0].stop}"
        )
    if request.first_step == len(own.scheduler.grid):
        raise InvalidArgument("strength must be above 0 for a walk, which has no steps then")
    return _steps(pipe, own, request)


@torch.no_grad()
def _steps(pipe: "Pipeline", own: "Pipeline", request: Request) -> Iterator[WalkedStep]:
    start, steps = own.sampling(request, request.batches[0])
    before = torch.zeros(())
    for step in steps:
        if request.callback is not None:
            request.callback(step)
        yield WalkedStep(own, request, start, step, before.to(step.x0))
        if own._interrupt or pipe._interrupt:
            return
        before = step.x0
