"""Watching a call from step to step: `Pipeline.walk`, and diffusers' callback.

The callback gets tensors by name at the end of every step, and may replace them:

def halfway(pipe, step, timestep, tensors):
    if step == 10:
        tensors["prompt_embeds"] = other
    return tensors

pipe(prompt, callback_on_step_end=halfway, callback_on_step_end_tensor_inputs=["prompt_embeds"])
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, one_of
from minidiff.guidance import Network
from minidiff.pipeline.denoiser import Guidance
from minidiff.runtime.checks import callback, each, optional, text
from minidiff.sample import Change, Step

if TYPE_CHECKING:
    from minidiff.pipeline.pipeline import Pipeline
    from minidiff.pipeline.request import Request
    from minidiff.pipeline.start import InitialState

StepFunction = Callable[[Any, int, Any, dict[str, Tensor]], Mapping[str, Tensor] | None]

# diffusers' name of a tensor → the network's argument
NETWORK_INPUTS = {
    "prompt_embeds": ("encoder_hidden_states",),
    "pooled_prompt_embeds": ("pooled_projections",),
    "add_text_embeds": ("added_cond_kwargs", "text_embeds"),
    "add_time_ids": ("added_cond_kwargs", "time_ids"),
    "w_embedding": ("timestep_cond",),
}


class StepEnd:
    """The callback during the sampling of one batch.

    Args:
        pipe: pipeline of the call.
        function: diffusers' callback; None for none.
        names: tensors that it is given.
    Attributes:
        inputs: network inputs of these names, after the first evaluation.
    """

    def __init__(
        self, pipe: "Pipeline", function: StepFunction | None, names: Sequence[str]
    ) -> None:
        self.pipe, self.function, self.names = pipe, function, names
        self.inputs: dict[str, Tensor] = {}

    def watch(self, network: Network) -> Network:
        """Return the network with the inputs that the callback replaced."""
        paths = {name: NETWORK_INPUTS[name] for name in self.names if name in NETWORK_INPUTS}

        def evaluate(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
            for name, (*outer, last) in paths.items():
                place = condition
                for key in outer:
                    place[key] = dict(place[key])
                    place = place[key]
                place[last] = self.inputs.setdefault(name, place[last])
            return network(x, t, **condition)

        return evaluate if paths else network

    def following(self, after_step: Change) -> Change:
        """Return `after_step` followed by the callback, which may return another sample.

        Raises:
            InvalidArgument: when called, if the callback returns anything but tensors like those
                that it was given.
        """
        if self.function is None:
            return after_step
        known = set(vars(self.pipe))

        def both(step: Step) -> Tensor:
            x = after_step(step)
            # diffusers has the negative half first: a roll by B exchanges the halves of 2·B
            inputs = {name: value.roll(len(x), 0) for name, value in self.inputs.items()}
            every = {"latents": x, "denoised": step.x0} | inputs
            given = {name: every[name] for name in self.names}
            answer = self.function(self.pipe, step.index, step.t, dict(given))
            if unknown := sorted(set(vars(self.pipe)) - known):
                for name in unknown:
                    delattr(self.pipe, name)
                raise InvalidArgument(
                    f"callback_on_step_end set pipe.{unknown[0]}, which has no effect here; of "
                    "diffusers' attributes pipe._interrupt alone has one"
                )
            replaced = _checked(answer, {"latents": x} | given)
            for name in inputs.keys() & replaced.keys():
                self.inputs[name] = replaced[name].roll(len(x), 0)
            return replaced.get("latents", x)

        return both


def _checked(answer: Any, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that a callback replaced. Raises InvalidArgument."""
    if isinstance(answer, Mapping):
        answer = {k: v for k, v in answer.items() if k not in given or v is not given[k]}
    kinds = {name: _kind(value) for name, value in given.items() if name != "denoised"}
    replaced = {} if answer is None else answer
    if isinstance(replaced, Mapping):
        got: Any = {name: _kind(value) for name, value in replaced.items()}
        if got.items() <= kinds.items():
            return {name: value.to(given[name].device) for name, value in replaced.items()}
    else:
        got = _kind(replaced)
    raise InvalidArgument(f"callback_on_step_end may return None, or any of {kinds}; got {got}")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def step_ends(
    pipe: "Pipeline", function: StepFunction | None, names: Sequence[str], guidance: Guidance
) -> Callable[[], StepEnd]:
    """Return a function that returns the callback of each batch.

    Args:
        pipe, function, names: see `StepEnd`.
        guidance: guidance of the call.
    Raises:
        InvalidArgument: it is not a function, or a name is not that of a tensor of this call.
    """
    optional(callback)("callback_on_step_end", function)
    each(text)("callback_on_step_end_tensor_inputs", names)
    inputs = ["w_embedding"] if pipe.takes_guidance_scale else []
    if pipe.prompts is not None:
        inputs.append("prompt_embeds")
        inputs += ["add_text_embeds", "add_time_ids"] if pipe.prompts.adds_text_time else []
        inputs += ["pooled_prompt_embeds"] if pipe.prompts.pooled_width else []
    for name in names:
        one_of("callback_on_step_end_tensor_inputs", name, ("latents", "denoised", *inputs))
        varies = guidance.interval is not None or guidance.autoguidance != 1 or pipe.wraps
        if varies and name in inputs:
            raise InvalidArgument(
                f"callback_on_step_end_tensor_inputs cannot have {name!r} with guidance_interval, "
                "autoguidance_scale or pipe.wraps"
            )
    return partial(StepEnd, pipe, function, names)


class WalkedStep:
    """A step of the loop with what it looks like.

    Attributes:
        index, t, x, x0, output, next_x: see `minidiff.sample.Step`.
        level: α and σ of x.
        change: root mean square by which x̂0 differs from that of the step before; of the first
            step, from 0.
    """

    def __init__(
        self,
        pipe: "Pipeline",
        request: "Request",
        start: "InitialState",
        step: Step,
        before: Tensor,
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


def walked(pipe: "Pipeline", own: "Pipeline", request: "Request") -> Iterator[WalkedStep]:
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
def _steps(pipe: "Pipeline", own: "Pipeline", request: "Request") -> Iterator[WalkedStep]:
    start, steps = own.sampling(request, request.batches[0])
    before = torch.zeros(())
    for step in steps:
        if request.callback is not None:
            request.callback(step)
        yield WalkedStep(own, request, start, step, before.to(step.x0))
        if own._interrupt or pipe._interrupt:
            return
        before = step.x0
