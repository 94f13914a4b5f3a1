"""The base of all networks: a configuration, and a folder to save to and load from.

A folder is `config.json` beside the weights, the layout of diffusers' and transformers' models
(https://huggingface.co/docs/diffusers), readable there and here. A checkpoint is not trusted. The
tensors that the configuration needs are compared with the headers of the files, first by number
and then by name and shape, on a network built without memory. Only then is memory allocated.
"""

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minidiff.errors import CheckpointError, InvalidArgument, one_of
from minidiff.runtime.files import (
    Config,
    atomic_folder,
    existing_folder,
    read_json,
    user_path,
    write_json,
)
from minidiff.runtime.shapes import warn_unless_finite
from minidiff.runtime.tensors import (
    DTYPES,
    Stored,
    find_weights,
    load_weights,
    own_files,
    read_headers,
    write_weights,
)

CONFIG = "config.json"
# What diffusers' EMAModel writes into the config.json of an averaged network, about the average.
EMA_NOTES = (
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step",
    "use_ema_warmup",
)  # fmt: skip


class Model(nn.Module):
    """Base of the networks that are saved to folders; a subclass sets `config`.

    Attributes:
        config: all options, as a dict with attribute access.
        class_name: class of the network in the library whose folders it reads.
        class_names: all classes of that library that this network covers.
        weights_name: name of the weights file, up to the first dot.
    """

    class_name: str
    class_names: ClassVar[tuple[str, ...]]
    weights_name: ClassVar[str] = "diffusion_pytorch_model"
    config: Config

    @classmethod
    def from_config(cls, config: Mapping) -> "Model":
        """Build with fresh weights; names that start with "_" are notes and ignored.

        Raises:
            InvalidArgument: a configuration for a different class, an unknown name or a bad value.
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

        The network is returned in evaluation mode, as by diffusers; call `train()` to train it.

        Args:
            folder: folder of the network, or of a pipeline.
            subfolder: name of the network's folder in a pipeline, such as "unet".
            torch_dtype: dtype to convert the weights to: float32, float64, float16 or bfloat16.
            variant: "fp16" for the files `….fp16.safetensors`.
        Raises:
            CheckpointError: a file is missing or damaged, or does not fit the others.
            InvalidArgument: another dtype.
        """
        if torch_dtype not in DTYPES:
            raise InvalidArgument(f"torch_dtype must be one of {DTYPES}, got {torch_dtype!r}")
        folder = existing_folder(folder) / (subfolder or "")
        stored = cls.translate_names(read_headers(find_weights(folder, cls.weights_name, variant)))
        config = cls.read_config(folder)
        try:
            if (least := cls.min_tensors(config)) > len(stored):
                raise CheckpointError(
                    f"{folder / CONFIG}: needs at least {least} tensors, there are {len(stored)}"
                )
            with torch.device("meta"):
                model = cls.from_config(config).to(torch_dtype)
        except InvalidArgument as error:
            raise CheckpointError(f"{folder / CONFIG}: {error}") from error
        load_weights(model, stored)
        return model.eval()

    @classmethod
    def check_replaceable(cls, folder: Path, variant: str | None = None) -> None:
        """Refuse a folder whose replacement by a network would delete files of other people.

        Raises:
            CheckpointError: names files that are not those of such a network.
            InvalidArgument: a bad variant.
        """
        others = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
        own = own_files(cls.weights_name, variant)
        if foreign := sorted(n for n in others - {CONFIG} if not own.fullmatch(n)):
            raise CheckpointError(
                f"{folder}: holds {', '.join(foreign[:3])}, and saving replaces the whole folder; "
                f"choose a new or empty one"
            )

    def save_pretrained(
        self, folder: str | Path, *, max_shard_size: int | str = "10GB", variant: str | None = None
    ) -> None:
        """Write the folder as a whole, or leave its old content.

        Args:
            folder: new or empty folder, or one that holds such a network.
            max_shard_size: bytes per file; more are written as several files and their index.
            variant: "fp16" for the files `….fp16.safetensors`.
        Raises:
            CheckpointError: the folder cannot be written, or holds files that would be lost.
            InvalidArgument: a bad max_shard_size or variant.
        """
        folder = user_path(folder)
        self.check_replaceable(folder, variant)
        with atomic_folder(folder) as temporary:
            state = self.state_dict()
            write_weights(temporary, self.weights_name, state, max_shard_size, variant)
            write_json(temporary / CONFIG, self.written_config())

    def check_inputs(self, **inputs: object) -> None:
        """Refuse tensors of another dtype than the weights', and warn of NaN and infinity.

        Autocast converts all but float64. What is no tensor of floating point is left to others.

        Args:
            inputs: inputs of the network by name.
        Raises:
            InvalidArgument: names the input.
        """
        dtype = next(self.parameters()).dtype
        for name, x in inputs.items():
            if not isinstance(x, Tensor) or not x.is_floating_point():
                continue
            is_cast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
            if x.dtype != dtype and not is_cast:
                raise InvalidArgument(
                    f"{name} must have the dtype of the network, {dtype}, got {x.dtype}"
                )
            warn_unless_finite(name, x)

    # --- differences between libraries and their versions ------------------------------------

    @classmethod
    def read_config(cls, folder: Path) -> dict:
        """Return the content of config.json as `from_config` takes it. Raises CheckpointError."""
        config = read_json(folder / CONFIG)
        return {name: value for name, value in config.items() if name not in EMA_NOTES}

    def written_config(self) -> dict:
        """Return the content of config.json."""
        return {"_class_name": self.class_name, **self.config}

    @classmethod
    def translate_names(cls, stored: Mapping[str, Stored]) -> dict[str, Stored]:
        """Return the tensors of a file under the names of this class, without unused ones."""
        return dict(stored)

    @classmethod
    def min_tensors(cls, config: Mapping) -> int:
        """Return a lower bound on the tensors of this configuration. Raises InvalidArgument."""
        return 0


class DenoisingNetwork(Model):
    """Base of the networks that a pipeline samples, with what the pipeline needs to know.

    A network is called as network(x, t, **condition) and returns a prediction like x. Its config
    has in_channels, out_channels and sample_size.

    Attributes:
        part: name of the network's folder in a pipeline of diffusers.
        text_channels: channels of a token of the text that it takes; None for no text.
    """

    part: ClassVar[str] = "unet"
    text_channels: int | None

    @property
    def num_labels(self) -> int:
        """Number of class labels, "no class" included; 0 for a network without classes."""
        return self.config.get("num_class_embeds") or 0


def describe_options(network: type, *configs: type) -> None:
    """Give the constructor of a network the signature of its options, as Jupyter shows it.

    Args:
        network: class whose constructor takes `**config`.
        configs: dataclasses of the options; of options of one name the first one's default.
    """
    options = {field.name: field for config in configs[::-1] for field in fields(config)}
    kind, none = inspect.Parameter, inspect.Parameter.empty
    parameters = [kind("self", kind.POSITIONAL_OR_KEYWORD)]
    for name, field in options.items():
        default = none if field.default is MISSING else field.default
        parameters.append(kind(name, kind.KEYWORD_ONLY, annotation=field.type, default=default))
    network.__init__.__signature__ = inspect.Signature(parameters)


def parse_options(cls: type, given: Mapping, network: str) -> Any:
    """Return the options of a network, a dataclass, from names and values.

    `network` is the class of the network, for messages.

    Raises:
        InvalidArgument: a name that is not a field of the class, or a value that it refuses.
    """
    known = [field.name for field in fields(cls)]
    if unknown := sorted(given.keys() - set(known)):
        raise InvalidArgument(
            f"{unknown[0]!r} is not an option of {network}, which has {', '.join(known)}"
        )
    return cls(**given)
