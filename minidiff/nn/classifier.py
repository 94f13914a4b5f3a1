"""Small classifiers whose penultimate layer is the feature space for the evaluation of samples.

Three stages of convolutions, each at half the size of the previous one, and a mean over space give
the features. The mean lets the same layers take images of any size.

    x (B, C, H, W) → stages → mean over (H, W) → features (B, D) → linear → logits (B, K)

`FeatureNet` suffices for digits. Photographs need more depth and residual connections:
`ResidualFeatureNet` (K. He et al. 2016, arXiv:1603.05027; S. Zagoruyko and N. Komodakis 2016,
arXiv:1605.07146).
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.errors import InvalidArgument, listed, one_of, whole_number

MAX_WIDTH, MAX_BLOCKS = 4096, 64  # anything above is a typing error


class Classifier(nn.Module):
    """A convolutional classifier that also returns its features.

    Attributes:
        stages: layers from images to maps of D features.
        head: linear layer from the D features to the logits.
    """

    stages: nn.Sequential
    head: nn.Linear

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Classify images in [−1, 1], float (B, C, H, W) with H, W ≥ 4.

        Returns:
            logits (B, K) and features (B, D), the latter ≥ 0.
        """
        features = self.stages(x).mean(dim=(2, 3))
        return self.head(features), features


class FeatureNet(Classifier):
    """A network of two plain convolutions per stage and 2×2 max pooling between stages.

    Args:
        channels: channels C of the images.
        num_classes: number K of classes.
        widths: channels of the three stages; the last is the number D of features. The default
            has 200,000 parameters, so its weights file is below 1 MB.

    Raises:
        InvalidArgument: an argument is out of range.
    """

    def __init__(
        self, channels: int = 1, num_classes: int = 10, widths: tuple[int, int, int] = (32, 64, 96)
    ) -> None:
        super().__init__()
        channels, num_classes, (first, second, third) = _sizes(channels, num_classes, widths)
        self.stages = nn.Sequential(
            _plain_stage(channels, first),
            nn.MaxPool2d(2),
            _plain_stage(first, second),
            nn.MaxPool2d(2),
            _plain_stage(second, third),
        )
        self.head = nn.Linear(third, num_classes)


class ResidualFeatureNet(Classifier):
    """A network of residual blocks with norm and ReLU before each convolution.

    Stages begin with a stride of 2 instead of pooling.

    Args:
        channels, num_classes, widths: C, K and the channels of the stages, as in `FeatureNet`. The
            default has 480,000 parameters: in 16 bits its weights file is below 1 MB.
        blocks: residual blocks per stage, of two 3×3 convolutions each.

    Raises:
        InvalidArgument: an argument is out of range.
    """

    def __init__(
        self,
        channels: int = 3,
        num_classes: int = 10,
        widths: tuple[int, int, int] = (32, 64, 96),
        blocks: int = 2,
    ) -> None:
        super().__init__()
        channels, num_classes, (first, second, third) = _sizes(channels, num_classes, widths)
        blocks = whole_number("blocks", blocks, 1, MAX_BLOCKS)
        self.stages = nn.Sequential(
            nn.Conv2d(channels, first, 3, padding=1, bias=False),
            _residual_stage(first, first, blocks, stride=1),
            _residual_stage(first, second, blocks, stride=2),
            _residual_stage(second, third, blocks, stride=2),
            nn.BatchNorm2d(third),
            nn.ReLU(),
        )
        self.head = nn.Linear(third, num_classes)


class SceneNet(Classifier):
    """Q classifiers of K classes on shared features, for images of several objects.

    A mean over space would lose where an object is. Instead max pooling reduces the image to 4×4
    cells, which one linear layer maps to the features.

    Args:
        channels, num_classes, widths: C, K and the channels of the stages, as in `FeatureNet`.
            With nine questions the default has 220,000 parameters. A question with fewer classes
            does not use the last logits.
        questions: number Q of questions.
        features: number D of features.

    Raises:
        InvalidArgument: an argument is out of range.
    """

    def __init__(
        self,
        channels: int = 3,
        num_classes: int = 10,
        questions: int = 1,
        widths: tuple[int, int, int] = (24, 48, 64),
        features: int = 96,
    ) -> None:
        super().__init__()
        questions = whole_number("questions", questions, 1, MAX_WIDTH)
        features = whole_number("features", features, 1, MAX_WIDTH)
        cells = nn.Sequential(nn.AdaptiveMaxPool2d(4), nn.Flatten())
        self.stages = nn.Sequential(*FeatureNet(channels, num_classes, widths).stages, *cells)
        self.features = nn.Sequential(nn.Linear(16 * widths[-1], features), nn.ReLU())
        self.head = nn.Linear(features, num_classes * questions)
        self.logits = nn.Unflatten(1, (num_classes, questions))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Classify images in [−1, 1], float (B, C, H, W) with H, W ≥ 16.

        Returns:
            logits (B, K, Q) and features (B, D), the latter ≥ 0.
        """
        features = self.features(self.stages(x))
        return self.logits(self.head(features)), features


NETWORKS = {"plain": FeatureNet, "residual": ResidualFeatureNet, "scene": SceneNet}


def build_classifier(architecture: Mapping[str, Any]) -> Classifier:
    """Build a classifier with fresh weights from its name and the arguments of its class.

    Args:
        architecture: "network", a key of `NETWORKS` ("plain" if missing), "channels",
            "num_classes", and further arguments of the class.

    Raises:
        InvalidArgument: another name, an unknown argument, or one out of range.
    """
    if not isinstance(architecture, Mapping):
        raise InvalidArgument(f"architecture must be a mapping, got {architecture!r}")
    name, arguments = architecture.get("network", "plain"), dict(architecture)
    one_of("network", name, NETWORKS)
    arguments.pop("network", None)
    try:
        return NETWORKS[name](**arguments)
    except TypeError as error:
        raise InvalidArgument(f"network {name!r} takes no such arguments: {error}") from None


def _sizes(
    channels: int, num_classes: int, widths: tuple[int, int, int]
) -> tuple[int, int, tuple[int, ...]]:
    """Check the three arguments that the networks share and return them."""
    return (
        whole_number("channels", channels, 1, MAX_WIDTH),
        whole_number("num_classes", num_classes, 2, MAX_WIDTH),
        tuple(whole_number("widths", w, 1, MAX_WIDTH) for w in listed("widths", widths, 3)),
    )


def _plain_stage(channels: int, width: int) -> nn.Sequential:
    """Return two 3×3 convolutions, each followed by a norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),  # the norm has the bias
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


def _residual_stage(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = ResidualBlock(channels, width, stride)
    return nn.Sequential(first, *(ResidualBlock(width, width, 1) for _ in range(blocks - 1)))


class ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), with a 1×1 convolution if the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        changes = channels != width or stride != 1
        self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to (B, width, ⌈H/stride⌉, ⌈W/stride⌉)."""
        y = F.relu(self.norm1(x))
        kept = x if self.shortcut is None else self.shortcut(y)
        return kept + self.conv2(F.relu(self.norm2(self.conv1(y))))
