"""A network that knows its configuration and its folder.

A folder is `config.json` beside the weights, the layout of diffusers' and transformers' models
(https://huggingface.co/docs/diffusers), readable there and here. A checkpoint is not trusted: what
the configuration would need is compared with what the headers of the files hold, first by counting
and then, on a network built without memory, name by name; only then is memory taken.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from minidiff.errors import CheckpointError, InvalidArgument, one_of
from minidiff.runtime.files import Config, atomic_folder, read_json, write_json
from minidiff.runtime.tensors import (
    DTYPES,
    Stored,
    find_weights,
    headers,
    load_weights,
    own_files,
    write_weights,
)

CONFIG = "config.json"


class Model(nn.Module):
    """Base of the networks that are saved to folders; a subclass sets `config`.

    Attributes:
        config: all options, as a dict with attribute access.
        class_name: what the network is called in the library whose folders it reads.
        class_names: all that it can be called.
        weights_name: of the file, without what follows the first point.
    """

    class_name: str
    class_names: ClassVar[tuple[str, ...]]
    weights_name: ClassVar[str] = "diffusion_pytorch_model"
    config: Config

    @classmethod
    def from_config(cls, config: Mapping) -> "Model":
        """Build with fresh weights; names that start with "_" are notes and not read.

        Raises:
            InvalidArgument: another class's configuration, an unknown name or a bad value.
        """
        one_of("_class_name", config.get("_class_name", cls.class_names[0]), cls.class_names)
        return cls(**{name: value for name, value in config.items() if not name.startswith("_")})

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        subfolder: str | None = None,
        *,
        torch_dtype: torch.dtype = torch.float32,
        variant: str | None = None,
    ) -> "Model":
        """Read a folder that `save_pretrained` of minidiff, diffusers or transformers wrote.

        The network comes in evaluation mode, as from diffusers; call `train()` to go on training.

        Args:
            folder, subfolder: of the network; the folder of a pipeline has it in "unet", for one.
            torch_dtype: of the weights, whatever the file's: float32, float64, float16, bfloat16.
            variant: "fp16" for the files `….fp16.safetensors`.
        Raises:
            CheckpointError: a file is missing or damaged, or does not fit the others.
            InvalidArgument: another dtype.
        """
        if torch_dtype not in DTYPES:
            raise InvalidArgument(f"torch_dtype must be one of {DTYPES}, got {torch_dtype!r}")
        folder = Path(folder, subfolder or "")
        stored = cls.wanted(headers(find_weights(folder, cls.weights_name, variant)))
        config = cls.read_config(folder)
        try:
            if (least := cls.least_tensors(config)) > len(stored):
                raise CheckpointError(
                    f"{folder / CONFIG}: needs at least {least} tensors, there are {len(stored)}"
                )
            with torch.device("meta"):
                model = cls.from_config(config).to(torch_dtype)
        except InvalidArgument as error:
            raise CheckpointError(f"{folder / CONFIG}: {error}") from error
        load_weights(model, stored)
        return model.eval()

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        max_shard_size: int | str = "10GB",
        variant: str | None = None,
    ) -> None:
        """Write the folder as a whole, or leave what was there.

        Args:
            max_shard_size: more bytes than this are written as several files and their index.
            variant: "fp16" calls them `….fp16.safetensors`.
        Raises:
            CheckpointError: it cannot be written, or holds files that this would throw away.
            InvalidArgument: max_shard_size or variant is not what it can be.
        """
        folder = Path(folder)
        others = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
        own = own_files(self.weights_name, variant)
        if foreign := sorted(n for n in others - {CONFIG} if not own.fullmatch(n)):
            raise CheckpointError(
                f"{folder}: holds {', '.join(foreign[:3])}, and saving replaces the whole folder; "
                f"choose a new or empty one"
            )
        with atomic_folder(folder) as temporary:
            state = self.state_dict()
            write_weights(temporary, self.weights_name, state, max_shard_size, variant)
            write_json(temporary / CONFIG, self.written_config())

    # --- where libraries and generations of them differ --------------------------------------

    @classmethod
    def read_config(cls, folder: Path) -> dict:
        """What config.json says, in the words of `from_config`. Raises CheckpointError."""
        return read_json(folder / CONFIG)

    def written_config(self) -> dict:
        """What config.json is to say."""
        return {"_class_name": self.class_name, **self.config}

    @classmethod
    def wanted(cls, stored: Mapping[str, Stored]) -> dict[str, Stored]:
        """The tensors of a file under the names that they have here, without what is none."""
        return dict(stored)

    @classmethod
    def least_tensors(cls, config: Mapping) -> int:
        """How many tensors a network of this configuration has at least. Raises InvalidArgument."""
        return 0


def options_of(cls: type, given: Mapping) -> Any:
    """The options of a network, a dataclass, from names and values.

    Raises:
        InvalidArgument: a name that is none of its fields, or as the class itself.
    """
    known = [field.name for field in fields(cls)]
    if unknown := sorted(given.keys() - set(known)):
        raise InvalidArgument(f"{unknown[0]} must be one of {', '.join(known)}")
    return cls(**given)
