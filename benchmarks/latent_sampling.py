"""What a model on latents costs and is worth, beside a model in pixels of the same images.

    python benchmarks/latent_sampling.py LATENT [--pixel MODEL] [--steps N ...] [--data-dir DIR]
        [--num 1000] [--seed 0] [--rounds 5] [--device cuda]

LATENT is a run, or a model's folder, trained with --vae on MNIST; the model in pixels is the one
that comes along unless told otherwise. For each number of steps of the latent model, the pixel
model keeping its own: the Fréchet distance of `--num` guided samples, the time of 128 samples, and
both as a share of the pixel model's. Each round times all of them in turn, so that a busy machine
slows them alike; printed are medians, with the quartiles that the rounds' own shares lie between.
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

TIMED = 128


def seconds(pipe: Pipeline, steps: int) -> float:
    """Of wall-clock for TIMED samples."""
    start = time.perf_counter()
    pipe(num_images=TIMED, seed=0, num_inference_steps=steps, output_type="np")  # on the host
    return time.perf_counter() - start


def distance(pipe: Pipeline, steps: int, evaluator: Evaluator, n: int, seed: int) -> float:
    """FD‰ of n samples, equal shares of all classes."""
    images = pipe(num_images=n, seed=seed, num_inference_steps=steps, output_type="np").images
    return evaluator.score(torch.from_numpy(images).permute(0, 3, 1, 2)).fd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("latent", help="a run or a model on latents")
    add("--pixel", help="a run or a model in pixels; default: the one of MNIST that comes along")
    add("--steps", type=int, nargs="+", help="of the latent model; default: its own")
    add("--data-dir", help="where MNIST is; default: MINIDIFF_DATA")
    add("--num", type=int, default=1000, help="samples of a Fréchet distance")
    add("--seed", type=int, default=0, help="of the samples' noise")
    add("--rounds", type=int, default=5)
    add("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    keep_freed_memory()
    pixel, latent = (
        open_pipeline(model, options.device)
        for model in (options.pixel or shipped.folder("mnist"), options.latent)
    )
    evaluator = Evaluator("mnist", options.data_dir, torch.device(options.device))
    ways = [(pixel, pixel.num_inference_steps)]
    ways += [(latent, steps) for steps in options.steps or [latent.num_inference_steps]]
    for way in ways:
        seconds(*way)  # warm
    rounds = [[seconds(*way) for way in ways] for _ in range(options.rounds)]
    print(f"{'':10}{'steps':>6}{'FD':>8}{'share':>8}{'seconds':>10}{'share':>8}  quartiles")
    first = None
    for i, (pipe, steps) in enumerate(ways):
        fd = distance(pipe, steps, evaluator, options.num, options.seed)
        first = first or fd
        shares = [times[i] / times[0] for times in rounds]
        low, middle, high = statistics.quantiles(shares, n=4, method="inclusive")
        name = "pixels" if pipe is pixel else "latents"
        median = statistics.median(times[i] for times in rounds)
        print(
            f"{name:10}{steps:6}{fd:8.2f}{fd / first:8.2f}{median:10.2f}{middle:8.3f}"
            f"  {low:.3f}..{high:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
