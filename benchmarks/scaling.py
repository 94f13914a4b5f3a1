"""Cost of sampling against images in a batch, resolution and steps, in every engine.

    python benchmarks/scaling.py [--engines torch,onnxruntime] [--threads N] [--rounds N]

The network has the size of that for MNIST and fresh weights, so only the time means anything. Each
table varies one number and keeps the others at 4 images, 32 pixels and 4 steps of DDIM. Calls of
all engines and sizes take turns. Printed are the medians (and quartiles) of CPU milliseconds per
image, and the exponent k of cost ~ size^k between the ends: 0 for the cost of an image against the
batch, 1 against steps, 2 against the side of an image if nothing but arithmetic costs time.
"""

import argparse
import io
import math
import statistics
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from itertools import product

import torch
from import_time import conditions
from unet_forward import SHAPES

from minidiff.names import ENGINES
from minidiff.nn import UNet
from minidiff.pipeline import Pipeline
from minidiff.runtime.device import keep_freed_memory
from minidiff.schedulers import DDIMScheduler

BASE = {"images": 4, "pixels": 32, "steps": 4}
SIZES = {"images": (1, 4, 16), "pixels": (16, 32, 64), "steps": (2, 4, 8)}


def pipeline(engine: str, side: int) -> Pipeline:
    """Return a pipeline of fresh weights with one engine."""
    torch.manual_seed(0)
    unet = UNet(**SHAPES["MNIST"].config, sample_size=side).eval()
    unet.to(memory_format=torch.channels_last)
    with redirect_stdout(io.StringIO()):  # which engine it is
        return Pipeline(unet, DDIMScheduler()).optimize(engine, "float32")


def call(pipe: Pipeline, images: int, steps: int) -> Callable[[], object]:
    """Return a call of a pipeline."""
    return lambda: pipe(
        num_images=images, num_inference_steps=steps, seed=0, output_type="pt", progress=False
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", default="torch", help=f"some of {', '.join(ENGINES)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    engines = options.engines.split(",")
    print(f"{conditions(options.threads, 'onnxruntime', 'openvino')}; CPU ms per image")
    for varied, sizes in SIZES.items():
        calls = {}
        for engine, size in product(engines, sizes):
            at = {**BASE, varied: size}
            calls[engine, size] = call(pipeline(engine, at["pixels"]), at["images"], at["steps"])
            calls[engine, size]()
        spent: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
        for _ in range(options.rounds):
            for (engine, size), each in calls.items():
                start = time.process_time()
                each()
                images = size if varied == "images" else BASE["images"]
                spent[engine, size].append(1e3 * (time.process_time() - start) / images)
        for engine in engines:
            cells = []
            for size in sizes:
                low, middle, high = statistics.quantiles(spent[engine, size], n=4)
                cells.append(f"{size}: {middle:.1f} ({low:.1f} … {high:.1f})")
            ends = [statistics.median(spent[engine, size]) for size in (sizes[0], sizes[-1])]
            k = math.log(ends[1] / ends[0]) / math.log(sizes[-1] / sizes[0])
            print(f"  {engine:12} {varied:7} {', '.join(cells)}; k = {k:.2f}", flush=True)


if __name__ == "__main__":
    main()
