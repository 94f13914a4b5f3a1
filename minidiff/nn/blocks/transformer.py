"""A transformer over the positions of an image, with cross-attention to the tokens of a text.

    x ← x + A₁(norm₁(x))            self-attention: positions attend to each other
    x ← x + A₂(norm₂(x), text)      cross-attention: positions attend to the text
    x ← x + F(norm₃(x))             a feed-forward layer, position by position

a few times, between two linear maps and inside a residual connection. Submodules have the names of
diffusers' checkpoints.

Sources: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; Rombach et al. 2022,
"High-Resolution Image Synthesis with Latent Diffusion Models", https://arxiv.org/abs/2112.10752,
section 3.3 and appendix E; Shazeer 2020, https://arxiv.org/abs/2002.05202, eq. 6 (the gated
feed-forward layer).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.nn.blocks.attention import Context, attend
from minidiff.nn.blocks.layers import CONVOLUTIONS, GroupNorm


class CrossAttention(nn.Module):
    """Attention of tokens (B, N, channels) to a context.

    Args:
        channels: channels of the tokens.
        context: channels of the context's tokens.
        heads, head_dim: number of heads, and channels per head.
    """

    def __init__(self, channels: int, context: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(context, inner, bias=False)
        self.to_v = nn.Linear(context, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])  # a list in checkpoints: to_out.0

    def forward(self, x: Tensor, context: Context) -> Tensor:
        tokens, bias = context
        q, k, v = self.to_q(x), self.to_k(tokens), self.to_v(tokens)
        return self.to_out[0](attend(q, k, v, self.heads, bias))


class SelfAttention(CrossAttention):
    """Attention of tokens to each other."""

    def __init__(self, channels: int, heads: int, head_dim: int):
        super().__init__(channels, channels, heads, head_dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return super().forward(x, Context(x, None))


class UnmaskedCrossAttention(CrossAttention):
    """The cross-attention that replaces self-attention if `only_cross_attention` is set.

    It attends to the whole context: in diffusers only the second attention of a block is masked.
    """

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return super().forward(x, Context(context.tokens, None))


class GEGLU(nn.Module):
    """a · GELU(b), (a, b) = W·x + c: eq. 6 of Shazeer 2020."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """A gated layer with four times the channels, and a linear layer back."""

    def __init__(self, channels: int):
        super().__init__()
        # In checkpoints net.0 and net.2; between them diffusers has a dropout of rate 0.
        self.net = nn.Sequential(
            GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Two attentions and a feed-forward layer, each after a norm, in a residual connection."""

    def __init__(self, channels: int, context: int, heads: int, head_dim: int, only_cross: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = (
            UnmaskedCrossAttention(channels, context, heads, head_dim)
            if only_cross
            else SelfAttention(channels, heads, head_dim)
        )
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = CrossAttention(channels, context, heads, head_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attn1(self.norm1(x), context)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Transformer blocks on an image, (B, C, *space) to the same shape, given a text.

    Args:
        dims: axes of space.
        channels: C.
        context: channels of a token of the text.
        heads: number of heads of C // heads channels each.
        depth: number of blocks.
        groups: groups of the first norm.
        linear: first and last map stored as linear layers, not as 1×1 convolutions.
        only_cross: cross-attention instead of self-attention.
    """

    def __init__(
        self,
        dims: int,
        channels: int,
        context: int,
        *,
        heads: int,
        depth: int,
        groups: int,
        linear: bool = False,
        only_cross: bool = False,
    ):
        super().__init__()
        head_dim = channels // heads
        inner = heads * head_dim  # less than C where the heads do not divide it
        self.norm = GroupNorm(groups, channels, 1e-6)
        self.proj_in = _pointwise(dims, channels, inner, linear)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(inner, context, heads, head_dim, only_cross) for _ in range(depth)
        )
        self.proj_out = _pointwise(dims, inner, channels, linear)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (B, positions, C)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class PointwiseConvolution(nn.Module):
    """A linear layer on tokens whose weight has the shape of a 1×1 convolution."""

    def __init__(self, dims: int, channels: int, out_channels: int):
        super().__init__()
        conv = CONVOLUTIONS[dims](channels, out_channels, 1)
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self.weight.flatten(1), self.bias)


def _pointwise(dims: int, channels: int, out_channels: int, linear: bool) -> nn.Module:
    if linear:
        return nn.Linear(channels, out_channels)
    return PointwiseConvolution(dims, channels, out_channels)
