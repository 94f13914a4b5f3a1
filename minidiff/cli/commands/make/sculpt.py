"""minidiff sculpt"""

import argparse
from typing import Any

from minidiff.cli.arguments import add_command, add_model

TURN = range(0, 360, 15)  # degrees of the animation's frames


def add_to(commands: Any) -> None:
    """Add the grammar of minidiff sculpt."""
    command = add_command(
        commands,
        sculpt,
        "make a volume that is one digit from the front and another from the side",
        "Changes a small volume by score distillation until a model of images reads its front and "
        "its side view as the requested classes. The model was trained on images only. Writes both "
        "views and an animation of the turning volume. Takes seconds and trains no network.",
    )
    add_model(command)
    command.set_defaults(sampler=None)
    add = command.adder("sampling")
    add("--front", metavar="CLASS", required=True, help="class of the front view")
    add("--side", metavar="CLASS", required=True, help="class of the side view")
    add("--steps", type=int, default=150, help="gradient steps")
    add("--guidance", type=float, default=6.0, help="guidance scale, which must be strong here")
    add = command.adder("output")
    add("--png", default="views.png", help="file for the two views")
    add("--gif", help="file for an animation of the volume turning")


def sculpt(options: argparse.Namespace) -> None:
    """Run minidiff sculpt."""
    import torch

    from minidiff.cli.model_options import check_files, class_of, open_model
    from minidiff.images import plot
    from minidiff.lab.plot import save_gif
    from minidiff.modalities import sculpture
    from minidiff.runtime.files import announced

    check_files(options, "png", "gif")
    pipe = open_model(options, "float32")
    made = sculpture.sculpt(
        pipe,
        class_of(pipe, options.front),
        class_of(pipe, options.side),
        steps=options.steps,
        guidance_scale=options.guidance,
        seed=options.seed,
    )
    with announced(options.png):
        plot.save(plot.grid(plot.as_array(made.views()), 2, scale=4), options.png)
    if options.gif:
        frames = plot.as_array(torch.cat([made.turned(degrees) for degrees in TURN]))
        with announced(options.gif):
            save_gif([plot.grid(frame[None], 1, scale=4) for frame in frames], options.gif)
