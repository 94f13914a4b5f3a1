"""T5's encoder: the third text encoder of Stable Diffusion 3.

    h ← h + Attention(norm(h), bias by distance);  h ← h + W_o·(GELU(W₀·norm(h)) ⊙ W₁·norm(h))
    result = norm(h)

A norm divides by the root mean square. Attention looks both ways, its logits are not scaled, and a
trained number per head and distance is added to them. The distances of all layers are the first
layer's. Submodules have the names of transformers' checkpoints.

Sources: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", https://arxiv.org/abs/1910.10683, section 2.1; Shazeer 2020,
https://arxiv.org/abs/2002.05202, for the gated layer of version 1.1. The arguments are those of
transformers' `T5EncoderModel`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.errors import InvalidArgument
from minidiff.nn.blocks.attention import attend
from minidiff.nn.configs.checks import MAX_CHANNELS, WIDTH
from minidiff.nn.configs.text import UNREAD
from minidiff.nn.model import Model, parse_options
from minidiff.runtime.checks import check_fields, choice, option, real, whole
from minidiff.runtime.files import Config
from minidiff.runtime.tensors import Stored

# Names of config.json that the encoder does not read: the decoder's, and what others imply.
_UNUSED = UNREAD | {
    "model_type", "architectures", "is_encoder_decoder", "is_decoder", "num_decoder_layers",
    "decoder_start_token_id", "n_positions", "dense_act_fn", "is_gated_act", "dropout_rate",
    "classifier_dropout", "initializer_factor", "pad_token_id", "eos_token_id", "bos_token_id",
    "scale_decoder_outputs", "output_past",
}  # fmt: skip


@dataclass(frozen=True)
class T5Config:
    """The arguments of a T5Encoder, with transformers' names and the defaults of version 1.1.

    Raises:
        InvalidArgument: a value is not allowed.
    """

    vocab_size: int = option(32128, "tokens in the vocabulary", whole(1, 1 << 22))
    d_model: int = option(512, "channels of a token", WIDTH)
    d_kv: int = option(64, "channels of a head", whole(1, MAX_CHANNELS))
    d_ff: int = option(1024, "channels within the MLP", WIDTH)
    num_layers: int = option(8, "layers", whole(1, 128))
    num_heads: int = option(6, "heads", whole(1, 1024))
    relative_attention_num_buckets: int = option(32, "distances", whole(4, 1 << 12))
    relative_attention_max_distance: int = option(128, "largest distance", whole(2, 1 << 16))
    layer_norm_epsilon: float = option(1e-6, "epsilon of the norms", real(1e-12, 1))
    feed_forward_proj: str = option("gated-gelu", "kind of the MLP", choice("gated-gelu"))

    def __post_init__(self) -> None:
        check_fields(self)
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            raise InvalidArgument(
                "relative_attention_max_distance must be above a quarter of "
                f"relative_attention_num_buckets ({self.relative_attention_num_buckets}), "
                f"got {self.relative_attention_max_distance}"
            )


class T5Encoder(Model):
    """The encoder of T5, version 1.1, equal to transformers' `T5EncoderModel`.

    Args:
        config: fields of T5Config.
    Raises:
        InvalidArgument: an unknown name or a value that is not allowed.
    """

    class_name = "T5EncoderModel"
    class_names = (class_name,)
    weights_name = "model"

    def __init__(self, **config: object):
        super().__init__()
        c = parse_options(T5Config, config, self.class_name)
        self.config = Config(asdict(c))
        self.shared = nn.Embedding(c.vocab_size, c.d_model, device="meta")  # no time for init
        self.shared.to_empty(device=torch.get_default_device())
        self.encoder = Layers(c)
        for weight in self.parameters():
            if weight.dim() > 1 and not weight.is_meta:
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map token numbers (B, L) to one vector per token, (B, L, d_model).

        Raises:
            InvalidArgument: a wrong shape, type or, on the CPU, number.
        """
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise InvalidArgument(
                f"input_ids must be int64 (B, L), got {input_ids.dtype} {tuple(input_ids.shape)}"
            )
        try:
            return self.encoder(self.shared(input_ids))
        except IndexError as error:
            raise InvalidArgument(
                f"input_ids must be in 0..{self.config.vocab_size - 1}, "
                f"got {input_ids.min().item()}..{input_ids.max().item()}"
            ) from error

    @classmethod
    def from_config(cls, config: Mapping) -> "T5Encoder":
        """Build with fresh weights from the content of a config.json. Raises InvalidArgument."""
        if config.get("model_type", "t5") != "t5":
            raise InvalidArgument(f"model_type must be 't5', got {config['model_type']!r}")
        return cls(**_options(config))

    def written_config(self) -> dict:
        """Return the content of config.json, with the names that transformers needs."""
        return {"model_type": "t5", "architectures": [self.class_name], **self.config}

    @classmethod
    def translate_names(cls, stored: Mapping[str, Stored]) -> dict[str, Stored]:
        """Return the tensors of a file; some have the embedding of tokens under two names."""
        result = dict(stored)
        copy = result.pop("encoder.embed_tokens.weight", None)
        return result if copy is None else {"shared.weight": copy, **result}

    @classmethod
    def min_tensors(cls, config: Mapping) -> int:
        return 8 * parse_options(T5Config, _options(config), cls.class_name).num_layers


def _options(config: Mapping) -> dict:
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in _UNUSED}


class Layers(nn.Module):
    """All layers and the last norm."""

    def __init__(self, c: T5Config):
        super().__init__()
        self.block = nn.ModuleList(Block(c, first=i == 0) for i in range(c.num_layers))
        self.final_layer_norm = RMSNorm(c)

    def forward(self, h: Tensor) -> Tensor:
        bias = self.block[0].layer[0].SelfAttention.bias(h.shape[1])
        for block in self.block:
            attention, mlp = block.layer
            h = mlp(attention(h, bias))
        return self.final_layer_norm(h)


class Block(nn.Module):
    """A layer of attention and one of the MLP."""

    def __init__(self, c: T5Config, first: bool):
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(c, first), MLPLayer(c)])


class RMSNorm(nn.RMSNorm):
    """The norm of a token, with statistics in float32, in the number type of the weights."""

    def __init__(self, c: T5Config):
        super().__init__(c.d_model, c.layer_norm_epsilon)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h).to(self.weight.dtype)


class AttentionLayer(nn.Module):
    """Attention after a norm, in a residual connection."""

    def __init__(self, c: T5Config, first: bool):
        super().__init__()
        self.SelfAttention = (FirstAttention if first else Attention)(c)
        self.layer_norm = RMSNorm(c)

    def forward(self, h: Tensor, bias: Tensor) -> Tensor:
        return h + self.SelfAttention(self.layer_norm(h), bias)


class Attention(nn.Module):
    """Multi-head attention without biases and without a scale of the logits."""

    def __init__(self, c: T5Config):
        super().__init__()
        self.heads, self.scale, inner = c.num_heads, c.d_kv**0.5, c.num_heads * c.d_kv
        self.q, self.k, self.v = (nn.Linear(c.d_model, inner, bias=False) for _ in "qkv")
        self.o = nn.Linear(inner, c.d_model, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q = self.q(x) * self.scale  # attention divides by √d, which T5 does not
        return self.o(attend(q, self.k(x), self.v(x), self.heads, bias))


class FirstAttention(Attention):
    """The attention of the first layer, which has the trained numbers of the distances."""

    def __init__(self, c: T5Config):
        super().__init__(c)
        self.buckets, self.furthest = (
            c.relative_attention_num_buckets // 2,
            c.relative_attention_max_distance,
        )
        self.relative_attention_bias = nn.Embedding(2 * self.buckets, c.num_heads)

    def bias(self, length: int) -> Tensor:
        """Return the numbers that are added to the logits of a text, (1, heads, L, L)."""
        i = torch.arange(length, device=self.q.weight.device)
        return self.relative_attention_bias(self._bucket(i - i[:, None])).permute(2, 0, 1)[None]

    def _bucket(self, distance: Tensor) -> Tensor:
        """Return the bucket of every distance: one each if small, logarithmic if large."""
        exact, far = self.buckets // 2, distance.abs()
        growth = (far.float() / exact).log() / math.log(self.furthest / exact)
        large = exact + (growth * (self.buckets - exact)).long()
        bucket = torch.where(far < exact, far, large.clamp(max=self.buckets - 1))
        return bucket + (distance > 0) * self.buckets


class MLPLayer(nn.Module):
    """The gated MLP after a norm, in a residual connection."""

    def __init__(self, c: T5Config):
        super().__init__()
        self.DenseReluDense = GatedMLP(c)
        self.layer_norm = RMSNorm(c)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.DenseReluDense(self.layer_norm(h))


class GatedMLP(nn.Module):
    """W_o·(GELU(W₀·x) ⊙ W₁·x)."""

    def __init__(self, c: T5Config):
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(c.d_model, c.d_ff, bias=False) for _ in range(2))
        self.wo = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))
