"""diffusers' callback at the end of a step: the tensors that it reads, and those that it replaces.

def halfway(pipe, step, timestep, tensors):
    if step == 10:
        tensors["prompt_embeds"] = other
    return tensors

pipe(prompt, callback_on_step_end=halfway, callback_on_step_end_tensor_inputs=["prompt_embeds"])
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from minidiff.errors import InvalidArgument, one_of
from minidiff.guidance import Network
from minidiff.pipeline.denoiser import Guidance
from minidiff.runtime.checks import callback, each, optional, text
from minidiff.sample import Change, Step

if TYPE_CHECKING:
    from minidiff.pipeline.pipeline import Pipeline

StepFunction = Callable[[Any, int, Any, dict[str, Tensor]], Mapping[str, Tensor] | None]

# diffusers' name of a tensor → the network's argument
NETWORK_INPUTS = {
    "prompt_embeds": ("encoder_hidden_states",),
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
        inputs += list(NETWORK_INPUTS)[: 3 if pipe.prompts.adds_text_time else 1]
    for name in names:
        one_of("callback_on_step_end_tensor_inputs", name, ("latents", "denoised", *inputs))
        varies = guidance.interval is not None or guidance.autoguidance != 1 or pipe.wraps
        if varies and name in inputs:
            raise InvalidArgument(
                f"callback_on_step_end_tensor_inputs cannot have {name!r} with guidance_interval, "
                "autoguidance_scale or pipe.wraps"
            )
    return partial(StepEnd, pipe, function, names)
