"""Tensors on disk: untrusted safetensors files, whole or in shards.

A file begins with a header of the names, types and shapes of its tensors. The header is checked
before memory is allocated for the weights; then the tensors are read one after the other. Files
are written as a whole or not at all, see `runtime.files`. Nothing reads or writes pickles: the
format is safetensors (https://github.com/huggingface/safetensors), in the file layout of diffusers
and transformers.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minidiff.errors import CheckpointError, InvalidArgument, whole_number
from minidiff.runtime.files import atomic_file, read_json, write_json, wrong_content

SUFFIX = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_INDEX_BYTES = 1 << 24  # an index names every tensor
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # allowed for weights
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


class Stored(NamedTuple):
    """A tensor's entry in a header: its file and name there, shape, and type ("F32", "I64")."""

    file: Path
    name: str
    shape: tuple[int, ...]
    type: str


# ------------------------------------------------------------------------------------ reading


def find_weights(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """Find the weights of a network: one file, or the shards that an index names.

    Args:
        folder: folder of the network.
        stem: start of `stem.safetensors` and of `stem.safetensors.index.json`.
        variant: "fp16" for `stem.fp16.safetensors` or `stem.safetensors.index.fp16.json`.
    Raises:
        CheckpointError: no weights, or only a pickle; an index that is damaged or that names files
            outside the folder.
    """
    mark = "" if variant is None else f".{_plain('variant', variant)}"
    whole = folder / f"{stem}{mark}{SUFFIX}"
    indices = [folder / f"{stem}{SUFFIX}.index{mark}.json"]
    if variant is not None:  # name in older versions of diffusers
        indices.append(folder / f"{stem}{SUFFIX}{mark}.index.json")
    for index in indices:
        if index.is_file():
            return _shards(index)
    if whole.is_file():
        return [whole]
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    present = sorted(file.name for file in folder.iterdir())
    pickles = [name for name in present if name.endswith((*PICKLES, ".bin.index.json"))]
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]}: a pickle can run code and is not read; convert it with the "
            "library that wrote it: from_pretrained(folder).save_pretrained(folder)"
        )
    others = [name for name in present if name.endswith(SUFFIX)]
    there = f"; there is {', '.join(others)}" if others else ""
    raise CheckpointError(f"{whole}: no such file{there}")


def _shards(index: Path) -> list[Path]:
    """Return the files of an index, checking that they lie beside it and hold its tensors."""
    places = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: has no weight_map of tensors to files")
    for name in places.values():
        plain = isinstance(name, str) and Path(name).name == name and "\\" not in name
        if not plain or not name.endswith(SUFFIX) or "\0" in name:
            raise CheckpointError(
                f"{index}: {name!r} must be the plain name of a {SUFFIX} file in the same folder"
            )
    files = [index.parent / name for name in sorted(set(places.values()))]
    for file in files:
        listed = {tensor for tensor, name in places.items() if name == file.name}
        if (found := read_headers([file]).keys()) != listed:
            tensor = min(listed ^ found)
            raise CheckpointError(f"{index}: does not agree with {file.name} on {tensor}")
    return files


def read_headers(files: list[Path]) -> dict[str, Stored]:
    """Read the headers of files, as tensor name → entry.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors, or two of them hold the
            same tensor.
    """
    stored: dict[str, Stored] = {}
    for path in files:
        with _opened(path) as file:
            names = file.keys()
            for name in names:
                if name in stored:
                    raise CheckpointError(f"{path}: {name} is also in {stored[name].file.name}")
                tensor = file.get_slice(name)
                stored[name] = Stored(path, name, tuple(tensor.get_shape()), tensor.get_dtype())
    return stored


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        reason = wrong_content(path) or error
        raise CheckpointError(f"{path}: not a readable safetensors file ({reason})") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the metadata of a file, texts by name. Raises CheckpointError."""
    with _opened(Path(path)) as file:
        return file.metadata() or {}


def read_tensor(entry: Stored) -> Tensor:
    """Read one tensor onto the CPU. Raises CheckpointError."""
    with _opened(entry.file) as file:
        return file.get_tensor(entry.name).view(entry.shape)


def load_weights(module: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Read tensors into a module, converted to its types; every name, shape and value must fit.

    Args:
        module: module to fill; on the "meta" device it gets new tensors.
        stored: entries from `read_headers`, by the names of the module's state dict.
    Raises:
        CheckpointError: names the first missing, unexpected, mis-shaped, wrongly typed or
            non-finite tensor. The module is then unchanged.
    """
    expected = module.state_dict()
    check_fit(expected, stored)
    loaded: dict[str, Tensor] = {}
    for path in sorted({entry.file for entry in stored.values()}):
        with _opened(path) as file:
            for name, entry in stored.items():
                if entry.file == path:
                    tensor = file.get_tensor(entry.name).view(entry.shape)
                    loaded[name] = _finite(entry, tensor, expected[name].dtype)
    on_meta = any(tensor.is_meta for tensor in expected.values())
    module.load_state_dict(loaded, strict=True, assign=on_meta)


def check_fit(expected: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> None:
    """Check that headers have the expected names, shapes and kinds of number.

    Raises:
        CheckpointError: names the first missing, unexpected, mis-shaped or wrongly typed tensor.
    """
    source = next(iter(stored.values())).file if stored else "no file"
    for problem, names in (
        ("missing", expected.keys() - stored.keys()),
        ("unexpected", stored.keys() - expected.keys()),
    ):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (" …" if len(names) > 3 else "")
            raise CheckpointError(f"{source}: {len(names)} {problem} tensors: {listed}")
    for name, entry in stored.items():
        tensor = expected[name]
        if entry.shape != tensor.shape:
            raise CheckpointError(
                f"{entry.file}: {name} has shape {entry.shape}, expected {tuple(tensor.shape)}"
            )
        if (entry.type in _FLOATS) != tensor.is_floating_point():
            raise CheckpointError(f"{entry.file}: {name} is {entry.type}, expected {tensor.dtype}")


def _finite(entry: Stored, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy in a new type, checked after conversion: 1e300 is infinite in float32."""
    copy = torch.empty(tensor.shape, dtype=dtype).copy_(tensor)
    if copy.is_floating_point() and not torch.isfinite(copy).all():
        raise CheckpointError(
            f"{entry.file}: {entry.name} holds NaN or infinite values (as {dtype})"
        )
    return copy


# ------------------------------------------------------------------------------------ writing


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as one safetensors file. Raises CheckpointError."""
    flat = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(flat, temporary, metadata={"format": "pt", **(metadata or {})})


def write_weights(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    max_shard_size: int | str,
    variant: str | None = None,
) -> None:
    """Write tensors for `find_weights`: one file, or shards and their index.

    Args:
        folder: folder of the network.
        stem: start of the file names.
        tensors: tensors by name.
        max_shard_size: bytes per file, or a text such as "5GB"; a larger tensor gets its own file.
        variant: "fp16" for file names with "fp16"; None for none.
    Raises:
        CheckpointError: a file cannot be written.
        InvalidArgument: a bad max_shard_size or variant.
    """
    limit = byte_count("max_shard_size", max_shard_size)
    mark = "" if variant is None else f".{_plain('variant', variant)}"
    shards: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        write_tensors(folder / f"{stem}{mark}{SUFFIX}", shards[0])
        return
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}{mark}-{number:05}-of-{len(shards):05}{SUFFIX}"
        write_tensors(folder / file, shard)
        places.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(folder / f"{stem}{SUFFIX}.index{mark}.json", index)


def own_files(stem: str, variant: str | None = None) -> re.Pattern:
    """Return a pattern of the file names that `write_weights` gives to this variant."""
    mark = "" if variant is None else rf"\.{_plain('variant', variant)}"
    shards, suffix = r"(-[0-9]{5,}-of-[0-9]{5,})?", re.escape(SUFFIX)
    return re.compile(rf"{stem}{mark}{shards}{suffix}|{stem}{suffix}\.index{mark}\.json")


def byte_count(name: str, value: int | str) -> int:
    """Read bytes from a number or a text such as "500MB" (10⁶) or "2GiB" (2³⁰), like diffusers.

    Raises:
        InvalidArgument: neither of them, or not positive.
    """
    if not isinstance(value, str):
        return whole_number(name, value, 1)
    match = re.fullmatch(r"([0-9]{1,9})([KMGT])(i?)B", value)
    if match is None or int(match[1]) == 0:
        raise InvalidArgument(f"{name} must be bytes or a text such as '5GB', got {value!r}")
    base = 1024 if match[3] else 1000
    return int(match[1]) * base ** ("KMGT".index(match[2]) + 1)


def _plain(name: str, value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value):
        raise InvalidArgument(f"{name} must be a short word such as 'fp16', got {value!r}")
    return value


def digest(network: nn.Module) -> str:
    """Return the SHA-256 of a network's weights: names, types, shapes and bytes, in order."""
    total = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
