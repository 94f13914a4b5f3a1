"""Prompts to token numbers, by the tokenizer of CLIP or T5 in a checkpoint's folder.

The vocabulary and merges are files of the checkpoint. The code that applies them is the
`transformers` library, which nothing else needs: `pip install minidiff[text]`. Nothing is
downloaded, and no code in the folder is run.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from minidiff.errors import CheckpointError, InvalidArgument, MinidiffError, whole_number
from minidiff.runtime.files import existing_folder, read_json, wrong_content

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, T5Tokenizer

# Names in tokenizer_config.json, and sets of files: one of them must be there.
CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
T5_CLASSES = ("T5Tokenizer", "T5TokenizerFast")
T5_FILES = (("tokenizer.json",), ("spiece.model",))


def load_tokenizer(folder: str | Path) -> "CLIPTokenizer":
    """Read the tokenizer of CLIP that transformers or diffusers wrote to a folder.

    Raises:
        MinidiffError: transformers is not installed.
        CheckpointError: a file is missing or damaged, the tokenizer is not CLIP's, or its
            `model_max_length` is missing.
    """
    return _load(folder, CLASSES, FILES)


def load_t5_tokenizer(folder: str | Path) -> "T5Tokenizer":
    """Read the tokenizer of T5 that transformers or diffusers wrote to a folder.

    Raises:
        MinidiffError: transformers is not installed.
        CheckpointError: a file is missing or damaged, the tokenizer is not T5's, or its
            `model_max_length` is missing.
    """
    return _load(folder, T5_CLASSES, T5_FILES)


def _load(folder: str | Path, classes: Sequence[str], files: Sequence[Sequence[str]]) -> Any:
    """Read a tokenizer of the first of the classes, from one of the sets of files."""
    try:
        import transformers
    except ImportError as error:
        raise MinidiffError(
            f"prompts need the tokenizer of transformers: pip install minidiff[text] ({error})"
        ) from error
    folder = existing_folder(folder)
    # Checked here because transformers accepts the files of other classes with a mere warning.
    options = read_json(folder / "tokenizer_config.json")
    if (written_by := options.get("tokenizer_class", classes[0])) not in classes:
        raise CheckpointError(f"{folder}: tokenizer_class must be {classes[0]}, got {written_by!r}")
    # Without these transformers takes the path for a name on the Hub, or returns an empty table.
    if not any(all((folder / name).is_file() for name in names) for names in files):
        one, other = (", ".join(names) for names in files)
        raise CheckpointError(f"{folder}: holds neither {one} nor {other}")
    try:
        kind = getattr(transformers, classes[0])
        tokenizer = kind.from_pretrained(folder, local_files_only=True)
        whole_number("model_max_length", tokenizer.model_max_length, 2, 1 << 16)
        tokenize(tokenizer, [""])  # raises if the tokenizer cannot pad or encode
    except Exception as error:  # tokenizers raises plain Exception for damaged files
        wrong = (f"{file.name}: {why}" for file in folder.iterdir() if (why := wrong_content(file)))
        reason = next(wrong, " ".join(str(error).split()))
        name = classes[0].removesuffix("Tokenizer")
        raise CheckpointError(f"{folder}: not a readable {name} tokenizer ({reason})") from error
    return tokenizer


def tokenize(
    tokenizer: "CLIPTokenizer | T5Tokenizer", prompts: Sequence[str], length: int | None = None
) -> Tensor:
    """Return the token numbers of every prompt, int64 (B, length), padded at the end.

    The end of a prompt that is too long is cut off, with a warning that names it.

    Args:
        tokenizer: CLIP's or T5's.
        prompts: texts.
        length: tokens per text; by default the tokenizer's model_max_length.
    Raises:
        InvalidArgument: not a list of texts, an empty one, or one that is not Unicode.
    """
    check_texts(prompts)
    prompts, length = list(prompts), length or tokenizer.model_max_length
    for word, tokens in getattr(tokenizer, "new_words", {}).items():
        prompts = [prompt.replace(word, " ".join(tokens)) for prompt in prompts]
    whole = tokenizer(prompts, verbose=False).input_ids
    # A text that is cut keeps its first length - 1 tokens and the token that ends a text.
    if cut := [tokenizer.decode(ids[length - 1 : -1]) for ids in whole if len(ids) > length]:
        warnings.warn(
            f"a prompt has at most {length} tokens; the end of "
            f"{len(cut)} of {len(prompts)} is cut off: {', '.join(map(repr, cut))}",
            stacklevel=2,
        )
    return tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def extended(tokenizer: "CLIPTokenizer", counts: Mapping[str, int]) -> "CLIPTokenizer":
    """Return a copy of a tokenizer that knows further words.

    As in diffusers a word of several tokens stands for "word word_1 word_2 …".

    Args:
        tokenizer: CLIP's.
        counts: number of tokens of every word.
    """
    other = copy.deepcopy(tokenizer)
    tokens = {
        word: [word, *(f"{word}_{i}" for i in range(1, count))] for word, count in counts.items()
    }
    other.add_tokens([token for group in tokens.values() for token in group])
    several = {word: group for word, group in tokens.items() if len(group) > 1}
    other.new_words = {**getattr(tokenizer, "new_words", {}), **several}
    return other


def check_texts(prompts: Sequence[str]) -> None:
    """Check that prompts are texts that a tokenizer can take.

    Raises:
        InvalidArgument: not a list of texts, an empty one, or one that is not Unicode.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise InvalidArgument(f"prompts must be a list of at least one text, got {prompts!r}")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise InvalidArgument(f"prompts must hold texts, got {prompt!r}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"prompts must be Unicode text, got {prompt!r}") from error
