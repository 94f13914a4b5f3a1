"""A sampling as a GIF or a filmstrip: what the sampler holds, and what the network predicts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from minidiff.lab import plot
from minidiff.runtime.files import announced
from minidiff.sample import Step

MAX_FRAMES, MAX_IMAGES = 12, 4  # columns of a strip, and images of a strip


class Film:
    """The samples of one batch after every step, and their predictions x̂0.

    Pass it as `callback` to a pipeline. Only the first batch of a larger call is kept.

    Args:
        decode: map from samples of the network to images in [−1, 1], such as `pipe.decode`.
    """

    def __init__(self, decode: Callable[[Tensor], Tensor]) -> None:
        self.decode = decode
        self.samples: list[np.ndarray] = []  # uint8 (N, H, W, C), the starting noise first
        self.predictions: list[np.ndarray] = []
        self._whole = False

    def __call__(self, step: Step) -> None:
        """Keep a step."""
        self._whole = self._whole or (step.index == 0 and bool(self.samples))
        if self._whole:
            return
        if not self.samples:
            self.samples.append(plot.as_array(self.decode(step.x)))
        self.samples.append(plot.as_array(self.decode(step.next_x)))
        self.predictions.append(plot.as_array(self.decode(step.x0)))

    def write(self, gif: str | None, strip: str | None, columns: int, scale: int) -> None:
        """Write a GIF, a filmstrip or both, and print their names. Raises CheckpointError."""
        if gif:
            with announced(gif):
                self.write_gif(gif, columns, scale)
        if strip:
            with announced(strip):
                self.write_strip(strip, scale)

    def write_gif(self, path: str | Path, columns: int, scale: int = 2) -> None:
        """Write the samples on their way from noise as a GIF. Raises CheckpointError."""
        frames = [plot.grid(frame, min(columns, len(frame)), scale) for frame in self.samples]
        plot.save_gif(frames, path)

    def write_strip(self, path: str | Path, scale: int = 2) -> None:
        """Write a PNG with two rows per image, its samples and the predictions below them.

        The first four images and at most twelve steps, the last one included. Raises
        CheckpointError.
        """
        n = len(self.predictions)
        chosen = np.unique(np.linspace(0, n - 1, min(n, MAX_FRAMES)).round().astype(int))
        rows = []
        for image in range(min(MAX_IMAGES, len(self.samples[0]))):
            rows += [self.samples[i + 1][image] for i in chosen]
            rows += [self.predictions[i][image] for i in chosen]
        plot.save(plot.grid(np.stack(rows), len(chosen), scale), path)
