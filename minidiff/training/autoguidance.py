"""Autoguidance in training: the averaged weights of an earlier time are kept as guidance network.

Sampling then guides away from that network's output, see `guidance.autoguidance` (Karras et al.
2024, arXiv:2406.02507, which calls it a bad version of the model).
"""

import copy
from collections.abc import Callable

from minidiff.nn import UNet
from minidiff.pipeline import Pipeline
from minidiff.training.config import TrainConfig


class GuidanceNetwork:
    """The guidance network of a run, as an `Extra` of its training.

    Args:
        config: says whether and when the network is kept, and the scale that is stored.
        result: returns the pipeline of the averaged weights so far.
    """

    name = "weaker"  # also in the folders of pipelines

    def __init__(self, config: TrainConfig, result: Callable[[], Pipeline]) -> None:
        self.config, self.result = config, result

    def is_due(self, fraction_done: float) -> bool:
        return self.config.autoguidance_scale != 1 and fraction_done >= self.config.weaker_at

    def make(self) -> UNet:
        return copy.deepcopy(self.result().unet)

    def attach(self, network: UNet) -> None:
        pipe = self.result()
        pipe.weaker, pipe.autoguidance_scale = network, self.config.autoguidance_scale
        # A pipeline without any guidance is built without an interval.
        pipe.guidance_interval = self.config.guidance_interval
