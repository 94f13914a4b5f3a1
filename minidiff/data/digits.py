"""The embedded digits: 16×16 grey images of 0..9, rendered from fonts and frozen as a file.

They allow a first run without a download. `tests/data/render_digits.py` made `digits.npz`. Train
and test split are independent draws from one distribution, so the test split is a fair ceiling.
Pixels have 16 grey levels in the file; level k means byte 17·k.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch

from minidiff.data.images import ImageData
from minidiff.errors import DataError, one_of

FILE = Path(__file__).with_name("digits.npz")
SIDE = 16
LEVELS = 16
COUNTS = {"train": 10_000, "test": 2_000}


def load(split: str = "train", path: str | Path = FILE) -> ImageData:
    """Read one split of the embedded digits: 10,000 train or 2,000 test images.

    Image i shows digit i mod 10, so every class is equally frequent.

    Raises:
        InvalidArgument: another split.
        DataError: the file is missing, damaged or of another kind.
    """
    one_of("split", split, COUNTS)
    levels = _read(Path(path), split)
    labels = torch.arange(len(levels)) % 10
    images = torch.from_numpy(levels * (255 // (LEVELS - 1))).unsqueeze(1)
    return ImageData("digits", images, labels, tuple(str(digit) for digit in range(10)))


def _read(path: Path, split: str) -> np.ndarray:
    """Read the grey levels of one split, uint8 (N, 16, 16) in 0..15."""
    try:
        with np.load(path, allow_pickle=False) as file:
            levels = file[split]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not readable as the embedded digits ({error})") from error
    expected = (COUNTS[split], SIDE, SIDE)
    if levels.dtype != np.uint8 or levels.shape != expected or levels.max() >= LEVELS:
        raise DataError(
            f"{path}: {split} is {levels.dtype} {levels.shape} up to {levels.max()}, "
            f"expected uint8 {expected} in 0..{LEVELS - 1}"
        )
    return levels
