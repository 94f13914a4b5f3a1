"""The arguments of a text encoder: names of transformers' `CLIPTextConfig`, checked by name.

Published folders were written by many versions of transformers, and the older ones wrote every
attribute of their base class into config.json. Each such name is in one of two tables below, with
the reason why it cannot change the result; a name in neither is refused.

Source: https://huggingface.co/docs/transformers/model_doc/clip#transformers.CLIPTextConfig
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minidiff.errors import InvalidArgument, one_of, whole_number
from minidiff.nn.blocks.layers import ACTIVATIONS
from minidiff.nn.configs.checks import SIDE, WIDTH
from minidiff.runtime.checks import check_fields, choice, option, optional, real, whole

# Classes of transformers: True for a projection of the pooled vector.
PROJECTS = {"CLIPTextModel": False, "CLIPTextModelWithProjection": True}
MODEL_TYPE = "clip_text_model"
TEXT_ACTIVATIONS = ("quick_gelu", *ACTIVATIONS)

# Names in config.json whose value no CLIP text model of any version reads.
_UNREAD_BECAUSE = {
    "the weights have a dtype, and no version reads which one wrote the file": (
        "torch_dtype dtype transformers_version"
    ),
    "listed beside attention_dropout, but never used by a layer": "dropout",
    "what a call returns: here everything, by name": (
        "return_dict output_hidden_states output_attentions torchscript"
    ),
    "speed and memory": "gradient_checkpointing use_cache chunk_size_feed_forward",
    "TensorFlow and Flax only": "tf_legacy_loss use_bfloat16",
    "there are no output embeddings to tie to the input's": "tie_word_embeddings",
    "classifiers and training only": (
        "id2label label2id num_labels problem_type finetuning_task task_specific_params"
    ),
    "tokenizer only": "tokenizer_class prefix sep_token_id",
    "text generation, which an encoder does not do": (
        "max_length min_length do_sample early_stopping num_beams num_beam_groups "
        "diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
        "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences "
        "output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
        "remove_invalid_values exponential_decay_length_penalty suppress_tokens "
        "begin_suppress_tokens decoder_start_token_id"
    ),
}
UNREAD = frozenset(name for names in _UNREAD_BECAUSE.values() for name in names.split())

# Names that select another network: accepted at the one value that this network has.
_ONLY = {
    "model_type": MODEL_TYPE,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
}

_TOKEN = whole(0, (1 << 31) - 1)


def read_arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a TextEncoder that a config.json holds.

    Notes, whose names start with "_", and names that nothing reads are left out.

    Raises:
        InvalidArgument: a value that selects another network.
    """
    for name, only in _ONLY.items():
        if name in content and (type(content[name]), content[name]) != (type(only), only):
            raise InvalidArgument(f"{name} must be {only!r}, got {content[name]!r}")
    return {
        name: value
        for name, value in content.items()
        if not (name.startswith("_") or name in UNREAD or name in _ONLY)
    }


@dataclass(frozen=True)
class TextConfig:
    """The arguments of a TextEncoder, with transformers' names and defaults.

    Raises:
        InvalidArgument: a value is not allowed, or two contradict each other.
    """

    architectures: Sequence[str] = ("CLIPTextModel",)  # one of PROJECTS
    vocab_size: int = option(49408, "tokens in the vocabulary", whole(1, 1 << 22))
    hidden_size: int = option(512, "channels of a token", SIDE)
    intermediate_size: int = option(2048, "channels within the MLP", WIDTH)
    projection_dim: int | None = option(512, "channels of the projection", optional(SIDE))
    num_hidden_layers: int = option(12, "transformer layers", whole(1, 128))
    num_attention_heads: int = 8
    max_position_embeddings: int = option(77, "maximum number of tokens", WIDTH)
    hidden_act: str = option("quick_gelu", "activation of the MLP", choice(*TEXT_ACTIVATIONS))
    layer_norm_eps: float = option(1e-5, "epsilon of the norms", real(1e-12, 1))
    attention_dropout: float = option(0.0, "dropout of attention weights", real(0, 1))
    initializer_range: float = option(0.02, "unused here: vision half of CLIP", real(0))
    initializer_factor: float = option(1.0, "scale of the initial weights", real(0))
    # Tokenizer only: the encoder ignores padding only where an attention_mask covers it.
    pad_token_id: int | None = option(1, "padding token", optional(_TOKEN))
    bos_token_id: int | None = option(49406, "token that begins a text", optional(_TOKEN))
    eos_token_id: int = option(49407, "token that ends a text", _TOKEN)

    def __post_init__(self) -> None:
        if not isinstance(self.architectures, list | tuple) or len(self.architectures) != 1:
            raise InvalidArgument(
                f"architectures must be a list of one name, got {self.architectures!r}"
            )
        one_of("architectures", self.architectures[0], PROJECTS)
        check_fields(self)
        if self.projects:
            SIDE("projection_dim", self.projection_dim)
        whole_number("num_attention_heads", self.num_attention_heads, 1, self.hidden_size)
        if self.hidden_size % self.num_attention_heads:
            raise InvalidArgument(
                f"num_attention_heads must divide hidden_size ({self.hidden_size}), "
                f"got {self.num_attention_heads}"
            )

    @property
    def projects(self) -> bool:
        """Whether the pooled vector is projected to `projection_dim`."""
        return PROJECTS[self.architectures[0]]
