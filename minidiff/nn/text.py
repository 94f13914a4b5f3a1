"""The text encoder: CLIP's transformer, from token numbers to a vector a token.

    h₀ = token[ids] + position
    h  ← h + Attention(norm₁(h));  h ← h + MLP(norm₂(h))          in every layer
    last_hidden_state = norm(h);  pooled = its row at the end of the text

A token attends to itself and to what came before, so that its vector never depends on what
follows; the row at the end of the text has seen everything and stands for the whole. Submodule
names are those of published checkpoints.

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
from minidiff.nn.configs.text import MODEL_TYPE, PROJECTS, TextConfig, arguments_of
from minidiff.nn.model import Model, options_of
from minidiff.runtime.files import Config
from minidiff.runtime.tensors import Stored, read_one

EMBEDDINGS = "text_model.embeddings"
POSITIONS = f"{EMBEDDINGS}.position_ids"


class TextEncoding(NamedTuple):
    """What a TextEncoder makes of token numbers (B, length).

    last_hidden_state: a vector a token after the last norm, (B, length, hidden_size).
    pooled: the one of the token that ends the text, (B, hidden_size).
    text_embeds: its projection, (B, projection_dim); `pooled` itself without a projection.
    hidden_states: what entered the first layer and what left each, not normalised, so the one
        before the last layer (SDXL, "clip skip") is hidden_states[-2].
    """

    last_hidden_state: Tensor
    pooled: Tensor
    text_embeds: Tensor
    hidden_states: tuple[Tensor, ...]


class TextEncoder(Model):
    """CLIP's text transformer, equal to `CLIPTextModel` and `CLIPTextModelWithProjection`.

    Args:
        config: the fields of TextConfig, by name; what is left out has transformers' default.
            `architectures=["CLIPTextModelWithProjection"]` adds the projection.
    Raises:
        InvalidArgument: an unknown name, a value that is not allowed, or two that do not go
            together.

    `encoder.config` holds all arguments. Fresh weights are normal, as in CLIP's code, with
    `initializer_factor` on every standard deviation.
    """

    class_names = tuple(PROJECTS)
    weights_name = "model"

    def __init__(self, **config: object):
        super().__init__()
        c = options_of(TextConfig, config)
        self.config, self.class_name = Config(asdict(c)), c.architectures[0]
        self.text_model = Transformer(c)
        self.text_projection = nn.Identity()
        if c.projects:
            std = c.initializer_factor * c.hidden_size**-0.5
            self.text_projection = _linear(c.hidden_size, c.projection_dim, std, bias=False)
        # Configurations from before transformers 4.31 say 2, which does not end a text; what does
        # has the highest number in CLIP's vocabulary, and that is what was looked for.
        self.end = HighestToken() if c.eos_token_id == 2 else FirstToken(c.eos_token_id)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TextEncoding:
        """Encode token numbers.

        Args:
            input_ids: int64 or int32, (B, length), length up to max_position_embeddings. Each
                text holds the token that ends it, which is where `pooled` is read: the first
                eos_token_id, or the first token where there is none; where the configuration
                says 2, as older ones do, the highest number. On the CPU a number that is not in
                the vocabulary is refused; a GPU is not waited for and stops with an error of its
                own.
            attention_mask: bool or whole numbers, (B, length); 0 hides a token from the others,
                as padding. None hides nothing, which is how Stable Diffusion encodes prompts.
        Raises:
            InvalidArgument: a wrong shape, type or number.
        """
        self._check(input_ids, attention_mask)
        last, hidden = self.text_model(input_ids, _visible(attention_mask))
        pooled = last[torch.arange(len(last), device=last.device), self.end(input_ids)]
        return TextEncoding(last, pooled, self.text_projection(pooled), hidden)

    def _check(self, ids: Tensor, mask: Tensor | None) -> None:
        """Refuse bad input by name."""
        if not isinstance(ids, Tensor):
            raise InvalidArgument(f"input_ids must be a tensor, got {type(ids).__name__}")
        if ids.dtype not in (torch.int64, torch.int32):
            raise InvalidArgument(f"input_ids must be int64 or int32, got {ids.dtype}")
        longest = self.config.max_position_embeddings
        if ids.dim() != 2 or not len(ids) or not 1 <= ids.shape[1] <= longest:
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

    # ------------------------------------------------------------------------- folders

    @classmethod
    def from_config(cls, config: Mapping) -> "TextEncoder":
        """Build with fresh weights from `encoder.config` or what a config.json holds.

        Raises:
            InvalidArgument: another class's configuration, an unknown name or a bad value.
        """
        return cls(**arguments_of(config))

    def written_config(self) -> dict:
        """What config.json holds; without `model_type` transformers would not know it."""
        return {"model_type": MODEL_TYPE, **self.config}

    @classmethod
    def wanted(cls, stored: Mapping[str, Stored]) -> dict[str, Stored]:
        """Tensors of a file under the names of this network.

        transformers 5 writes a `CLIPTextModel` without the prefix that published files have.
        Before 4.31 it also wrote the positions' numbers.

        Raises:
            CheckpointError: those numbers are not 0, 1, 2, …, so the file is damaged.
        """
        if not any(name.startswith("text_model.") for name in stored):
            stored = {
                name if name.startswith("text_projection.") else f"text_model.{name}": entry
                for name, entry in stored.items()
            }
        numbered, table = (
            stored.get(POSITIONS),
            stored.get(f"{EMBEDDINGS}.position_embedding.weight"),
        )
        if numbered and table and table.shape:
            longest = table.shape[0]
            if read_one(numbered).flatten().tolist() != list(range(longest)):
                raise CheckpointError(
                    f"{numbered.file}: {POSITIONS} must hold 0..{longest - 1}, in order"
                )
        return {name: entry for name, entry in stored.items() if name != POSITIONS}

    @classmethod
    def least_tensors(cls, config: Mapping) -> int:
        return 16 * options_of(TextConfig, arguments_of(config)).num_hidden_layers


# --------------------------------------------------------------------------- the transformer


class Transformer(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.embeddings = Embeddings(c)
        self.encoder = Layers(c)
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, ids: Tensor, visible: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map numbers (B, length) to the normalised result and the tuple of all states."""
        hidden = self.encoder(self.embeddings(ids), visible)
        return self.final_layer_norm(hidden[-1]), hidden


class Embeddings(nn.Module):
    """A trained vector a token and one a position, added."""

    def __init__(self, c: TextConfig):
        super().__init__()
        factor = c.initializer_factor
        self.token_embedding = _table(c.vocab_size, c.hidden_size, 0.02 * factor)
        self.position_embedding = _table(c.max_position_embeddings, c.hidden_size, 0.01 * factor)

    def forward(self, ids: Tensor) -> Tensor:
        try:
            tokens = self.token_embedding(ids)
        except IndexError as error:  # the CPU's kernel looks; nothing is read for the good case
            raise InvalidArgument(
                f"input_ids must be in 0..{self.token_embedding.num_embeddings - 1}, "
                f"got {ids.min().item()}..{ids.max().item()}"
            ) from error
        return tokens + self.position_embedding.weight[: ids.shape[1]]


class Layers(nn.Module):
    """The layers one after the other."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))

    def forward(self, h: Tensor, visible: Tensor | None) -> tuple[Tensor, ...]:
        """Map h (B, length, hidden_size) to all states: h, and what left each layer."""
        hidden = [h]
        for layer in self.layers:
            hidden.append(layer(hidden[-1], visible))
        return tuple(hidden)


class Layer(nn.Module):
    """Attention, then an MLP on every token alone; each adds to what came in.

    The norms are torch's own: they keep float32 statistics in 16 bits on every device, and twice
    as fast on the CPU as by casting to float32 and back.
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
    """Multi-head attention of every token to itself and to those before it.

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
        """Map x (B, length, width) to the same; `visible` as `_visible` makes it."""
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
    """Where each text has its highest token number, the first of equals: (B, length) -> (B,)."""

    def forward(self, ids: Tensor) -> Tensor:
        return ids.argmax(dim=1)


class FirstToken(nn.Module):
    """Where each text has `token` first, 0 where it has none: (B, length) -> (B,)."""

    def __init__(self, token: int):
        super().__init__()
        self.token = token

    def forward(self, ids: Tensor) -> Tensor:
        return (ids == self.token).int().argmax(dim=1)


def _visible(attention_mask: Tensor | None) -> Tensor | None:
    """Who may attend to whom, (B, 1, length, length); None for every token to those before it."""
    if attention_mask is None:
        return None
    length = attention_mask.shape[1]
    past = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    return past & attention_mask.bool()[:, None, None, :]


def _depth_scale(c: TextConfig) -> float:
    """What keeps the variance of the sum of 2 · layers residual branches from growing."""
    return (2 * c.num_hidden_layers) ** -0.5


def _table(rows: int, width: int, std: float) -> nn.Embedding:
    """A trained vector a row, normal."""
    return nn.Embedding.from_pretrained(_normal(torch.empty(rows, width), std), freeze=False)


def _linear(entering: int, leaving: int, std: float, bias: bool = True) -> nn.Linear:
    """A linear layer with normal weights and no offset yet."""
    linear = nn.Linear(entering, leaving, bias=bias)
    _normal(linear.weight, std)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def _normal(weight: Tensor, std: float) -> Tensor:
    """Fill `weight`, unless it has no memory: torch takes seconds to draw nothing there."""
    return weight if weight.is_meta else nn.init.normal_(weight, std=std)
