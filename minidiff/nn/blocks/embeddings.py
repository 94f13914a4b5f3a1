"""The conditioning of a network: time, class, text, and numbers.

The time is expanded to features, sines and cosines at many frequencies, which two linear layers map
to the embedding that conditions every block. A class, a pooled text or the size of the image is
mapped to the same width and added. Submodules have the names of diffusers' checkpoints. A network
without one of these inputs has a module in its place that adds nothing and refuses the input.
"""

import math
from collections.abc import Mapping
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.errors import InvalidArgument, real_number
from minidiff.nn.blocks.attention import Context
from minidiff.nn.blocks.layers import ACTIVATIONS
from minidiff.runtime.shapes import append_dims, check_finite, check_mask, warn_unless_finite

# ------------------------------------------------------------------------------------ time


class SinusoidalTime(nn.Module):
    """Sines and cosines of t at half = channels // 2 frequencies from 1 down to about 1/10000.

        features(t)ᵢ = sin(t·ωᵢ), cos(t·ωᵢ);  ωᵢ = 10000^(−i / (half − freq_shift))

    Args:
        channels: number of features; an odd last one is zero.
        flip_sin_to_cos: cosines before sines.
        freq_shift: 1 for a lowest frequency of exactly 1/10000, as in Ho et al.; at least 0.

    Source: Vaswani et al. 2017, section 3.5, https://arxiv.org/abs/1706.03762.
    """

    def __init__(self, channels: int, flip_sin_to_cos: bool, freq_shift: float):
        super().__init__()
        self.channels = channels
        self.half = channels // 2
        self.freq_shift = freq_shift
        self.cosines_first = flip_sin_to_cos

    def forward(self, t: Tensor) -> Tensor:
        """Map times (B,) to features (B, channels), float32 for every dtype of the model."""
        # Not a buffer: `.to(bfloat16)` would round the frequencies, and t reaches 1000.
        i = torch.arange(self.half, dtype=torch.float32, device=t.device)
        frequencies = torch.exp(-math.log(10000) * i / (self.half - self.freq_shift))
        features = _waves(t[:, None].float() * frequencies, self.cosines_first)
        return F.pad(features, (0, self.channels - 2 * self.half))

    def rescale_output(self, out: Tensor, t: Tensor) -> Tensor:
        return out


def _waves(angles: Tensor, cosines_first: bool) -> Tensor:
    waves = (angles.cos(), angles.sin()) if cosines_first else (angles.sin(), angles.cos())
    return torch.cat(waves, dim=1)


class FourierTime(nn.Module):
    """Sines and cosines of t at random frequencies, drawn once and not trained.

        features(t) = sin(2π·t·w), cos(2π·t·w);  w ~ N(0, scale²)

    Args:
        features: number of features, even.
        flip_sin_to_cos: cosines before sines.
        scale: standard deviation of the frequencies.

    Source: Tancik et al. 2020, "Fourier Features Let Networks Learn High Frequency Functions",
    https://arxiv.org/abs/2006.10739.
    """

    def __init__(self, features: int, flip_sin_to_cos: bool, scale: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features // 2) * scale, requires_grad=False)
        self.cosines_first = flip_sin_to_cos

    def forward(self, t: Tensor) -> Tensor:
        """Map times (B,) to (B, features), float32 or wider."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        angles = t.to(wide)[:, None] * self.weight.to(wide) * 2 * math.pi
        return _waves(angles, self.cosines_first)

    def rescale_output(self, out: Tensor, t: Tensor) -> Tensor:
        return out


class LogFourierTime(FourierTime):
    """Fourier features of log σ, for a network whose time is a noise level σ instead of a step.

    The output of such a network is divided by σ.

    Source: Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential
    Equations", https://arxiv.org/abs/2011.13456, appendix C.
    """

    def __init__(self, features: int):
        super().__init__(features, flip_sin_to_cos=False, scale=16.0)

    def forward(self, t: Tensor) -> Tensor:
        """Map noise levels (B,), positive, to (B, features), float32 or wider."""
        return super().forward(t.to(torch.promote_types(self.weight.dtype, torch.float32)).log())

    def rescale_output(self, out: Tensor, t: Tensor) -> Tensor:
        return out / append_dims(t, out.ndim).to(out.dtype)


class TimestepEmbedding(nn.Module):
    """Two linear layers from features to the embedding that conditions every block.

    Args:
        features, width: channels of the input and of the embedding.
        act: activation between the layers, a key of ACTIVATIONS.
        post_act: activation after them, or None.
        condition: channels of a second input added to the features, such as the embedded guidance
            scale of a distilled network; None without it.
    """

    def __init__(
        self,
        features: int,
        width: int,
        act: str = "silu",
        post_act: str | None = None,
        condition: int | None = None,
    ):
        super().__init__()
        self.linear_1 = nn.Linear(features, width)
        self.act = ACTIVATIONS[act]()
        self.linear_2 = nn.Linear(width, width)
        self.post_act = ACTIVATIONS[post_act]() if post_act else nn.Identity()
        self.cond_proj = Condition(condition, features) if condition else NoCondition()

    def forward(self, features: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map (B, features) and (B, condition), or None, to (B, width)."""
        features = features.to(self.linear_1.weight.dtype)
        if condition is not None:
            features = features + self.cond_proj(condition, features.shape[0])
        return self.post_act(self.linear_2(self.act(self.linear_1(features))))


class Condition(nn.Linear):
    """The projection of the second input of a TimestepEmbedding to the width of the first."""

    def __init__(self, width: int, features: int):
        super().__init__(width, features, bias=False)

    def forward(self, condition: Tensor, batch: int) -> Tensor:
        check_tensor("timestep_cond", condition, (batch, self.in_features))
        check_floating("timestep_cond", condition)
        return super().forward(condition)


class NoCondition(nn.Module):
    """The projection of an embedding without a second input, which refuses it."""

    def forward(self, condition: Tensor, batch: int) -> Tensor:
        raise InvalidArgument("timestep_cond must be None: time_cond_proj_dim is None")


def check_floating(name: str, value: object) -> None:
    """Refuse anything but a floating-point tensor. Raises InvalidArgument naming it."""
    if not isinstance(value, Tensor):
        raise InvalidArgument(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise InvalidArgument(f"{name} must be floating point, got {value.dtype}")
    if value.layout != torch.strided:
        raise InvalidArgument(f"{name} must be dense, got {value.layout}")


def expand_times(sample: Tensor, timestep: int | float | Tensor) -> Tensor:
    """Return the times of a batch, (B,) on the sample's device, from one or B times.

    Raises:
        InvalidArgument: neither a number nor a tensor () or (B,), or times that are not finite.
    """
    if not isinstance(timestep, Tensor):
        if isinstance(timestep, bool) or not isinstance(timestep, Real):
            raise InvalidArgument(f"timestep must be a number or a tensor, got {timestep!r}")
        real_number("timestep", timestep, -math.inf)
        return torch.full(
            (sample.shape[0],), float(timestep), dtype=torch.float32, device=sample.device
        )
    if timestep.shape not in ((), (sample.shape[0],)):
        raise InvalidArgument(
            f"timestep must have shape () or ({sample.shape[0]},), got {tuple(timestep.shape)}"
        )
    if timestep.is_complex() or timestep.dtype == torch.bool:
        raise InvalidArgument(f"timestep must hold real numbers, got {timestep.dtype}")
    check_finite("timestep", timestep)
    return timestep.to(sample.device).expand(sample.shape[0])


# --------------------------------------------------------------------------------- classes


class NoLabels(nn.Module):
    """The class embedding of a network without classes, which refuses labels."""

    def forward(self, labels: Tensor | None, batch: int) -> float:
        if labels is not None:
            raise InvalidArgument(
                "class_labels must be None: this network is not class-conditional "
                "(num_class_embeds and class_embed_type are None)"
            )
        return 0.0


class LabelTable(nn.Embedding):
    """One trained vector per class, for integer labels (B,).

    Their range is checked on the CPU only: elsewhere the host would wait for the device.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # torch takes seconds to initialise a large one
            super().reset_parameters()

    def forward(self, labels: Tensor | None, batch: int) -> Tensor:
        check_tensor("class_labels", labels, (batch,))
        if labels.dtype not in (torch.int64, torch.int32):
            raise InvalidArgument(f"class_labels must be int64 or int32, got {labels.dtype}")
        try:
            return super().forward(labels)
        except IndexError as error:
            low, high = (bound.item() for bound in labels.aminmax())
            raise InvalidArgument(
                f"class_labels must be in 0..{self.num_embeddings - 1}, got {low} to {high}"
            ) from error


class LabelTimes(TimestepEmbedding):
    """One number per label (B,), embedded like the time but with separate weights."""

    def __init__(self, times: nn.Module, features: int, width: int, act: str = "silu"):
        super().__init__(features, width, act)
        self._times = (times,)  # in a tuple: its weights belong to the time, not to this module

    def forward(self, labels: Tensor | None, batch: int) -> Tensor:
        check_tensor("class_labels", labels, (batch,))
        return super().forward(self._times[0](labels))


class LabelVectors(nn.Module):
    """Labels that are already embeddings, (B, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, labels: Tensor | None, batch: int) -> Tensor:
        check_tensor("class_labels", labels, (batch, self.width))
        return labels


class LabelFeatures(TimestepEmbedding):
    """Labels that are vectors (B, features), embedded by two layers."""

    def forward(self, labels: Tensor | None, batch: int) -> Tensor:
        check_tensor("class_labels", labels, (batch, self.linear_1.in_features))
        return super().forward(labels)


class LabelProjection(nn.Linear):
    """Labels that are vectors (B, features), embedded by one layer."""

    def forward(self, labels: Tensor | None, batch: int) -> Tensor:
        check_tensor("class_labels", labels, (batch, self.in_features))
        return super().forward(labels)


class Add(nn.Module):
    """The sum of time and class embedding."""

    def forward(self, time: Tensor, label: Tensor | float) -> Tensor:
        return time + label


class Concatenate(nn.Module):
    """The concatenation of time and class embedding, (B, 2 · width)."""

    def forward(self, time: Tensor, label: Tensor) -> Tensor:
        return torch.cat([time, label], dim=1)


# ------------------------------------------------------------------------- texts and numbers


class NoAddition(nn.Module):
    """The additional embedding of a network without one, which refuses it."""

    def forward(self, given: Mapping[str, Tensor] | None, batch: int) -> float:
        if given:
            raise InvalidArgument(
                f"added_cond_kwargs must be None: addition_embed_type is None, got {given!r:.80}"
            )
        return 0.0


class TextTime(TimestepEmbedding):
    """SDXL's additional embedding: a pooled text, and numbers (sizes and crop of the image).

    Args:
        sinusoids: features of a number.
        features: total features of the pooled text and of all numbers.
        width: channels of the embedding.

    Source: Podell et al. 2023, "SDXL", https://arxiv.org/abs/2307.01952, section 2.2.
    """

    def __init__(self, sinusoids: SinusoidalTime, features: int, width: int):
        super().__init__(features, width)
        self.sinusoids = sinusoids

    def forward(self, given: Mapping[str, Tensor] | None, batch: int) -> Tensor:
        """Map {"text_embeds": (B, D), "time_ids": (B, numbers)} to (B, width)."""
        if not isinstance(given, Mapping) or given.keys() != {"text_embeds", "time_ids"}:
            got = sorted(given) if isinstance(given, Mapping) else given
            raise InvalidArgument(
                f"added_cond_kwargs must hold text_embeds and time_ids, got {got!r}"
            )
        text, numbers = given["text_embeds"], given["time_ids"]
        for name, tensor in given.items():
            if not (isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[0] == batch):
                raise InvalidArgument(f"{name} must be a tensor ({batch}, n), got {_shape(tensor)}")
            warn_unless_finite(name, tensor)
        check_floating("text_embeds", text)
        total = self.linear_1.in_features
        if text.shape[1] + numbers.shape[1] * self.sinusoids.channels != total:
            raise InvalidArgument(
                f"text_embeds and time_ids must give {total} features (numbers count "
                f"{self.sinusoids.channels} each), got {_shape(text)} and {_shape(numbers)}"
            )
        features = self.sinusoids(numbers.flatten()).view(batch, -1)
        return super().forward(torch.cat([text, features.to(text.dtype)], dim=1))


class NoTextContext(nn.Module):
    """The context of a network without cross-attention, which refuses a text."""

    def forward(self, states: Tensor | None, mask: Tensor | None, batch: int) -> None:
        for name, value in (("encoder_hidden_states", states), ("encoder_attention_mask", mask)):
            if value is not None:
                raise InvalidArgument(f"{name} must be None: this network has no cross-attention")


class TextContext(nn.Module):
    """The context of cross-attention: tokens, and a mask of those to attend to.

    Args:
        width: channels of a token.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, states: Tensor | None, mask: Tensor | None, batch: int) -> Context:
        """Check tokens (B, L, width) and a mask (B, L), 1 or True for tokens to attend to."""
        if not isinstance(states, Tensor) or states.dim() != 3 or not states.is_floating_point():
            raise InvalidArgument(
                "encoder_hidden_states must be a floating point tensor "
                f"({batch}, tokens, {self.width}), got {_shape(states)}"
            )
        check_tensor("encoder_hidden_states", states, (batch, states.shape[1], self.width))
        if not states.shape[1]:
            raise InvalidArgument(f"encoder_hidden_states must have tokens, got {_shape(states)}")
        if mask is None:
            return Context(states, None)
        check_tensor("encoder_attention_mask", mask, tuple(states.shape[:2]))
        check_mask("encoder_attention_mask", mask)
        # −10000 as in diffusers, not −∞: a text whose tokens are all masked gives no NaN.
        return Context(states, (1 - mask.to(states.dtype))[:, None, None] * -10000.0)


class ProjectedTextContext(nn.Linear):
    """A TextContext whose tokens are projected to the width of the attention first."""

    def __init__(self, width: int, to: int):
        super().__init__(width, to)
        self.checked = TextContext(width)

    def forward(self, states: Tensor | None, mask: Tensor | None, batch: int) -> Context:
        tokens, bias = self.checked(states, mask, batch)
        return Context(super().forward(tokens), bias)


def check_tensor(name: str, value: object, shape: tuple[int, ...]) -> None:
    """Refuse anything but a tensor of this shape. Raises InvalidArgument naming it."""
    if not isinstance(value, Tensor):
        raise InvalidArgument(f"{name} must be a tensor of shape {shape}, got {_shape(value)}")
    if value.shape != shape:
        raise InvalidArgument(f"{name} must have shape {shape}, got {tuple(value.shape)}")


def _shape(value: object) -> str:
    shape = f" {tuple(value.shape)}" if hasattr(value, "shape") else f" {value!r:.60}"
    return shape.strip() if isinstance(value, Tensor) else type(value).__name__ + shape
