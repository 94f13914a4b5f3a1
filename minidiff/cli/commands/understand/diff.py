"""minidiff diff"""

import argparse
from typing import Any

from minidiff.cli.arguments import add_command, add_scheduler_options


def add_to(commands: Any) -> None:
    """Add the grammar of minidiff diff."""
    command = add_command(
        commands,
        diff,
        "find where and why a scheduler's samples differ from diffusers'",
        "Samples the same noise with a scheduler of diffusers, and with minidiff's by "
        "compat='diffusers' and compat='exact'. Prints the first step at which 'exact' diverges "
        "and the departures that explain it (schedulers/QUIRKS.md). The exit code is then 1.",
    )
    command.add_argument("scheduler", help="scheduler class of diffusers, such as DDIM")
    add = command.adder("sampling")
    add("--steps", type=int, default=20, help="steps of the scheduler")
    add_scheduler_options(command)
    add("--tolerance", type=float, help="difference, relative to max(1, |x|), above which two "
        "samples diverge (default: 1e-6, with --dtype float32 2e-5)")  # fmt: skip
    command.adder("output")("--json", help="file for all steps and departures")


def diff(options: argparse.Namespace) -> None:
    """Run minidiff diff."""
    from minidiff.errors import MinidiffError, one_of
    from minidiff.lab.choose import parse_options
    from minidiff.lab.diff import diff as compare_with_diffusers
    from minidiff.runtime import files

    one_of("--device", options.device, ("auto", "cpu"))
    if options.json is not None:
        files.ensure_writable(options.json)
    found = compare_with_diffusers(
        options.scheduler, options.steps, parse_options(options.option),
        seed=options.seed, tolerance=options.tolerance,
        dtype="float64" if options.dtype == "auto" else options.dtype,
    )  # fmt: skip
    print(found)
    if options.json is not None:
        files.write_json(options.json, found.as_json())
    if found.first is not None:
        raise MinidiffError(
            f"{found.scheduler} diverges from diffusers in step {found.first + 1}: {found.summary}"
        )
