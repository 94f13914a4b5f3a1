"""A tokenizer and a text encoder like CLIP's, small enough for tests to build."""

import json
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = ("cat", "dog")  # each one token; every other text is encoded byte by byte


def _byte_names() -> list[str]:
    """Return the printable character of each byte in a byte-level vocabulary (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _merges() -> list[tuple[str, str]]:
    """Return the merges of the letters of WORDS, the last one with the mark that ends a word."""
    merges = []
    for word in WORDS:
        letters = [*word[:-1], f"{word[-1]}</w>"]
        while len(letters) > 1:
            merges.append((letters[0], letters[1]))
            letters[:2] = ["".join(letters[:2])]
    return merges


def _vocabulary() -> list[str]:
    """Return the vocabulary in CLIP's order: bytes, bytes that end a word, pieces, two marks."""
    names = _byte_names()
    pieces = [first + second for first, second in _merges()]
    return [*names, *(f"{name}</w>" for name in names), *pieces, START, END]


VOCAB_SIZE = len(_vocabulary())
START_ID, END_ID = VOCAB_SIZE - 2, VOCAB_SIZE - 1


def write_tokenizer(folder: Path, max_length: int = 12, pad_token: str = END) -> None:
    """Write the files of a CLIPTokenizer like older versions of transformers.

    `pad_token` is END in Stable Diffusion 1 and in SDXL's first tokenizer, "!" (number 0) in
    Stable Diffusion 2 and in SDXL's second.
    """
    folder.mkdir(parents=True, exist_ok=True)
    marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    options = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **marks,
    }
    numbers = {token: number for number, token in enumerate(_vocabulary())}
    lines = ["#version: 0.2", *(" ".join(merge) for merge in _merges())]
    (folder / "vocab.json").write_text(json.dumps(numbers), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    (folder / "special_tokens_map.json").write_text(json.dumps(marks))


def tiny_text_config(**changes: object) -> dict:
    """Return arguments of transformers' CLIPTextConfig, and of TextEncoder, for that tokenizer."""
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 24,
        "projection_dim": 10,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "pad_token_id": END_ID,
        "bos_token_id": START_ID,
        "eos_token_id": END_ID,
        **changes,
    }
