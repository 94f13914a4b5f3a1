"""Images with one caption each: a folder with `metadata.jsonl`, or one caption for all.

    folder/metadata.jsonl     {"file_name": "1.png", "text": "a red heart"}    one line per image
    folder/1.png …

The file is that of the `datasets` library's ImageFolder. Every image must have a line, and every
line an image. Of a folder with captions all images are trained on: a handful of pictures is too
few to hold any out.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from minidiff.data import folder as image_folder
from minidiff.data.protocol import Data, digest
from minidiff.errors import DataError, InvalidArgument, whole_number
from minidiff.images.pixels import to_float
from minidiff.runtime.checks import instance
from minidiff.text.conditioning import Captions, ConditionConfig
from minidiff.text.prompts import Prompts, WordPrompts
from minidiff.text.words import WordTokenizer, words_of

METADATA = "metadata.jsonl"
MAX_BYTES = 1 << 28  # of metadata.jsonl
TEXT_KEYS = ("text", "caption", "prompt")


class CaptionedImages(Data):
    """Images as bytes with a caption each, in the tokens of a model, or of all their words.

    Args:
        name: name in error messages and reports.
        images: uint8 (N, C, H, W).
        texts: N captions.
        prompts: tokenizer of the captions; None for one of all their words.
    Raises:
        InvalidArgument: images of another type or shape, another number of captions, or a caption
            that is not a text.
    """

    class_names = ()
    is_stored = True

    def __init__(
        self, name: str, images: Tensor, texts: Sequence[str], prompts: Prompts | None = None
    ) -> None:
        instance(Tensor)("images", images)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise InvalidArgument(
                "images must be uint8 (N, C, H, W) with C = 1 or 3, "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        if len(texts) != len(images):
            raise InvalidArgument(f"texts must be one per image, {len(images)}, got {len(texts)}")
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise InvalidArgument(f"texts must be captions, got {text!r}")
        self.name, self.images, self.texts, self.prompts = name, images, tuple(texts), prompts
        tokenizer = self._tokenizer() if prompts is None else None
        self.ids = tokenizer.encode(self.texts) if tokenizer else prompts.tokens(self.texts)
        self._own = tokenizer

    def _tokenizer(self) -> WordTokenizer:
        """Return a tokenizer of all words of the captions."""
        found = [words_of(text) for text in self.texts]
        words = sorted({word for words in found for word in words})
        if not words:
            raise InvalidArgument("texts must have words")
        return WordTokenizer(words, max(map(len, found)) + 2)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image: (C, H, W)."""
        return tuple(self.images.shape[1:])

    def to(self, device: torch.device | str) -> "CaptionedImages":
        """Return the data with its tensors on `device`."""
        other = object.__new__(CaptionedImages)
        vars(other).update(vars(self), images=self.images.to(device), ids=self.ids.to(device))
        return other

    def batch(self, index: Tensor, position: int = 0) -> tuple[Tensor, Tensor]:
        """Return x float32 (B, C, H, W) and token numbers int64 (B, L), see `Data.batch`."""
        index = index.to(self.images.device, non_blocking=True)
        return to_float(self.images[index]), self.ids[index]

    def condition(self, config: ConditionConfig) -> Captions:
        """Return the encoder of the prompts, or a fresh one of the captions' words."""
        if self._own is None:
            return Captions(self.prompts)
        return Captions(WordPrompts.fresh(self._own, config.text_width, config.text_layers))

    def tokenized(self, prompts: Prompts) -> "CaptionedImages":
        """Return the same images and captions in the tokens of other prompts."""
        return CaptionedImages(self.name, self.images, self.texts, prompts)

    def example_prompts(self, n: int) -> list[str]:
        """Return n captions, from the beginning again where there are fewer."""
        return [self.texts[i % len(self.texts)] for i in range(n)]

    def digests(self) -> dict[str, str]:
        """Return digests of the pixels and of the captions."""
        texts = torch.frombuffer(bytearray("\n".join(self.texts).encode()), dtype=torch.uint8)
        return {"pixels": digest(self.images), "captions": digest(texts)}


def is_captioned(folder: str | Path) -> bool:
    """Return whether a folder has a `metadata.jsonl`."""
    return (Path(folder) / METADATA).is_file()


def load(
    folder: str | Path, caption: str | None = None, image_size: int | None = None
) -> CaptionedImages:
    """Read a folder of images with captions.

    Args:
        folder: folder with a `metadata.jsonl`, or of images without classes.
        caption: caption of all images, without that file.
        image_size: side to which the central square of each image is resized; None if all images
            have one size.
    Raises:
        InvalidArgument: a caption beside those of the file, or neither of them.
        DataError: the images or the file are damaged or do not fit each other.
    """
    root = Path(folder)
    if is_captioned(root) == (caption is not None):
        raise InvalidArgument(
            f"caption must be left out, {root} has a {METADATA}; got {caption!r}"
            if caption is not None
            else f"caption must be given: {root} has no {METADATA}"
        )
    files, _, _ = image_folder.list_images(root)
    names = [path.relative_to(root).as_posix() for path in files]
    texts = [caption] * len(files) if caption else match(names, read_captions(root), root)
    if image_size is not None:
        whole_number("image_size", image_size, 1, 65536)
    images = image_folder.read(root, files, list(range(len(files))), image_size)
    return CaptionedImages(f"folder {root.resolve().name}", images, texts)


def read_captions(root: Path) -> dict[str, str]:
    """Return caption by file name, from `metadata.jsonl`.

    Raises:
        DataError: the file is too large or damaged, or a line lacks a name or a caption, or names
            a file twice.
    """
    path, found = root / METADATA, dict[str, str]()
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: larger than {MAX_BYTES} bytes")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error})") from error
        name, text = _entry(entry, f"{path}:{number}")
        if name in found:
            raise DataError(f"{path}:{number}: names {name} a second time")
        found[name] = text
    if not found:
        raise DataError(f"{path}: holds no captions")
    return found


def _entry(entry: object, where: str) -> tuple[str, str]:
    """Return file name and caption of a line. Raises DataError."""
    if not isinstance(entry, Mapping) or not isinstance(name := entry.get("file_name"), str):
        raise DataError(f'{where}: must be {{"file_name": …, "text": …}}')
    text = next((entry[key] for key in TEXT_KEYS if key in entry), None)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: {name} has no caption; give one as {', '.join(TEXT_KEYS)}")
    return name, text


def match(names: Sequence[str], captions: Mapping[str, str], root: Path) -> list[str]:
    """Return the caption of every image, in order.

    Args:
        names: paths of the images relative to the folder, with slashes.
        captions: caption by name.
        root: the folder, for messages.
    Raises:
        DataError: an image without a caption, or a caption without an image.
    """
    for kind, missing in (
        ("an image has no caption", sorted(set(names) - captions.keys())),
        ("a caption has no image", sorted(captions.keys() - set(names))),
    ):
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise DataError(f"{root / METADATA}: {kind}: {missing[0]}{more}")
    return [captions[name] for name in names]
