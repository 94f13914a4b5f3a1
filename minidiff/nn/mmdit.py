"""MMDiT: a transformer over the patches of an image and the tokens of a text, as equals.

    image h, text c:   q, k, v of each by their own layers, one attention over both
    h ← h + γ·out;  h ← h + γ'·MLP(norm h)         and the same for c with separate weights

The pooled text is added to the embedding of the time, which conditions all norms. The last block
leaves the text as it is. Stable Diffusion 3.5 adds a norm of queries and keys, and in some blocks a
second attention of the image alone. Submodules have the names of diffusers' checkpoints.

Source: Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image
Synthesis", https://arxiv.org/abs/2403.03206, figure 2. The arguments and what they mean are those
of diffusers' `SD3Transformer2DModel`.
"""

from dataclasses import asdict

import torch
from torch import Tensor, nn

from minidiff.nn.blocks.adaptive import (
    AdaptiveNorm,
    FinalNorm,
    PatchEmbed,
    TokenAttention,
    TokenMLP,
    head_norm,
    modulated,
    per_head,
    plain_norm,
)
from minidiff.nn.blocks.attention import attend
from minidiff.nn.blocks.embeddings import (
    SinusoidalTime,
    TextContext,
    TimestepEmbedding,
    check_tensor,
    expand_times,
)
from minidiff.nn.configs.transformer import MMDiTConfig
from minidiff.nn.model import DenoisingNetwork, describe_options, parse_options
from minidiff.runtime.files import Config

FEATURES = 256  # sines and cosines of the time


class MMDiT(DenoisingNetwork):
    """The transformer of Stable Diffusion 3 and 3.5, conditioned on texts.

    Args:
        config: fields of MMDiTConfig: arguments of diffusers' `SD3Transformer2DModel`.
    Raises:
        InvalidArgument: an unknown name, a value that is not allowed, or two that contradict
            each other.

    `mmdit.config` holds all arguments.
    """

    class_name = "SD3Transformer2DModel"
    class_names = (class_name,)
    part = "transformer"

    def __init__(self, **config: object):
        super().__init__()
        c = parse_options(MMDiTConfig, config, self.class_name)
        self.config, self.text_channels = Config(asdict(c)), c.joint_attention_dim
        width = c.width
        self.pos_embed = PatchEmbed(
            c.in_channels, width, c.patch_size, c.sample_size, c.pos_embed_max_size
        )
        self.time_text_embed = Embedding(c.pooled_projection_dim, width)
        self.check_text = TextContext(c.joint_attention_dim)
        self.context_embedder = nn.Linear(c.joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(
            (DualBlock if i in c.dual_attention_layers else Block)(c, last=i == c.num_layers - 1)
            for i in range(c.num_layers)
        )
        self.norm_out = FinalNorm(width)
        self.proj_out = nn.Linear(width, c.patch_channels)

    def forward(
        self,
        sample: Tensor,
        timestep: int | float | Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
    ) -> Tensor:
        """Map a noisy sample and its time to the prediction.

        Args:
            sample: noisy sample (B, in_channels, H, W); H and W are multiples of patch_size, up to
                pos_embed_max_size · patch_size.
            timestep: 1000·σ of the batch (a number or a tensor ()), or one per image, (B,).
            encoder_hidden_states: tokens of a text, (B, L, joint_attention_dim).
            pooled_projections: pooled text, (B, pooled_projection_dim).
        Returns:
            (B, out_channels, H, W).
        Raises:
            InvalidArgument: a wrong shape or type, or a text that is missing.
        """
        h = self.pos_embed(sample)
        emb = self.time_text_embed(expand_times(sample, timestep), pooled_projections)
        tokens = self.check_text(encoder_hidden_states, None, len(sample)).tokens
        context = self.context_embedder(tokens)
        for block in self.transformer_blocks:
            h, context = block(h, context, emb)
        return self.pos_embed.image_of(self.proj_out(self.norm_out(h, emb)), sample.shape)


describe_options(MMDiT, MMDiTConfig)


class Embedding(nn.Module):
    """The sum of the embeddings of time and pooled text."""

    def __init__(self, pooled: int, width: int):
        super().__init__()
        self.pooled = pooled
        self.time_proj = SinusoidalTime(FEATURES, flip_sin_to_cos=True, freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(FEATURES, width)
        self.text_embedder = TimestepEmbedding(pooled, width)

    def forward(self, t: Tensor, pooled: Tensor | None) -> Tensor:
        check_tensor("pooled_projections", pooled, (len(t), self.pooled))
        return self.timestep_embedder(self.time_proj(t)) + self.text_embedder(pooled)


class JointAttention(TokenAttention):
    """One attention over the tokens of an image and of a text, with separate layers for each.

    Args:
        c: options of the network.
        last: the result for the text is not used.
    """

    def __init__(self, c: MMDiTConfig, last: bool):
        width, heads, size = c.width, c.num_attention_heads, c.attention_head_dim
        super().__init__(width, heads, size, normalizes=bool(c.qk_norm))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in "qkv")
        self.norm_added_q, self.norm_added_k = (head_norm(size, bool(c.qk_norm)) for _ in "qk")
        self.to_add_out = nn.Identity() if last else nn.Linear(width, width)

    def forward(self, h: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens (B, N, width) and (B, L, width) to the same shapes."""
        added = (
            per_head(self.norm_added_q, self.add_q_proj(context), self.heads),
            per_head(self.norm_added_k, self.add_k_proj(context), self.heads),
            self.add_v_proj(context),
        )
        joined = (torch.cat(pair, 1) for pair in zip(self.projected(h), added, strict=True))
        image, text = attend(*joined, self.heads).split([h.shape[1], context.shape[1]], dim=1)
        return self.out(image), self.to_add_out(text)


class Block(nn.Module):
    """Joint attention, then an MLP for the image and another for the text.

    Args:
        c: options of the network.
        last: the text has no result and no MLP.
    """

    parts = 6  # vectors of the image's norm

    def __init__(self, c: MMDiTConfig, last: bool):
        super().__init__()
        width = c.width
        self.norm1 = AdaptiveNorm(width, self.parts)
        self.attn = JointAttention(c, last)
        self.norm2, self.ff = plain_norm(width), TokenMLP(width)
        self.is_last = last
        if last:
            self.norm1_context = FinalNorm(width)
        else:
            self.norm1_context = AdaptiveNorm(width)
            self.norm2_context, self.ff_context = plain_norm(width), TokenMLP(width)

    def forward(self, h: Tensor, context: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        """Map image (B, N, width) and text (B, L, width) to the same shapes."""
        normal, gate, shift, scale, gate_mlp, *second = self.norm1(h, emb)
        if self.is_last:
            text, others = self.norm1_context(context, emb), None
        else:
            text, *others = self.norm1_context(context, emb)
        image, text = self.attn(normal, text)
        h = h + gate * image + self.attend_again(h, *second)
        h = h + gate_mlp * self.ff(modulated(self.norm2(h), shift, scale))
        return h, self.text_of(context, text, others)

    def attend_again(self, h: Tensor) -> Tensor | float:
        """Return the result of the second attention: there is none."""
        return 0.0

    def text_of(self, context: Tensor, attended: Tensor, vectors: list[Tensor] | None) -> Tensor:
        """Return the tokens of the text after the block."""
        if vectors is None:
            return context
        gate, shift, scale, gate_mlp = vectors
        context = context + gate * attended
        normal = modulated(self.norm2_context(context), shift, scale)
        return context + gate_mlp * self.ff_context(normal)


class DualBlock(Block):
    """A block with a second attention, of the image alone (Stable Diffusion 3.5)."""

    parts = 9

    def __init__(self, c: MMDiTConfig, last: bool):
        super().__init__(c, last)
        self.attn2 = TokenAttention(
            c.width, c.num_attention_heads, c.attention_head_dim, normalizes=bool(c.qk_norm)
        )

    def attend_again(self, h: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return gate * self.attn2(modulated(self.norm1.norm(h), shift, scale))
