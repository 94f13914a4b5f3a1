"""Time of a network's call in every engine, and in diffusers, with equal weights.

    python benchmarks/sampling.py [--threads N] [--rounds N] [--shape NAME] [--batch N,…]
        [--compiled] [--plot FILE]

Runs alternate between all forms, so that a busy machine slows all alike, and CPU time is counted.
Printed are medians and quartiles in milliseconds, the speed-up over diffusers in float32, and the
error relative to float32. Engines that are not installed are left out. `--compiled` adds
torch.compile of diffusers' network, which takes minutes to begin. `--plot` draws images per second
against the time of a call, of all forms and batches.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import diffusers
import torch
from import_time import conditions
from unet_forward import SHAPES

from minidiff.engines.backends import is_installed
from minidiff.nn import UNet
from minidiff.pipeline import Pipeline
from minidiff.runtime.device import keep_freed_memory
from minidiff.schedulers import DDIMScheduler

FORMS = {  # name → engine and dtype
    "torch float32": ("torch", "float32"),
    "torch bfloat16": ("torch", "bfloat16"),
    "onnxruntime float32": ("onnxruntime", "float32"),
    "openvino float32": ("openvino", "float32"),
    "openvino bfloat16": ("openvino", "bfloat16"),
}


def forms(
    name: str, batch: int, *, compiled: bool = False
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return a call of the network in every form."""
    side, _, config = SHAPES[name]
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(**config).eval()
    x = torch.randn(batch, theirs.config.in_channels, side, side)
    found: dict[str, Callable[[], torch.Tensor]] = {
        "diffusers float32": lambda: theirs(x, 500).sample,
    }

    def narrow() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return theirs(x, 500).sample.float()

    found["diffusers bfloat16"] = narrow
    if compiled:
        faster = torch.compile(theirs)
        found["diffusers compiled"] = lambda: faster(x, 500).sample
    for form, (engine, dtype) in FORMS.items():
        if engine != "torch" and not is_installed(engine):
            continue
        unet = UNet(**{"sample_size": side} | config).eval()
        unet.load_state_dict(theirs.state_dict())
        unet.to(memory_format=torch.channels_last)
        pipe = Pipeline(unet, DDIMScheduler()).optimize(engine, dtype)
        denoise = pipe.denoiser(None)
        found[form] = lambda denoise=denoise: denoise(x, 500.0)
    return found


@torch.inference_mode()
def measure(found: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, float]:
    """Print a line per form, and return the medians in milliseconds."""
    exact = found["diffusers float32"]()
    errors = {name: ((call() - exact).norm() / exact.norm()).item() for name, call in found.items()}
    spent: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, call in found.items():
            started = time.process_time()
            call()
            spent[name].append(1e3 * (time.process_time() - started))
    base = statistics.median(spent["diffusers float32"])
    for name, values in spent.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"  {name:22}{middle:9.1f} ({low:8.1f} …{high:8.1f})  {base / middle:5.2f} ×  "
              f"error {errors[name]:.0e}", flush=True)  # fmt: skip
    return {name: statistics.median(values) for name, values in spent.items()}


def plot(found: dict[int, dict[str, float]], title: str, path: str) -> None:
    """Draw images per second against milliseconds of a call, a line per form."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in next(iter(found.values())):
        points = [(each[name], 1e3 * batch / each[name]) for batch, each in found.items()]
        style = "--" if name.startswith("diffusers") else "-"
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, label=name)
    axes.set(xscale="log", xlabel="latency: CPU milliseconds of a call", ylabel="images per second")
    axes.set_xticks(ticks := [10, 20, 50, 100, 200, 500], labels=map(str, ticks))
    axes.minorticks_off()
    axes.set_title(title, fontsize=7)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shape", choices=SHAPES, default="MNIST")
    parser.add_argument("--batch", default="16", help="images in a call; several for a picture")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile of diffusers'")
    parser.add_argument("--plot", metavar="FILE", help="picture to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    diffusers.logging.set_verbosity_error()
    where = conditions(options.threads, "diffusers", "openvino", "onnxruntime")
    print(f"{where}; {options.shape} size; CPU ms of a call, median (quartiles), speed over "
          "diffusers float32")  # fmt: skip
    medians = {}
    for batch in map(int, options.batch.split(",")):
        print(f"{batch} images")
        found = forms(options.shape, batch, compiled=options.compiled)
        medians[batch] = measure(found, options.rounds)
    if options.plot:
        first, *_ = where.split(", load")
        title = f"One evaluation of the U-Net of {options.shape} size, {options.batch} images"
        plot(medians, f"{title}\n{first}", options.plot)


if __name__ == "__main__":
    main()
