"""Memory and time of the first and the second epoch over a folder of JPEG files.

    python benchmarks/image_folder.py [--images N] [--side PIXELS] [--batch-size N]

The files are made in a temporary folder. `minidiff.data.load` decodes them once and keeps their
bytes, images·channels·side² of them; an epoch then only gathers. Nothing is trained: an epoch is
every batch as input of a network. Printed are seconds, and the peak of the process's memory so far.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from minidiff.data import batches, load

UNIT = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss, per MiB


@contextmanager
def measured(what: str) -> Iterator[None]:
    """Print the seconds of a block, and the peak of memory at its end."""
    began = time.perf_counter()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / UNIT
    print(f"{what:24}{time.perf_counter() - began:8.2f} s{peak:8.0f} MiB at most", flush=True)


def write_images(folder: Path, count: int, side: int) -> None:
    """Write smooth random colours as JPEG files, so that their size is that of photographs."""
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:07}.jpg")


def main() -> None:
    """Measure what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000, help="files (10000)")
    parser.add_argument("--side", type=int, default=64, help="side of an image in pixels (64)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per batch (64)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        with measured("before: files made"):
            write_images(Path(place), options.images, options.side)
        with measured("load"):
            data = load(place)
    print(f"{len(data)} images kept, {data.images.numel() / 2**20:.0f} MiB of bytes")
    order = batches(len(data), options.batch_size, seed=0)
    for epoch in ("first epoch", "second epoch"):
        with measured(epoch):
            for index in islice(order, -(-len(data) // options.batch_size)):
                data.batch(index)


if __name__ == "__main__":
    main()
