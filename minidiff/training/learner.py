"""Learner: all trained parts of a pipeline as one module.

The condition, a class or an encoded text, is a part of that module: the loop that trains it knows
neither.
"""

import copy

import torch
from torch import Tensor, nn

from minidiff.data.conditioning import Captions, ClassLabels, Condition
from minidiff.nn import UNet
from minidiff.pipeline import Pipeline
from minidiff.runtime.shapes import append_dims


class Learner(nn.Module):
    """All that is trained, as one module: the network, and what turns what it is told into inputs.

    Args:
        unet: (x, t, **condition) → output.
        condition: a module that maps what the data tell of a batch, (B, …) or None, to the
            condition; its `null` is the entry that means nothing.
    """

    def __init__(self, unet: UNet, condition: Condition) -> None:
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
        if pipe.prompts is not None:
            return cls(pipe.unet, Captions(pipe.prompts))
        return cls(pipe.unet, ClassLabels(len(pipe.class_names), pipe.has_null_class))

    def pipeline(self, like: Pipeline) -> Pipeline:
        """Another pipeline with these networks."""
        other = copy.copy(like)
        other.unet = self.unet
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
