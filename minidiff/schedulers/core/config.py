"""The options of a scheduler: checked, kept as `config`, written and read as diffusers does.

The lowest of the three layers of a scheduler: `Configured` here, `Grid` in `grid.py` on it, and
`Scheduler` in `base.py` on that. They are one chain of plain base classes, and each uses only
those below it. Composition would not be simpler: diffusers' contract has `from_config`, `timesteps`
and `step` on one object, so each of them would have to be forwarded.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor

from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.runtime import files
from minidiff.runtime.files import Config
from minidiff.schedulers.core import options as option_rules
from minidiff.schedulers.core.quirks import READINGS, Exact

CONFIG_NAME = "scheduler_config.json"


class Configured:
    """The constructor's arguments as a config that other schedulers and diffusers can read.

    Attributes:
        config: the options, as a dict with attribute access.
        reading: the departures from the papers, if any, that `compat` selects; see `quirks.py`.
    """

    unsupported: Mapping[str, Any] = {}  # option -> the only value that can work
    choices: Mapping[str, Sequence] = {}  # option -> its values, where the family has others
    _given: set[str]  # names of the options that were given, not left at their defaults
    translated: Mapping[str, Mapping] = {}  # option -> another class' values and their equivalents

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        try:
            given = inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs).arguments
        except TypeError as error:
            options = ", ".join(cls._defaults())
            raise InvalidArgument(f"{cls.__name__} {error}; its options are {options}") from None
        self = super().__new__(cls)
        self._given = set(given)  # only these move on to another class, see `from_config`
        return self

    def _configure(self, options: dict[str, Any]) -> None:
        """Check the constructor's arguments, keep them as `config` and build the tables."""
        options = {k: v for k, v in options.items() if k not in ("self", "__class__")}
        for name, value in options.items():
            option_rules.check(type(self).__name__, name, value, self.choices, self.unsupported)
        option_rules.check_flow(options)
        config = Config(options, _class_name=type(self).__name__)
        if isinstance(config.get("trained_betas"), np.ndarray | Tensor):
            config["trained_betas"] = config["trained_betas"].tolist()
        implied = [name for name in options if name not in self._given]
        if implied:
            config["_use_default_values"] = implied
        self._internal_dict = config  # diffusers' pipelines assign to this name
        self._use_reading(READINGS[config.compat])

    def _use_reading(self, reading: Exact) -> None:
        """Build the tables under this reading; a layer above builds them."""
        self.reading = reading

    @classmethod
    def has_option(cls, name: str) -> bool:
        """Return whether the constructor takes an option of this name."""
        return name in cls._defaults()

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        signature = inspect.signature(cls.__init__).parameters
        return {name: p.default for name, p in signature.items() if name != "self"}

    @property
    def config(self) -> Config:
        """The options."""
        return self._internal_dict

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """Build from the config of any scheduler of the family, minidiff's or diffusers'.

        Options that this class lacks but another scheduler of the family has are kept for the next
        class that is made from this one's config. A value that was only the other class's default
        is left out; unknown names are refused. A value of `solver_type` or `algorithm_type` that
        only the other class has is translated to this class' default, as in diffusers
        (`translated`).

        Args:
            config: options by name, such as `scheduler.config` or the content of a file.
            overrides: options that replace the config's.
        Raises:
            InvalidArgument: an unknown option, or a value that this class does not support.
        """
        if not isinstance(config, Mapping):
            raise InvalidArgument(f"config must be a dict of options, got {config!r}")
        implied, carried = config.get("_use_default_values", ()), config.get("_carried", {})
        if not isinstance(implied, list | tuple) or not isinstance(carried, Mapping):
            raise InvalidArgument("_use_default_values must be a list and _carried a dict")
        given = {k: v for k, v in config.items() if not k.startswith("_") and k not in implied}
        options = option_rules.modern({**carried, **given}) | overrides
        own = cls._defaults()
        for name in sorted(options.keys() - own.keys() - option_rules.FAMILY):
            raise InvalidArgument(
                f"{name!r} is not an option of {cls.__name__}; it has {', '.join(own)}"
            )
        for name, values in cls.translated.items():
            if isinstance(options.get(name), str) and name not in overrides:
                options[name] = values.get(options[name], options[name])
        scheduler = cls(**{name: value for name, value in options.items() if name in own})
        carried = {name: value for name, value in options.items() if name not in own}
        if carried:
            scheduler.config["_carried"] = carried
        return scheduler

    @classmethod
    def load_config(cls, folder: str | Path, subfolder: str | None = None) -> dict[str, Any]:
        """Read the options in `scheduler_config.json`, for `from_config`. Raises CheckpointError.

        Args:
            folder, subfolder: folder that holds the file; a pipeline has it in "scheduler".
        """
        content = files.read_json(files.existing_folder(folder) / (subfolder or "") / CONFIG_NAME)
        return {"compat": "diffusers"} | content  # a config without it is diffusers' own

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, subfolder: str | None = None, **overrides: Any
    ) -> Self:
        """Build from `scheduler_config.json`, written by minidiff or by diffusers.

        Args:
            folder, subfolder: folder that holds the file; a pipeline has it in "scheduler".
            overrides: options that replace the file's.
        Raises:
            CheckpointError: the file is missing, not a config, or that of a class whose noise
                levels this one does not have.
            InvalidArgument: an option that this class does not support.
        """
        config = cls.load_config(folder, subfolder)
        writer = str(config.get("_class_name", cls.__name__))
        there, here = _levels_of(writer), _levels_of(*(base.__name__ for base in cls.__mro__))
        if there != here and not (there == "FlowMatch" and overrides.get("use_flow_sigmas")):
            file = Path(folder, subfolder or "") / CONFIG_NAME
            lacks = f"whose noise levels {cls.__name__} does not have"
            raise CheckpointError(f"{file}: written by {writer}, {lacks}")
        return cls.from_config(config, **overrides)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `scheduler_config.json`, which diffusers reads as well. Raises CheckpointError."""
        content = {**self.config.get("_carried", {}), **self.config}
        content = {k: v for k, v in content.items() if k not in ("_carried", "_use_default_values")}
        if content["compat"] == "diffusers":
            del content["compat"]  # `load_config` puts it back
        files.write_json(Path(folder) / CONFIG_NAME, content)

    save_config = save_pretrained  # a scheduler has nothing else to save

    def __repr__(self) -> str:
        changed = ", ".join(
            f"{k}={v!r}"
            for k, v in self.config.items()
            if not k.startswith("_") and not option_rules.same(v, self._defaults().get(k))
        )
        return f"{type(self).__name__}({changed})"


def _levels_of(*names: str) -> str:
    """Return the family of noise levels of a class with these bases; "" for that of β."""
    return next((kind for kind in ("EDM", "FlowMatch") for n in names if n.startswith(kind)), "")
