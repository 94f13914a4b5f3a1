"""Curves and pictures of a run for TensorBoard, beside its `log.jsonl`.

RUN/tensorboard/    event files: loss, learning_rate and images_per_second by step, and samples

A run adds an event file when it begins and whenever it is resumed. That file starts with the mark
by which TensorBoard drops what earlier files hold of the steps that are now repeated. Nothing is
imported from TensorBoard unless a run requests it.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minidiff.errors import InvalidArgument
from minidiff.runs.autosave import Log
from minidiff.training.loop import TrainingState
from minidiff.training.progress import Progress

FOLDER = "tensorboard"


def check_installed(log: str | None) -> None:
    """Refuse a log whose library is missing. Raises InvalidArgument.

    Args:
        log: see `Saving`.
    """
    if log is not None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            raise InvalidArgument(
                f"log {log!r} needs tensorboard, which is not installed: "
                'pip install "minidiff[tensorboard]"'
            ) from None


class TensorBoardLog(Log):
    """The log of a run, whose rows and pictures TensorBoard shows as well.

    Args:
        path: file of the rows; the event files lie in a folder beside it.
    """

    _writer: Any = None  # a SummaryWriter, from `resume` on

    def resume(self, training: TrainingState) -> None:
        """Begin an event file, which replaces the steps after that of the training."""
        from torch.utils.tensorboard import SummaryWriter

        self._images, self._seconds = training.stream.position, training.budget.elapsed
        with self._naming():
            folder = str(self.path.parent / FOLDER)
            self._writer = SummaryWriter(folder, purge_step=training.budget.step + 1)

    def append(self, row: Progress) -> None:
        """Write a row. Raises TrainingError if that fails."""
        super().append(row)
        images, seconds = row.images - self._images, row.seconds - self._seconds
        self._images, self._seconds = row.images, row.seconds
        with self._naming():
            self._writer.add_scalar("loss", row.loss, row.step)
            self._writer.add_scalar("learning_rate", row.learning_rate, row.step)
            if seconds > 0:
                self._writer.add_scalar("images_per_second", images / seconds, row.step)

    def add_picture(self, path: Path, step: int) -> None:
        """Show a picture that was written at a step. Raises TrainingError if that fails."""
        with self._naming(), Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image("samples", pixels, step, dataformats="HWC")

    def sync(self) -> int:
        """Make sure that all rows are on the disk and return the length of the log in bytes."""
        with self._naming():
            self._writer.flush()
        return super().sync()

    def close(self) -> None:
        """Close the files."""
        super().close()
        with self._naming():
            if self._writer is not None:
                self._writer.close()
