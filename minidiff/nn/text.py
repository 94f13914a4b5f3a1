"""The text encoder: CLIP's transformer, from token numbers to one vector per token.

    h₀ = token[ids] + position
    h  ← h + Attention(norm₁(h));  h ← h + MLP(norm₂(h))          in every layer
    last_hidden_state = norm(h);  pooled = its row at the end of the text

A token attends to itself and to earlier tokens, so its vector does not depend on later ones. The
row at the end of the text depends on all of it and represents the text. Submodule names are those
of published checkpoints.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
Supervision", https://arxiv.org/abs/2103.00020, section 2.4, and its code,
https://github.com/openai/CLIP. The arguments and what they mean are those of transformers'
`CLIPTextModel` and `CLIPTextModelWithProjection`.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.nn.blocks.attention import attend
from minidiff.nn.blocks.layers import ACTIVATIONS
from minidiff.nn.configs.text import MODEL_TYPE, PROJECTS, TextConfig, read_arguments
from minidiff.nn.model import Model, parse_options
from minidiff.runtime.files import Config
from minidiff.runtime.shapes import check_mask
from minidiff.runtime.tensors import Stored, read_tensor

EMBEDDINGS = "text_model.embeddings"
POSITIONS = f"{EMBEDDINGS}.position_ids"


class TextEncoding(NamedTuple):
    """The output of a TextEncoder for token numbers (B, length).

    Attributes:
        last_hidden_state: one vector per token after the last norm, (B, length, hidden_size).
        pooled: vector of the token that ends the text, (B, hidden_size).
        text_embeds: projection of `pooled`, (B, projection_dim); `pooled` without a projection.
        hidden_states: input of the first layer and output of each, not normalised. That of the
            last layer but one (SDXL, "clip skip") is hidden_states[-2].
    """

    last_hidden_state: Tensor
    pooled: Tensor
    text_embeds: Tensor
    hidden_states: tuple[Tensor, ...]


class TextEncoder(Model):
    """CLIP's text transformer, equal to `CLIPTextModel` and `CLIPTextModelWithProjection`.

    Args:
        config: fields of TextConfig, with transformers' defaults.
            `architectures=["CLIPTextModelWithProjection"]` adds the projection.
    Raises:
        InvalidArgument: an unknown name, a value that is not allowed, or two that contradict
            each other.

    `encoder.config` holds all arguments. Fresh weights are normal, as in CLIP's code, with every
    standard deviation multiplied by `initializer_factor`.
    """

    class_names = tuple(PROJECTS)
    weights_name = "model"

    def __init__(self, **config: object):
        super().__init__()
        c = parse_options(TextConfig, config, type(self).class_names[0])
        self.config, self.class_name = Config(asdict(c)), c.architectures[0]
        self.text_model = Transformer(c)
        self.text_projection = nn.Identity()
        if c.projects:
            std = c.initializer_factor * c.hidden_size**-0.5
            self.text_projection = _linear(c.hidden_size, c.projection_dim, std, bias=False)
        # Before transformers 4.31 the configuration has 2, which does not end a text, and the code
        # looks for the highest number instead: in CLIP's vocabulary that token ends a text.
        self.end = HighestToken() if c.eos_token_id == 2 else FirstToken(c.eos_token_id)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TextEncoding:
        """Encode token numbers.

        `pooled` is read at the token that ends a text: the first eos_token_id, or the first token
        of a text without one. Where the configuration has 2, as older ones do, it is the highest
        number.

        Args:
            input_ids: int64 or int32, (B, length), length up to max_position_embeddings. A number
                outside the vocabulary is refused on the CPU; on a GPU, where checking would make
                the host wait, CUDA raises its own error.
            attention_mask: bool or integers, (B, length); 0 hides a token from the others, such
                as padding. None hides nothing, which is how Stable Diffusion encodes prompts.
        Raises:
            InvalidArgument: a wrong shape, type or number.
        """
        self._check(input_ids, attention_mask)
        last, hidden = self.text_model(input_ids, _visible(attention_mask))
        pooled = last[torch.arange(last.shape[0], device=last.device), self.end(input_ids)]
        return TextEncoding(last, pooled, self.text_projection(pooled), hidden)

    def _check(self, ids: Tensor, mask: Tensor | None) -> None:
        """Check the input. Raises InvalidArgument."""
        if not isinstance(ids, Tensor):
            raise InvalidArgument(f"input_ids must be a tensor, got {type(ids).__name__}")
        if ids.dtype not in (torch.int64, torch.int32):
            raise InvalidArgument(f"input_ids must be int64 or int32, got {ids.dtype}")
        longest = self.config.max_position_embeddings
        if ids.dim() != 2 or not ids.shape[0] or not 1 <= ids.shape[1] <= longest:
            raise InvalidArgument(
                f"input_ids must have shape (B, length) with length in 1..{longest} "
                f"(max_position_embeddings), got {tuple(ids.shape)}"
            )
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise InvalidArgument(
                f"attention_mask must be a tensor of bool or whole numbers, got {kind}"
            )
        if mask.shape != ids.shape:
            raise InvalidArgument(
                f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}, "
                f"got {tuple(mask.shape)}"
            )
        check_mask("attention_mask", mask)

    # ------------------------------------------------------------------------- folders

    @classmethod
    def from_config(cls, config: Mapping) -> "TextEncoder":
        """Build with fresh weights from `encoder.config` or the content of a config.json.

        Raises:
            InvalidArgument: a configuration for a different class, an unknown name or a bad value.
        """
        return cls(**read_arguments(config))

    def written_config(self) -> dict:
        """Return the content of config.json, with the `model_type` that transformers needs."""
        return {"model_type": MODEL_TYPE, **self.config}

    @classmethod
    def translate_names(cls, stored: Mapping[str, Stored]) -> dict[str, Stored]:
        """Return the tensors of a file under the names of this network.

        transformers 5 writes a `CLIPTextModel` without the prefix that published files have.
        Before 4.31 it also wrote the numbers of the positions.

        Raises:
            CheckpointError: those numbers are not 0, 1, 2, …, so the file is damaged.
        """
        if not any(name.startswith("text_model.") for name in stored):
            stored = {
                name if name.startswith("text_projection.") else f"text_model.{name}": entry
                for name, entry in stored.items()
            }
        numbers = stored.get(POSITIONS)
        table = stored.get(f"{EMBEDDINGS}.position_embedding.weight")
        if numbers and table and table.shape:
            longest = table.shape[0]
            if read_tensor(numbers).flatten().tolist() != list(range(longest)):
                raise CheckpointError(
                    f"{numbers.file}: {POSITIONS} must hold 0..{longest - 1}, in order"
                )
        return {name: entry for name, entry in stored.items() if name != POSITIONS}

    @classmethod
    def min_tensors(cls, config: Mapping) -> int:
        c = parse_options(TextConfig, read_arguments(config), cls.class_names[0])
        return 16 * c.num_hidden_layers


# --------------------------------------------------------------------------- the transformer


class Transformer(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.embeddings = Embeddings(c)
        self.encoder = Layers(c)
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, ids: Tensor, visible: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map token numbers (B, length) to the normalised result and all hidden states."""
        hidden = self.encoder(self.embeddings(ids), visible)
        return self.final_layer_norm(hidden[-1]), hidden


class Embeddings(nn.Module):
    """The sum of a trained vector per token and one per position."""

    def __init__(self, c: TextConfig):
        super().__init__()
        factor = c.initializer_factor
        self.token_embedding = _table(c.vocab_size, c.hidden_size, 0.02 * factor)
        self.position_embedding = _table(c.max_position_embeddings, c.hidden_size, 0.01 * factor)

    def forward(self, ids: Tensor) -> Tensor:
        try:
            tokens = self.token_embedding(ids)
        except IndexError as error:  # from the CPU's kernel, so that valid input costs nothing
            raise InvalidArgument(
                f"input_ids must be in 0..{self.token_embedding.num_embeddings - 1}, "
                f"got {ids.min().item()}..{ids.max().item()}"
            ) from error
        return tokens + self.position_embedding.weight[: ids.shape[1]]


class Layers(nn.Module):
    """The layers in sequence."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))

    def forward(self, h: Tensor, visible: Tensor | None) -> tuple[Tensor, ...]:
        """Map h (B, length, hidden_size) to all hidden states: h and the output of each layer."""
        hidden = [h]
        for layer in self.layers:
            hidden.append(layer(hidden[-1], visible))
        return tuple(hidden)


class Layer(nn.Module):
    """Attention and an MLP on each token, both in a residual connection.

    The norms are torch's own. Their statistics are float32 for 16-bit input on every device, and
    on the CPU they are twice as fast as casting to float32 and back.
    """

    def __init__(self, c: TextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.self_attn = CausalAttention(c)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = MLP(c)

    def forward(self, h: Tensor, visible: Tensor | None) -> Tensor:
        h = h + self.self_attn(self.layer_norm1(h), visible)
        return h + self.mlp(self.layer_norm2(h))


class CausalAttention(nn.Module):
    """Multi-head attention of every token to itself and to earlier tokens.

    Source: Vaswani et al. 2017, "Attention Is All You Need", https://arxiv.org/abs/1706.03762,
    eq. 1 and section 3.2.3.
    """

    def __init__(self, c: TextConfig):
        super().__init__()
        width, std = c.hidden_size, c.initializer_factor * c.hidden_size**-0.5
        self.heads, self.dropout = c.num_attention_heads, c.attention_dropout
        self.q_proj, self.k_proj, self.v_proj = (_linear(width, width, std) for _ in "qkv")
        self.out_proj = _linear(width, width, std * _depth_scale(c))

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """Map x (B, length, width) to the same shape; `visible` is that of `_visible`."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        dropout = self.dropout * self.training
        out = attend(q, k, v, self.heads, visible, causal=visible is None, dropout=dropout)
        return self.out_proj(out)


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, c: TextConfig):
        super().__init__()
        std = c.initializer_factor * c.hidden_size**-0.5
        self.fc1 = _linear(c.hidden_size, c.intermediate_size, std * 2**-0.5)
        self.act = QuickGELU() if c.hidden_act == "quick_gelu" else ACTIVATIONS[c.hidden_act]()
        self.fc2 = _linear(c.intermediate_size, c.hidden_size, std * _depth_scale(c))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the approximation of GELU that CLIP was trained with.

    Source: Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415, section 2.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class HighestToken(nn.Module):
    """Position of the highest token number, the first of equals: (B, length) to (B,)."""

    def forward(self, ids: Tensor) -> Tensor:
        return ids.argmax(dim=1)


class FirstToken(nn.Module):
    """Position of the first `token`, 0 for a text without it: (B, length) to (B,)."""

    def __init__(self, token: int):
        super().__init__()
        self.token = token

    def forward(self, ids: Tensor) -> Tensor:
        return (ids == self.token).int().argmax(dim=1)


def _visible(attention_mask: Tensor | None) -> Tensor | None:
    """Return which token may attend to which, (B, 1, length, length); None for plain causal."""
    if attention_mask is None:
        return None
    length = attention_mask.shape[1]
    past = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    return past & attention_mask.bool()[:, None, None, :]


def _depth_scale(c: TextConfig) -> float:
    """Return the scale that keeps the variance of 2 · layers residual branches constant."""
    return (2 * c.num_hidden_layers) ** -0.5


def _table(rows: int, width: int, std: float) -> nn.Embedding:
    """Return an embedding with normal weights."""
    return nn.Embedding.from_pretrained(_normal(torch.empty(rows, width), std), freeze=False)


def _linear(in_channels: int, channels: int, std: float, bias: bool = True) -> nn.Linear:
    """Return a linear layer with normal weights and zero bias."""
    linear = nn.Linear(in_channels, channels, bias=bias)
    _normal(linear.weight, std)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def _normal(weight: Tensor, std: float) -> Tensor:
    """Fill `weight` unless it is on the meta device, where torch takes seconds to do nothing."""
    return weight if weight.is_meta else nn.init.normal_(weight, std=std)
