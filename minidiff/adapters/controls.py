"""Images made of training images, on which a network is conditioned: edges, scribbles, masks.

`WithControl` puts them behind the labels of a batch, so that the training loop need not know them:

    labels (B, …)  →  (B, L + C·H·W)      numbers of the label or caption, and bytes of the image

`ControlLearner` reads them there. Only the ControlNet has gradients, the model is frozen.

Source of the edges: Sobel & Feldman 1968, a 3×3 gradient; here the largest over the channels.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.adapters.learner import Frozen
from minidiff.data.protocol import Data
from minidiff.nn import ControlNet
from minidiff.pipeline import Pipeline
from minidiff.text.conditioning import Condition, ConditionConfig
from minidiff.training.learner import Learner

EDGE = 0.1  # gradient of an edge, where 1 is a full step from black to white in one channel,
THIN = 0.7  # and as a fraction of the largest gradient nearby, which keeps edges thin
INK = 0.15  # distance from the background, in the channel where it is largest
Picture = Callable[[Tensor], Tensor]


def edges(images: Tensor) -> Tensor:
    """Return where colours change: 1 or 0, float32 (B, 1, H, W), of images (B, C, H, W) in [−1, 1].

    The gradient is Sobel's, at the border of the repeated image.
    """
    kernel = images.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    channels = images.shape[1]
    padded = F.pad(images / 2 + 0.5, (1, 1, 1, 1), mode="replicate")
    both = torch.stack([kernel, kernel.T])[:, None].repeat(channels, 1, 1, 1)
    gradients = F.conv2d(padded, both, groups=channels).unflatten(1, (channels, 2))
    steep = gradients.norm(dim=2).amax(1, keepdim=True)
    nearby = F.max_pool2d(steep, 5, stride=1, padding=2)
    return ((steep > EDGE) & (steep > THIN * nearby)).float()


def scribble(images: Tensor) -> Tensor:
    """Return thick, coarse edges, as of a drawing by hand; see `edges`."""
    coarse = F.max_pool2d(edges(images), 2, ceil_mode=True)
    height, width = images.shape[-2:]
    return F.interpolate(coarse, scale_factor=2)[..., :height, :width]


def mask(images: Tensor) -> Tensor:
    """Return where an image differs from its background, the median colour of its border."""
    sides = (images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1])
    background = torch.cat(sides, dim=-1).median(dim=-1).values[..., None, None]
    far = (images - background).abs().amax(1, keepdim=True) / 2
    return (far > INK).float()


# Names of `--control`, and their functions from images (B, C, H, W) in [−1, 1] to (B, 1, H, W).
PICTURES: dict[str, Picture] = {"edges": edges, "scribble": scribble, "mask": mask}


class WithControl(Data):
    """Data with an image made of every image behind its label.

    Args:
        data: images.
        name: name of the function, for digests.
        picture: function from images (B, C, H, W) in [−1, 1] to images (B, C', H, W) in [0, 1];
            they are kept as bytes.
    """

    fixed_options: ClassVar[Mapping[str, Any]] = {"shift": 0, "flip": False}  # would move x alone

    def __init__(self, data: Data, name: str, picture: Picture) -> None:
        self.data, self.kind, self.picture = data, name, picture
        self.name, self.class_names = data.name, data.class_names
        self.decoder = data.decoder

    def __len__(self) -> int:
        return len(self.data)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image: (C, H, W)."""
        return self.data.shape

    def to(self, device: torch.device | str) -> "WithControl":
        """Return the data with its batches on `device`."""
        return WithControl(self.data.to(device), self.kind, self.picture)

    def batch(self, index: Tensor, position: int = 0) -> tuple[Tensor, Tensor]:
        """Return the images at `index`, and their labels with the images made; see `Data.batch`."""
        x, labels = self.data.batch(index, position)
        return x, joined(labels, self.picture(x))

    def condition(self, config: ConditionConfig) -> Condition:
        return self.data.condition(config)

    def example_prompts(self, n: int) -> list[str] | None:
        return self.data.example_prompts(n)

    def digests(self) -> dict[str, str]:
        """Return those of the data, and the name of what is made."""
        return self.data.digests() | {"control": self.kind}


def joined(labels: Tensor | None, images: Tensor) -> Tensor:
    """Return labels (B, …) or None with images (B, C, H, W) in [0, 1] behind them, int64 (B, n)."""
    made = (images * 255).round().to(torch.int64).flatten(1)
    return made if labels is None else torch.cat([labels.reshape(len(made), -1), made], dim=1)


def split_labels(labels: Tensor, size: tuple[int, int, int]) -> tuple[Tensor | None, Tensor]:
    """Return the labels of a batch of `WithControl`, and images float32 (B, *size) in [0, 1]."""
    count = size[0] * size[1] * size[2]
    own, bytes_ = labels[:, :-count], labels[:, -count:]
    images = bytes_.unflatten(1, size).float() / 255
    return (None if not own.shape[1] else own), images


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
