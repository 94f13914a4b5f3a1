"""minidiff check"""

import argparse
from pathlib import Path
from typing import Any

from minidiff.cli.arguments import add_command
from minidiff.errors import InvalidArgument, TrainingError
from minidiff.shipped import MODELS


def add_to(commands: Any) -> None:
    """Add the grammar of minidiff check."""
    command = add_command(
        commands,
        check,
        "find out why the samples of a run are noise",
        "Checks everything between the data and a sample: the range of the data, the prediction "
        "type, the level where sampling starts, the averaged weights, the loss at each noise "
        "level, overfitting of one batch, and the sampler with a perfect network. A failed check "
        "is printed with its likely cause and a remedy; the exit code is then 1.",
    )
    command.add_argument("run", help="folder of a run")


def check(options: argparse.Namespace) -> None:
    """Run minidiff check."""
    from minidiff.cli.run_options import load_source, settings_with_data
    from minidiff.lab.doctor import FIELD_GUIDE, examine
    from minidiff.runs import diffusion
    from minidiff.runtime.device import pick_device

    if options.run in MODELS and not Path(options.run).exists():
        raise InvalidArgument(
            f"check is for the folder of a run, with its data; {options.run} is a model that "
            f"ships with minidiff: see minidiff evaluate {options.run}"
        )
    settings = settings_with_data(
        options.run, "minidiff.lab.doctor.examine", diffusion.COMMAND, "demo"
    )
    device, failed = pick_device(options.device), []
    data = load_source(settings.data, device, settings.config.seed)
    for finding in examine(options.run, data, device):
        print(finding, flush=True)
        if finding.good is False:
            failed.append(finding.name)
    print(f"samples by their look, with causes and remedies: {FIELD_GUIDE}")
    if failed:
        raise TrainingError(f"{options.run}: failed checks: {', '.join(failed)}; see above")
