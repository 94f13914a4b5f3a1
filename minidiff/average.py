"""The running average of the weights, which is what is sampled from."""

import copy
import math

import torch
from torch import nn

from minidiff.distributed import local


class EMA:
    """Average of the weights whose memory grows with the run, so it needs no warm-up of its own.

    After update n the average is θ̂ ← β_n·θ̂ + (1 − β_n)·θ with β_n = (1 − 1/n)^k (Karras et al.
    2024, arXiv:2312.02696, eq. 3, k = γ + 1). In closed form θ_s has the weight
    (s/N)^k − ((s−1)/N)^k after N updates: the first weights vanish, and the last share h of the
    run always holds 1 − (1 − h)^k.

    Args:
        model: what to average; copied.
        half_life: the share h of the run that holds half the weight, in (0, 1); 0 keeps only the
            latest weights.
    Attributes:
        model: the copy that holds the average; buffers are the latest.
        updates: n.
    """

    def __init__(self, model: nn.Module, half_life: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.exponent = math.log(0.5) / math.log1p(-half_life) if half_life else math.inf
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the current weights of `model` into the average."""
        self.updates += 1
        new = 1 - (1 - 1 / self.updates) ** self.exponent
        torch._foreach_lerp_(local(self.model.parameters()), local(model.parameters()), new)
        for averaged, latest in zip(self.model.buffers(), model.buffers(), strict=True):
            averaged.copy_(latest)
