"""A denoiser of points: a few linear layers that are told the time, and the class if there is one.

    emb = time_embedding(features(t)) + class_embedding(label)
    h   = linear_in(x, sin 2ᵏx, cos 2ᵏx);   h ← h + out(SiLU(in(norm(h)) + proj(emb)))   a few times
    out = linear_out(norm(h))

The waves, k = 0 … num_waves − 1, let so small a network say where a narrow mode ends (Tancik et al.
2020, "Fourier Features Let Networks Learn High Frequency Functions", arXiv:2006.10739). It is
called and saved as the U-Net is, so that schedulers, guidance and the sampling loop take
either. Two dimensions are learnt in seconds on one core.
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
    check_sample,
    times_of,
)
from minidiff.nn.model import Model, options_of
from minidiff.runtime.files import Config


@dataclass(frozen=True)
class MLPConfig:
    """The options of an `MLP`; see there."""

    in_channels: int = 2
    hidden_channels: int = 128
    num_layers: int = 2
    num_waves: int = 3
    num_class_embeds: int | None = None

    def __post_init__(self) -> None:
        whole_number("in_channels", self.in_channels, 1, 1 << 16)
        whole_number("hidden_channels", self.hidden_channels, 4, 1 << 14)
        whole_number("num_layers", self.num_layers, 1, 64)
        whole_number("num_waves", self.num_waves, 0, 10)
        if self.num_class_embeds is not None:
            whole_number("num_class_embeds", self.num_class_embeds, 1, 1 << 20)


class MLP(Model):
    """A residual multilayer perceptron for points (B, D).

    Args:
        in_channels: D, of what comes in and what goes out.
        hidden_channels: width of every layer.
        num_layers: residual blocks of two linear layers each.
        num_waves: sines and cosines of every coordinate, at frequencies 1, 2, 4, … .
        num_class_embeds: how many labels there are, "no class" included; None for no labels.
    Raises:
        InvalidArgument: an option is unknown or not allowed.
    """

    class_name = "MLP"
    class_names = ("MLP",)

    def __init__(self, **config: object):
        super().__init__()
        c = options_of(MLPConfig, config)
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
        """Map noisy points and their time to what the network predicts.

        Args:
            sample: (B, in_channels), floating point.
            timestep: one time for the batch (a number or a tensor ()), or one a point, (B,).
            class_labels: int64 (B,) below num_class_embeds; None for a network without labels.
        Returns:
            (B, in_channels).
        Raises:
            InvalidArgument: a wrong shape or type; labels missing, or given for no reason.
        """
        check_sample(sample)
        if sample.dim() != 2 or sample.shape[1] != self.config.in_channels or not len(sample):
            raise InvalidArgument(
                f"sample must have shape (B, {self.config.in_channels}), got {tuple(sample.shape)}"
            )
        emb = self.time_embedding(self.time_proj(times_of(sample, timestep)))
        emb = F.silu(emb + self.class_embedding(class_labels, len(sample)))
        waves = [sample * 2**k for k in range(self.config.num_waves)]
        waves = [wave(x) for x in waves for wave in (torch.sin, torch.cos)]
        h = self.linear_in(torch.cat([sample, *waves], dim=1))
        for block in self.blocks:
            h = block(h, emb)
        return self.linear_out(self.norm_out(h))

    @classmethod
    def least_tensors(cls, config: Mapping) -> int:
        """As `Model`; a block has eight."""
        return 8 * whole_number("num_layers", config.get("num_layers", MLPConfig.num_layers), 1, 64)


class Block(nn.Module):
    """Two linear layers around what the block is told, and past them the way straight on."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, width)
        self.time_emb_proj = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """Map (B, width) and the embedding (B, width) to (B, width)."""
        return h + self.linear_2(F.silu(self.linear_1(self.norm(h)) + self.time_emb_proj(emb)))
