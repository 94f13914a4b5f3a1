"""DiT: a transformer over the patches of an image, conditioned on the time and a class.

    h   = patches(x) + position
    h   ← block(h, emb)                    a few times, see `minidiff.nn.blocks.adaptive`
    out = image of (1 + s)·norm(h) + b     (b, s) = W·SiLU(emb) + c

There is no downsampling and no skip connection. In checkpoints every block has its own embedding
of time and class.

Source: Peebles & Xie 2023, "Scalable Diffusion Models with Transformers",
https://arxiv.org/abs/2212.09748. The arguments and what they mean are those of diffusers'
`DiTTransformer2DModel`.
"""

from dataclasses import asdict

import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.nn.blocks.adaptive import (
    AdaptiveNorm,
    PatchEmbed,
    TokenAttention,
    TokenMLP,
    modulated,
    plain_norm,
)
from minidiff.nn.blocks.embeddings import (
    LabelTable,
    SinusoidalTime,
    TimestepEmbedding,
    expand_times,
)
from minidiff.nn.configs.transformer import DiTConfig
from minidiff.nn.model import DenoisingNetwork, describe_options, parse_options
from minidiff.runtime.files import Config

FEATURES = 256  # sines and cosines of the time


class DiT(DenoisingNetwork):
    """A diffusion transformer, conditioned on classes.

    Args:
        config: fields of DiTConfig: arguments of diffusers' `DiTTransformer2DModel`.
    Raises:
        InvalidArgument: an unknown name, a value that is not allowed, or two that contradict
            each other.

    `dit.config` holds all arguments. The label num_embeds_ada_norm stands for "no class".
    """

    class_name = "DiTTransformer2DModel"
    class_names = (class_name,)
    part = "transformer"
    text_channels = None

    def __init__(self, **config: object):
        super().__init__()
        c = parse_options(DiTConfig, config, self.class_name)
        self.config = Config(asdict(c))
        width = c.width
        self.pos_embed = PatchEmbed(c.in_channels, width, c.patch_size, c.sample_size)
        self.transformer_blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.norm_out = plain_norm(width)
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, c.patch_channels)

    def forward(
        self,
        sample: Tensor,
        timestep: int | float | Tensor,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """Map a noisy sample and its time to the prediction.

        Args:
            sample: noisy sample (B, in_channels, H, W); H and W are multiples of patch_size.
            timestep: time of the batch (a number or a tensor ()), or one per image, (B,).
            class_labels: int64 (B,), in 0..num_embeds_ada_norm.
        Returns:
            (B, out_channels, H, W).
        Raises:
            InvalidArgument: a wrong shape or type, or no labels.
        """
        h = self.pos_embed(sample)
        t = expand_times(sample, timestep)
        for block in self.transformer_blocks:
            h = block(h, t, class_labels)
        emb = self.transformer_blocks[0].norm1.emb(t, class_labels)  # as in diffusers
        shift, scale = self.proj_out_1(F.silu(emb))[:, None].chunk(2, dim=-1)
        out = self.proj_out_2(modulated(self.norm_out(h), shift, scale))
        return self.pos_embed.image_of(out, sample.shape)

    @property
    def num_labels(self) -> int:
        return self.config.num_embeds_ada_norm + 1


describe_options(DiT, DiTConfig)


class Embedding(nn.Module):
    """The sum of the embeddings of time and class."""

    def __init__(self, labels: int, width: int):
        super().__init__()
        self.time_proj = SinusoidalTime(FEATURES, flip_sin_to_cos=True, freq_shift=1)
        self.timestep_embedder = TimestepEmbedding(FEATURES, width)
        self.class_embedder = nn.ModuleDict({"embedding_table": LabelTable(labels, width)})

    def forward(self, t: Tensor, labels: Tensor | None) -> Tensor:
        time = self.timestep_embedder(self.time_proj(t))
        return time + self.class_embedder["embedding_table"](labels, len(t))


class TimeNorm(AdaptiveNorm):
    """An adaptive norm with a separate embedding of time and class."""

    def __init__(self, labels: int, width: int):
        super().__init__(width)
        self.emb = Embedding(labels, width)


class Block(nn.Module):
    """Attention and an MLP, each after an adaptive norm and before a gate."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        self.norm1 = TimeNorm(c.num_embeds_ada_norm + 1, c.width)
        self.attn1 = TokenAttention(
            c.width,
            c.num_attention_heads,
            c.attention_head_dim,
            bias=c.attention_bias,
            dropout=c.dropout,
        )
        self.norm3 = nn.LayerNorm(c.width, c.norm_eps, c.norm_elementwise_affine)
        self.ff = TokenMLP(c.width, c.dropout)

    def forward(self, h: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        normal, gate, shift, scale, gate_mlp = self.norm1(h, self.norm1.emb(t, labels))
        h = h + gate * self.attn1(normal)
        return h + gate_mlp * self.ff(modulated(self.norm3(h), shift, scale))
