"""The space of a network of points: they are drawn as they are, with nothing to encode or decode.

`space_of` chooses between this and the space of images; the pipeline knows no kinds of samples.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from minidiff.errors import InvalidArgument, one_of
from minidiff.nn import MLP, UNet
from minidiff.pipeline.space import LatentSpace, Vae
from minidiff.runtime.files import Config


class PointSpace(NamedTuple):
    """Samples that are points of D dimensions; the methods are those of `LatentSpace`.

    Attributes:
        config: options of the network.
    """

    config: Config
    takes_mask = False
    sheet = 2000  # samples in a picture: enough to show a density

    @property
    def channels(self) -> int:
        """Dimension D of the points."""
        return self.config.in_channels

    image_channels = channels

    def shape(self, height: int | None = None, width: int | None = None) -> tuple[int]:
        """Return (D,). Raises InvalidArgument where a height or width is given."""
        _refuse(height=height, width=width)
        return (self.channels,)

    def image_size(self, shape: Sequence[int]) -> tuple[()]:
        """Return (): points have no height and width."""
        return ()

    def original(self, image: Any, mask: Any) -> None:
        """Refuse images, which cannot become points. Raises InvalidArgument."""
        _refuse(image=image, mask_image=mask)

    def check_output(self, output_type: str) -> None:
        """Refuse an output type that points do not have. Raises InvalidArgument."""
        one_of("output_type of points", output_type, ("np", "pt", "latent"))

    def output(self, points: Tensor, output_type: str) -> Any:
        """Return points (N, D) as float32 array ("np") or as they are ("pt")."""
        return points.float().cpu().numpy() if output_type == "np" else points

    def encode(self, points: Tensor, generator: Any = None) -> Tensor:
        """Return the points."""
        return points

    mode = decode = encode


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise InvalidArgument(f"{name} must be None: this model draws points, got {value!r}")


def space_of(network: UNet | MLP, vae: Vae | None) -> LatentSpace | PointSpace:
    """Return the space of a network. Raises InvalidArgument for points with a vae."""
    if not isinstance(network, MLP):
        return LatentSpace(network.config, vae)
    if vae is not None:
        raise InvalidArgument(f"vae must be None for points, got {type(vae).__name__}")
    return PointSpace(network.config)
