"""Learner: all trained parts of a pipeline as one module.

The condition (class labels, or an encoded text) is a part of that module, so the loop that trains
it need not know it. A custom learner decides what of a pipeline is trained: it freezes parameters
(`requires_grad_(False)`) or adds its own, and `pipeline` says how they are used afterwards.
"""

import copy

import torch
from torch import Tensor, nn

from minidiff.nn import UNet
from minidiff.pipeline import Pipeline
from minidiff.runtime.shapes import append_dims
from minidiff.text.conditioning import Captions, ClassLabels, Condition


class Learner(nn.Module):
    """All trained parts as one module: the network, and the condition that makes its inputs.

    Args:
        unet: (x, t, **condition) → output.
        condition: module from the labels of a batch to further inputs of the network.
    """

    def __init__(self, unet: UNet, condition: Condition) -> None:
        super().__init__()
        self.unet, self.condition = unet, condition
        for name, layer in self.named_modules():
            if name.endswith((".to_k", ".k_proj")) and layer.bias is not None:
                # It adds the same number to all scores of a query, which softmax ignores. Its
                # gradient is rounding, and Adam would turn that into whole steps.
                layer.bias.requires_grad_(False)

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that training changes."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def text_parameters(self) -> set[nn.Parameter]:
        """Return the parameters that `TrainConfig.text_learning_rate` is for."""
        return set(self.condition.parameters())

    @classmethod
    def of(cls, pipe: Pipeline) -> "Learner":
        """Return the learner of a pipeline's network and text encoder."""
        if pipe.prompts is not None:
            return cls(pipe.unet, Captions(pipe.prompts))
        return cls(pipe.unet, ClassLabels(len(pipe.class_names), pipe.has_null_class))

    def pipeline(self, like: Pipeline) -> Pipeline:
        """Return a copy of a pipeline with these networks."""
        other = copy.copy(like)
        other.unet, other.prompts = self.unet, self.condition.prompts
        return other

    def refresh(self, pipe: Pipeline) -> None:
        """Bring a result of `pipeline` up to date, where it does not share the weights."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """Return the network's output for noisy images (B, C, *space), times (B,) and labels."""
        return self.unet(x, t, **self.condition(labels))

    def hide(self, labels: Tensor | None, hidden: Tensor) -> Tensor | None:
        """Return labels (B, …) with the condition's `null` where `hidden` (B,) is True."""
        if labels is None:
            return None
        hidden = hidden.to(labels.device, non_blocking=True)
        return torch.where(append_dims(hidden, labels.ndim), self.condition.null, labels)
