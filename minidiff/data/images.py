"""Images stored on the device as bytes.

A data set is one uint8 tensor (N, C, H, W). The inputs of a network are floats in [−1, 1]:

    x = u / 127.5 − 1        u = round(127.5·(x + 1)), clamped to 0..255

A batch takes one gather and one multiply-add on the device, so no worker processes are needed.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minidiff.data.protocol import Data, check_labels, digest
from minidiff.errors import InvalidArgument
from minidiff.images.pixels import to_float
from minidiff.runtime.checks import instance


@dataclass(frozen=True, eq=False)  # eq: tensors have no single truth value to compare by
class ImageData(Data):
    """Images as bytes, all with a class label or all without.

    Attributes:
        name: name of the data in error messages and reports.
        images: uint8 (N, C, H, W), C = 1 grey or 3 RGB.
        labels: int64 (N,) in 0..len(class_names) − 1, or None.
        class_names: one name per class, in label order; empty without labels.

    Raises:
        InvalidArgument: a dtype, a shape or a label does not fit this description.
    """

    name: str
    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...]
    is_stored: ClassVar[bool] = True

    def __post_init__(self) -> None:
        images = instance(Tensor)("images", self.images)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise InvalidArgument(
                "images must be uint8 (N, C, H, W) with C = 1 or 3, "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        check_labels(self.labels, len(images), self.class_names)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image: (C, H, W)."""
        return tuple(self.images.shape[1:])

    def to(self, device: torch.device | str) -> "ImageData":
        """Return the data with its tensors on `device`."""
        labels = None if self.labels is None else self.labels.to(device)
        return ImageData(self.name, self.images.to(device), labels, self.class_names)

    def digests(self) -> dict[str, str]:
        """Return digests of the pixels and of the labels."""
        labels = [] if self.labels is None else [self.labels]
        return {"pixels": digest(self.images), "labels": digest(*labels)}

    def batch(self, index: Tensor, position: int = 0) -> tuple[Tensor, Tensor | None]:
        """Return the images at `index` as inputs of a network.

        Args:
            index: image numbers, int64 (B,), on any device.
            position: unused, because an image is the same at every position of the stream.

        Returns:
            x float32 (B, C, H, W) in [−1, 1] and the labels int64 (B,) or None, both on the
            device of the data.
        """
        # A blocking copy to the device would stall the training loop at each step.
        index = index.to(self.images.device, non_blocking=True)
        labels = None if self.labels is None else self.labels[index]
        return to_float(self.images[index]), labels
