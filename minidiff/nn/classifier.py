"""A small classifier whose penultimate layer is the space in which samples are measured.

Three stages of convolutions, the first and the second followed by 2×2 max pooling, then the mean
over space: the features. Because of that mean the same layers take 16×16 and 28×28 images.

    x (B, C, H, W) → stages → mean over (H, W) → features (B, D) → linear → logits (B, K)
"""

from torch import Tensor, nn

from minidiff.errors import InvalidArgument, whole_number


class FeatureNet(nn.Module):
    """A convolutional classifier that also returns its features.

    Args:
        channels: C of the images.
        num_classes: K.
        widths: channels of the three stages; the last is D, the number of features. The
            default has 200,000 parameters, so its weights file stays below 1 MB.

    Raises:
        InvalidArgument: an argument is out of range.
    """

    def __init__(
        self,
        channels: int = 1,
        num_classes: int = 10,
        widths: tuple[int, int, int] = (32, 64, 96),
    ) -> None:
        super().__init__()
        channels = whole_number("channels", channels, 1)
        num_classes = whole_number("num_classes", num_classes, 2)
        if len(widths) != 3:
            raise InvalidArgument(f"widths must be three numbers, one a stage, got {widths!r}")
        first, second, third = (whole_number("widths", width, 1) for width in widths)
        self.stages = nn.Sequential(
            _stage(channels, first),
            nn.MaxPool2d(2),
            _stage(first, second),
            nn.MaxPool2d(2),
            _stage(second, third),
        )
        self.head = nn.Linear(third, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Classify images in [−1, 1], float (B, C, H, W) with H, W ≥ 4.

        Returns:
            logits (B, K) and features (B, D), the latter ≥ 0.
        """
        features = self.stages(x).mean(dim=(2, 3))
        return self.head(features), features


def _stage(channels: int, width: int) -> nn.Sequential:
    """Two 3×3 convolutions, each normalised and rectified."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),  # the norm has the bias
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )
