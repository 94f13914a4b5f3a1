"""Self-attention over the positions of an image.

Every position asks (q), offers (k) and holds (v); with d channels a head,

    Attention(q, k, v) = softmax(q·kᵀ / √d) · v                               (eq. 1)

and the result is added to what came in. Source: Vaswani et al. 2017, "Attention Is All You
Need", https://arxiv.org/abs/1706.03762; for images Ho et al. 2020, "Denoising Diffusion
Probabilistic Models", https://arxiv.org/abs/2006.11239, appendix B.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.nn.layers import Divide, GroupNorm, widened


class Attention(nn.Module):
    """Multi-head self-attention with a residual connection, (B, C, *space) -> the same.

    Args:
        channels: C.
        head_dim: channels a head; there are C // head_dim heads, at least one.
        groups: groups of the norm in front, or None for no norm.
        eps: added to the variance in that norm.
        output_scale: the sum of input and attention is divided by this.
    """

    def __init__(
        self,
        channels: int,
        head_dim: int,
        groups: int | None,
        eps: float = 1e-5,
        output_scale: float = 1.0,
    ):
        super().__init__()
        self.heads = channels // head_dim
        inner = self.heads * head_dim  # less than C where head_dim does not divide it
        self.group_norm = GroupNorm(groups, channels, eps) if groups else nn.Identity()
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])  # a list in checkpoints: to_out.0
        self.rescale = nn.Identity() if output_scale == 1 else Divide(output_scale)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, positions, C)
        q, k, v = (
            project(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        # Autocast would narrow what was just widened; it has no say in the softmax.
        with torch.autocast(x.device.type, enabled=False):
            out = F.scaled_dot_product_attention(widened(q), widened(k), widened(v))  # eq. 1
        out = self.to_out[0](out.to(q.dtype).transpose(1, 2).flatten(2))  # (B, positions, C)
        return self.rescale(x + out.transpose(1, 2).unflatten(2, x.shape[2:]))
