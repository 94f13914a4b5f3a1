"""A tokenizer of whole words, for models trained on a vocabulary of a few dozen.

A text is converted to lower case and split at everything but letters and digits. Each word of the
vocabulary becomes a number. A mark begins the text, another ends it, and padding fills up to a
fixed length:

    "A red 7!"  →  begin a red 7 end pad pad …

A word outside the vocabulary is left out, with a warning that names it.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from minidiff.errors import CheckpointError, InvalidArgument, one_of, whole_number
from minidiff.runtime.files import existing_folder, read_json, write_json
from minidiff.text.clip import check_texts

FILE = "tokenizer_config.json"
CLASS = "WordTokenizer"
MARKS = ("<pad>", "<end>", "<begin>")  # 0, 1 and 2; <end> must not be 2, see nn.text.TextEncoder
PAD, END, BEGIN = range(len(MARKS))
_WORD = re.compile(r"[^\W_]+")
_MAX_LENGTH, _MAX_WORDS = 1 << 10, 1 << 16


class WordTokenizer:
    """A map from texts to numbers by a fixed vocabulary.

    Args:
        words: vocabulary, in the order of the numbers after those of the marks.
        model_max_length: tokens per text, both marks included.
        several: words that stand for several tokens, with their number: the word and those behind
            it in `words`.
    Attributes:
        words, model_max_length, several: the arguments.
        numbers: word → number.
    Raises:
        InvalidArgument: no words, one twice or not in lower case, a length without room for one, or
            a number of tokens that `words` does not have.
    """

    def __init__(
        self,
        words: Sequence[str],
        model_max_length: int,
        several: Mapping[str, int] | None = None,
    ) -> None:
        if isinstance(words, str) or not isinstance(words, Sequence) or not words:
            raise InvalidArgument(f"words must be a list of at least one word, got {words!r}")
        for word in words:
            if not isinstance(word, str) or words_of(word) != [word]:
                raise InvalidArgument(f"words must hold lower-case words, got {word!r}")
        if len(set(words)) < len(words):
            twice = next(word for i, word in enumerate(words) if word in words[:i])
            raise InvalidArgument(f"words must differ from each other, got {twice!r} twice")
        whole_number("number of words", len(words), 1, _MAX_WORDS)
        self.words = tuple(words)
        self.model_max_length = whole_number(
            "model_max_length", model_max_length, len(MARKS), _MAX_LENGTH
        )
        self.numbers = {word: number for number, word in enumerate(words, len(MARKS))}
        self.several = dict(several or {})
        for word, count in self.several.items():
            one_of("several", word, self.numbers)
            whole_number(f"tokens of {word!r}", count, 2, len(self) - self.numbers[word])

    def __len__(self) -> int:
        """Return the number of tokens, marks included."""
        return len(MARKS) + len(self.words)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the token numbers of every text, int64 (B, model_max_length).

        Unknown words and the end of a text that is too long are left out, with a warning that
        names them.

        Raises:
            InvalidArgument: not a list of texts, an empty one, or one that is not Unicode.
        """
        check_texts(texts)
        ids = torch.full((len(texts), self.model_max_length), PAD)
        unknown: dict[str, None] = {}  # a set that keeps the order
        cut: list[str] = []
        for row, text in zip(ids, texts, strict=True):
            found = words_of(text)
            known = [token for word in found for token in self._tokens(word)]
            unknown |= dict.fromkeys(word for word in found if word not in self.numbers)
            room = self.model_max_length - 2
            if len(known) > room:
                cut.append(" ".join(known[room:]))
            numbers = [BEGIN, *(self.numbers[word] for word in known[:room]), END]
            row[: len(numbers)] = torch.tensor(numbers)
        if unknown:
            warnings.warn(
                f"words outside the vocabulary are left out: {', '.join(unknown)}", stacklevel=2
            )
        if cut:
            warnings.warn(
                f"a prompt has at most {room} words; the end of {len(cut)} of {len(texts)} is cut "
                f"off: {', '.join(map(repr, cut))}",
                stacklevel=2,
            )
        return ids

    def _tokens(self, word: str) -> Sequence[str]:
        """Return the tokens that a word stands for; none for an unknown word."""
        if word not in self.numbers:
            return ()
        first = self.numbers[word] - len(MARKS)
        return self.words[first : first + self.several.get(word, 1)]

    def check_new(self, word: str) -> str:
        """Return a word that may be added. Raises InvalidArgument."""
        if not isinstance(word, str) or words_of(word) != [word]:
            raise InvalidArgument(
                f"word must be one word of lower-case letters and digits, got {word!r}"
            )
        if word in self.numbers:
            raise InvalidArgument(f"word must be new to the model, which knows {word!r}")
        return word

    def extended(self, counts: Mapping[str, int]) -> "WordTokenizer":
        """Return a tokenizer with further words, of one token or several. Raises InvalidArgument.

        Args:
            counts: number of tokens of every word.
        """
        words = list(self.words)
        for word, count in counts.items():
            names = (f"{word}x{i}" for i in range(2, count + 1))
            words += [self.check_new(word), *(self.check_new(name) for name in names)]
        several = {word: count for word, count in counts.items() if count > 1}
        return WordTokenizer(words, self.model_max_length, self.several | several)

    def numbers_of(self, text: str) -> list[int]:
        """Return the numbers of a text's known words, without marks and padding."""
        return [self.numbers[token] for word in words_of(text) for token in self._tokens(word)]

    def decode(self, ids: Tensor) -> list[str]:
        """Return one text per row of token numbers (B, L), without the marks.

        Raises:
            InvalidArgument: a number outside the vocabulary.
        """
        names = (*MARKS, *self.words)
        low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
        if low < 0 or high >= len(names):
            raise InvalidArgument(f"ids must be in 0..{len(names) - 1}, got {low}..{high}")
        return [" ".join(names[i] for i in row if i >= len(MARKS)) for row in ids.tolist()]

    # ------------------------------------------------------------------------- folders

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `tokenizer_config.json`. Raises CheckpointError if it cannot be written."""
        content = {
            "tokenizer_class": CLASS,
            "words": list(self.words),
            "model_max_length": self.model_max_length,
            **({"several": self.several} if self.several else {}),
        }
        write_json(Path(folder) / FILE, content)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "WordTokenizer":
        """Read a folder that `save_pretrained` wrote.

        Raises:
            CheckpointError: the file is missing, damaged or of another kind of tokenizer.
        """
        path = existing_folder(folder) / FILE
        content = read_json(path)
        keys = {"tokenizer_class", "words", "model_max_length"}
        if content.keys() - {"several"} != keys or content["tokenizer_class"] != CLASS:
            raise CheckpointError(
                f"{path}: must hold {', '.join(sorted(keys))} of a {CLASS}, "
                f"got {', '.join(sorted(content)) or 'nothing'}"
            )
        try:
            return cls(content["words"], content["model_max_length"], content.get("several"))
        except InvalidArgument as error:
            raise CheckpointError(f"{path}: {error}") from error


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case: its runs of letters and digits."""
    return _WORD.findall(text.lower())
