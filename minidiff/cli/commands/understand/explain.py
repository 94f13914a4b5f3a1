"""minidiff explain"""

import argparse
from typing import Any

from minidiff.cli.arguments import add_command, add_model, add_scheduler_options
from minidiff.names import BETA_SCHEDULES, SAMPLERS


def add_to(commands: Any) -> None:
    """Add the grammar of minidiff explain."""
    command = add_command(
        commands,
        explain,
        "print a sampler's equation, and its numbers in every step",
        "Prints the paper's equation, its place in the code, and its numbers. A step that ends at "
        "a wrong noise level is marked ≠. With a model, also prints how much the predicted clean "
        "image changes.",
    )
    add_model(command)
    command.set_defaults(sampler=None)  # of `open_model`, which takes no plug-ins
    add = command.adder("sampling")
    add("--sampler", dest="name", metavar="NAME", required=True, help=f"{', '.join(SAMPLERS)}, a "
        "class such as PNDM, or FILE:CLASS")  # fmt: skip
    add("--steps", type=int, default=5, help="steps of the sampler")
    add("--schedule", help=f"noise schedule without a model: {', '.join(BETA_SCHEDULES)}, flow or "
        "edm (default: squaredcos_cap_v2)")  # fmt: skip
    add_scheduler_options(command)
    add("--class", dest="label", metavar="CLASS", help="class of the sample, by name or number")
    command.adder("output")("--json", help="file for all numbers")


def explain(options: argparse.Namespace) -> None:
    """Run minidiff explain."""
    from minidiff.cli.model_options import class_of, open_model
    from minidiff.errors import InvalidArgument
    from minidiff.lab import explain as lab
    from minidiff.lab.choose import choose, like_schedule, parse_options
    from minidiff.runtime import files

    if options.json is not None:
        files.ensure_writable(options.json)
    has_model = bool(options.run or options.model)
    if options.schedule is not None and has_model:
        raise InvalidArgument("--schedule is for a call without a model, which has its own")
    if options.label is not None and not has_model:
        raise InvalidArgument("--class needs a model: give a run or --model")
    dtype = "float32" if options.dtype == "auto" else options.dtype
    pipe = open_model(options, dtype) if has_model else None
    like = pipe.scheduler if pipe else like_schedule(options.schedule or "squaredcos_cap_v2")
    chosen = choose(options.name, like, parse_options(options.option))
    moves = pipe and lab.moves_of(
        pipe, chosen, options.steps, options.seed,
        class_labels=class_of(pipe, options.label), prompt="" if pipe.prompts else None,
    )  # fmt: skip
    found = lab.explain(chosen, options.steps, moves)
    print(found)
    if options.json is not None:
        files.write_json(options.json, found.as_json())
