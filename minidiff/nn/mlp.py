"""A denoiser of points: a few linear layers, conditioned on the time and an optional class.

    emb = time_embedding(features(t)) + class_embedding(label)
    h   = linear_in(x, sin 2ᵏx, cos 2ᵏx);   h ← h + out(SiLU(in(norm(h)) + proj(emb)))   a few times
    out = linear_out(norm(h))

The waves, k = 0 … num_waves − 1, let a small network resolve the edges of narrow modes (Tancik et
al. 2020, "Fourier Features Let Networks Learn High Frequency Functions", arXiv:2006.10739). The
network is called and saved like the U-Net, so that schedulers, guidance and the sampling loop take
either. Two dimensions are learned in seconds on one core.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.errors import InvalidArgument, whole_number
from minidiff.nn.blocks.embeddings import (
    LabelTable,
    NoLabels,
    SinusoidalTime,
    TimestepEmbedding,
    check_floating,
    expand_times,
)
from minidiff.nn.model import DenoisingNetwork, parse_options
from minidiff.runtime.checks import check_fields, option, optional, whole
from minidiff.runtime.files import Config


@dataclass(frozen=True)
class MLPConfig:
    """The options of an `MLP`.

    Attributes:
        in_channels: dimension D of input and output.
        hidden_channels: width of every layer.
        num_layers: number of residual blocks of two linear layers each.
        num_waves: number of frequencies 1, 2, 4, … of the sines and cosines of every coordinate.
        num_class_embeds: number of labels, "no class" included; None for no labels.
    Raises:
        InvalidArgument: a value out of range.
    """

    in_channels: int = option(2, "dimensions of a point", whole(1, 1 << 16))
    hidden_channels: int = option(128, "channels of every layer", whole(4, 1 << 14))
    num_layers: int = option(2, "residual blocks", whole(1, 64))
    num_waves: int = option(3, "frequencies per coordinate", whole(0, 10))
    num_class_embeds: int | None = option(None, "labels", optional(whole(1, 1 << 20)))

    def __post_init__(self) -> None:
        check_fields(self)


class MLP(DenoisingNetwork):
    """A residual multilayer perceptron for points (B, D).

    Args:
        config: fields of MLPConfig, by name.
    Raises:
        InvalidArgument: an option is unknown or not allowed.
    """

    class_name = "MLP"
    class_names = ("MLP",)
    text_channels = None  # it reads no texts

    def __init__(self, **config: object):
        super().__init__()
        c = parse_options(MLPConfig, config, self.class_name)
        self.config = Config(asdict(c))
        width = c.hidden_channels
        self.time_proj = SinusoidalTime(width, flip_sin_to_cos=True, freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, width)
        self.class_embedding = (
            LabelTable(c.num_class_embeds, width) if c.num_class_embeds else NoLabels()
        )
        self.linear_in = nn.Linear(c.in_channels * (1 + 2 * c.num_waves), width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(c.num_layers))
        self.norm_out = nn.LayerNorm(width)
        self.linear_out = nn.Linear(width, c.in_channels)

    def forward(
        self,
        sample: Tensor,
        timestep: int | float | Tensor,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """Map noisy points and their time to the prediction.

        Args:
            sample: noisy points (B, in_channels), floating point.
            timestep: time of the batch (a number or a tensor ()), or one per point, (B,).
            class_labels: int64 (B,) below num_class_embeds; None for a network without labels.
        Returns:
            (B, in_channels).
        Raises:
            InvalidArgument: a wrong shape or type, or labels that are missing or unused.
        """
        check_floating("sample", sample)
        if sample.dim() != 2 or sample.shape[1] != self.config.in_channels or not len(sample):
            raise InvalidArgument(
                f"sample must have shape (B, {self.config.in_channels}), got {tuple(sample.shape)}"
            )
        self.check_inputs(sample=sample)
        emb = self.time_embedding(self.time_proj(expand_times(sample, timestep)))
        emb = F.silu(emb + self.class_embedding(class_labels, len(sample)))
        waves = [sample * 2**k for k in range(self.config.num_waves)]
        waves = [wave(x) for x in waves for wave in (torch.sin, torch.cos)]
        h = self.linear_in(torch.cat([sample, *waves], dim=1))
        for block in self.blocks:
            h = block(h, emb)
        return self.linear_out(self.norm_out(h))

    @classmethod
    def min_tensors(cls, config: Mapping) -> int:
        """Return eight tensors per block, a lower bound. Raises InvalidArgument."""
        return 8 * whole_number("num_layers", config.get("num_layers", MLPConfig.num_layers), 1, 64)


class Block(nn.Module):
    """Two linear layers in a residual connection, conditioned between them."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, width)
        self.time_emb_proj = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """Map (B, width) and the embedding (B, width) to (B, width)."""
        return h + self.linear_2(F.silu(self.linear_1(self.norm(h)) + self.time_emb_proj(emb)))
