"""New words: vectors behind the table of a text encoder, and a tokenizer that knows them.

A word may have several vectors, which follow each other in the text. All other weights stay as they
are, and so does every text without the word.

Source: Gal et al. 2022, "An Image is Worth One Word: Personalizing Text-to-Image Generation using
Textual Inversion", https://arxiv.org/abs/2208.01618, section 3.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.errors import InvalidArgument
from minidiff.nn import TextEncoder
from minidiff.nn.text import EMBEDDINGS
from minidiff.runtime.files import Config
from minidiff.text.clip import extended
from minidiff.text.prompts import Prompts
from minidiff.text.words import WordTokenizer

TABLE = f"{EMBEDDINGS}.token_embedding"


def known_vectors(prompts: Prompts) -> Tensor:
    """Return the table of a text encoder, one row per token."""
    return prompts.text_encoder.get_submodule(TABLE).weight


def fresh_vectors(prompts: Prompts, count: int, like: str | None = None) -> Tensor:
    """Return vectors for a word to begin with, (count, d).

    Args:
        prompts: prompts that do not know the word.
        count: number of vectors.
        like: word whose vectors are taken; None for the mean of all. Several vectors of one word
            begin a little apart, or they would stay equal.
    Raises:
        InvalidArgument: a word that the prompts do not know, or of several tokens.
    """
    table = known_vectors(prompts).detach().float()
    first = table.mean(dim=0) if like is None else table[single_token(prompts, like)]
    vectors = first.repeat(count, 1)
    if count > 1:
        noise = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0))
        vectors += 0.1 * table.std().cpu() * noise.to(vectors)
    return vectors


def single_token(prompts: Prompts, word: str) -> int:
    """Return the number of a known word. Raises InvalidArgument."""
    tokenizer = prompts.tokenizer
    if isinstance(tokenizer, WordTokenizer):
        if word not in tokenizer.numbers:
            raise InvalidArgument(f"init_word must be a word of the model, got {word!r}")
        return tokenizer.numbers[word]
    numbers = tokenizer(word, add_special_tokens=False).input_ids
    if len(numbers) != 1:
        raise InvalidArgument(f"init_word must be one token of the model, got {word!r}: {numbers}")
    return numbers[0]


def check_word(prompts: Prompts, word: str) -> str:
    """Return a word that the prompts do not know yet.

    Raises:
        InvalidArgument: it exists already, or is not one word.
    """
    tokenizer = prompts.tokenizer
    if isinstance(tokenizer, WordTokenizer):
        return tokenizer.check_new(word)
    if not isinstance(word, str) or not word or len(word.split()) != 1:
        raise InvalidArgument(f"word must be one word without spaces, got {word!r}")
    if word in tokenizer.get_vocab():
        raise InvalidArgument(f"word must be new to the model, which knows {word!r}")
    return word


def with_words(prompts: Prompts, vectors: Mapping[str, Tensor]) -> Prompts:
    """Return prompts that know further words; those given are not changed.

    The text encoder is a copy that shares everything but its table.

    Args:
        prompts: tokenizer and text encoder.
        vectors: (n, d) for each new word.
    Raises:
        InvalidArgument: a word exists or is not one word, or its vectors have another width.
    """
    for word, rows in vectors.items():
        check_word(prompts, word)
        width = prompts.text_encoder.config.hidden_size
        if rows.ndim != 2 or rows.shape[1] != width or not len(rows):
            raise InvalidArgument(
                f"the vectors of {word!r} must be (n, {width}), got {tuple(rows.shape)}"
            )
    table = table_with(prompts, known_vectors(prompts).detach(), vectors.values())
    counts = {word: len(rows) for word, rows in vectors.items()}
    other = copy.copy(prompts)
    other.tokenizer = with_new_tokens(prompts.tokenizer, counts)
    other.text_encoder = with_table(prompts.text_encoder, table)
    return other


def table_with(prompts: Prompts, table: Tensor, vectors: Iterable[Tensor]) -> Tensor:
    """Return a table with the vectors of new words, behind those of the tokenizer's words.

    Published tables may have more rows than there are words; the new vectors replace them.
    """
    first = len(prompts.tokenizer)
    rows = torch.cat([part.to(table) for part in vectors])
    return torch.cat([table[:first], rows, table[first + len(rows) :]])


def with_table(encoder: TextEncoder, table: Tensor) -> TextEncoder:
    """Return a copy of a text encoder with another table of vectors, which shares the rest."""
    shared = [*encoder.parameters(), *encoder.buffers()]
    other = copy.deepcopy(encoder, {id(tensor): tensor for tensor in shared})
    layer = other.get_submodule(TABLE)
    layer.weight = nn.Parameter(table, requires_grad=False)
    layer.num_embeddings = len(table)
    other.config = Config({**encoder.config, "vocab_size": len(table)})
    return other


def with_new_tokens(tokenizer: Any, counts: Mapping[str, int]) -> Any:
    """Return a tokenizer with further words.

    Args:
        tokenizer: `WordTokenizer` or CLIP's.
        counts: number of tokens of every word.
    """
    return (
        tokenizer.extended(counts)
        if isinstance(tokenizer, WordTokenizer)
        else extended(tokenizer, counts)
    )
