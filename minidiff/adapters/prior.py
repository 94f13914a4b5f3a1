"""The data of an adaptation: captions with new words, and the prior that the model draws.

The prior is drawn by the model as it was before training, when the data move to their device. In a
run it is kept as bytes, so that a resumed run trains on the same pictures.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minidiff.adapters.learners import PRIOR
from minidiff.adapters.texts import CaptionedImages
from minidiff.adapters.words import check_word, fresh_vectors, with_words
from minidiff.data.captioned.captions import CaptionedDigits
from minidiff.data.protocol import Data, digest
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.images.pixels import to_uint8
from minidiff.pipeline import Pipeline
from minidiff.runtime.tensors import read_headers, read_metadata, read_tensor, write_tensors
from minidiff.text.prompts import Prompts
from minidiff.text.words import WordTokenizer, words_of

if TYPE_CHECKING:
    from minidiff.adapters.personal import Personal

FILE = "prior.safetensors"  # in the folder of a run
MAX_NEW_WORDS = 8
SEED = 20_220_825  # of the pictures; the day on which DreamBooth appeared


def prepared(own: "Personal", start: Pipeline, data: Data) -> tuple["Personal", Data]:
    """Return the adaptation with its words, and the data with the prior.

    Raises:
        InvalidArgument: data without captions for a model of texts, words that are known, not one
            word, or in no caption, or a prior that the model has no captions for.
    """
    if start.prompts is None:
        if own.word or own.prior:
            name = "word" if own.word else "prior"
            raise InvalidArgument(f"{name} must be left out for a model without texts")
        return own, data
    if not isinstance(data, CaptionedImages | CaptionedDigits):
        raise InvalidArgument(
            f"data must have captions, {data.name} have none: a metadata.jsonl in the folder, or "
            "--caption TEXT for all images"
        )
    words = _new_words(own, start.prompts, data)
    first = {word: fresh_vectors(start.prompts, own.vectors, own.init_word) for word in words}
    prompts = with_words(start.prompts, first) if words else start.prompts
    data = data.tokenized(prompts)
    texts = _prior_prompts(own, start)
    own = replace(own, word=words or None)
    return own, WithPrior(data, start, prompts, texts, own.folder) if texts else data


def _new_words(own: "Personal", prompts: Prompts, data: Data) -> tuple[str, ...]:
    """Return the words to be learned. Raises InvalidArgument."""
    texts = getattr(data, "texts", ())
    if own.word is not None:
        for word in own.word:
            check_word(prompts, word)
            if not any(word in text.lower() for text in texts):
                raise InvalidArgument(f"word must be in a caption of {data.name}, got {word!r}")
        if len(set(own.word)) < len(own.word):
            raise InvalidArgument(f"word must name different words, got {', '.join(own.word)}")
        return own.word
    if not isinstance(prompts.tokenizer, WordTokenizer):
        return ()
    found = dict.fromkeys(word for text in texts for word in words_of(text))
    new = tuple(word for word in found if word not in prompts.tokenizer.numbers)
    if len(new) > MAX_NEW_WORDS:
        raise InvalidArgument(
            f"word must name those to be learned: the model does not know {len(new)} words of "
            f"{data.name}: {', '.join(new[:10])}, …"
        )
    return new


def _prior_prompts(own: "Personal", start: Pipeline) -> list[str]:
    """Return the captions of the prior; none for no prior. Raises InvalidArgument."""
    count = own.prior
    if count is None:
        count = PRIOR if own.keeps_prior else 0
    if not count:
        return []
    if own.prior_prompts:
        return [own.prior_prompts[i % len(own.prior_prompts)] for i in range(count)]
    data = CaptionedDigits(seed=SEED)
    known = getattr(start.prompts.tokenizer, "words", ())
    if known[: len(data.tokenizer.words)] != data.tokenizer.words:
        if own.prior is None:
            return []
        raise InvalidArgument(
            "prior must be 0, or prior_prompts given, for a model of other captions"
        )
    return data.captions(torch.arange(count))


class WithPrior(Data):
    """Instances and prior, every second item of each.

    Args:
        data: instances, in the tokens of `prompts`.
        start: pipeline that draws the prior.
        prompts: tokenizer of both.
        texts: captions of the prior.
        folder: folder of a run, where the prior is kept; None for none.
    """

    class_names = ()
    is_stored = True

    def __init__(
        self, data: Data, start: Pipeline, prompts: Prompts, texts: list[str], folder: Path | None
    ) -> None:
        self.data, self.start, self.prompts = data, start, prompts
        self.texts, self.folder, self.name = texts, folder, data.name
        self.kept: CaptionedImages | None = None

    def __len__(self) -> int:
        return 2 * max(len(self.data), len(self.texts))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image: (C, H, W)."""
        return self.data.shape

    def to(self, device: torch.device | str) -> "WithPrior":
        """Return the data on `device`; draw the prior, if it is not kept."""
        other = object.__new__(WithPrior)
        kept = self.kept or CaptionedImages("prior", self._images(), self.texts, self.prompts)
        vars(other).update(vars(self), data=self.data.to(device), kept=kept.to(device))
        return other

    def _images(self) -> Tensor:
        """Return the pictures, uint8 (N, C, H, W)."""
        path = None if self.folder is None else self.folder / FILE
        if path is not None and path.is_file():
            return _read(path, len(self.texts))
        result = self.start(self.texts, seed=SEED, output_type="pt", progress=False)
        images = to_uint8(result.images).cpu()
        if path is not None and path.parent.is_dir():
            write_tensors(path, {"images": images}, {"sha256": digest(images)})
        return images

    def batch(self, index: Tensor, position: int = 0) -> tuple[Tensor, Tensor]:
        """Return even items from the instances and odd ones from the prior, see `Data.batch`."""
        if self.kept is None:
            return self.to("cpu").batch(index, position)
        index, odd = index // 2, (index % 2 == 1).cpu()
        pairs = (
            self.data.batch(index % len(self.data), position),
            self.kept.batch(index % len(self.kept), position),
        )
        return tuple(
            torch.where(odd.to(own.device).view(-1, *[1] * (own.ndim - 1)), prior, own)
            for own, prior in zip(*pairs, strict=True)
        )

    def condition(self, config):
        """Return the condition of the instances."""
        return self.data.condition(config)

    def example_prompts(self, n: int) -> list[str] | None:
        """Return captions of the instances."""
        return self.data.example_prompts(n)


def _read(path: Path, count: int) -> Tensor:
    """Read the pictures of a run. Raises CheckpointError."""
    stored = read_headers([path])
    if stored.keys() != {"images"} or stored["images"].shape[:1] != (count,):
        raise CheckpointError(f"{path}: must hold {count} images")
    images = read_tensor(stored["images"])
    if digest(images) != read_metadata(path).get("sha256"):
        raise CheckpointError(f"{path}: damaged, its SHA-256 is another")
    return images
