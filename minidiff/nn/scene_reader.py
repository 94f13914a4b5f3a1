"""A classifier that answers several questions about one picture.

Convolutions as in `FeatureNet`, but where things are must not be averaged away: what is left of
the picture is 4×4 cells, which one linear layer reads as a whole.

    x (B, C, H, W) → stages → cells (B, W₃, 4, 4) → features (B, D) → linear → logits (B, K, Q)
"""

from torch import Tensor, nn

from minidiff.errors import whole_number
from minidiff.nn.classifier import FeatureNet

CELLS = 4  # a side


class SceneReader(nn.Module):
    """Q classifiers of K classes on features in common.

    Args:
        channels: C of the images.
        num_classes: K; a question with fewer answers leaves the last ones alone.
        questions: Q.
        widths: channels of the three stages.
        features: D. The defaults have 200,000 parameters, so the weights file stays below 1 MB.
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
        questions, features = (
            whole_number("questions", questions, 1),
            whole_number("features", features, 1),
        )
        self.stages = FeatureNet(channels, num_classes, widths).stages
        self.cells = nn.Sequential(
            nn.AdaptiveMaxPool2d(CELLS),
            nn.Flatten(),
            nn.Linear(CELLS**2 * widths[-1], features),
            nn.ReLU(),
        )
        self.head = nn.Linear(features, num_classes * questions)
        self.shape = (num_classes, questions)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Read images in [−1, 1], float (B, C, H, W) with H, W ≥ 16.

        Returns:
            logits (B, K, Q) and features (B, D), the latter ≥ 0.
        """
        features = self.cells(self.stages(x))
        return self.head(features).unflatten(1, self.shape), features
