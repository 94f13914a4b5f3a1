"""Attention of the positions of an image to each other, or to the tokens of a text.

Every position has a query q; every position or token that it attends to has a key k and a value v.
With d channels per head,

    Attention(q, k, v) = softmax(q·kᵀ / √d) · v                               (eq. 1)

Sources: Vaswani et al. 2017, "Attention Is All You Need", https://arxiv.org/abs/1706.03762; for
images Ho et al. 2020, "Denoising Diffusion Probabilistic Models",
https://arxiv.org/abs/2006.11239, appendix B.
"""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidiff.errors import CheckpointError
from minidiff.nn.blocks.layers import Divide, GroupNorm, widened
from minidiff.runtime.tensors import Stored

# Names of picture attention in 2022, which published checkpoints still have.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD = re.compile(rf"(.*\battentions\.\d+)\.({'|'.join(OLD_NAMES)})\.(weight|bias)")
_NEW = re.compile(rf".*\battentions\.\d+\.({'|'.join(OLD_NAMES.values())})\.(weight|bias)")

_KERNELS = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}


class Context(NamedTuple):
    """The tokens that cross-attention attends to.

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
    """Compute multi-head attention, with the softmax in float32 or wider.

    Args:
        q: queries (B, N, heads · d).
        k: keys (B, L, heads · d).
        v: values (B, L, heads · d).
        heads: number of heads.
        bias: broadcasts to (B, heads, N, L): added to the logits, or bool, True to attend.
        causal: attention to the same and earlier positions only; excludes a bias.
        dropout: probability of zeroing a weight of the softmax.
    Returns:
        (B, N, heads · d), of the dtype of q.
    """
    split = [x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    # Autocast would narrow these tensors again before the softmax.
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
    """Return a context in which attention avoids cuDNN's kernels if another one is allowed.

    cuDNN's are torch 2.13's first choice for 16 bits on an H100. Their backward pass is reported
    to return NaN for q if all logits of a position are below about -89, with 64 positions (8×8) or
    64 more than a multiple of 128: https://github.com/pytorch/pytorch/issues/196678, seen there
    with a mask. It has not been tested here without a mask.
    """
    return sdpa_kernel(allowed) if (allowed := _allowed()) else nullcontext()


def _allowed() -> list[SDPBackend]:
    return [kernel for kernel, enabled in _KERNELS.items() if enabled()]


# Reading the caller's choice would break a compiled graph. The decorator that sets this mark,
# torch.compiler.assume_constant_result, imports torch._dynamo, as slow to import as torch itself.
_allowed._dynamo_marked_constant = True


class NoAttention(nn.Module):
    """The identity, for a level without attention."""

    def forward(self, x: Tensor, context: Context | None) -> Tensor:
        return x


class Attention(nn.Module):
    """Multi-head self-attention with a residual connection, (B, C, *space) to the same shape.

    Args:
        channels: C.
        head_dim: channels per head, at most C; there are C // head_dim heads.
        groups: groups of the norm before attention, or None for no norm.
        eps: epsilon of that norm.
        output_scale: divisor of the sum of input and attention.
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
        """Map (B, C, *space) to the same shape; `context` is ignored."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, positions, C)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        out = self.to_out[0](attend(q, k, v, self.heads))
        return self.rescale(x + out.transpose(1, 2).unflatten(2, x.shape[2:]))


def rename_old_attention(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the tensors of a checkpoint with the attention of 2022 under today's names.

    In the oldest files its linear layers are 1×1 convolutions, of shape (C, C, 1, 1).

    Raises:
        CheckpointError: old names and today's in one checkpoint.
    """
    result = dict(stored)
    if not (old := {name: match for name in stored if (match := _OLD.fullmatch(name))}):
        return result
    if new := [name for name in stored if _NEW.fullmatch(name)]:
        name = next(iter(old))
        raise CheckpointError(
            f"{stored[name].file}: {name} is a name of 2022, but {new[0]} is today's; all "
            "attention must have names of one kind"
        )
    for name, match in old.items():
        entry = result.pop(name)
        flat = entry.shape[:2] if entry.shape[2:] == (1, 1) else entry.shape
        result[f"{match[1]}.{OLD_NAMES[match[2]]}.{match[3]}"] = entry._replace(shape=flat)
    return result
