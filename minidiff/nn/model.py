"""A network that knows its configuration and its folder.

A folder is `config.json` beside `diffusion_pytorch_model.safetensors`, the layout of diffusers'
models (https://huggingface.co/docs/diffusers), readable there and here. A checkpoint is not
trusted: the network is first built without memory, from a configuration within bounds, and
memory is taken only once the names and shapes in the file are the ones it wants.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from minidiff.checkpoint import (
    Config,
    atomic_folder,
    load_weights,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from minidiff.errors import CheckpointError, InvalidArgument

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLE = "diffusion_pytorch_model.bin"


class Model(nn.Module):
    """Base of the networks that are saved to folders; a subclass sets `config` and class_name."""

    class_name: str  # what diffusers calls the class, written as `_class_name`
    config: Config

    @classmethod
    def from_config(cls, config: Mapping) -> "Model":
        """Build with fresh weights; names that start with "_" are notes and not read.

        Raises:
            InvalidArgument: another class's configuration, an unknown name or a bad value.
        """
        written_by = config.get("_class_name", cls.class_name)
        if written_by != cls.class_name:
            raise InvalidArgument(f"_class_name must be {cls.class_name}, got {written_by!r}")
        return cls(**{name: value for name, value in config.items() if not name.startswith("_")})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Model":
        """Read a folder that `save_pretrained` of minidiff or diffusers wrote, in float32.

        The network comes in evaluation mode, as from diffusers; call `train()` to go on training.

        Raises:
            CheckpointError: a file is missing or damaged, or does not fit the other one.
        """
        folder = Path(folder)
        config = read_json(folder / CONFIG)
        if not (folder / WEIGHTS).exists() and (folder / PICKLE).exists():
            raise CheckpointError(
                f"{folder / PICKLE}: a pickle can run code and is not read; convert it with "
                f"diffusers: {cls.class_name}.from_pretrained(folder).save_pretrained(folder)"
            )
        try:
            with torch.device("meta"):
                model = cls.from_config(config)
        except InvalidArgument as error:
            raise CheckpointError(f"{folder / CONFIG}: {error}") from error
        tensors = read_tensors(folder / WEIGHTS)
        wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if wanted == {name: tensor.shape for name, tensor in tensors.items()}:
            model = model.to_empty(device="cpu")
        # Where they differ the network still has no memory, and this names the first difference.
        load_weights(model, tensors, folder / WEIGHTS)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder as a whole, or leave what was there.

        Raises:
            CheckpointError: it cannot be written, or holds files that this would throw away.
        """
        folder = Path(folder)
        others = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
        if foreign := sorted(others - {CONFIG, WEIGHTS}):
            raise CheckpointError(
                f"{folder}: holds {', '.join(foreign[:3])}, and saving replaces the whole folder; "
                f"choose a new or empty one"
            )
        with atomic_folder(folder) as temporary:
            write_tensors(temporary / WEIGHTS, self.state_dict())
            write_json(temporary / CONFIG, {"_class_name": self.class_name, **self.config})
