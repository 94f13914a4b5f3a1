"""What is trained: a fresh pipeline for a config and data, and all its trained parts as one module.

What a network is told beside image and time, a class or a text, is a part of that module: the loop
that trains it knows neither.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minidiff.nn import UNet
from minidiff.pipeline import Pipeline
from minidiff.runtime.shapes import append_dims
from minidiff.text.prompts import WordPrompts


class ClassLabels(nn.Module):
    """What a network with classes is told: the label itself, or that of "no class".

    Attributes:
        null: what stands for "told nothing", an entry of what the data tell.
    """

    def __init__(self, null: int) -> None:
        super().__init__()
        self.register_buffer("null", torch.tensor(null), persistent=False)

    def forward(self, told: Tensor | None) -> Mapping[str, Tensor]:
        return {} if told is None else {"class_labels": told}


class Texts(nn.Module):
    """What a network that looks at a text is told: the tokens of its words, encoded.

    Attributes:
        prompts: whose text encoder is trained.
        null: the token numbers of no text, (L,).
    """

    def __init__(self, prompts: WordPrompts) -> None:
        super().__init__()
        self.prompts, self.text_encoder = prompts, prompts.text_encoder
        self.register_buffer("null", prompts.tokens([""])[0], persistent=False)

    def forward(self, told: Tensor) -> Mapping[str, Tensor]:
        return self.prompts.encode(told)


class Learner(nn.Module):
    """All that is trained, as one module: the network, and what turns what it is told into inputs.

    Args:
        unet: (x, t, **condition) → output.
        condition: a module that maps what the data tell of a batch, (B, …) or None, to the
            condition; its `null` is the entry that means nothing.
    """

    def __init__(self, unet: UNet, condition: ClassLabels | Texts) -> None:
        super().__init__()
        self.unet, self.condition = unet, condition
        for name, layer in self.named_modules():
            if name.endswith((".to_k", ".k_proj")) and layer.bias is not None:
                # It adds the same to all scores of a query, which softmax does not see. Its
                # gradient is rounding, and Adam would make whole steps of that.
                layer.bias.requires_grad_(False)

    def trained(self) -> list[nn.Parameter]:
        """The parameters that training changes."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @classmethod
    def of(cls, pipe: Pipeline) -> "Learner":
        """What is trained of a pipeline."""
        prompts = pipe.prompts
        return cls(pipe.unet, Texts(prompts) if prompts else ClassLabels(len(pipe.class_names)))

    def pipeline(self, like: Pipeline) -> Pipeline:
        """Another pipeline with these networks."""
        other = copy.copy(like)
        other.unet = self.unet
        if isinstance(self.condition, Texts):
            other.prompts = self.condition.prompts
        return other

    def forward(self, x: Tensor, t: Tensor, told: Tensor | None) -> Tensor:
        return self.unet(x, t, **self.condition(told))

    def hide(self, told: Tensor | None, hidden: Tensor) -> Tensor | None:
        """What the data tell (B, …), with `null` where `hidden` (B,) says so."""
        if told is None:
            return None
        hidden = hidden.to(told.device, non_blocking=True)
        return torch.where(append_dims(hidden, told.ndim), self.condition.null, told)
