"""The adapters of a pipeline: what is loaded, at which scale, above which base.

The pipeline's networks are then sums W + Σ s·Δ in copies that share all unchanged weights with the
base. The base is kept: at scale 0, and after the last adapter is removed, it is the network itself.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiff.adapters.change import Change, with_weights
from minidiff.adapters.words import check_word, with_words
from minidiff.errors import InvalidArgument, one_of, real_number
from minidiff.text.prompts import PromptsXL

if TYPE_CHECKING:
    from minidiff.pipeline import Pipeline


class Adapter(NamedTuple):
    """What was learned of a model.

    Attributes:
        change: differences of weights of "unet.…", "text_encoder.…" and "text_encoder_2.…".
        words: vectors (n, d) of new words.
    """

    change: Change
    words: Mapping[str, Tensor]


@dataclass(frozen=True)
class Stack:
    """The adapters of a pipeline, and the networks without them.

    Attributes:
        unet, prompts: the base.
        adapters: adapter and scale by name.
        below: the stack that was fused into the base; None for none.
    """

    unet: nn.Module
    prompts: Any
    adapters: Mapping[str, tuple[Adapter, float]]
    below: "Stack | None" = None

    @property
    def networks(self) -> list[nn.Module]:
        """All networks of the base, of the adapters and of the stacks below."""
        encoders = () if self.prompts is None else self.prompts.encoders
        changes = (adapter.change for adapter, _ in self.adapters.values())
        return [self.unet, *encoders, *changes, *(self.below.networks if self.below else ())]

    def with_adapters(self, adapters: Mapping[str, tuple[Adapter, float]]) -> "Stack":
        """Return the same base with other adapters."""
        return replace(self, adapters=dict(adapters))

    @torch.no_grad()
    def parts(self) -> tuple[nn.Module, Any]:
        """Return U-Net and prompts with the adapters of a scale other than 0.

        The sums are made in the order of the names, so that they do not depend on the order in
        which adapters were loaded.
        """
        active = [self.adapters[n] for n in sorted(self.adapters) if self.adapters[n][1] != 0]
        sums: dict[str, Tensor] = {}
        for adapter, scale in active:
            for name, delta in adapter.change.sums(scale).items():
                sums[name] = sums[name] + delta if name in sums else delta
        unet = changed(self.unet, "unet", sums)
        prompts = _with_encoders(self.prompts, sums)
        words = [adapter.words for adapter, _ in active if adapter.words]
        return unet, reduce(with_words, words, prompts)


def changed(network: nn.Module, part: str, sums: Mapping[str, Tensor]) -> nn.Module:
    """Return a network with differences of its weights; the network itself where there are none.

    Args:
        network: the base.
        part: its name at the beginning of names: "unet".
        sums: differences by name.
    """
    own = {n.removeprefix(f"{part}."): d for n, d in sums.items() if n.startswith(f"{part}.")}
    if not own:
        return network
    return with_weights(
        network, {name: _sum(network.get_parameter(name), delta) for name, delta in own.items()}
    )


def _sum(weight: Tensor, delta: Tensor) -> Tensor:
    """Return weight + delta, added in float32 or wider, in the type and layout of the weight."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide) + delta.to(weight.device, wide)
    return torch.empty_like(weight).copy_(total)


def _with_encoders(prompts: Any, sums: Mapping[str, Tensor]) -> Any:
    """Return prompts whose text encoders have changed weights."""
    if prompts is None or not any(name.startswith("text_encoder") for name in sums):
        return prompts
    other = copy.copy(prompts)
    other.text_encoder = changed(prompts.text_encoder, "text_encoder", sums)
    if isinstance(prompts, PromptsXL):
        other.text_encoder_2 = changed(prompts.text_encoder_2, "text_encoder_2", sums)
    return other


def adapted(pipe: "Pipeline", adapters: Mapping[str, tuple[Adapter, float]]) -> "Pipeline":
    """Return a pipeline with these adapters; the given one stays as it is."""
    other = copy.copy(pipe)
    set_adapters(other, adapters)
    return other


def stack_of(pipe: "Pipeline") -> Stack:
    """Return the adapters of a pipeline, above its networks where there are none."""
    return pipe.stack or Stack(pipe.unet, pipe.prompts, {})


def set_adapters(pipe: "Pipeline", adapters: Mapping[str, tuple[Adapter, float]]) -> None:
    """Replace the adapters of a pipeline.

    Raises:
        InvalidArgument: an engine evaluates the networks, or two adapters have one new word.
    """
    if pipe.engines:
        raise InvalidArgument(
            "adapters must be set before optimize(), which keeps the weights that it finds"
        )
    stack = stack_of(pipe).with_adapters(adapters)
    pipe.unet, pipe.prompts = stack.parts()
    pipe.stack = stack if stack.adapters or stack.below else None


def check_scale(scale: Any) -> float:
    """Return the scale of an adapter. Raises InvalidArgument."""
    return real_number("scale", scale, -100, 100)


def add(pipe: "Pipeline", name: str, adapter: Adapter, scale: float) -> "Pipeline":
    """Load an adapter. Raises InvalidArgument for a name that is taken, see `set_adapters`."""
    loaded = dict(stack_of(pipe).adapters)
    if name in loaded:
        raise InvalidArgument(
            f"name must be new, an adapter {name!r} is loaded: remove_adapter({name!r}), or give "
            "another name"
        )
    for word in adapter.words:
        check_word(stack_of(pipe).prompts, word)
        if owner := next((n for n, (other, _) in loaded.items() if word in other.words), None):
            raise InvalidArgument(f"word must be new to the model, adapter {owner!r} has {word!r}")
    set_adapters(pipe, {**loaded, name: (adapter, check_scale(scale))})
    return pipe


def remove(pipe: "Pipeline", name: str) -> "Pipeline":
    """Remove an adapter. Raises InvalidArgument where there is none of that name."""
    loaded = dict(stack_of(pipe).adapters)
    one_of("name", name, loaded)
    del loaded[name]
    set_adapters(pipe, loaded)
    return pipe


def set_scale(pipe: "Pipeline", name: str, scale: float) -> "Pipeline":
    """Set the scale of an adapter. Raises InvalidArgument."""
    loaded = dict(stack_of(pipe).adapters)
    one_of("name", name, loaded)
    set_adapters(pipe, {**loaded, name: (loaded[name][0], check_scale(scale))})
    return pipe


def fuse(pipe: "Pipeline") -> "Pipeline":
    """Make the adapters a part of the networks. Raises InvalidArgument without adapters."""
    if pipe.stack is None or not pipe.stack.adapters:
        raise InvalidArgument("fuse() needs an adapter, this pipeline has none")
    pipe.stack = Stack(pipe.unet, pipe.prompts, {}, below=pipe.stack)
    return pipe


def unfuse(pipe: "Pipeline") -> "Pipeline":
    """Undo the last `fuse`.

    Raises:
        InvalidArgument: nothing is fused, or adapters were loaded above it.
    """
    stack = pipe.stack
    if stack is None or stack.below is None:
        raise InvalidArgument("unfuse() needs a pipeline after fuse()")
    if stack.adapters:
        names = ", ".join(stack.adapters)
        raise InvalidArgument(f"unfuse() needs the adapters loaded since fuse() removed: {names}")
    pipe.stack = stack.below
    pipe.unet, pipe.prompts = pipe.stack.parts()
    return pipe
