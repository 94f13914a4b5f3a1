"""A pipeline on disk: `model_index.json`, and one folder per part.

The index names the kind of pipeline, and library and class of every part. The kinds are minidiff's
own "Pipeline", which may have a text encoder with a word tokenizer, and from diffusers Stable
Diffusion 1.x, 2.x and XL and the unconditional pipelines. diffusers reads every part that minidiff
writes, and whole pipelines that have CLIP's tokenizer.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from minidiff.errors import CheckpointError, InvalidArgument, one_of
from minidiff.nn import AutoencoderKL, SpaceToDepth, TextEncoder, UNet
from minidiff.runtime import files
from minidiff.schedulers import SCHEDULERS, Scheduler
from minidiff.schedulers.core.config import CONFIG_NAME
from minidiff.text.clip import load_tokenizer
from minidiff.text.prompts import Prompts, PromptsXL, WordPrompts
from minidiff.text.words import WordTokenizer

INDEX = "model_index.json"
OWN = "Pipeline"
TEXT, SECOND = ("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")
# Parts of every kind of pipeline that is read.
KINDS = {OWN: ("unet", "scheduler")}
KINDS |= dict.fromkeys(("DDPMPipeline", "DDIMPipeline"), ("unet", "scheduler"))
for _suffix in ("", "Img2Img", "Inpaint"):  # the same parts, used in another way
    KINDS[f"StableDiffusion{_suffix}Pipeline"] = ("unet", "scheduler", "vae", *TEXT)
    KINDS[f"StableDiffusionXL{_suffix}Pipeline"] = ("unet", "scheduler", "vae", *TEXT, *SECOND)
EXTRA_NETWORKS = ("weaker",)  # optional in minidiff's own kind: the guidance network
CLASSES = {
    "unet": UNet.class_names,
    "scheduler": tuple(SCHEDULERS),
    "vae": ("AutoencoderKL", "SpaceToDepth"),
    **dict.fromkeys(EXTRA_NETWORKS, UNet.class_names),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder": TextEncoder.class_names,
}
_OWN_CLASSES = {"tokenizer": (WordTokenizer.__name__,)}
# Parts that images do not depend on, and options of the index.
UNUSED = ("feature_extractor", "image_encoder")
OPTIONS = ("class_names", "guidance_scale", "num_inference_steps")
LATER_OPTIONS = ("guidance_interval", "autoguidance_scale")  # older folders lack them
XL_OPTIONS = ("force_zeros_for_empty_prompt",)
NOTES = ("requires_safety_checker", "add_watermarker")


def read(folder: str | Path, torch_dtype: torch.dtype, variant: str | None) -> dict[str, Any]:
    """Return the arguments of the Pipeline that a folder holds.

    Args:
        folder: folder with `model_index.json`.
        torch_dtype, variant: see `Model.from_pretrained`.
    Raises:
        CheckpointError: names the file that is missing, damaged or not understood.
        InvalidArgument: parts or options do not fit each other.
    """
    folder = Path(folder)
    index = files.read_json(folder / INDEX)
    _check_index(folder / INDEX, index)
    own, parts = index["_class_name"] == OWN, _parts(index)
    if own and (missing := sorted(set(OPTIONS) - index.keys())):
        raise CheckpointError(f"{folder / INDEX}: has no {missing[0]}")
    if index.get("safety_checker", [None])[0] is not None:
        warnings.warn(
            f"{folder}: its safety_checker is not loaded: images are not filtered", stacklevel=3
        )

    def network(part: str, cls: type) -> Any:
        return cls.from_pretrained(folder / part, torch_dtype=torch_dtype, variant=variant)

    arguments: dict[str, Any] = {
        "unet": network("unet", UNet),
        "scheduler": _scheduler(folder / "scheduler", SCHEDULERS[index["scheduler"][1]]),
    }
    arguments |= {part: network(part, UNet) for part in EXTRA_NETWORKS if part in index}
    if "vae" in index:
        arguments["vae"] = _vae(folder / "vae", index["vae"][1], torch_dtype, variant)
    texts = [part for part in (*TEXT, *SECOND) if part in parts]
    if texts:
        load = WordTokenizer.from_pretrained if own else load_tokenizer
        loaded = {
            part: network(part, TextEncoder) if "encoder" in part else load(folder / part)
            for part in texts
        }
        chosen = {name: index[name] for name in XL_OPTIONS if name in index}
        cls = PromptsXL if SECOND[0] in texts else WordPrompts if own else Prompts
        arguments["prompts"] = cls(**loaded, **(chosen if cls is PromptsXL else {}))
    return arguments | {name: index[name] for name in (*OPTIONS, *LATER_OPTIONS) if name in index}


def _vae(
    folder: Path, name: str, torch_dtype: torch.dtype, variant: str | None
) -> AutoencoderKL | SpaceToDepth:
    if name == "SpaceToDepth":
        return SpaceToDepth.from_pretrained(folder)
    vae = AutoencoderKL.from_pretrained(folder, variant=variant)
    return vae.to(vae.working_dtype(torch_dtype))  # float16 is too narrow for some


def _check_index(path: Path, index: Mapping[str, Any]) -> None:
    try:
        one_of("_class_name", index.get("_class_name"), KINDS)
    except InvalidArgument as error:
        raise CheckpointError(f"{path}: {error}") from error
    parts = _parts(index)
    classes = CLASSES | (_OWN_CLASSES if index["_class_name"] == OWN else {})
    allowed = {
        *parts,
        "vae",
        *(EXTRA_NETWORKS if index["_class_name"] == OWN else ()),
        "safety_checker",
        *UNUSED,
        *OPTIONS,
        *LATER_OPTIONS,
        *XL_OPTIONS,
        *NOTES,
    }
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if name not in allowed:
            raise CheckpointError(f"{path}: {name!r} is not a part or option of this pipeline")
        if name in (*OPTIONS, *LATER_OPTIONS, *XL_OPTIONS, *NOTES):
            continue
        absent = name not in parts and value == [None, None]
        if not absent and not _names_a_class(value):
            raise CheckpointError(f"{path}: {name} must be a library and a class, got {value!r}")
        if (kinds := classes.get(name.removesuffix("_2"))) and value[1] not in kinds:
            raise CheckpointError(f"{path}: {name} must be one of {kinds}, got {value[1]!r}")
    if missing := [part for part in parts if part not in index]:
        raise CheckpointError(f"{path}: has no {missing[0]}")
    if not isinstance(index.get("class_names", []), list):
        raise CheckpointError(f"{path}: class_names must be a list")


def _parts(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the parts that a pipeline must have; tokenizer and text encoder go together."""
    parts, kind = KINDS[index["_class_name"]], index["_class_name"]
    return (*parts, *TEXT) if kind == OWN and not index.keys().isdisjoint(TEXT) else parts


def _names_a_class(entry: object) -> bool:
    return (
        isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)
    )


def _scheduler(folder: Path, cls: type[Scheduler]) -> Scheduler:
    try:
        return cls.from_pretrained(folder)
    except InvalidArgument as error:
        raise CheckpointError(f"{folder / CONFIG_NAME}: {error}") from error


def write(
    folder: str | Path,
    parts: Mapping[str, Any],
    prompts: Prompts | PromptsXL | None,
    options: Mapping[str, Any],
) -> None:
    """Write a pipeline; an existing one is replaced as a whole.

    Args:
        folder: folder of the pipeline, new, empty or with an earlier pipeline.
        parts: unet, scheduler, vae and extra networks; None for an absent one.
        prompts: tokenizers and text encoders, or None.
        options: options of minidiff's own index. diffusers' kinds have no place for them, so they
            are not written beside CLIP's tokenizer.
    Raises:
        CheckpointError: the folder cannot be written, or holds something else.
        InvalidArgument: there is an extra network, which diffusers' pipelines do not have.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder}: not empty and not a pipeline, will not replace it")
    parts = {name: part for name, part in parts.items() if part is not None}
    index: dict[str, Any] = {"_class_name": OWN, **options}
    if prompts is not None:
        second = isinstance(prompts, PromptsXL)
        parts |= {name: getattr(prompts, name) for name in (*TEXT, *(SECOND if second else ()))}
        if not isinstance(prompts, WordPrompts):
            index = _XL_INDEX if second else _INDEX
            index = index | {name: getattr(prompts, name) for name in XL_OPTIONS if second}
            for name in parts.keys() & set(EXTRA_NETWORKS):
                raise InvalidArgument(
                    f"{name} must be None: {index['_class_name']} has no place for it"
                )
    with files.atomic_folder(folder) as temporary:
        for name, part in parts.items():
            part.save_pretrained(temporary / name)
            index[name] = [_library(name, part), _class(part)]
        files.write_json(temporary / INDEX, index)


_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
}
_XL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
}


def _library(name: str, part: Any) -> str:
    if isinstance(part, SpaceToDepth | WordTokenizer):
        return "minidiff"
    return "transformers" if name.removesuffix("_2") in TEXT else "diffusers"


def _class(part: Any) -> str:
    return getattr(part, "class_name", type(part).__name__)
