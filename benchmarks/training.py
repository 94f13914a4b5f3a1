"""Time of a training step of a preset: plain, compiled, and captured as a CUDA graph.

    python benchmarks/training.py PRESET [--variants plain,compile] [--data-dir DIR]
        [--device cpu] [--dtype float32] [--batch-size N] [--threads N] [--rounds N]

The variants take turns of a few steps with equal batches, so that a busy machine slows all alike.
Printed are the seconds of the first steps, which include compilation and capture; then median and
quartiles of a step in milliseconds, and the speed-up over the first variant: CPU time on a CPU,
time by the clock on a GPU. `--profile` prints the operations of three steps of the first variant.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch
from import_time import conditions

from minidiff import data
from minidiff.runtime.device import DTYPES, keep_freed_memory, pick_device
from minidiff.training.build import resolve
from minidiff.training.diffusion import DiffusionTraining
from minidiff.training.presets import PRESETS

VARIANTS = {"plain": {}, "compile": {"compile": True}, "cuda-graph": {"cuda_graph": True}}
WARM_UP, STEPS = 4, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("preset", choices=PRESETS, help="preset of minidiff train")
    add("--variants", default="plain,compile", help=f"some of {', '.join(VARIANTS)}")
    add("--data-dir", help="folder of the preset's data; default: MINIDIFF_DATA")
    add("--device", default="cpu", help="cpu or cuda")
    add("--dtype", choices=DTYPES, default="float32")
    add("--batch-size", type=int, help="images per step; default: the preset's")
    add("--threads", type=int, default=2, help="threads of torch")
    add("--rounds", type=int, default=9, help="turns of each variant")
    add("--profile", action="store_true", help="print what the time is spent on, and nothing else")
    options = parser.parse_args()
    names = options.variants.split(",")
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"--variants must be some of {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    device = pick_device(options.device)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    preset = PRESETS[options.preset]
    images = data.load(preset.data, "train", options.data_dir)
    size = options.batch_size or preset.train.batch_size
    config = replace(
        preset.train, steps=10**6, minutes=None, batch_size=size, final_batch_size=size,
        dtype=options.dtype,
    )  # fmt: skip
    config = resolve(config, images)
    where = torch.cuda.get_device_name() + ", " if device.type == "cuda" else ""
    print(f"{where}{conditions(options.threads)}; ", end="")
    print(f"{options.preset}, batches of {size}, {options.dtype}")

    def take(training: DiffusionTraining, steps: int) -> float:
        """Return the seconds of a number of steps."""
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        start = clock()
        for _ in range(steps):
            training.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    runs = {}
    for name in names:
        runs[name] = DiffusionTraining(replace(config, **VARIANTS[name]), images, device)
        print(f"{name:12} ready after {take(runs[name], WARM_UP):.0f} s", flush=True)
    if options.profile:
        with torch.profiler.profile() as profile:
            take(runs[names[0]], 3)
        order = f"self_{device.type}_time_total"
        print(profile.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=45))
        return
    spent = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, training in runs.items():
            spent[name].append(1e3 * take(training, STEPS) / STEPS)
    first = statistics.median(spent[names[0]])
    for name, values in spent.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{name:12}{middle:8.1f} ms ({low:.1f} … {high:.1f}), {first / middle:.2f}")


if __name__ == "__main__":
    main()
