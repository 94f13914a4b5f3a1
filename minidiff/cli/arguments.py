"""The pieces that the grammars of several commands are made of."""

import argparse
from collections.abc import Mapping
from dataclasses import Field
from typing import Any, NoReturn

from minidiff.noise import MAX_SEED
from minidiff.runtime.device import DEVICES, DTYPES
from minidiff.schedulers.core.names import SAMPLERS


class Parser(argparse.ArgumentParser):
    """argparse with one line an error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class Verbatim(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the table of presets."""


def add_command(
    commands: Any,
    name: str,
    function: Any,
    help: str,
    description: str,
    seed: Any = 0,
    dtype: Any = "auto",
) -> Parser:
    """A command with the flags that every one has; `function` is what it does."""
    command = commands.add_parser(
        name,
        help=help,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.set_defaults(command=function)
    command.add_argument("--seed", type=int, default=seed, help=f"0 to {MAX_SEED}")
    command.add_argument(
        "--device", default="auto", help=f"{', '.join(DEVICES)}; auto takes a GPU if there is one"
    )
    command.add_argument(
        "--dtype",
        default=dtype,
        help=f"of the network: auto, {', '.join(DTYPES)}; auto is bfloat16 where the hardware has "
        "it (sample: float32)",
    )
    command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return command


def add_files(command: Parser) -> None:
    """Where data are that are no folder of images, and what is made of those that are."""
    add = command.add_argument
    add("--data-dir", help="where the files of MNIST or CIFAR-10 are (or set MINIDIFF_DATA)")
    add("--download", action="store_true", help="fetch MNIST or CIFAR-10 into --data-dir first, "
        "where its files are not there; checked by size and SHA-256")  # fmt: skip
    add("--image-size", type=int, help="crop and resize the images of a folder to this side")


def add_keeping(command: Parser) -> None:
    """Where a run is kept, how often it is saved, and how it goes on."""
    add = command.add_argument
    add("--out", help="folder of the run; must be new or empty")
    add("--resume", metavar="RUN", help="go on with a run that was stopped or killed, from its "
        "newest snapshot that is whole; everything else is in its config.json")  # fmt: skip
    add("--save-every", type=int, metavar="N", help="steps between snapshots; default: every five "
        "minutes. The end, and where a signal stops the run, are saved in any case")  # fmt: skip
    add("--keep-last", type=int, metavar="N", help="how many of the last snapshots are kept, "
        "beside the one of the lowest running loss; default: 2")  # fmt: skip


def add_options(command: Parser, options: Mapping[str, Field]) -> None:
    """Flags for the fields of a config, but for those that every command has."""
    for name, option in options.items():
        if option.metadata["flag"] != "":
            _add_option(command, name, option)


def _add_option(command: Parser, name: str, option: Field) -> None:
    """A flag for a field of a config; absent from the result unless given."""
    kind, default = option.metadata["type"], option.default
    help = option.metadata["help"]
    if default is not None and kind is not bool:
        shown = ",".join(map(str, default)) if kind is tuple else default
        help += f" (default: {shown})"
    how = (
        {"action": "store_true"} if kind is bool else {"type": _channels if kind is tuple else kind}
    )
    if values := option.metadata["values"]:
        how |= {"nargs": len(values), "metavar": values}
    command.add_argument(
        flag_of(name, option),
        dest=name,
        default=argparse.SUPPRESS,
        help=help.replace("%", "%%"),
        **how,
    )


def flag_of(name: str, option: Field | None = None) -> str:
    """The flag of an argument, or of a field of a config."""
    return "--" + ((option and option.metadata["flag"]) or name.replace("_", "-"))


def add_sampling(command: Parser) -> None:
    """How a model is sampled."""
    add = command.add_argument
    add("--sampler", help=f"{', '.join(SAMPLERS)}; default: the model's own")
    add("--steps", type=int, help="steps of the sampler; default: the model's own")
    add("--guidance", type=float, help="scale of guidance, 1 for none; default: the model's own")
    add("--autoguidance", type=float, help="scale of guidance away from the model's weaker "
        "network, 1 for none; default: the model's own")  # fmt: skip
    add("--eta", type=float, help="randomness of ddim, 0 to 1")
    add("--batch-size", type=int, default=250, help="pictures in memory at once")


def _channels(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers with commas, such as 48,96; got {text!r}"
        ) from None
