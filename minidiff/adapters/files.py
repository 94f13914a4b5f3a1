"""Files of adapters: diffusers' where it has a format, and the older ones that it reads.

    pytorch_lora_weights.safetensors    low-rank differences, by peft's names
    learned_embeds.safetensors          vectors of new words
    weight_changes.safetensors          other differences, by the names of weights; minidiff's own

Layers are read by four kinds of names. All of these are A of the same layer:

    unet.down_blocks.0.attentions.0.….attn1.to_q.lora_A.weight            peft
    unet.down_blocks.0.attentions.0.….attn1.to_q.lora.down.weight         diffusers before peft
    down_blocks.0.attentions.0.….attn1.processor.to_q_lora.down.weight    attention processors
    lora_unet_down_blocks_0_attentions_0_…_attn1_to_q.lora_down.weight    Kohya's scripts
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiff.adapters.change import Change, Dense, LowRank
from minidiff.adapters.stack import Adapter, add, check_scale, stack_of
from minidiff.errors import CheckpointError, InvalidArgument, one_of
from minidiff.runtime.files import atomic_folder, user_path
from minidiff.runtime.tensors import (
    PICKLES,
    SUFFIX,
    Stored,
    read_headers,
    read_metadata,
    read_tensor,
    write_tensors,
)

if TYPE_CHECKING:
    from minidiff.pipeline import Pipeline

LORA, WORDS, DENSE = (
    f"{stem}{SUFFIX}" for stem in ("pytorch_lora_weights", "learned_embeds", "weight_changes")
)
FILES = (LORA, WORDS, DENSE)
INSIDE = "adapter"  # folder of an adapter in that of a run
LORA_METADATA = "lora_adapter_metadata"  # of diffusers: JSON of peft's options
KIND = {"minidiff": "weight_changes"}  # metadata of DENSE
_SIDES = {
    "lora_A.weight": "A", "lora_B.weight": "B",
    "lora.down.weight": "A", "lora.up.weight": "B",
    "lora_linear_layer.down.weight": "A", "lora_linear_layer.up.weight": "B",
    "lora_down.weight": "A", "lora_up.weight": "B",
    "alpha": "alpha",
}  # fmt: skip
_LAYER = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _SIDES))})")
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight")
_KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
          "lora_te2_": "text_encoder_2"}  # fmt: skip


class _Key(NamedTuple):
    """What a tensor of a LoRA file is: side "A", "B" or "alpha" of a layer of a network."""

    part: str
    layer: str
    side: str


# ------------------------------------------------------------------------------------ loading


def load(pipe: "Pipeline", path: str | Path, scale: float, name: str | None) -> "Pipeline":
    """Load an adapter into a pipeline; see `Pipeline.load_adapter`."""
    path = user_path(path)
    check_scale(scale)
    if name is None:
        name = path.stem if path.is_file() else path.resolve().name
    if not isinstance(name, str) or not name:
        raise InvalidArgument(f"name must be a text, got {name!r}")
    return add(pipe, name, read(path, pipe), scale)


def read(path: Path, pipe: "Pipeline") -> Adapter:
    """Read an adapter for a pipeline.

    Raises:
        CheckpointError: a file is missing, damaged, a pickle, or for another network.
    """
    stack = stack_of(pipe)
    networks: dict[str, nn.Module] = {"unet": stack.unet}
    for suffix, encoder in zip(("", "_2"), getattr(stack.prompts, "encoders", ()), strict=False):
        networks[f"text_encoder{suffix}"] = encoder
    parts: dict[str, LowRank | Dense] = {}
    words: dict[str, Tensor] = {}
    for file in _files(path):
        stored, about = read_headers([file]), read_metadata(file)
        if about.get("minidiff") == KIND["minidiff"]:
            found = _dense(stored, networks)
        elif any(_LAYER.fullmatch(key) or _PROCESSOR.fullmatch(key) for key in stored):
            found = _low_rank(stored, about, networks)
        else:
            words |= _words(file, stored)
            continue
        if twice := parts.keys() & found.keys():
            raise CheckpointError(f"{path}: has two differences of {min(twice)}")
        parts |= found
    if words and len(networks) != 2:
        raise CheckpointError(f"{path}: new words are for a model with one text encoder")
    return Adapter(Change(parts), words)


def _files(path: Path) -> list[Path]:
    """Return the files of an adapter. Raises CheckpointError."""
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{path}: a pickle can run code and is not read; save it as {SUFFIX} with the library "
            "that wrote it"
        )
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    folder = path / INSIDE if (path / INSIDE).is_dir() else path
    if found := [folder / name for name in FILES if (folder / name).is_file()]:
        return found
    others = sorted(file for file in folder.iterdir() if file.suffix == SUFFIX)
    if len(others) == 1:
        return others
    if pickles := sorted(file for file in folder.iterdir() if file.suffix in PICKLES):
        return _files(pickles[0])
    raise CheckpointError(f"{folder}: no adapter; looked for {', '.join(FILES)}")


def _finite(entry: Stored) -> Tensor:
    """Read a tensor in float32. Raises CheckpointError for NaN and infinity."""
    tensor = read_tensor(entry)
    if not tensor.is_floating_point() or not torch.isfinite(tensor := tensor.float()).all():
        raise CheckpointError(f"{entry.file}: {entry.name} must hold finite real numbers")
    return tensor


def _dense(stored: Mapping[str, Stored], networks: Mapping[str, nn.Module]) -> dict[str, Dense]:
    """Read differences of whole weights. Raises CheckpointError."""
    found = {}
    for key, entry in stored.items():
        part, _, name = key.partition(".")
        weight = dict(networks[part].named_parameters()).get(name) if part in networks else None
        _check_shape(entry, key, weight, entry.shape)
        found[key] = Dense(entry.shape)
        found[key].difference.data = _finite(entry)
    return found


def _check_shape(
    entry: Stored, layer: str, weight: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    """Return the weight that a difference of this shape is for. Raises CheckpointError."""
    if weight is None:
        raise CheckpointError(f"{entry.file}: {entry.name}: this model has no {layer}")
    if tuple(weight.shape) != tuple(shape):
        raise CheckpointError(
            f"{entry.file}: {entry.name} is for a {layer} of shape {tuple(shape)}, that of this "
            f"model is {tuple(weight.shape)}"
        )
    return weight


def _words(file: Path, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Read vectors by word, (n, d) each. Raises CheckpointError."""
    found = {}
    for key, entry in stored.items():
        if len(entry.shape) not in (1, 2) or "." in key or not all(entry.shape):
            raise CheckpointError(
                f"{file}: {key} {entry.shape} is no layer of a LoRA and no vectors of a word"
            )
        word = file.stem if key == "emb_params" else key  # the key of web user interfaces
        found[word] = _finite(entry).reshape(-1, entry.shape[-1])
    return found


# ------------------------------------------------------------------------------------ low rank


def _low_rank(
    stored: Mapping[str, Stored], about: Mapping[str, str], networks: Mapping[str, nn.Module]
) -> dict[str, LowRank]:
    """Read low-rank differences by the names of weights. Raises CheckpointError."""
    sides: dict[tuple[str, str], dict[str, Stored]] = {}
    layers = {part: dict(network.named_modules()) for part, network in networks.items()}
    for entry in stored.values():
        where = _placed(entry, layers)
        sides.setdefault((where.part, where.layer), {})[where.side] = entry
    options = _peft_options(next(iter(stored.values())).file, about)
    found = {}
    for (part, layer), entries in sides.items():
        any_entry = next(iter(entries.values()))
        if missing := {"A", "B"} - entries.keys():
            raise CheckpointError(
                f"{any_entry.file}: {part}.{layer} has no {missing.pop()}, the other factor of "
                f"{any_entry.name}"
            )
        weight = getattr(layers[part][layer], "weight", None)
        found[f"{part}.{layer}.weight"] = _pair(part, layer, entries, weight, options)
    return found


def _placed(entry: Stored, layers: Mapping[str, Mapping[str, nn.Module]]) -> _Key:
    """Return what a tensor is by its name. Raises CheckpointError."""
    name = entry.name.removeprefix("base_model.model.")
    if match := _PROCESSOR.fullmatch(name):
        inner = "to_out.0" if match[2] == "to_out" else match[2]
        path, side = f"{match[1]}.{inner}", {"down": "A", "up": "B"}[match[3]]
    elif match := _LAYER.fullmatch(name):
        path, side = match[1], _SIDES[match[2]]
    else:
        raise CheckpointError(f"{entry.file}: {entry.name} is not read: only A, B and alpha are")
    for prefix, part in _KOHYA.items():
        if path.startswith(prefix):
            flat = path.removeprefix(prefix)
            known = {layer.replace(".", "_"): layer for layer in layers.get(part, ())}
            layer = known.get(flat) or known.get(f"text_model_{flat}", "")
            break
    else:
        part, _, layer = path.partition(".")
        if part not in ("unet", "text_encoder", "text_encoder_2"):
            part, layer = "unet", path
        if part != "unet" and layer not in layers.get(part, ()):
            layer = f"text_model.{layer}"  # which transformers 5 leaves out
    if layer not in layers.get(part, ()) or not layer:
        raise CheckpointError(f"{entry.file}: {entry.name}: this model has no layer {path}")
    return _Key(part, layer, side)


def _pair(
    part: str, layer: str, entries: Mapping[str, Stored], weight: Any, options: Mapping[str, Any]
) -> LowRank:
    """Return a difference from its two factors and alpha. Raises CheckpointError."""
    down, up = entries["A"], entries["B"]
    rank = down.shape[0] if down.shape else 0
    ok = len(down.shape) > 1 and len(up.shape) > 1 and up.shape[1] == rank
    shape = (up.shape[0], *down.shape[1:]) if ok else ()
    if not ok or any(side != 1 for side in up.shape[2:]):
        raise CheckpointError(
            f"{down.file}: A {down.shape} and B {up.shape} of {part}.{layer} do not fit each other"
        )
    full = tuple(getattr(weight, "shape", ()))
    if len(shape) != len(full) and shape == full[:2] and set(full[2:]) <= {1}:
        shape = full  # a linear layer that is a 1×1 convolution here
    elif len(full) == 2 and len(shape) > 2 and set(shape[2:]) <= {1}:
        shape = shape[:2]
    _check_shape(down, f"layer {part}.{layer}", weight, shape)
    alpha = options.get(f"{part}.{layer}", options.get(part, rank))
    if "alpha" in entries:
        alpha = _alpha(entries["alpha"])
    try:
        own = LowRank(shape, rank, alpha, f"{part}.{layer}")
    except InvalidArgument as error:
        raise CheckpointError(f"{down.file}: {error}") from error
    own.lora_A.weight.data = _finite(down).reshape(own.lora_A.weight.shape)
    own.lora_B.weight.data = _finite(up).reshape(own.lora_B.weight.shape)
    return own


def _alpha(entry: Stored) -> float:
    if entry.shape not in ((), (1,)):
        raise CheckpointError(f"{entry.file}: {entry.name} must be one number, got {entry.shape}")
    return float(_finite(entry))


def _peft_options(file: Path, about: Mapping[str, str]) -> dict[str, float]:
    """Return alpha by network, and by layer where it differs, from diffusers' metadata.

    Raises:
        CheckpointError: the metadata are damaged, or of another kind of adapter.
    """
    if LORA_METADATA not in about:
        return {}
    found: dict[str, float] = {}
    try:
        content = json.loads(about[LORA_METADATA])
        for name in content:
            part, _, option = name.partition(".")
            if option in ("use_dora", "use_rslora", "lora_bias") and content[name]:
                raise CheckpointError(f"{file}: {option} is not read: only plain LoRA is")
            if option == "lora_alpha":
                found[part] = float(content[name])
            if option == "alpha_pattern":
                for layer, value in content[name].items():
                    found[f"{part}.{layer}"] = float(value)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: {LORA_METADATA} is damaged ({error})") from error
    return found


# ------------------------------------------------------------------------------------- saving


def save(pipe: "Pipeline", folder: str | Path, name: str | None) -> None:
    """Write an adapter of a pipeline; see `Pipeline.save_adapter`."""
    loaded = stack_of(pipe).adapters
    if name is None and len(loaded) == 1:
        name = next(iter(loaded))
    one_of("name", name, loaded)
    adapter = loaded[name][0]
    folder = user_path(folder)
    others = {file.name for file in folder.iterdir()} - {*FILES} if folder.is_dir() else set()
    if others:
        raise CheckpointError(
            f"{folder}: holds {min(others)}, and saving replaces the whole folder; choose another"
        )
    low = {n: part for n, part in adapter.change.parts.items() if isinstance(part, LowRank)}
    rest = {n: part() for n, part in adapter.change.parts.items() if n not in low}
    with atomic_folder(folder) as temporary:
        if low:
            metadata = {LORA_METADATA: json.dumps(_metadata(low), indent=2, sort_keys=True)}
            write_tensors(temporary / LORA, _factors(low), metadata)
        if rest:
            write_tensors(temporary / DENSE, rest, KIND)
        if adapter.words or not (low or rest):
            write_tensors(temporary / WORDS, dict(adapter.words))


def _factors(parts: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Return A and B by the names of diffusers' files, which have no "text_model"."""
    found = {}
    for name, part in parts.items():
        layer = name.removesuffix(".weight").replace(".text_model.", ".", 1)
        found[f"{layer}.lora_A.weight"] = part.lora_A.weight
        found[f"{layer}.lora_B.weight"] = part.lora_B.weight
    return found


def _metadata(parts: Mapping[str, LowRank]) -> dict[str, Any]:
    """Return peft's options of each network, as diffusers writes them."""
    found: dict[str, Any] = {}
    for network in sorted({name.partition(".")[0] for name in parts}):
        own = {
            name.removesuffix(".weight").partition(".")[2].removeprefix("text_model."): part
            for name, part in parts.items() if name.startswith(f"{network}.")
        }  # fmt: skip
        rank, alpha = _most(p.rank for p in own.values()), _most(p.alpha for p in own.values())
        found |= {
            f"{network}.r": rank,
            f"{network}.lora_alpha": alpha,
            f"{network}.target_modules": sorted(own),
            f"{network}.rank_pattern": {n: p.rank for n, p in own.items() if p.rank != rank},
            f"{network}.alpha_pattern": {n: p.alpha for n, p in own.items() if p.alpha != alpha},
        }
    return found


def _most(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
