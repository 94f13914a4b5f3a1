"""How long the U-Net takes beside diffusers' on the same weights, in one alternating run.

    python benchmarks/unet_forward.py [--threads N] [--rounds N]

Each line is one training shape. Runs alternate between all variants, so that a busy machine
slows all of them; what is printed is the median, and the ratio of diffusers' to ours within the
same dtype and memory format (above 1: ours is faster).
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import diffusers
import torch
from torch import nn

from minidiff.nn import UNet

BATCH = 64
SHAPES = {
    "4x14x14, (64, 128)": (
        14,
        {
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (64, 128),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
    ),
    "1x28x28, (32, 64, 64)": (
        28,
        {
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (32, 64, 64),
            "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            "norm_num_groups": 8,
        },
    ),
}
# dtype of the weights, memory format, autocast
VARIANTS = {
    "float32": (torch.float32, torch.contiguous_format, False),
    "float32 channels_last": (torch.float32, torch.channels_last, False),
    "autocast channels_last": (torch.float32, torch.channels_last, True),
    "bfloat16 channels_last": (torch.bfloat16, torch.channels_last, False),
}


def steps(model: nn.Module, size: int, variant: tuple) -> tuple[Callable, Callable]:
    """A forward pass without gradients, and a forward and backward pass."""
    dtype, layout, autocast = variant
    model = model.to(dtype=dtype, memory_format=layout)
    x = torch.randn(BATCH, model.config.in_channels, size, size)
    x = x.to(dtype=dtype, memory_format=layout)
    t = torch.randint(0, 1000, (BATCH,))

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            out = model(x, t)
        return getattr(out, "sample", out).float().square().mean()

    def train() -> None:
        forward().backward()
        model.zero_grad()

    return torch.no_grad()(forward), train


def medians(functions: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Milliseconds of each function, run in turn after one run to warm up."""
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    diffusers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, {options.threads} threads, batch {BATCH}, milliseconds")
    print(f"{'':24}{'forward':>30}{'forward + backward':>30}")
    print(f"{'':24}{'ours':>10}{'theirs':>10}{'ratio':>10}{'ours':>10}{'theirs':>10}{'ratio':>10}")
    for name, (size, config) in SHAPES.items():
        forward, train = {}, {}
        for variant, settings in VARIANTS.items():
            ours, theirs = UNet(**config), diffusers.UNet2DModel(**config)
            ours.load_state_dict(theirs.state_dict())
            for who, model in (("ours", ours), ("theirs", theirs)):
                key = f"{variant}/{who}"
                forward[key], train[key] = steps(model, size, settings)
        print(name)
        results = medians(forward, options.rounds), medians(train, options.rounds)
        for variant in VARIANTS:
            cells = ""
            for times in results:
                ours, theirs = times[f"{variant}/ours"], times[f"{variant}/theirs"]
                cells += f"{ours:10.0f}{theirs:10.0f}{theirs / ours:10.2f}"
            print(f"  {variant:22}{cells}", flush=True)


if __name__ == "__main__":
    main()
