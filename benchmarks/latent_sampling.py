"""Quality and speed of a model on latents, relative to a model in pixels of the same images.

    python benchmarks/latent_sampling.py LATENT [--pixel MODEL] [--steps N ...] [--data-dir DIR]
        [--num 1000] [--seed 0] [--rounds 5] [--device cuda]

LATENT is a run or the folder of a model, trained with --vae on MNIST; the model in pixels is by
default the one that ships with minidiff. The table has a row for each number of steps of the latent
model: the Fréchet distance of `--num` guided samples, and the time of 128 samples. Both stand also
relative to the pixel model with its stored number of steps. Each round times all of them in turn,
so that a busy machine slows all alike. Printed are medians, and quartiles of the rounds' ratios.
"""

import argparse
import statistics
import time

import torch

from minidiff import shipped
from minidiff.metrics import Evaluator
from minidiff.pipeline import Pipeline
from minidiff.runs.folder import open_pipeline
from minidiff.runtime.device import keep_freed_memory

TIMED = 128  # samples


def seconds(pipe: Pipeline, steps: int) -> float:
    """Return the wall-clock time of TIMED samples."""
    start = time.perf_counter()
    pipe(num_images=TIMED, seed=0, num_inference_steps=steps, output_type="np")  # on the host
    return time.perf_counter() - start


def distance(pipe: Pipeline, steps: int, evaluator: Evaluator, n: int, seed: int) -> float:
    """Return FD‰ of n samples, every class equally often."""
    images = pipe(num_images=n, seed=seed, num_inference_steps=steps, output_type="np").images
    return evaluator.score(torch.from_numpy(images).permute(0, 3, 1, 2)).fd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("latent", help="run or model on latents")
    add(
        "--pixel",
        help="run or model in pixels; default: the model of MNIST that ships with minidiff",
    )
    add(
        "--steps", type=int, nargs="+", help="steps of the latent model; default: its stored number"
    )
    add("--data-dir", help="folder of MNIST; default: MINIDIFF_DATA")
    add("--num", type=int, default=1000, help="samples for a Fréchet distance")
    add("--seed", type=int, default=0, help="seed of the noise")
    add("--rounds", type=int, default=5, help="measurements of each time")
    add("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    keep_freed_memory()
    pixel, latent = (
        open_pipeline(model, options.device)
        for model in (options.pixel or shipped.folder("mnist"), options.latent)
    )
    evaluator = Evaluator("mnist", options.data_dir, torch.device(options.device))
    pairs = [(pixel, pixel.num_inference_steps)]
    pairs += [(latent, steps) for steps in options.steps or [latent.num_inference_steps]]
    for pair in pairs:
        seconds(*pair)  # warm-up
    rounds = [[seconds(*pair) for pair in pairs] for _ in range(options.rounds)]
    print(f"{'':10}{'steps':>6}{'FD':>8}{'ratio':>8}{'seconds':>10}{'ratio':>8}  quartiles")
    first = None
    for i, (pipe, steps) in enumerate(pairs):
        fd = distance(pipe, steps, evaluator, options.num, options.seed)
        first = first or fd
        ratios = [times[i] / times[0] for times in rounds]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        name = "pixels" if pipe is pixel else "latents"
        median = statistics.median(times[i] for times in rounds)
        print(
            f"{name:10}{steps:6}{fd:8.2f}{fd / first:8.2f}{median:10.2f}{middle:8.3f}"
            f"  {low:.3f}..{high:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
