"""minidiff check"""

import argparse
from typing import Any

from minidiff.cli.arguments import add_command
from minidiff.cli.run_options import data_from, told_all
from minidiff.errors import TrainingError
from minidiff.runs import diffusion
from minidiff.runtime.device import pick_device


def add_to(commands: Any) -> None:
    """The grammar of minidiff check."""
    command = add_command(
        commands,
        "check",
        check,
        "find out why samples of a run are noise",
        "Looks at everything between the data and a sample: the range of the data, what the "
        "network predicts and the scheduler reads, where sampling starts, the average, the loss "
        "at every noise level, one batch learnt by heart, the sampler with a perfect network. "
        "What is wrong comes with its likely cause and a remedy, and exit code 1.",
    )
    command.add_argument("run", help="a run folder")


def check(options: argparse.Namespace) -> None:
    """minidiff check"""
    from minidiff.lab.doctor import examine

    settings = told_all(options.run, diffusion.COMMAND, "minidiff.lab.doctor.examine")
    device, bad = pick_device(options.device), []
    data = data_from(settings.data, device, settings.config.seed)
    for finding in examine(options.run, data, device):
        print(finding, flush=True)
        if finding.good is False:
            bad.append(finding.name)
    if bad:
        raise TrainingError(f"{options.run}: {', '.join(bad)} not as it should be, see above")
