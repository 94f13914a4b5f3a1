"""Any folder of images as a data set.

    folder/cat/1.png, folder/dog/1.png …    one class per sub-folder, labels in sorted name order
    folder/1.png, folder/2.png …            no sub-folders: no labels

Sub-folders are searched to any depth and links are followed. A sub-folder without images is not a
class, nor are folders of thumbnails (`@eaDir`, `__MACOSX`). Sub-folders that are all called train,
val or test are refused. Names that begin with a dot, and files without the suffix of an image, are
ignored. The order is that of the sorted relative paths.

Every tenth image of that order (the 10th, 20th, …) belongs to the test split and never to the train
split. It is needed to distinguish memorizing from generalizing.

Pixels are those of the first frame, with EXIF orientation applied and transparency composited on
black. They are grey (C = 1) if every file is stored as grey, else RGB (C = 3) for all.
"""

import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minidiff.data.images import ImageData
from minidiff.data.protocol import is_constant
from minidiff.errors import DataError, one_of, whole_number
from minidiff.images.pixels import GREY_MODES, on_black, opened, orientation, unreadable, upright

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm",
                      ".pgm", ".pnm", ".jfif"})  # fmt: skip
UNREAD = frozenset({".heic", ".heif", ".avif", ".jxl", ".jp2"})  # refused, not ignored
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # for EPS Pillow runs Ghostscript
HOLD_OUT = 10  # one image in ten is the test split
MAX_BYTES = 1 << 35  # images are held in memory; more than this is a forgotten image_size
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}
SYSTEM_FOLDERS = {"@eaDir", "__MACOSX", "lost+found"}  # thumbnails and leftovers of file systems


class _Header(NamedTuple):
    grey: bool
    width: int
    height: int


def load(folder: str | Path, split: str = "train", image_size: int | None = None) -> ImageData:
    """Read a folder of images, with the layout of this module's docstring.

    Args:
        folder: existing folder.
        split: "train", or "test" for the images held out.
        image_size: side to which the central square of each image is resized, with an antialiasing
            filter; None if all images have one size.

    Returns:
        Images uint8 (N, C, H, W), labelled if there are sub-folders.

    Raises:
        InvalidArgument: another split, or an image_size below 1.
        DataError: no images, an unreadable one, or sizes that differ; names the file.
    """
    one_of("split", split, ("train", "test"))
    if image_size is not None:
        image_size = whole_number("image_size", image_size, 1, 65536)
    root = Path(folder)
    files, labels, class_names = list_images(root)
    chosen = [i for i in range(len(files)) if (i % HOLD_OUT == HOLD_OUT - 1) == (split == "test")]
    if not chosen:
        raise DataError(
            f"{root}: {len(files)} images are too few to hold one out; "
            f"the test split is every {HOLD_OUT}th image"
        )
    images = read(root, files, chosen, image_size)
    chosen_labels = torch.tensor([labels[i] for i in chosen]) if class_names else None
    # "folder" distinguishes a folder called "mnist" from the data set of that name.
    name = f"folder {root.resolve().name}"
    return ImageData(name, images, chosen_labels, class_names)


def read(root: Path, files: list[Path], chosen: list[int], image_size: int | None) -> Tensor:
    """Return the pixels of chosen files, uint8 (N, C, H, W); see `load`. Raises DataError."""
    # Size and colour depend on all files, so that both splits have the same shape.
    headers = [_header(path) for path in files]
    if image_size is None:
        _require_one_size(files, headers)
    mode = "L" if all(header.grey for header in headers) else "RGB"
    size = (headers[0].width, headers[0].height) if image_size is None else (image_size,) * 2
    if (needed := len(chosen) * len(mode) * size[0] * size[1]) > MAX_BYTES:
        raise DataError(
            f"{root}: {len(chosen)} images of {size[0]}×{size[1]} need {needed / 2**30:.0f} GiB of "
            "memory; pass image_size to crop and resize them"
        )
    images = torch.empty(len(chosen), len(mode), size[1], size[0], dtype=torch.uint8)
    for row, i in enumerate(chosen):
        images[row] = _pixels(files[i], mode, size, resize=image_size is not None)
    if not images.any() or (len(images) > 1 and is_constant(images)):
        raise DataError(f"{root}: all pixels are of one colour: there is nothing to learn")
    return images


def list_images(root: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Return all image files in order, the label of each, and the class names."""
    files, folders = _entries(root)
    if len(folders) > 1 and {folder.name.lower() for folder in folders} <= SPLIT_NAMES:
        raise DataError(
            f"{root}: {', '.join(folder.name for folder in folders)} are parts of a data set, not "
            "classes; give the path of one of them"
        )
    classes = {folder.name: _search(folder, (root.resolve(),)) for folder in folders}
    classes = {name: found for name, found in classes.items() if found}
    if files and classes:
        raise DataError(
            f"{root}: holds images ({files[0].name}, …) beside folders of images "
            f"({', '.join(list(classes)[:3])}, …); put every image into a class folder, or none"
        )
    if not files and not classes:
        raise DataError(f"{root}: no images; looked for {', '.join(sorted(SUFFIXES))}")
    if len({unicodedata.normalize("NFC", name) for name in classes}) < len(classes):
        raise DataError(f"{root}: two class folders have one name, written in two ways of Unicode")
    files += [path for found in classes.values() for path in found]
    labels = [label for label, found in enumerate(classes.values()) for _ in found]
    return files, labels, tuple(classes)


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the image files and the folders in a folder, each sorted by name."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: not a folder that can be read ({error.strerror})") from error
    folders = [entry for entry in entries if entry.is_dir() and entry.name not in SYSTEM_FOLDERS]
    files = []
    for entry in (entry for entry in entries if not entry.is_dir()):
        suffix = entry.suffix.lower()
        if suffix in UNREAD:
            raise DataError(f"{entry}: images of this kind are not read; convert it to PNG or JPEG")
        if suffix in SUFFIXES and not entry.is_file():
            raise DataError(f"{entry}: a link to nothing, or no ordinary file")
        if suffix in SUFFIXES:
            files.append(entry)
    return files, folders


def _search(folder: Path, above: tuple[Path, ...]) -> list[Path]:
    """Return image files at any depth, sorted by relative path in the same way on all systems."""
    real = folder.resolve()
    if real in above:
        raise DataError(f"{folder}: is a link to a folder that it lies in")
    files, folders = _entries(folder)
    found = files + [path for inner in folders for path in _search(inner, (*above, real))]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """Open an image and read its header but not its pixels."""
    with warnings.catch_warnings():
        # Pillow warns from 89 million pixels on and refuses twice as many; here both are refused.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with opened(path, FORMATS) as image:
            yield image


def _header(path: Path) -> _Header:
    try:
        with _open(path) as image:
            (width, height), mode, problem = image.size, image.mode, unreadable(image)
            if orientation(image) >= 5:
                width, height = height, width
    except Exception as error:  # decoders of arbitrary bytes raise nearly anything
        raise DataError(f"{path}: not a readable image ({error})") from error
    if problem:
        raise DataError(f"{path}: {problem}")
    return _Header(mode in GREY_MODES, width, height)


def _require_one_size(files: list[Path], headers: list[_Header]) -> None:
    first = headers[0]
    for path, header in zip(files, headers, strict=True):
        if header[1:] != first[1:]:
            raise DataError(
                f"{files[0]} is {first.width}×{first.height} but {path} is "
                f"{header.width}×{header.height}; pass image_size to crop and resize all images"
            )


def _pixels(path: Path, mode: str, size: tuple[int, int], *, resize: bool) -> Tensor:
    """Decode one image as uint8 (C, H, W)."""
    try:
        with _open(path) as image:
            image = on_black(upright(image)).convert(mode)
    except Exception as error:  # as in _header
        raise DataError(f"{path}: truncated or damaged ({error})") from error
    if image.size != size:
        if not resize:
            raise DataError(
                f"{path}: its pixels are {image.width}×{image.height}, its header says "
                f"{size[0]}×{size[1]}; pass image_size to crop and resize all images"
            )
        image = _central_square(image).resize(size, Image.Resampling.LANCZOS)
    pixels = np.array(image, dtype=np.uint8)
    return torch.from_numpy(pixels.reshape(size[1], size[0], len(mode))).permute(2, 0, 1)


def _central_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
