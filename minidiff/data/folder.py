"""Any folder of images as a data set.

    folder/cat/1.png, folder/dog/1.png …    one class per sub-folder, labels in sorted name order
    folder/1.png, folder/2.png …            no sub-folders: no labels

Sub-folders are searched to any depth and links are followed. A sub-folder without images is not a
class. Names that begin with a dot, and files without the suffix of an image, are ignored. The order
is that of the sorted relative paths.

Every tenth image of that order (the 10th, 20th, …) belongs to the test split and never to the train
split. It is needed to distinguish memorizing from generalizing.

Pixels are those of the first frame, with EXIF orientation applied and transparency composited on
black. They are grey (C = 1) if every file is stored as grey, else RGB (C = 3) for all.
"""

import re
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from minidiff.data.images import ImageData
from minidiff.errors import DataError, one_of, whole_number

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm",
                      ".pgm", ".pnm", ".jfif"})  # fmt: skip
UNREAD = frozenset({".heic", ".heif", ".avif", ".jxl", ".jp2"})  # refused, not ignored
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # for EPS Pillow runs Ghostscript
HOLD_OUT = 10  # one image in ten is the test split

_GREY = frozenset({"1", "L", "LA", "La"})
_COLOUR = frozenset({"P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr"})
_ORIENTATION = 0x0112  # EXIF tag; its values 5..8 swap width and height


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
    files, labels, class_names = _list(root)
    # Size and colour depend on all files, so that both splits have the same shape.
    headers = [_header(path) for path in files]
    if image_size is None:
        _require_one_size(files, headers)
    mode = "L" if all(header.grey for header in headers) else "RGB"
    chosen = [i for i in range(len(files)) if (i % HOLD_OUT == HOLD_OUT - 1) == (split == "test")]
    if not chosen:
        raise DataError(
            f"{root}: {len(files)} images are too few to hold one out; "
            f"the test split is every {HOLD_OUT}th image"
        )
    size = (headers[0].width, headers[0].height) if image_size is None else (image_size,) * 2
    images = torch.empty(len(chosen), len(mode), size[1], size[0], dtype=torch.uint8)
    for row, i in enumerate(chosen):
        images[row] = _pixels(files[i], mode, size)
    chosen_labels = torch.tensor([labels[i] for i in chosen]) if class_names else None
    # "folder" distinguishes a folder called "mnist" from the data set of that name.
    name = f"folder {root.resolve().name}"
    return ImageData(name, images, chosen_labels, class_names)


def _list(root: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Return all image files in order, the label of each, and the class names."""
    files, folders = _entries(root)
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
    folders = [entry for entry in entries if entry.is_dir()]
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


def _open(path: Path) -> Image.Image:
    """Open an image and read its header but not its pixels."""
    with warnings.catch_warnings():
        # Pillow warns from 89 million pixels on and refuses twice as many; here both are refused.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(path, formats=FORMATS)


def _header(path: Path) -> _Header:
    try:
        with _open(path) as image:
            width, height = image.size
            mode, depth = image.mode, str(image.tile)  # before getexif, which may empty the latter
            if image.getexif().get(_ORIENTATION, 1) >= 5:
                width, height = height, width
    except Exception as error:  # decoders of arbitrary bytes raise nearly anything
        raise DataError(f"{path}: not a readable image ({error})") from error
    # Pillow would clip 16-bit grey and floats, and drop half of the bits of 16-bit colours.
    deep = re.search(r";16[BLN]", depth) is not None
    if deep or mode not in _GREY | _COLOUR:
        bits = ", 16 bits" if deep else ""
        raise DataError(f"{path}: pixels of mode {mode!r}{bits}, expected 8 bits a channel")
    return _Header(mode in _GREY, width, height)


def _require_one_size(files: list[Path], headers: list[_Header]) -> None:
    first = headers[0]
    for path, header in zip(files, headers, strict=True):
        if header[1:] != first[1:]:
            raise DataError(
                f"{files[0]} is {first.width}×{first.height} but {path} is "
                f"{header.width}×{header.height}; pass image_size to crop and resize all images"
            )


def _pixels(path: Path, mode: str, size: tuple[int, int]) -> Tensor:
    """Decode one image as uint8 (C, H, W)."""
    try:
        with _open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
            image = image.convert(mode)
            if image.size != size:
                image = _central_square(image).resize(size, Image.Resampling.LANCZOS)
            pixels = np.array(image, dtype=np.uint8)
    except Exception as error:  # as in _header
        raise DataError(f"{path}: truncated or damaged ({error})") from error
    return torch.from_numpy(pixels.reshape(size[1], size[0], len(mode))).permute(2, 0, 1)


def _central_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
