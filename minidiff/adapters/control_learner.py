"""The learner of a ControlNet: only the copy has gradients, the model is shared and frozen."""

import torch
from torch import Tensor, nn

from minidiff.adapters.controls import split_labels
from minidiff.adapters.learner import Frozen
from minidiff.nn import ControlNet
from minidiff.pipeline import Pipeline
from minidiff.text.conditioning import Condition
from minidiff.training.learner import Learner


class ControlLearner(Learner):
    """A ControlNet, trained through a frozen model, on labels of `controls.WithControl`.

    Args:
        pipe: the model.
        net: ControlNet of one channel for its network.
        examples: control images of pictures along the way, (N, 1, H, W).
    """

    def __init__(self, pipe: Pipeline, net: ControlNet, examples: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.examples = examples
        self.net = net.to(memory_format=torch.channels_last)
        self.frozen, self.size = Frozen(pipe, Learner.of(pipe)), (1, *pipe.image_shape[1:])

    @property
    def condition(self) -> Condition:
        """The condition of the frozen model."""
        return self.frozen.learner.condition

    def _apply(self, fn, recurse: bool = True) -> "ControlLearner":
        self.frozen.learner._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def text_parameters(self) -> set[nn.Parameter]:
        return set()

    def hide(self, labels: Tensor, hidden: Tensor) -> Tensor:
        """Return labels whose caption or class is hidden; the control image stays."""
        count = self.size[1] * self.size[2]
        own, control = labels[:, :-count], labels[:, -count:]
        if not own.shape[1]:
            return labels
        own = super().hide(own[:, 0] if self._has_classes else own, hidden)
        return torch.cat([own.reshape(len(labels), -1), control], dim=1)

    @property
    def _has_classes(self) -> bool:
        return self.frozen.pipe.prompts is None

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Return the output of the model with the ControlNet's residuals."""
        own, image = split_labels(labels, self.size)
        if own is not None and self._has_classes:
            own = own[:, 0]
        with torch.no_grad():
            condition = self.condition(own)
        residuals = self.net(x, t, image, **condition)
        return self.frozen.learner.unet(x, t, residuals=residuals, **condition)

    def pipeline(self, like: Pipeline) -> Pipeline:
        """Return the model with the ControlNet."""
        other = like.with_controls([self.net])
        other.example = {} if self.examples is None else {"control_image": self.examples}
        return other
