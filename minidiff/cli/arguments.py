"""The flags that several commands share, and the form of `--help`.

Flags stand in groups, which `--help` prints in the order of `GROUPS`. A default is named once: by
the help text where it has the word, otherwise by the formatter.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import Field
from typing import Any, NoReturn

from minidiff.errors import suggestion
from minidiff.names import DEVICES, DTYPE_NAMES, ENGINES, LOGS, MAX_SEED, SAMPLERS
from minidiff.shipped import MODELS

GROUPS = (
    "model", "adapter", "data", "run", "budget", "optimisation", "objective", "network",
    "measurement", "image", "sampling", "output",
)  # fmt: skip


class Formatter(argparse.HelpFormatter):
    """Help with metavars that match the flags, and every default named once."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return action.option_strings[0].lstrip("-").replace("-", "_").upper()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        if action.help and not nothing and "default" not in action.help:
            return f"{action.help} (default: %(default)s)"
        return action.help


class Verbatim(Formatter, argparse.RawDescriptionHelpFormatter):
    """Help whose description and epilog keep their lines."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose flags stand in named groups."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **options)
        self._titled = {title: self.add_argument_group(title) for title in GROUPS}

    def adder(self, group: str) -> Callable[..., argparse.Action]:
        """Return the method that adds a flag to one of the `GROUPS`."""
        return self._titled[group].add_argument

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known, hint = ", ".join(action.choices), suggestion(value, action.choices)
            text = f"must be one of {known}; got {value!r}{hint}"
            raise argparse.ArgumentError(action, text)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse what is unknown here: the root parser would name its own help."""
        options, unknown = super().parse_known_args(args, namespace)
        for action in self._get_positional_actions():
            # argparse leaves all of them out that do not stand beside the first.
            missing = action.nargs == "?" and getattr(options, action.dest) is None
            if missing and unknown and not unknown[0].startswith("-"):
                setattr(options, action.dest, unknown.pop(0))
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"unknown: {' '.join(unknown)}{suggestion(unknown[0].split('=')[0], known)}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add_command(
    commands: Any,
    function: Callable[[argparse.Namespace], None],
    help: str,
    description: str,
    seed: Any = 0,
    dtype: Any = "auto",
) -> Parser:
    """Return a new command with the flags that all commands have.

    Args:
        commands: subparsers of the root parser.
        function: implementation of the command, called with the parsed options; its name is the
            word on the command line.
        help: line in `minidiff --help`.
        description: paragraph in the command's own `--help`.
        seed, dtype: values without the flags; `argparse.SUPPRESS` for none.
    """
    name = function.__name__.replace("_", "-")
    command = commands.add_parser(name, help=help, description=description)
    command.set_defaults(command=function)
    add = command.adder("run")
    add("--seed", type=int, default=seed,
        help=f"seed of all random numbers, 0 to {MAX_SEED} (default: 0)")  # fmt: skip
    add("--device", default="auto", help=f"{', '.join(DEVICES)}; auto is a GPU where there is one")
    add("--threads", type=int, metavar="N", help="threads of the CPU (default: the faster of one "
        "and all)")  # fmt: skip
    add("--dtype", default=dtype, help="number type of the network: auto, "
        f"{', '.join(DTYPE_NAMES)}; auto is bfloat16 if the hardware has it, but "
        "float32 for sample (default: auto)",
    )  # fmt: skip
    add("--debug", action="store_true", help="print the traceback of an error")
    return command


def add_data_files(command: Parser) -> None:
    """Add the flags for files of published data sets, and for the size of images of a folder."""
    add = command.adder("data")
    add("--data-dir", help="folder with the files of MNIST or CIFAR-10 (or set MINIDIFF_DATA)")
    add("--download", action="store_true", help="download missing files of MNIST or CIFAR-10 "
        "into --data-dir, checked by size and SHA-256")  # fmt: skip
    add("--image-size", type=int, help="side that the images of a folder are cropped and resized "
        "to, in pixels")  # fmt: skip
    add("--caption", metavar="TEXT", help="caption of all images of a folder without a "
        "metadata.jsonl")  # fmt: skip


def add_run_folder(command: Parser) -> None:
    """Add the flags for a run's folder, its snapshots, and its resumption."""
    add = command.adder("run")
    add("--out", help="folder of the run, new or empty")
    add("--resume", metavar="RUN", help="run to continue from its newest intact snapshot; its "
        "config.json has the options. --minutes or --steps lengthen it (+10 is added to its "
        "budget). If files have moved, --data, --data-dir and others give their place")  # fmt: skip
    add("--save-every", type=int, metavar="N", help="steps between snapshots (default: every five "
        "minutes); the end, and a stop by a signal, are always saved")  # fmt: skip
    add("--log", choices=LOGS, help="further log, in RUN/tensorboard/: loss, learning rate, "
        "images per second, and grids of samples")  # fmt: skip
    add("--keep-last", type=int, metavar="N", help="number of latest snapshots to keep; the one "
        "with the lowest running loss is kept too (default: 2)")  # fmt: skip


def add_options(command: Parser, options: Mapping[str, Field]) -> None:
    """Add flags for the fields of a config, except those that every command has."""
    for name, option in options.items():
        if option.metadata["flag"] != "":
            _add_option(command, name, option)


def _add_option(command: Parser, name: str, option: Field) -> None:
    """Add a flag for a field of a config; without the flag the result has no such attribute."""
    kind, default = option.metadata["type"], option.default
    help = option.metadata["help"]
    if default is not None and kind is not bool:
        value = ",".join(map(str, default)) if kind is tuple else default
        help += f" (default: {value})"
    if name in ("minutes", "steps"):
        kind = _budget(kind)
    numbers = isinstance(default, tuple) and isinstance(default[0], int)
    read = (listed_numbers if numbers else listed_names) if kind is tuple else kind
    options: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": read}
    if values := option.metadata["values"]:
        options |= {"nargs": len(values), "metavar": values}
    command.adder(option.metadata["group"])(
        flag_of(name, option),
        dest=name,
        default=argparse.SUPPRESS,
        help=help.replace("%", "%%"),
        **options,
    )


def flag_of(name: str, option: Field | None = None) -> str:
    """Return the flag of an argument, or of a field of a config."""
    return "--" + ((option and option.metadata["flag"]) or name.replace("_", "-"))


def add_model(command: Parser) -> None:
    """Add the argument for a run's folder, and the flag for a model that ships with minidiff."""
    command.add_argument(
        "run", nargs="?", help="folder of a run or of a model; omitted with --model"
    )
    add = command.adder("model")
    add("--model", choices=list(MODELS), help="a model that ships with minidiff")
    add(
        "--adapter",
        action="append",
        metavar="PATH[:SCALE]",
        help="run of train --learn, or "
        "LoRA or new words in diffusers' format, with a factor (default: 1); may be repeated",
    )


def add_sampling(command: Parser) -> None:
    """Add the flags for the sampler of a model and for guidance."""
    add = command.adder("sampling")
    add("--sampler", help=f"{', '.join(SAMPLERS)} (default: the model's)")
    add("--steps", type=int, help="steps of the sampler (default: the model's)")
    add("--guidance", type=float, help="guidance scale, 1 for none (default: the model's)")
    add("--autoguidance", type=float, help="scale of guidance by the model's guidance network, 1 "
        "for none (default: the model's)")  # fmt: skip
    add("--eta", type=float, help="randomness of the sampler ddim, 0 to 1")
    add("--batch-size", type=int, default=250, help="images in memory at once")
    add_engine(add, "torch; for an exported folder its graphs")


def add_engine(add: Callable[..., Any], default: str = "torch") -> None:
    """Add the flag for an inference engine."""
    add("--engine", choices=ENGINES, metavar="ENGINE", help="what evaluates the network: "
        f"{', '.join(ENGINES)} (default: {default})")  # fmt: skip


def _budget(kind: type) -> Callable[[str], Any]:
    """Return a reader of numbers that leaves what is added to a run's budget, +10, a text."""

    def read(text: str) -> Any:
        return text if text.startswith("+") else kind(text)

    read.__name__ = kind.__name__  # which argparse's errors show
    return read


def add_scheduler_options(command: Parser) -> None:
    """Add the flag for options of a scheduler and of its `step`."""
    command.adder("sampling")("--option", action="append", default=[], metavar="NAME=VALUE",
        help="option of the scheduler or of its step (eta, s_churn); may be repeated")  # fmt: skip


def listed_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as 48,96."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers with commas, such as 48,96; got {text!r}"
        ) from None


def number_in(low: int, high: int) -> Callable[[str], int]:
    """Return the type of a flag whose value is a whole number in low..high."""

    def read(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"must be in {low}..{high}, got {text}")
        return int(text)

    return read


def listed_names(text: str) -> tuple[str, ...]:
    """Return the names of a list with commas."""
    return tuple(text.split(","))
