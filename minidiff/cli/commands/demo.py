"""minidiff demo"""

import argparse
from dataclasses import replace
from shlex import quote
from typing import Any

from minidiff.cli.arguments import add_command


def add_to(commands: Any) -> None:
    """Add the grammar of minidiff demo."""
    command = add_command(
        commands,
        "demo",
        demo,
        "train a small model of digits and draw samples, in a few minutes",
        "Trains a class-conditional diffusion model on the embedded digits, samples it with DDPM, "
        "DDIM and DPM-Solver++, prints a table, and writes pictures and the model.",
    )
    add = command.adder("run")
    add("--out", default="minidiff-demo", help="folder for the pictures and the model")
    add("--minutes", type=float, help="training time in minutes, instead of a number of steps")


def demo(options: argparse.Namespace) -> None:
    """Run minidiff demo."""
    from minidiff.cli.run_options import dtype_name
    from minidiff.lab.demo import TRAINING_STEPS
    from minidiff.lab.demo import demo as run_demo
    from minidiff.runtime.device import pick_device
    from minidiff.training.presets import PRESETS

    device = pick_device(options.device)
    config = replace(
        PRESETS["digits"].train,
        minutes=options.minutes,
        steps=TRAINING_STEPS if options.minutes is None else None,
        seed=options.seed,
        dtype=dtype_name(options.dtype, device),
        pictures=0,
    )
    run_demo(options.out, config, device)
    out = quote(options.out)
    print(
        f"\nLook at {out}/samples.png, {out}/forward.png and {out}/denoise.gif. Try next:\n"
        f"  minidiff sample {out} --class 7 --num 64 --png sevens.png\n"
        f"  minidiff sample {out} --sampler ddim --steps 5 --guidance 4 --png few-steps.png\n"
        f"  minidiff evaluate {out} --guidance 1\n"
        f"  minidiff train --preset mnist --data-dir DIR --out runs/mnist"
    )
