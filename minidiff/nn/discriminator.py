"""A discriminator that classifies the patches of an image as real or decoded.

    x (B, C, H, W) ─ [4×4 convolution, half the size ─ norm ─ leaky ReLU]ⁿ ─ 3×3 ─ (B, 1, h, w)

Each output is the logit of its receptive field, a patch of the image. The network is used in
training only, so it has no folder.

Source: Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks",
https://arxiv.org/abs/1611.07004, section 3.2.2. Their batch norm would make the images of a batch
depend on each other; here the norm is over groups of channels.
"""

import math
from collections.abc import Sequence

from torch import nn

from minidiff.nn.blocks.layers import GroupNorm

EPS = 1e-5
SLOPE = 0.2  # slope of the leaky ReLU for negative values


class PatchDiscriminator(nn.Sequential):
    """Images (B, C, H, W) to logits (B, 1, ⌊H/2ⁿ⌋, ⌊W/2ⁿ⌋), positive for real patches.

    Args:
        in_channels: C.
        channels: channels of the n levels. A patch is 5·2ⁿ − 2 pixels wide: 18 for two levels.
    """

    def __init__(self, in_channels: int, channels: Sequence[int] = (32, 64)) -> None:
        first, *others = channels  # no norm on the first level, which would remove the brightness
        layers = [nn.Conv2d(in_channels, first, 4, 2, 1), nn.LeakyReLU(SLOPE)]
        for before, width in zip(channels, others, strict=False):
            layers.append(nn.Conv2d(before, width, 4, 2, 1))
            layers.append(GroupNorm(math.gcd(width, 8), width, EPS, nn.LeakyReLU(SLOPE)))
        super().__init__(*layers, nn.Conv2d(channels[-1], 1, 3, padding=1))
