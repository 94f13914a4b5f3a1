"""Conditioning: from the labels or captions of a batch to the inputs of a network.

Data describe their own conditioning (`Data.condition`), so neither the training loop nor the code
that builds a network knows kinds of data. A condition is a module, because it may have weights: a
text encoder is trained with the network.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minidiff.text.prompts import WordPrompts


class ConditionConfig(Protocol):
    """The options of a training run that conditioning depends on.

    Attributes:
        label_dropout: fraction of images whose label or caption is hidden.
        text_width, text_layers: channels of a token and layers of a fresh text encoder.
        channels, layers: sizes of a fresh network, see `TrainConfig`.
    """

    channels: tuple[int, ...]
    layers: int
    label_dropout: float
    text_width: int
    text_layers: int


class Condition(nn.Module):
    """A module (labels) → keyword arguments of the network.

    Attributes:
        null: the entry that means "nothing", in the form of one label or caption.
        unet_options: options of the U-Net that reads this condition; empty for none.
        prompts: text encoder and tokenizer that the pipeline keeps; None without texts.
    """

    null: Tensor
    unet_options: Mapping[str, Any]
    prompts: WordPrompts | None = None

    def forward(self, labels: Tensor | None) -> Mapping[str, Tensor]:
        """Return the network's inputs for labels or token numbers (B, …)."""
        raise NotImplementedError


class ClassLabels(Condition):
    """Class labels as they are, or the label of "no class", the last one.

    Args:
        num_classes: number of classes; 0 for data without labels.
        hides: True for a label of "no class", which guidance needs.
    """

    def __init__(self, num_classes: int, hides: bool = True) -> None:
        super().__init__()
        embeddings = num_classes + hides if num_classes else None
        self.unet_options = {"num_class_embeds": embeddings} if embeddings else {}
        self.register_buffer("null", torch.tensor(num_classes), persistent=False)

    def forward(self, labels: Tensor | None) -> Mapping[str, Tensor]:
        return {} if labels is None else {"class_labels": labels}


class Captions(Condition):
    """Token numbers of captions, encoded by a text encoder that is trained with the network.

    Args:
        prompts: tokenizer and text encoder.
    """

    def __init__(self, prompts: WordPrompts) -> None:
        super().__init__()
        self.prompts, self.text_encoder = prompts, prompts.text_encoder
        self.unet_options = {
            "cross_attention_dim": prompts.width,
            "class_embed_type": "projection",  # of the pooled text
            "projection_class_embeddings_input_dim": prompts.width,
        }
        self.register_buffer("null", prompts.tokens([""])[0], persistent=False)

    def forward(self, labels: Tensor) -> Mapping[str, Tensor]:
        return self.prompts.encode(labels)
