"""Blocks of diffusion transformers: patches of an image as tokens, conditioned by their norms.

    h ← patches(x) + position
    h ← h + γ₁·Attention((1 + s₁)·norm(h) + b₁)
    h ← h + γ₂·MLP((1 + s₂)·norm(h) + b₂)          (b₁, s₁, γ₁, b₂, s₂, γ₂) = W·SiLU(emb) + c

The norms have no weights: scale s, shift b and gate γ come from the embedding of time and
conditioning ("adaLN-Zero"). With W and c of zero every block begins as the identity. Submodules
have the names of diffusers' checkpoints.

Sources: Peebles & Xie 2023, "Scalable Diffusion Models with Transformers",
https://arxiv.org/abs/2212.09748, section 3.2; Esser et al. 2024, "Scaling Rectified Flow
Transformers for High-Resolution Image Synthesis", https://arxiv.org/abs/2403.03206, section 4.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.errors import InvalidArgument
from minidiff.nn.blocks.attention import attend
from minidiff.nn.blocks.embeddings import check_floating
from minidiff.runtime.shapes import warn_unless_finite

EPS = 1e-6  # of the norms whose scale and shift come from the embedding


def positions(width: int, rows: int, columns: int, base: int, device: torch.device) -> Tensor:
    """Return the positional embedding of patches, float32 (rows · columns, width).

    A quarter of the channels each are sines and cosines of the column and of the row. Both are
    counted so that rows and columns of any number end at `base`.

    Args:
        width: channels of a token, a multiple of 4.
        rows, columns: patches of the image.
        base: patches along a side of the images that the network was trained on.
        device: device of the result.

    Source: Vaswani et al. 2017, section 3.5, https://arxiv.org/abs/1706.03762; for two axes
    Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, appendix D.4.
    """
    i = torch.arange(width // 4, dtype=torch.float64, device=device)
    frequencies = 1 / 10000 ** (i / (width / 4))
    axes = [
        torch.arange(n, dtype=torch.float32, device=device) / (n / base) for n in (rows, columns)
    ]
    row, column = torch.meshgrid(*axes, indexing="ij")
    waves = [
        wave(torch.outer(axis.flatten(), frequencies))
        for axis in (column, row)
        for wave in (torch.sin, torch.cos)
    ]
    return torch.cat(waves, dim=1).float()


class PatchEmbed(nn.Module):
    """Patches (B, C, H, W) as tokens with positions, (B, H/p · W/p, width).

    Args:
        channels: C.
        width: channels of a token.
        patch: side p of a patch.
        side: side of the images that the network was trained on.
        table: side, in patches, of a table of positions that is stored with the weights and whose
            middle is cut out for an image; None to compute them for the size of every image.
    """

    def __init__(self, channels: int, width: int, patch: int, side: int, table: int | None = None):
        super().__init__()
        self.channels, self.patch, self.base, self.table = channels, patch, side // patch, table
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        if table:
            embedding = positions(width, table, table, self.base, self.proj.weight.device)
            self.register_buffer("pos_embed", embedding[None])

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens. Raises InvalidArgument for a size that has no patches or positions."""
        check_floating("sample", x)
        rows, columns = self.grid(x.shape)
        warn_unless_finite("sample", x)
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        return tokens + self._positions(tokens.shape[-1], rows, columns).to(tokens)

    def grid(self, shape: torch.Size) -> tuple[int, int]:
        """Return the rows and columns of patches of a sample. Raises InvalidArgument."""
        if len(shape) != 4 or shape[1] != self.channels or not shape[0]:
            raise InvalidArgument(
                f"sample must have shape (B, {self.channels}, H, W), got {tuple(shape)}"
            )
        sides = shape[2:]
        if any(not side or side % self.patch for side in sides):
            raise InvalidArgument(
                f"sample must have sides that are multiples of {self.patch} (patch_size), "
                f"got {tuple(sides)}"
            )
        if self.table and max(sides) > self.table * self.patch:
            raise InvalidArgument(
                f"sample must have sides of at most {self.table * self.patch} "
                f"(pos_embed_max_size · patch_size), got {tuple(sides)}"
            )
        return sides[0] // self.patch, sides[1] // self.patch

    def _positions(self, width: int, rows: int, columns: int) -> Tensor:
        if not self.table:
            return positions(width, rows, columns, self.base, self.proj.weight.device)
        top, left = (self.table - rows) // 2, (self.table - columns) // 2
        square = self.pos_embed.view(self.table, self.table, width)
        return square[top : top + rows, left : left + columns].flatten(0, 1)

    def image_of(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        """Return the image whose patches are tokens (B, H/p · W/p, p²·C'), (B, C', H, W)."""
        rows, columns = self.grid(shape)
        blocks = tokens.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, (rows, columns))
        return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class AdaptiveNorm(nn.Module):
    """A norm without weights, and vectors of the embedding that modulate it and what follows.

    Args:
        width: channels of a token and of the embedding.
        parts: number of vectors; the first two are shift and scale of this norm.
    """

    def __init__(self, width: int, parts: int = 6):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)
        self.norm = plain_norm(width)

    def forward(self, h: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        """Return the norm of tokens (B, N, width), modulated, and the other vectors (B, 1, ·)."""
        shift, scale, *others = self.vectors(emb)
        return modulated(self.norm(h), shift, scale), *others

    def vectors(self, emb: Tensor) -> tuple[Tensor, ...]:
        """Return the vectors of an embedding (B, width), (B, 1, width) each."""
        return self.linear(F.silu(emb))[:, None].chunk(self.parts, dim=-1)


class FinalNorm(AdaptiveNorm):
    """An adaptive norm that has only scale and shift, in this order."""

    def __init__(self, width: int):
        super().__init__(width, 2)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.vectors(emb)
        return modulated(self.norm(h), shift, scale)


def plain_norm(width: int) -> nn.LayerNorm:
    """Return a norm over the channels of a token, without weights."""
    return nn.LayerNorm(width, EPS, elementwise_affine=False)


def modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return (1 + scale)·h + shift."""
    return torch.addcmul(shift, h, 1 + scale)


class TokenAttention(nn.Module):
    """Multi-head self-attention of tokens (B, N, width).

    Args:
        width: channels of a token.
        heads, head_dim: number of heads, and channels per head.
        bias: biases of queries, keys and values.
        normalizes: a norm of every query and key, which keeps the logits small (Esser et al. 2024,
            section 5.3.2).
        dropout: dropout of the result.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        bias: bool = True,
        normalizes: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, inner, bias) for _ in "qkv")
        self.norm_q, self.norm_k = (head_norm(head_dim, normalizes) for _ in "qk")
        self.to_out = nn.ModuleList([nn.Linear(inner, width), nn.Dropout(dropout)])

    def forward(self, h: Tensor) -> Tensor:
        return self.out(attend(*self.projected(h), self.heads))

    def projected(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, (B, N, heads · head_dim) each."""
        q, k = (
            per_head(norm, linear(h), self.heads)
            for norm, linear in ((self.norm_q, self.to_q), (self.norm_k, self.to_k))
        )
        return q, k, self.to_v(h)

    def out(self, attended: Tensor) -> Tensor:
        """Return the tokens of attention's result."""
        return self.to_out[1](self.to_out[0](attended))


def head_norm(head_dim: int, normalizes: bool) -> nn.Module:
    """Return the norm of a query or key, the identity if there is none."""
    return nn.RMSNorm(head_dim, EPS) if normalizes else nn.Identity()


def per_head(norm: nn.Module, x: Tensor, heads: int) -> Tensor:
    """Return the norm of every head of (B, N, heads · d)."""
    return norm(x.unflatten(2, (heads, -1))).flatten(2)


class TokenMLP(nn.Module):
    """Two linear layers with four times the channels between them, token by token."""

    def __init__(self, width: int, dropout: float = 0.0):
        super().__init__()
        self.net = nn.Sequential(
            GELU(width, 4 * width), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.net(h)


class GELU(nn.Module):
    """A linear layer and GELU in its approximation by tanh."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, h: Tensor) -> Tensor:
        return F.gelu(self.proj(h), approximate="tanh")
