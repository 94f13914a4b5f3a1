"""Attention: positions of an image that look at each other, or at the tokens of a text.

Every position asks (q); what it looks at offers (k) and holds (v). With d channels a head,

    Attention(q, k, v) = softmax(q·kᵀ / √d) · v                               (eq. 1)

Source: Vaswani et al. 2017, "Attention Is All You Need", https://arxiv.org/abs/1706.03762; for
images Ho et al. 2020, "Denoising Diffusion Probabilistic Models",
https://arxiv.org/abs/2006.11239, appendix B.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidiff.nn.blocks.layers import Divide, GroupNorm, widened

_KERNELS = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}


class Context(NamedTuple):
    """What cross-attention reads.

    Attributes:
        tokens: (B, L, C).
        bias: (B, 1, 1, L), added to the logits; None for no bias.
    """

    tokens: Tensor
    bias: Tensor | None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of several heads, the softmax in float32 or wider.

    Args:
        q: (B, N, heads · d); k, v: (B, L, heads · d).
        bias: broadcasts to (B, heads, N, L): added to the logits, or True for what to look at.
        causal: in place of a bias: a position looks at itself and at those before it.
        dropout: probability with which a weight of the softmax is zeroed.
    Returns:
        (B, N, heads · d), of the dtype of q.
    """
    split = [x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    # Autocast would narrow what was just widened; it has no say in the softmax.
    differentiated = q.is_cuda and torch.is_grad_enabled()
    with (
        torch.autocast(q.device.type, enabled=False),
        without_cudnn() if differentiated else nullcontext(),
    ):
        wide = [widened(x) for x in split]
        if bias is not None and bias.is_floating_point():
            bias = bias.to(wide[0].dtype)
        out = F.scaled_dot_product_attention(  # eq. 1
            *wide, attn_mask=bias, is_causal=causal, dropout_p=dropout
        )
    return out.to(q.dtype).transpose(1, 2).flatten(2)


def without_cudnn() -> AbstractContextManager:
    """Within it, attention takes none of cuDNN's kernels where another one is allowed.

    Theirs are torch 2.13's first choice for 16 bits on an H100, and their backward pass is reported
    to say NaN for q at 64 positions, those of 8×8, or 64 more than a multiple of 128, wherever all
    logits of a position are below about -89: https://github.com/pytorch/pytorch/issues/196678,
    seen there with a mask. Whether it happens without one has not been tried here.
    """
    return sdpa_kernel(allowed) if (allowed := _allowed()) else nullcontext()


def _allowed() -> list[SDPBackend]:
    return [kernel for kernel, enabled in _KERNELS.items() if enabled()]


# Reading the caller's choice would break a compiled graph. The decorator that sets this mark,
# torch.compiler.assume_constant_result, imports torch._dynamo, which takes as long as torch.
_allowed._dynamo_marked_constant = True


class NoAttention(nn.Module):
    """Where a level has none."""

    def forward(self, x: Tensor, context: Context | None) -> Tensor:
        return x


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

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """`context` is for blocks that look at a text; this one looks at the picture alone."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, positions, C)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        out = self.to_out[0](attend(q, k, v, self.heads))
        return self.rescale(x + out.transpose(1, 2).unflatten(2, x.shape[2:]))
