"""minidiff compare"""

import argparse
from typing import Any

from minidiff import shipped
from minidiff.cli.arguments import add_command, listed_names, listed_numbers
from minidiff.names import DATA_VARIABLE, SAMPLERS


def add_to(commands: Any) -> None:
    """Add the grammar of minidiff compare."""
    command = add_command(
        commands,
        compare,
        "compare samplers, also your own, on one model",
        "Samples a model from the same noise with every sampler. Prints each one's measured order, "
        "and its distance from the result of many more steps, without data. Writes a picture.",
    )
    command.set_defaults(model=None, sampler=None)  # of `open_model`
    command.add_argument("run", metavar="MODEL", help=f"{', '.join(shipped.MODELS)}, or the folder "
        "of a run or of a model")  # fmt: skip
    add = command.adder("sampling")
    add("--samplers", type=listed_names, default=("ddim", "dpm++", "unipc"), metavar="NAMES",
        help=f"comma-separated, of {', '.join(SAMPLERS)} (default: ddim,dpm++,unipc)")  # fmt: skip
    add("--plugin", metavar="FILE:CLASS", help="your own sampler, a class in a Python file")
    add("--steps", type=listed_numbers, default=(4, 10, 20), help="with commas (default: 4,10,20)")
    add("--num", type=int, help="images per sampler (default: 30, with --data 500)")
    add("--guidance", type=float, help="guidance scale, 1 for none (default: the model's)")
    add = command.adder("data")
    add("--data", help="name of the data to score samples against, such as digits or mnist")
    add("--data-dir", help=f"folder with the published files of the data (or set {DATA_VARIABLE})")
    add = command.adder("output")
    add("--png", default="compare.png", help="file for the picture")
    add("--json", help="file for all figures")


def compare(options: argparse.Namespace) -> None:
    """Run minidiff compare."""
    from minidiff.cli.model_options import check_files, open_model
    from minidiff.images import plot
    from minidiff.lab.compare import compare as compare_samplers
    from minidiff.metrics import Evaluator
    from minidiff.runtime import files

    check_files(options, "png", "json")
    pipe = open_model(options, "float32" if options.dtype == "auto" else options.dtype)
    scores = options.data and Evaluator(options.data, options.data_dir, pipe.device)
    found = compare_samplers(
        pipe, [*options.samplers, *filter(None, [options.plugin])], options.steps,
        num_images=options.num, seed=options.seed, evaluator=scores,
        guidance_scale=options.guidance, prompt="" if pipe.prompts else None,
    )  # fmt: skip
    print(found)
    with files.announced(options.png):
        plot.save(found.picture(), options.png)
    if options.json is not None:
        files.write_json(options.json, found.as_json())
