"""minidiff demo"""

import argparse
from dataclasses import replace
from shlex import quote
from typing import Any

from minidiff.cli.arguments import add_command, add_engine, number_in
from minidiff.names import DEMO_SAMPLES


def add_to(commands: Any) -> None:
    """Add the grammar of minidiff demo."""
    command = add_command(
        commands,
        demo,
        "train a small model of digits and draw samples, in a few minutes",
        "Trains a class-conditional diffusion model on the embedded digits, samples it with DDPM, "
        "DDIM and DPM-Solver++, prints a table, and writes pictures and the model.",
    )
    add = command.adder("run")
    add("--out", default="minidiff-demo", help="folder for the pictures and the model")
    add("--samples", type=number_in(*DEMO_SAMPLES), help="samples of each sampler that are scored, "
        "192 to 10000 (default: 500, or 200 on a slow machine)")  # fmt: skip
    add("--minutes", type=float, help="training time in minutes, instead of a number of steps")
    add_engine(add)


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
    run_demo(options.out, config, device, options.samples, options.engine)
    out = quote(options.out)
    print(
        f"\nLook at {out}/samples.png, {out}/forward.png and {out}/denoise.gif. Open "
        f"{out}/explore.html in a browser: the model runs in it. Try next:\n"
        f"  minidiff sample {out} --class 7 --num 64 --png sevens.png\n"
        f"  minidiff sample {out} --sampler ddim --steps 5 --guidance 4 --png few-steps.png\n"
        f"  minidiff sample --model mnist --class 7 --png seven.png\n"
        f"  minidiff evaluate {out} --num 1000 --seeds 1 --parts samples --guidance 1\n"
        f"  minidiff check {out}\n"
        f"  minidiff train --data digits --minutes 3 --out runs/digits"
    )
