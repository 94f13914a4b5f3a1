"""What of a model can be learned, by the names of `minidiff train --init MODEL --learn NAME`.

    train(config, data, start=pipe, learner=LoRA(rank=8))

An *adaptation* decides which data are trained on, which parameters change, and which files hold
the result. Its fields are the flags of the command line. This file imports no torch, so that
`--help` is printed at once; the methods import what they need.
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from minidiff.errors import InvalidArgument, one_of
from minidiff.runtime.checks import (
    Check,
    check_fields,
    option,
)

if TYPE_CHECKING:
    from minidiff.data.protocol import Data
    from minidiff.pipeline import Pipeline
    from minidiff.training.learner import Learner

TARGETS = ("attention", "cross-attention", "convolution", "linear")  # layers of a network
MAX_RANK, MAX_VECTORS, MAX_PRIOR = 4096, 16, 100_000
PRIOR = 96  # pictures of a prior; drawing them takes about a tenth of a training of three minutes


def flag(
    default: Any, help: str, check: Check, kind: type | None = None, name: str | None = None
) -> Any:
    """Return a field of an adaptation, which is also a flag of `minidiff train`.

    Args:
        default: default value.
        help: noun phrase; the command line adds the default.
        check: what the value may be.
        kind: type of the flag's value; by default that of the default.
        name: name of the flag where it is not that of the field.
    """
    about = {"group": "adapter", "type": kind or type(default), "flag": name, "values": None}
    return option(default, help, check, **about)


@dataclass(frozen=True)
class Adaptation:
    """What of a pipeline is learned. A subclass names its options as fields made by `flag`.

    Args:
        folder: folder of the run, in which `prepare` may keep what it draws; None for none.
    """

    title: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = {}  # of the TrainConfig, on the command line

    folder: Path | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def within(self, folder: Path) -> "Adaptation":
        """Return the same adaptation for a run in this folder."""
        return replace(self, folder=folder)

    def prepare(self, start: "Pipeline", data: "Data") -> tuple["Adaptation", "Data"]:
        """Return this with what the data decide, and the data that are trained on.

        Called before any work starts: what has to be drawn is drawn later, by `Data.to`.

        Raises:
            InvalidArgument: this cannot be learned by the start, or from the data.
        """
        raise NotImplementedError

    def __call__(self, pipe: "Pipeline") -> "Learner":
        """Return the learner of a float32 copy of the start."""
        raise NotImplementedError

    def save(self, pipe: "Pipeline", folder: Path) -> None:
        """Write what was learned. Raises CheckpointError.

        Args:
            pipe: what `train` returned.
            folder: folder that is replaced as a whole.
        """
        raise NotImplementedError

    def load(self, start: "Pipeline", folder: Path) -> "Pipeline":
        """Return what `train` returned, from what `save` wrote. Raises CheckpointError."""
        raise NotImplementedError


def kinds() -> dict[str, type[Adaptation]]:
    """Return the adaptations by the names of `--learn`."""
    from minidiff.adapters.controlnet import ControlNetTraining
    from minidiff.adapters.personal import CustomDiffusion, DreamBooth, LoRA, TextualInversion

    return {
        "lora": LoRA,
        "word": TextualInversion,
        "dreambooth": DreamBooth,
        "custom": CustomDiffusion,
        "controlnet": ControlNetTraining,
    }


def flags() -> dict[str, Field]:
    """Return the options of all adaptations by name."""
    every = (field for kind in reversed(kinds().values()) for field in options_of(kind))
    return {field.name: field for field in every}


def options_of(kind: type[Adaptation]) -> list[Field]:
    """Return the fields of an adaptation that are options."""
    return [field for field in fields(kind) if "help" in field.metadata]


def make(what: str, **options: Any) -> Adaptation:
    """Return an adaptation by its name.

    Args:
        what: name of `kinds`.
        options: its options.
    Raises:
        InvalidArgument: another name, or an option that it does not have or allow.
    """
    known = kinds()
    one_of("learn", what, known)
    for name in options:
        having = [n for n, kind in known.items() if name in {f.name for f in options_of(kind)}]
        if what not in having:
            raise InvalidArgument(
                f"{name} is an option of --learn {' or '.join(having) or '(none)'}, not of {what}"
            )
    lists = {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    return known[what](**options | lists)
