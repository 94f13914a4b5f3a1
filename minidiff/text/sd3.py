"""Prompts of Stable Diffusion 3: two encoders of CLIP, and T5's, which may be absent.

    tokens = [CLIP₁ ‖ CLIP₂ ‖ 0]   77 rows: last hidden state but one, widened with zeros
             [T5]                  256 rows below; zeros where T5 is absent
    pooled = [CLIP₁ ‖ CLIP₂]       the projections

Source: Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image
Synthesis", https://arxiv.org/abs/2403.03206, section 5 and appendix B.
"""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.errors import InvalidArgument, whole_number
from minidiff.guidance import Condition
from minidiff.nn import T5Encoder, TextEncoder
from minidiff.text.phrase import conditioning
from minidiff.text.prompts import Prompts, PromptsXL, check_pair, check_projection

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, T5Tokenizer

ROWS = 256  # tokens of T5: diffusers' default of max_sequence_length


class PromptsSD3:
    """Tokenizers and text encoders of Stable Diffusion 3.

    Args:
        tokenizer, text_encoder, tokenizer_2, text_encoder_2: two pairs of CLIP, both encoders with
            a projection.
        tokenizer_3, text_encoder_3: T5's; None without it.
        joint_attention_dim: channels of a token; by default those of T5.
    Raises:
        InvalidArgument: a tokenizer and its encoder do not fit, an encoder has no projection, or
            the widths do not fit.
    """

    guidance_scale: ClassVar[float] = 7.0
    adds_text_time: ClassVar[bool] = False
    labels_are_pooled: ClassVar[bool] = False
    takes_begun_step: ClassVar[bool] = True

    def __init__(
        self,
        tokenizer: "CLIPTokenizer",
        text_encoder: TextEncoder,
        tokenizer_2: "CLIPTokenizer",
        text_encoder_2: TextEncoder,
        tokenizer_3: "T5Tokenizer | None" = None,
        text_encoder_3: T5Encoder | None = None,
        joint_attention_dim: int | None = None,
    ) -> None:
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        self.tokenizer_2, self.text_encoder_2 = tokenizer_2, text_encoder_2
        self.tokenizer_3, self.text_encoder_3 = tokenizer_3, text_encoder_3
        check_pair(tokenizer, text_encoder)
        check_pair(tokenizer_2, text_encoder_2)
        check_projection("text_encoder", text_encoder)
        check_projection("text_encoder_2", text_encoder_2)
        if (tokenizer_3 is None) != (text_encoder_3 is None):
            raise InvalidArgument("give tokenizer_3 and text_encoder_3 together, or neither")
        if text_encoder_3 is not None:
            joint_attention_dim = text_encoder_3.config.d_model
            if len(tokenizer_3) > text_encoder_3.config.vocab_size:
                raise InvalidArgument(
                    f"tokenizer_3 must have at most {text_encoder_3.config.vocab_size} tokens, "
                    f"the encoder's vocab_size, got {len(tokenizer_3)}"
                )
        self._third = [copy.deepcopy(tokenizer_3)] if tokenizer_3 is not None else []
        for reads in self._third:
            reads.model_max_length = ROWS
        clip = sum(e.config.hidden_size for e in (text_encoder, text_encoder_2))
        if joint_attention_dim is None:
            raise InvalidArgument("joint_attention_dim must be given without text_encoder_3")
        self.width = whole_number("joint_attention_dim", joint_attention_dim, clip)

    @property
    def encoders(self) -> tuple[TextEncoder | T5Encoder, ...]:
        """The text encoders, for moves between devices."""
        third = () if self.text_encoder_3 is None else (self.text_encoder_3,)
        return self.text_encoder, self.text_encoder_2, *third

    @property
    def pooled_width(self) -> int:
        """Channels of the pooled text."""
        return sum(e.config.projection_dim for e in (self.text_encoder, self.text_encoder_2))

    @property
    def tokenizers(self) -> tuple:
        """The tokenizer of each encoder."""
        return self.tokenizer, self.tokenizer_2, *self._third

    def condition(self, prompts: Sequence[str], size: tuple[int, int]) -> Condition:
        """Return the conditioning on each prompt; it does not depend on the size.

        Raises:
            InvalidArgument: prompts that are not texts.
        """
        return conditioning(self, prompts, size)

    def joined(self, each: Sequence[Tensor]) -> Tensor:
        """Return the tokens of the network, of those (B, L, C) of each encoder."""
        clip = torch.cat(list(each[:2]), dim=-1)
        clip = F.pad(clip, (0, self.width - clip.shape[-1]))
        third = each[2].to(clip) if each[2:] else clip.new_zeros(len(clip), ROWS, self.width)
        return torch.cat([clip, third], dim=1)

    def from_tokens(
        self, ids: Sequence[Tensor], size: tuple[int, int], clip_skip: int | None = None
    ) -> Condition:
        """Return the conditioning on token numbers (B, L) of each encoder.

        Args:
            ids: numbers for each encoder.
            size: height and width of the images, which have no effect.
            clip_skip: further layers of CLIP that are left out.
        """
        read = [
            encoder(numbers.to(next(encoder.parameters()).device))
            for encoder, numbers in zip(self.encoders, ids, strict=True)
        ]
        layers = [text.hidden_states[-2 - (clip_skip or 0)] for text in read[:2]]
        return {
            "encoder_hidden_states": self.joined([*layers, *read[2:]]),
            "pooled_projections": torch.cat([text.text_embeds for text in read[:2]], dim=-1),
        }

    def null(self, n: int, size: tuple[int, int]) -> Condition:
        """Return the unconditional conditioning for guidance, n times."""
        return self.condition([""] * n, size)


AnyPrompts = Prompts | PromptsXL | PromptsSD3
