"""The learner of a change: a frozen pipeline, evaluated with W + Δ and with new words.

Only Δ and the words' vectors are its parameters, so snapshots, averages and optimizers hold nothing
else. The frozen networks are shared by all copies.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from minidiff.adapters.change import Change
from minidiff.adapters.stack import Adapter, adapted
from minidiff.adapters.words import TABLE, table_with, with_words
from minidiff.pipeline import Pipeline
from minidiff.text.conditioning import Condition
from minidiff.training.learner import Learner

TEXT_TABLE = f"text_encoder.{TABLE}.weight"


class Frozen:
    """What a learner reads but does not train; copies of the learner share it.

    Args:
        pipe: the pipeline that training starts from.
        learner: its networks, and the new words.
    """

    def __init__(self, pipe: Pipeline, learner: Learner) -> None:
        self.pipe, self.learner = pipe, learner.requires_grad_(False).eval()

    def __deepcopy__(self, memo: dict) -> "Frozen":
        return self


class ChangeLearner(Learner):
    """A learner of differences of weights, and of the vectors of new words.

    Args:
        name: name of the adapter in `Pipeline.adapters`.
        pipe: the start.
        change: differences of weights of "unet.…" and "text_encoder.…".
        words: first vectors (n, d) of new words.
    Raises:
        InvalidArgument: a word exists, is not one word, or its vectors do not fit.
    """

    def __init__(
        self, name: str, pipe: Pipeline, change: Change, words: Mapping[str, Tensor]
    ) -> None:
        nn.Module.__init__(self)
        self.name, self.change = name, change
        self.words = tuple(words)
        self.vectors = nn.ParameterList(rows.clone() for rows in words.values())
        inner = copy.copy(pipe)
        if words:
            # Only the tokenizer knows the words: `forward` puts their vectors behind the table.
            inner.prompts = copy.copy(pipe.prompts)
            inner.prompts.tokenizer = with_words(pipe.prompts, words).tokenizer
        self.frozen = Frozen(pipe, Learner.of(inner))

    @property
    def condition(self) -> Condition:
        """The condition of the frozen networks."""
        return self.frozen.learner.condition

    def _apply(self, fn: Any, recurse: bool = True) -> "ChangeLearner":
        self.frozen.learner._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def text_parameters(self) -> set[nn.Parameter]:
        """Return the differences of the text encoder; new words learn at the full rate."""
        text = getattr(self.change, "text_encoder", None)
        return set() if text is None else set(text.parameters())

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """Return the output of the changed network, see `Learner.forward`."""
        learner = self.frozen.learner
        weights = {
            _place(name): learner.get_parameter(_place(name)) + delta
            for name, delta in self.change.sums().items()
        }
        if self.words:
            prompts, name = self.frozen.pipe.prompts, _place(TEXT_TABLE)
            table = weights.get(name, learner.get_parameter(name))
            weights[name] = table_with(prompts, table, self.vectors)
        return functional_call(learner, weights, (x, t, labels))

    def adapter(self) -> Adapter:
        """Return the change and the words, which share memory with the learner."""
        return Adapter(self.change, dict(zip(self.words, self.vectors, strict=True)))

    def pipeline(self, like: Pipeline) -> Pipeline:
        """Return the start with the adapter loaded."""
        return adapted(like, {self.name: (self.adapter(), 1.0)})

    @torch.no_grad()
    def refresh(self, pipe: Pipeline) -> None:
        """Add up the weights again."""
        pipe.unet, pipe.prompts = pipe.stack.parts()


def _place(name: str) -> str:
    """Return the name of a weight in a `Learner`, whose condition holds the text encoder."""
    return f"condition.{name}" if name.startswith("text_encoder.") else name
