"""Prompts: from texts to the conditioning of a network.

A tokenizer splits the text into numbered tokens, a text encoder maps each to a vector, and the
U-Net attends to these vectors. Stable Diffusion 1 and 2 have one encoder and use its last layer.
SDXL has two and concatenates the last layer but one of each. It adds the pooled vector of the
second one and the size of the image to the time embedding. A model trained with minidiff has one
small encoder, trained with the U-Net, and a tokenizer of whole words.

Sources: Rombach et al. 2022, https://arxiv.org/abs/2112.10752, section 3.3; Podell et al. 2023,
"SDXL", https://arxiv.org/abs/2307.01952, sections 2.1 and 2.2.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from minidiff.errors import InvalidArgument, true_or_false
from minidiff.guidance import Condition
from minidiff.nn import TextEncoder
from minidiff.text.phrase import conditioning, tokenize_with
from minidiff.text.words import BEGIN, END, PAD, WordTokenizer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


class Prompts:
    """Tokenizer and text encoder of Stable Diffusion 1 and 2.

    Args:
        tokenizer: CLIP tokenizer from `minidiff.text.clip.load_tokenizer`.
        text_encoder: encoder for at least the tokens of the tokenizer.
    Raises:
        InvalidArgument: the two do not fit.
    """

    guidance_scale: ClassVar[float] = 7.5  # default if neither the call nor the folder has one
    adds_text_time: ClassVar[bool] = False  # SDXL's added_cond_kwargs: pooled text and sizes
    labels_are_pooled: ClassVar[bool] = False  # class_labels: the pooled text
    pooled_width: ClassVar[int | None] = None  # channels of Stable Diffusion 3's pooled text
    takes_begun_step: ClassVar[bool] = False  # ⌈strength · steps⌉ steps instead of ⌊…⌋

    def __init__(
        self, tokenizer: "CLIPTokenizer | WordTokenizer", text_encoder: TextEncoder
    ) -> None:
        check_pair(tokenizer, text_encoder)
        self.tokenizer, self.text_encoder = tokenizer, text_encoder

    @property
    def encoders(self) -> tuple[TextEncoder, ...]:
        """The text encoders, for moves between devices."""
        return (self.text_encoder,)

    @property
    def tokenizers(self) -> tuple:
        """The tokenizer of each encoder."""
        return (self.tokenizer,)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.text_encoder.config.hidden_size

    def condition(self, prompts: Sequence[str], size: tuple[int, int]) -> Condition:
        """Return the conditioning on each prompt, for images of (height, width) pixels.

        Raises:
            InvalidArgument: prompts that are not texts.
        """
        return conditioning(self, prompts, size)

    def null(self, n: int, size: tuple[int, int]) -> Condition:
        """Return the unconditional conditioning for guidance, n times."""
        return self.condition([""] * n, size)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Return the token numbers of each prompt, int64 (B, L). Raises InvalidArgument."""
        return tokenize_with(self.tokenizer, prompts)

    def joined(self, each: Sequence[Tensor]) -> Tensor:
        """Return the tokens of the network, of those (B, L, C) of each encoder."""
        return torch.cat(list(each), dim=-1)

    def from_tokens(
        self, ids: Sequence[Tensor], size: tuple[int, int], clip_skip: int | None = None
    ) -> Condition:
        """Return the conditioning on token numbers (B, L), without the encoder's last layers.

        The last norm applies to whichever layer is read, as in diffusers.
        """
        (numbers,) = (n.to(next(self.text_encoder.parameters()).device) for n in ids)
        found = self.encode(numbers)
        if clip_skip is None:
            return found
        hidden = self.text_encoder(numbers).hidden_states[-1 - clip_skip]
        norm = self.text_encoder.text_model.final_layer_norm
        return {**found, "encoder_hidden_states": norm(hidden)}

    def encode(self, ids: Tensor) -> Condition:
        """Return the conditioning on token numbers (B, L) on the encoder's device."""
        return {"encoder_hidden_states": self.text_encoder(ids).last_hidden_state}


class WordPrompts(Prompts):
    """Tokenizer and text encoder of a model trained with minidiff.

    The network attends to the tokens. The vector of the token that ends the text is also added to
    the time embedding, like a class. Without it, a network trained on two million images drew the
    right colours but hardly ever the right digit, in sixteen images of one prompt.

    Args:
        tokenizer: tokenizer of whole words.
        text_encoder: encoder for at least the tokens of the tokenizer.
    Raises:
        InvalidArgument: the two do not fit.
    """

    guidance_scale: ClassVar[float] = 3.0
    labels_are_pooled: ClassVar[bool] = True

    @classmethod
    def fresh(cls, tokenizer: WordTokenizer, width: int, layers: int) -> "WordPrompts":
        """Build with a text encoder of fresh weights.

        Args:
            tokenizer: tokenizer of whole words.
            width: channels of a token; a head has gcd(width, 32) of them.
            layers: layers of the encoder.
        Raises:
            InvalidArgument: a number that is not allowed.
        """
        return cls(
            tokenizer,
            TextEncoder(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=4 * width,
                projection_dim=None,
                num_hidden_layers=layers,
                num_attention_heads=width // math.gcd(width, 32),
                max_position_embeddings=tokenizer.model_max_length,
                pad_token_id=PAD,
                bos_token_id=BEGIN,
                eos_token_id=END,
            ),
        )

    def encode(self, ids: Tensor) -> Condition:
        encoded = self.text_encoder(ids)
        return {"encoder_hidden_states": encoded.last_hidden_state, "class_labels": encoded.pooled}


class PromptsXL:
    """Tokenizers and text encoders of SDXL, the second encoder with a projection.

    Args:
        tokenizer, text_encoder, tokenizer_2, text_encoder_2: two pairs as in `Prompts`.
        force_zeros_for_empty_prompt: zeros instead of the encoding of "" for guidance.
    Raises:
        InvalidArgument: a tokenizer and its encoder do not fit, or the second has no projection.
    """

    guidance_scale: ClassVar[float] = 5.0
    adds_text_time: ClassVar[bool] = True
    labels_are_pooled: ClassVar[bool] = False
    pooled_width: ClassVar[int | None] = None
    takes_begun_step: ClassVar[bool] = False

    def __init__(
        self,
        tokenizer: "CLIPTokenizer",
        text_encoder: TextEncoder,
        tokenizer_2: "CLIPTokenizer",
        text_encoder_2: TextEncoder,
        force_zeros_for_empty_prompt: bool = True,
    ) -> None:
        check_pair(tokenizer, text_encoder)
        check_pair(tokenizer_2, text_encoder_2)
        check_projection("text_encoder_2", text_encoder_2)
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        self.tokenizer_2, self.text_encoder_2 = tokenizer_2, text_encoder_2
        self.force_zeros_for_empty_prompt = true_or_false(
            "force_zeros_for_empty_prompt", force_zeros_for_empty_prompt
        )

    @property
    def encoders(self) -> tuple[TextEncoder, ...]:
        """The text encoders, for moves between devices."""
        return self.text_encoder, self.text_encoder_2

    @property
    def tokenizers(self) -> tuple:
        """The tokenizer of each encoder."""
        return self.tokenizer, self.tokenizer_2

    @property
    def width(self) -> int:
        """Channels of a token."""
        return sum(encoder.config.hidden_size for encoder in self.encoders)

    def condition(self, prompts: Sequence[str], size: tuple[int, int]) -> Condition:
        """Return the conditioning on each prompt, for images of (height, width) pixels.

        Raises:
            InvalidArgument: prompts that are not texts.
        """
        return conditioning(self, prompts, size)

    def joined(self, each: Sequence[Tensor]) -> Tensor:
        """Return the tokens of the network, of those (B, L, C) of each encoder."""
        return torch.cat(list(each), dim=-1)

    def from_tokens(
        self, ids: Sequence[Tensor], size: tuple[int, int], clip_skip: int | None = None
    ) -> Condition:
        """Return the conditioning on token numbers (B, L) of each encoder.

        Args:
            ids: numbers for the first and the second encoder.
            size: height and width of the images.
            clip_skip: further layers that are left out; the pooled text is read at the end.
        """
        texts, layers = [], []
        for encoder, numbers in zip(self.encoders, ids, strict=True):
            texts.append(encoder(numbers.to(next(encoder.parameters()).device)))
            layers.append(texts[-1].hidden_states[-2 - (clip_skip or 0)])
        tokens = self.joined(layers)
        # Original size, corner of the crop, and target size: SDXL section 2.2.
        numbers = tokens.new_tensor([[*size, 0, 0, *size]]).expand(len(tokens), -1)
        return {
            "encoder_hidden_states": tokens,
            "added_cond_kwargs": {"text_embeds": texts[-1].text_embeds, "time_ids": numbers},
        }

    def null(self, n: int, size: tuple[int, int]) -> Condition:
        """Return the unconditional conditioning for guidance, n times."""
        empty = self.condition([""] * n, size)
        if not self.force_zeros_for_empty_prompt:
            return empty
        added = empty["added_cond_kwargs"]
        return {
            "encoder_hidden_states": torch.zeros_like(empty["encoder_hidden_states"]),
            "added_cond_kwargs": added | {"text_embeds": torch.zeros_like(added["text_embeds"])},
        }


def check_projection(name: str, encoder: TextEncoder) -> None:
    """Refuse a text encoder without a projection. Raises InvalidArgument."""
    if isinstance(encoder.text_projection, nn.Identity):
        raise InvalidArgument(
            f"{name} must be a CLIPTextModelWithProjection, got {encoder.class_name}"
        )


def check_pair(tokenizer: "CLIPTokenizer | WordTokenizer", encoder: TextEncoder) -> None:
    """Refuse a tokenizer with more words, or longer texts, than its encoder takes.

    Raises:
        InvalidArgument: names what does not fit.
    """
    longest, known = encoder.config.max_position_embeddings, encoder.config.vocab_size
    if tokenizer.model_max_length > longest:
        raise InvalidArgument(
            f"model_max_length of the tokenizer must be at most {longest}, the text encoder's "
            f"max_position_embeddings, got {tokenizer.model_max_length}"
        )
    if len(tokenizer) > known:
        raise InvalidArgument(
            f"the tokenizer must have at most {known} words, the text encoder's vocab_size, "
            f"got {len(tokenizer)}"
        )
