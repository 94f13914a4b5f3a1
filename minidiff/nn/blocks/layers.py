"""The layers of a U-Net: norms, residual blocks, resizing.

A residual block adds the result of two convolutions to its input. It is conditioned on time by an
embedding e = MLP(features(t)) that shifts, or scales and shifts, every channel:

    block(x, e) = x + conv₂(act(norm₂(conv₁(act(norm₁(x))) + W·e)))               "default"
    block(x, e) = x + conv₂(act(norm₂(conv₁(act(norm₁(x)))) · (1 + a) + b))       "scale_shift"

with (a, b) = W·e. Sources: Ho et al. 2020, "Denoising Diffusion Probabilistic Models",
https://arxiv.org/abs/2006.11239, appendix B; Dhariwal & Nichol 2021, "Diffusion Models Beat
GANs on Image Synthesis", https://arxiv.org/abs/2105.05233, section 3.1 (scale and shift).

All layers work on (B, C, *space) with one, two or three axes of space. Options are resolved at
construction: a feature is a submodule, and its absence another submodule that does nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.runtime.shapes import append_dims

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ACTIVATIONS = {"silu": nn.SiLU, "swish": nn.SiLU, "mish": nn.Mish, "gelu": nn.GELU, "relu": nn.ReLU}


def widened(x: Tensor) -> Tensor:
    """Return x in at least float32 on the CPU, and unchanged on other devices.

    Norms and attention compute in float32 for every dtype. A GPU's 16-bit kernels do so at full
    speed; some of the CPU's take two to five times as long as a cast, the float32 kernel and a
    cast back.
    """
    if x.device.type != "cpu":
        return x
    return x.to(torch.promote_types(x.dtype, torch.float32))


MANY_POSITIONS = 1024


def normalisable(x: Tensor, groups: int) -> Tensor:
    """Return x in the layout and dtype in which the CPU's group norm is fastest.

    The statistics are float32 either way. Below MANY_POSITIONS torch's channels_last kernel reads
    a group's channels position by position. It is fast if they fill whole vectors, 16 of a 16-bit
    type or 8 of float32, and 5 to 10 times slower with a remainder (torch 2.11, Intel Xeon with
    AMX, bfloat16, milliseconds):

        64·C·14·14, 8 groups of    6      8     12     16     24
        as it is                   2.9    2.5    7.1    1.0    3.4
        in float32                 3.3    0.9    2.8    1.4    1.9
        contiguous                 0.6    0.9    1.3    2.0    3.8
    """
    if x.device.type != "cpu" or x.is_contiguous() or x.shape[2:].numel() >= MANY_POSITIONS:
        return x
    depth = x.shape[1] // groups
    if depth % 8:
        return x.contiguous()
    return x if depth % 16 == 0 else widened(x)


def like(y: Tensor, x: Tensor) -> Tensor:
    """Return y in the dtype and the memory format of x."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    plain = x.is_contiguous() or not last  # both hold for one channel or one position
    layout = torch.preserve_format if plain else torch.channels_last
    return y.to(x.dtype, memory_format=layout)


class GroupNorm(nn.GroupNorm):
    """Group normalisation of (B, C, *space), followed by an activation.

    Args:
        groups: number of groups, a divisor of channels.
        channels: C.
        eps: epsilon added to the variance.
        act: activation; None for none.

    Source: Wu & He 2018, "Group Normalization", https://arxiv.org/abs/1803.08494.
    """

    def __init__(self, groups: int, channels: int, eps: float, act: nn.Module | None = None):
        super().__init__(groups, channels, eps)
        self.act = act or nn.Identity()
        if hasattr(self.act, "inplace"):
            self.act.inplace = True  # its input is a temporary of this norm

    def forward(self, x: Tensor) -> Tensor:
        return like(self.act(self._normalised(x)), x)

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Return act(norm(x) · scale + shift) with scale and shift (B, C)."""
        y = self._normalised(x) * append_dims(scale, x.ndim) + append_dims(shift, x.ndim)
        return like(self.act(y), x)

    def _normalised(self, x: Tensor) -> Tensor:
        x = normalisable(x, self.num_groups)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class Divide(nn.Module):
    """x / factor."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x / self.factor


class Center(nn.Module):
    """The map of pixel values from [0, 1] to [−1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x - 1


# ------------------------------------------------------------------------- residual blocks


class NoResize(nn.Module):
    """The identity."""

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        return x


class AveragePool(nn.Module):
    """Downsampling by averages over cells of side 2; an odd last position is dropped."""

    def __init__(self, dims: int):
        super().__init__()
        self.pool = AVERAGE_POOLS[dims](2)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        return self.pool(x)


class NearestUpsample(nn.Module):
    """Nearest-neighbour upsampling to `size`: twice as large, or one less for an odd side."""

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return F.interpolate(x, size=size, mode="nearest")


class ResnetBlock(nn.Module):
    """Two convolutions in a residual connection; the time embedding shifts the channels.

    Args:
        dims: axes of space, 1 to 3.
        in_channels, out_channels: channels of input and output; if they differ, a 1×1 convolution
            is on the shortcut.
        time_channels: channels of the time embedding; None for a PlainResnetBlock.
        groups, eps, act: groups, epsilon and activation (a key of ACTIVATIONS) of both norms.
        dropout: probability of zeroing an input of the second convolution.
        output_scale: divisor of the sum.
        resize: NoResize, AveragePool or NearestUpsample, before the first convolution.
    """

    embeddings = 1  # values per channel from the time embedding

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        time_channels: int | None,
        *,
        groups: int,
        eps: float,
        act: str = "silu",
        dropout: float = 0.0,
        output_scale: float = 1.0,
        resize: nn.Module | None = None,
    ):
        super().__init__()
        conv = CONVOLUTIONS[dims]
        self.norm1 = GroupNorm(groups, in_channels, eps, ACTIVATIONS[act]())
        self.conv1 = conv(in_channels, out_channels, 3, padding=1)
        if self.embeddings:
            self.time_emb_proj = nn.Linear(time_channels, self.embeddings * out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps, ACTIVATIONS[act]())
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = conv(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else conv(in_channels, out_channels, 1)
        self.resize = resize or NoResize()
        self.rescale = nn.Identity() if output_scale == 1 else Divide(output_scale)

    def forward(self, x: Tensor, emb: Tensor, size: torch.Size | None = None) -> Tensor:
        """Map x (B, C, *space) and the *activated* embedding (B, E) to (B, C_out, *space).

        `size` is the space of the result, which only an upsampling block reads.
        """
        h = self.conv1(self.resize(self.norm1(x), size))
        h = self.conv2(self.dropout(self.second_norm(h, emb)))
        return self.rescale(self.conv_shortcut(self.resize(x, size)) + h)

    def second_norm(self, h: Tensor, emb: Tensor) -> Tensor:
        return self.norm2(h + append_dims(self.time_emb_proj(emb), h.ndim))


class ScaleShiftResnetBlock(ResnetBlock):
    """A ResnetBlock whose time embedding scales and shifts the channels after the norm."""

    embeddings = 2

    def second_norm(self, h: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.time_emb_proj(emb).chunk(2, dim=1)
        return self.norm2.modulated(h, 1 + scale, shift)


class PlainResnetBlock(ResnetBlock):
    """A ResnetBlock without time; the embedding given to `forward` is None."""

    embeddings = 0

    def second_norm(self, h: Tensor, emb: None) -> Tensor:
        return self.norm2(h)


RESNET_BLOCKS = {"default": ResnetBlock, "scale_shift": ScaleShiftResnetBlock}


# -------------------------------------------------------------------------------- resizing


class Downsample(nn.Module):
    """A convolution of stride 2: side n to ⌈n/2⌉ with padding 1, to ⌊n/2⌋ with padding 0."""

    def __init__(self, dims: int, channels: int, padding: int):
        super().__init__()
        # With padding 0 the convolution still reads one zero past the far edge, as in Ho et al.'s
        # code: it reads the positions (0, 1, 2), (2, 3, 4), …, (n-2, n-1, zero).
        self.pad = nn.Identity() if padding else PadFarEdge(dims)
        self.conv = CONVOLUTIONS[dims](channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(self.pad(x))


class PadFarEdge(nn.Module):
    """Padding with one zero after the last position of every axis of space."""

    def __init__(self, dims: int):
        super().__init__()
        self.widths = (0, 1) * dims

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.widths)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to `size`, then a convolution."""

    def __init__(self, dims: int, channels: int):
        super().__init__()
        self.resize = NearestUpsample()
        self.conv = CONVOLUTIONS[dims](channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor, size: torch.Size) -> Tensor:
        return self.conv(self.resize(x, size))
