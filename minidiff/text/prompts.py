"""Prompts: from a text to what a network is told of it.

A tokenizer cuts the text into numbers, a text encoder makes a vector of each, and the U-Net looks
at these vectors. Stable Diffusion 1 and 2 have one encoder and read its last layer; SDXL has two,
reads the last layer but one of each side by side, and adds the second one's summary of the text
and the size of the picture to the embedding of time. A model that is trained here has one small
encoder, trained along with the U-Net, and a tokenizer of whole words.

Sources: Rombach et al. 2022, https://arxiv.org/abs/2112.10752, section 3.3; Podell et al. 2023,
"SDXL", https://arxiv.org/abs/2307.01952, sections 2.1 and 2.2.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from minidiff.errors import InvalidArgument
from minidiff.guidance import Condition
from minidiff.nn import TextEncoder
from minidiff.text.clip import tokenize
from minidiff.text.words import BEGIN, END, PAD, WordTokenizer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


class Prompts:
    """The text side of Stable Diffusion 1 and 2.

    Args:
        tokenizer: of CLIP, see `minidiff.text.clip.load_tokenizer`.
        text_encoder: takes as many tokens as the tokenizer makes.
    Raises:
        InvalidArgument: the two do not fit.
    """

    guidance_scale: ClassVar[float] = 7.5  # where neither the call nor the folder names one
    needs_numbers: ClassVar[bool] = False  # whether the network is told a summary and a size
    sums_up: ClassVar[bool] = False  # whether it is told the summary beside the time

    def __init__(
        self, tokenizer: "CLIPTokenizer | WordTokenizer", text_encoder: TextEncoder
    ) -> None:
        _check_pair(tokenizer, text_encoder)
        self.tokenizer, self.text_encoder = tokenizer, text_encoder

    @property
    def encoders(self) -> tuple[TextEncoder, ...]:
        """The networks, to be moved from device to device."""
        return (self.text_encoder,)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.text_encoder.config.hidden_size

    def condition(self, prompts: Sequence[str], size: tuple[int, int]) -> Condition:
        """What the network is told of each prompt, for pictures of (height, width) pixels.

        Raises InvalidArgument: prompts that are no texts.
        """
        return self.encode(self.tokens(prompts).to(next(self.text_encoder.parameters()).device))

    def null(self, n: int, size: tuple[int, int]) -> Condition:
        """What it is told n times where guidance leads away from no text."""
        return self.condition([""] * n, size)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token numbers of each prompt, int64 (B, L). Raises InvalidArgument, as `condition`."""
        return tokenize(self.tokenizer, prompts)

    def encode(self, ids: Tensor) -> Condition:
        """What the network is told of token numbers (B, L) on the encoder's device."""
        return {"encoder_hidden_states": self.text_encoder(ids).last_hidden_state}


class WordPrompts(Prompts):
    """The text side of a model that is trained here.

    The network looks at the tokens, and their summary, the token that ends the text, is added to
    its embedding of time as a class would be. In sixteen pictures of one prompt a network
    without it drew the right colours and hardly ever the digit, after two million pictures.

    Args:
        tokenizer: of whole words.
        text_encoder: takes as many tokens as the tokenizer makes.
    Raises:
        InvalidArgument: the two do not fit.
    """

    guidance_scale: ClassVar[float] = 3.0
    sums_up: ClassVar[bool] = True

    @classmethod
    def fresh(cls, tokenizer: WordTokenizer, width: int, layers: int) -> "WordPrompts":
        """With an encoder that has not learnt anything yet.

        Args:
            width: channels of a token, of which a head has up to 32.
            layers: of the encoder.
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

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        return self.tokenizer.encode(prompts)

    def encode(self, ids: Tensor) -> Condition:
        encoded = self.text_encoder(ids)
        return {"encoder_hidden_states": encoded.last_hidden_state, "class_labels": encoded.pooled}


class PromptsXL:
    """The text side of SDXL: two encoders, the second one with a projection.

    Args:
        tokenizer, text_encoder, tokenizer_2, text_encoder_2: see `Prompts`.
        force_zeros_for_empty_prompt: guidance leads away from zeros, not from the encoding of "".
    Raises:
        InvalidArgument: a tokenizer and its encoder do not fit, or the second has no projection.
    """

    guidance_scale: ClassVar[float] = 5.0
    needs_numbers: ClassVar[bool] = True
    sums_up: ClassVar[bool] = False

    def __init__(
        self,
        tokenizer: "CLIPTokenizer",
        text_encoder: TextEncoder,
        tokenizer_2: "CLIPTokenizer",
        text_encoder_2: TextEncoder,
        force_zeros_for_empty_prompt: bool = True,
    ) -> None:
        _check_pair(tokenizer, text_encoder)
        _check_pair(tokenizer_2, text_encoder_2)
        if isinstance(text_encoder_2.text_projection, nn.Identity):
            raise InvalidArgument(
                "text_encoder_2 must be a CLIPTextModelWithProjection, got "
                f"{text_encoder_2.class_name}"
            )
        if not isinstance(force_zeros_for_empty_prompt, bool):
            raise InvalidArgument(
                f"force_zeros_for_empty_prompt must be True or False, "
                f"got {force_zeros_for_empty_prompt!r}"
            )
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        self.tokenizer_2, self.text_encoder_2 = tokenizer_2, text_encoder_2
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt

    @property
    def encoders(self) -> tuple[TextEncoder, ...]:
        """The networks, to be moved from device to device."""
        return self.text_encoder, self.text_encoder_2

    @property
    def width(self) -> int:
        """Channels of a token."""
        return sum(encoder.config.hidden_size for encoder in self.encoders)

    def condition(self, prompts: Sequence[str], size: tuple[int, int]) -> Condition:
        """What the network is told of each prompt, for pictures of (height, width) pixels.

        Raises InvalidArgument: prompts that are no texts.
        """
        pairs = zip((self.tokenizer, self.tokenizer_2), self.encoders, strict=True)
        texts = [encoder(_tokens(tokenizer, prompts, encoder)) for tokenizer, encoder in pairs]
        tokens = torch.cat([text.hidden_states[-2] for text in texts], dim=-1)
        # Original size, where the crop began, and target size: SDXL sections 2.2.
        numbers = tokens.new_tensor([[*size, 0, 0, *size]]).expand(len(prompts), -1)
        return {
            "encoder_hidden_states": tokens,
            "added_cond_kwargs": {"text_embeds": texts[-1].text_embeds, "time_ids": numbers},
        }

    def null(self, n: int, size: tuple[int, int]) -> Condition:
        """What it is told n times where guidance leads away from no text."""
        empty = self.condition([""] * n, size)
        if not self.force_zeros_for_empty_prompt:
            return empty
        added = empty["added_cond_kwargs"]
        return {
            "encoder_hidden_states": torch.zeros_like(empty["encoder_hidden_states"]),
            "added_cond_kwargs": added | {"text_embeds": torch.zeros_like(added["text_embeds"])},
        }


def _tokens(tokenizer: "CLIPTokenizer", prompts: Sequence[str], encoder: TextEncoder):
    return tokenize(tokenizer, prompts).to(next(encoder.parameters()).device)


def _check_pair(tokenizer: "CLIPTokenizer | WordTokenizer", encoder: TextEncoder) -> None:
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
