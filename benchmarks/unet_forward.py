"""Time of the U-Net, of minidiff and of diffusers, with equal weights.

    python benchmarks/unet_forward.py [--threads N] [--rounds N] [--device cpu|cuda] [--shape NAME]

There is a table per network. Runs alternate between all variants, so that a busy machine slows all
alike. Printed are medians and quartiles in milliseconds, and the speed-up of minidiff's best
variant over diffusers' best, in 32 and in 16 bits. A variant is a number type, a memory format, and
autocast or not.
"""

import argparse
import contextlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import diffusers
import torch
from import_time import cpu_name
from torch import nn

from minidiff.nn import UNet
from minidiff.runtime.device import keep_freed_memory


class Shape(NamedTuple):
    """A network and its input."""

    side: int
    batch: int
    config: dict


SHAPES = {
    "MNIST": Shape(
        32,
        16,
        {
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (32, 64, 64),
            "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            "norm_num_groups": 8,
        },
    ),
    "CIFAR-10": Shape(
        32,
        4,
        {
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": None,
        },
    ),
}


class Variant(NamedTuple):
    """A variant: number type of the weights, memory format, autocast."""

    dtype: torch.dtype
    layout: torch.memory_format
    autocast: bool


_PLAIN, _LAST = torch.contiguous_format, torch.channels_last
VARIANTS = {
    "float32": Variant(torch.float32, _PLAIN, False),
    "float32 channels_last": Variant(torch.float32, _LAST, False),
    "bfloat16": Variant(torch.bfloat16, _PLAIN, False),
    "bfloat16 channels_last": Variant(torch.bfloat16, _LAST, False),
    "autocast": Variant(torch.float32, _PLAIN, True),
    "autocast channels_last": Variant(torch.float32, _LAST, True),
}
WIDE = ("float32", "float32 channels_last")
NARROW = tuple(name for name in VARIANTS if name not in WIDE)


def steps(
    model: nn.Module, shape: Shape, variant: Variant, device: torch.device
) -> tuple[Callable, Callable]:
    """Return a forward pass without gradients, and a forward and backward pass."""
    dtype, layout, autocast = variant
    model = model.to(device, dtype, memory_format=layout)
    size = (shape.batch, model.config.in_channels, shape.side, shape.side)
    x = torch.randn(size, device=device).to(dtype=dtype, memory_format=layout)
    t = torch.randint(0, 1000, (shape.batch,), device=device)
    cast = torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def forward() -> torch.Tensor:
        with cast:
            out = model(x, t)
        return getattr(out, "sample", out).float().square().mean()

    def sample() -> None:
        with torch.no_grad():
            forward()
        wait()

    def train() -> None:
        forward().backward()
        model.zero_grad()
        wait()

    return sample, train


def times(functions: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of functions that run in turn, after two runs to warm up."""
    for function in (*functions.values(), *functions.values()):
        function()
    spent = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            spent[name].append(1e3 * (time.perf_counter() - start))
    return spent


def report(spent: dict[str, list[float]]) -> None:
    """Print a line per variant, then the best of ours and of theirs."""
    medians = {name: statistics.median(values) for name, values in spent.items()}
    for variant in VARIANTS:
        cells = ""
        for who in ("ours", "theirs"):
            low, _, high = statistics.quantiles(spent[f"{variant}/{who}"], n=4)
            cells += f"{medians[f'{variant}/{who}']:10.1f} ({low:7.1f} …{high:7.1f})"
        print(f"    {variant:24}{cells}")
    best = {kind: min(medians[f"{v}/theirs"] for v in names)
            for kind, names in (("32", WIDE), ("16", NARROW))}  # fmt: skip
    own = {kind: min(medians[f"{v}/ours"] for v in names)
           for kind, names in (("32", WIDE), ("16", NARROW))}  # fmt: skip
    usual = medians["bfloat16 channels_last/ours"]
    print(
        f"    best of theirs / best of ours: float32 {best['32'] / own['32']:.2f}, "
        f"16 bits {best['16'] / own['16']:.2f}; / our bfloat16 channels_last "
        f"{best['16'] / usual:.2f}; our best float32 / bfloat16 channels_last "
        f"{own['32'] / usual:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # for both libraries
    diffusers.logging.set_verbosity_error()
    where = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    print(f"{where}, Python {platform.python_version()}, torch {torch.__version__}, ", end="")
    print(f"diffusers {diffusers.__version__}, {options.threads} threads")
    for name in options.shape or SHAPES:
        shape, sampling, training = SHAPES[name], {}, {}
        for label, variant in VARIANTS.items():
            ours, theirs = UNet(**shape.config), diffusers.UNet2DModel(**shape.config)
            ours.load_state_dict(theirs.state_dict())
            for who, model in (("ours", ours), ("theirs", theirs)):
                functions = steps(model, shape, variant, device)
                sampling[f"{label}/{who}"], training[f"{label}/{who}"] = functions
        size = sum(p.numel() for p in ours.parameters())
        print(f"{name}: {size / 1e6:.1f} million weights, {shape.side}x{shape.side}, ", end="")
        print(f"batch {shape.batch}; milliseconds, median (quartiles), ours and diffusers'")
        for title, functions in (("forward", sampling), ("forward and backward", training)):
            print(f"  {title}")
            report(times(functions, options.rounds))


if __name__ == "__main__":
    main()
