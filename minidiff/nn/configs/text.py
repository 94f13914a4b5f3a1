"""The arguments of a text encoder: names of transformers' `CLIPTextConfig`, checked by name.

Published folders were written by many versions of transformers, and the older ones put every
attribute of their base class into config.json. Each such name is in one of two tables below, with
the reason why it cannot change the result; a name that is in none is refused.

Source: https://huggingface.co/docs/transformers/model_doc/clip#transformers.CLIPTextConfig
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minidiff.errors import InvalidArgument, one_of, real_number, whole_number
from minidiff.nn.blocks.layers import ACTIVATIONS

# Classes of transformers: without and with a projection of the pooled vector.
PROJECTS = {"CLIPTextModel": False, "CLIPTextModelWithProjection": True}
MODEL_TYPE = "clip_text_model"
TEXT_ACTIVATIONS = ("quick_gelu", *ACTIVATIONS)

# Names in config.json whose value, whatever it is, no CLIP text model of any version reads.
_UNREAD_BECAUSE = {
    "the weights tell their dtype, and no version reads which one wrote": (
        "torch_dtype dtype transformers_version"
    ),
    "CLIP's configurations had it beside attention_dropout, and no layer ever used it": "dropout",
    "what a call returns: here everything, by name": (
        "return_dict output_hidden_states output_attentions torchscript"
    ),
    "speed and memory": "gradient_checkpointing use_cache chunk_size_feed_forward",
    "of TensorFlow and Flax": "tf_legacy_loss use_bfloat16",
    "there are no output embeddings to tie to the input's": "tie_word_embeddings",
    "of classifiers and of training": (
        "id2label label2id num_labels problem_type finetuning_task task_specific_params"
    ),
    "of the tokenizer": "tokenizer_class prefix sep_token_id",
    "of generating text, which an encoder does not": (
        "max_length min_length do_sample early_stopping num_beams num_beam_groups "
        "diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
        "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences "
        "output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
        "remove_invalid_values exponential_decay_length_penalty suppress_tokens "
        "begin_suppress_tokens decoder_start_token_id"
    ),
}
_UNREAD = frozenset(name for names in _UNREAD_BECAUSE.values() for name in names.split())

# Names that would ask for another network: read at the one value that this network has.
_ONLY = {
    "model_type": MODEL_TYPE,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
}

_LARGEST_TOKEN = (1 << 31) - 1


def arguments_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a TextEncoder that a config.json holds, without what is only noted there.

    Names that start with "_" are notes and not read, as in every config.

    Raises:
        InvalidArgument: a value that asks for another network.
    """
    for name, only in _ONLY.items():
        if name in content and (type(content[name]), content[name]) != (type(only), only):
            raise InvalidArgument(f"{name} must be {only!r}, got {content[name]!r}")
    return {
        name: value
        for name, value in content.items()
        if not (name.startswith("_") or name in _UNREAD or name in _ONLY)
    }


@dataclass(frozen=True)
class TextConfig:
    """The arguments of a TextEncoder, with transformers' names and defaults, checked when made.

    The bounds on sizes are far above any network in use; they keep a damaged or hostile
    config.json from taking memory or time.

    Raises:
        InvalidArgument: a value that is not allowed, or two that do not go together.
    """

    architectures: Sequence[str] = ("CLIPTextModel",)  # one of PROJECTS
    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int | None = 512  # read only where the architecture projects
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    initializer_range: float = 0.02  # read by the vision half of CLIP only
    initializer_factor: float = 1.0
    pad_token_id: int | None = 1  # of the tokenizer: the encoder sees no padding but by its mask
    bos_token_id: int | None = 49406  # of the tokenizer
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        if not isinstance(self.architectures, list | tuple) or len(self.architectures) != 1:
            raise InvalidArgument(
                f"architectures must be a list of one name, got {self.architectures!r}"
            )
        one_of("architectures", self.architectures[0], PROJECTS)
        whole_number("vocab_size", self.vocab_size, 1, 1 << 22)
        whole_number("hidden_size", self.hidden_size, 1, 1 << 14)
        whole_number("intermediate_size", self.intermediate_size, 1, 1 << 16)
        if self.projects or self.projection_dim is not None:
            whole_number("projection_dim", self.projection_dim, 1, 1 << 14)
        whole_number("num_hidden_layers", self.num_hidden_layers, 1, 128)
        whole_number("num_attention_heads", self.num_attention_heads, 1, self.hidden_size)
        if self.hidden_size % self.num_attention_heads:
            raise InvalidArgument(
                f"num_attention_heads must divide hidden_size ({self.hidden_size}), "
                f"got {self.num_attention_heads}"
            )
        whole_number("max_position_embeddings", self.max_position_embeddings, 1, 1 << 16)
        one_of("hidden_act", self.hidden_act, TEXT_ACTIVATIONS)
        real_number("layer_norm_eps", self.layer_norm_eps, 1e-12, 1)
        real_number("attention_dropout", self.attention_dropout, 0, 1)
        real_number("initializer_range", self.initializer_range, 0)
        real_number("initializer_factor", self.initializer_factor, 0)
        for name in ("pad_token_id", "bos_token_id"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), 0, _LARGEST_TOKEN)
        whole_number("eos_token_id", self.eos_token_id, 0, _LARGEST_TOKEN)

    @property
    def projects(self) -> bool:
        """Whether the pooled vector is projected to `projection_dim`."""
        return PROJECTS[self.architectures[0]]
