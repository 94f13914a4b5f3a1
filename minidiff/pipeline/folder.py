"""A pipeline on disk: `model_index.json`, and one folder per part.

The index names the kind of pipeline, and library and class of every part. Where a pipeline of
diffusers draws the same pictures, minidiff writes its name: Stable Diffusion 1.x, 2.x, XL and 3.x,
latent consistency models, and unconditional models in pixels. diffusers then reads the whole
folder, and passes over minidiff's own options, which stand under "_minidiff". Any other model is a
"MinidiffPipeline". diffusers refuses that name, but reads the parts.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minidiff.errors import CheckpointError, InvalidArgument, one_of
from minidiff.nn import (
    MLP,
    AutoencoderKL,
    ControlNet,
    MMDiT,
    SpaceToDepth,
    T5Encoder,
    TextEncoder,
    UNet,
)
from minidiff.nn.model import CONFIG as NETWORK_CONFIG
from minidiff.pipeline import card
from minidiff.pipeline.late import FILTER
from minidiff.runtime import files
from minidiff.runtime.tensors import own_files
from minidiff.schedulers import SCHEDULERS, Scheduler
from minidiff.schedulers.core.config import CONFIG_NAME
from minidiff.text.clip import T5_CLASSES, load_t5_tokenizer, load_tokenizer
from minidiff.text.prompts import Prompts, PromptsXL, WordPrompts
from minidiff.text.sd3 import AnyPrompts, PromptsSD3
from minidiff.text.words import WordTokenizer

if TYPE_CHECKING:
    from minidiff.pipeline.pipeline import Pipeline

INDEX = "model_index.json"
OWN = ("MinidiffPipeline", "Pipeline")  # the second in folders of earlier versions
TEXT, SECOND = ("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")
THIRD = ("tokenizer_3", "text_encoder_3")
# Parts of every kind of pipeline that is read.
KINDS = dict.fromkeys((*OWN, "DDPMPipeline", "DDIMPipeline"), ("unet", "scheduler"))
for _suffix in ("", "Img2Img", "Inpaint"):  # the same parts, used in another way
    for _kind, _parts in (("", TEXT), ("XL", (*TEXT, *SECOND))):
        KINDS[f"StableDiffusion{_kind}{_suffix}Pipeline"] = ("unet", "scheduler", "vae", *_parts)
        KINDS[f"StableDiffusion{_kind}ControlNet{_suffix}Pipeline"] = (
            "unet", "scheduler", "vae", *_parts, "controlnet",
        )  # fmt: skip
    KINDS[f"StableDiffusion3{_suffix}Pipeline"] = (
        "transformer", "scheduler", "vae", *TEXT, *SECOND, *THIRD,
    )  # fmt: skip
LCM, SD3 = "LatentConsistencyModelPipeline", "StableDiffusion3Pipeline"
KINDS[LCM] = KINDS["StableDiffusionPipeline"]
# diffusers' defaults of a call, where they are not those of Stable Diffusion
CALL_OPTIONS = {
    LCM: {"guidance_scale": 8.5, "num_inference_steps": 4},
    SD3: {"num_inference_steps": 28},
}
# Parts that may be null: [null, null] in the index.
OPTIONAL = {kind: THIRD for kind in KINDS if "Diffusion3" in kind}
# diffusers' pipeline of an unconditional model in pixels; the first runs every scheduler whose
# sample needs no scaling and whose step takes a generator, the second DDIM alone.
UNCONDITIONAL = {
    "DDPMScheduler": "DDPMPipeline",
    "DPMSolverMultistepScheduler": "DDPMPipeline",
    "DPMSolverSinglestepScheduler": "DDPMPipeline",
    "DDIMScheduler": "DDIMPipeline",
}
DENOISERS = {name: cls for cls in (UNet, MLP, MMDiT) for name in cls.class_names}
NETWORKS = ("unet", "transformer", "vae", "weaker", "text_encoder", "controlnet")
EXTRA_NETWORKS = ("weaker",)  # optional in minidiff's own kind: the guidance network
SEVERAL = "MultiControlNetModel"  # ControlNets in the folders controlnet, controlnet_1, …
CLASSES = {
    "unet": UNet.class_names,
    "transformer": MMDiT.class_names,
    "scheduler": tuple(SCHEDULERS),
    "vae": ("AutoencoderKL", "SpaceToDepth"),
    **dict.fromkeys(EXTRA_NETWORKS, UNet.class_names),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder": TextEncoder.class_names,
    "controlnet": (*ControlNet.class_names, SEVERAL),
    "tokenizer_3": T5_CLASSES,
    "text_encoder_3": T5Encoder.class_names,
}
_OWN_CLASSES = {
    "tokenizer": (WordTokenizer.__name__,),
    **dict.fromkeys(("unet", *EXTRA_NETWORKS), (*UNet.class_names, *MLP.class_names)),
}
# Parts that images do not depend on, and options of the index.
UNUSED = ("feature_extractor", "image_encoder")
OPTIONS = ("class_names", "guidance_scale", "num_inference_steps")
LATER_OPTIONS = ("guidance_interval", "autoguidance_scale", "guide")  # older folders lack them
XL_OPTIONS = ("force_zeros_for_empty_prompt",)
NOTES = ("requires_safety_checker", "add_watermarker")
EXTRAS = "_minidiff"  # minidiff's options in an index of diffusers


def read(folder: str | Path, torch_dtype: torch.dtype, variant: str | None) -> dict[str, Any]:
    """Return the arguments of the Pipeline that a folder holds.

    Args:
        folder: folder with `model_index.json`.
        torch_dtype, variant: see `Model.from_pretrained`.
    Raises:
        CheckpointError: names the file that is missing, damaged or not understood.
        InvalidArgument: parts or options do not fit each other.
    """
    folder = files.existing_folder(folder)
    index = files.read_json(folder / INDEX)
    extras = index.get(EXTRAS, {})
    if not isinstance(extras, dict) or extras.keys() - {*OPTIONS, *LATER_OPTIONS}:
        raise CheckpointError(f"{folder / INDEX}: {EXTRAS} must hold options, got {extras!r}")
    index |= extras
    _check_index(folder / INDEX, index)
    own, parts = index["_class_name"] in OWN, _parts(index)
    if own and (missing := sorted(set(OPTIONS) - index.keys())):
        raise CheckpointError(f"{folder / INDEX}: has no {missing[0]}")
    if index.get("safety_checker", [None])[0] is not None:
        warnings.warn(
            f"{folder}: its safety_checker is not loaded: images are not filtered", stacklevel=3
        )

    variants = _variants(folder, index, variant)

    def network(part: str, cls: type) -> Any:
        place, which = _place(folder, part, NETWORK_CONFIG), variants.get(part)
        narrow = cls is T5Encoder and torch_dtype == torch.float16  # which its sums leave
        dtype = torch.float32 if narrow else torch_dtype
        return cls.from_pretrained(place, torch_dtype=dtype, variant=which)

    unet = network(_denoiser(index), DENOISERS[index[_denoiser(index)][1]])
    place = _place(folder, "scheduler", CONFIG_NAME)
    arguments: dict[str, Any] = {
        "unet": unet,
        "scheduler": _scheduler(place, SCHEDULERS[index["scheduler"][1]]),
    }
    arguments |= {part: network(part, type(unet)) for part in EXTRA_NETWORKS if part in index}
    if "controlnet" in index:
        nets = _controlnet_folders(folder, index["controlnet"][1] == SEVERAL)
        variants |= dict.fromkeys(nets, variants.get("controlnet"))
        arguments["controlnets"] = [network(part, ControlNet) for part in nets]
    if "vae" in index:
        place = _place(folder, "vae", NETWORK_CONFIG)
        arguments["vae"] = _vae(place, index["vae"][1], torch_dtype, variants.get("vae"))
    if TEXT[0] in parts:
        arguments["prompts"] = _prompts(folder, index, network)
        if isinstance(arguments["prompts"], PromptsSD3):
            arguments |= CALL_OPTIONS[SD3]
    arguments |= CALL_OPTIONS.get(index["_class_name"], {})
    return arguments | {name: index[name] for name in (*OPTIONS, *LATER_OPTIONS) if name in index}


def _controlnet_folders(folder: Path, several: bool) -> list[str]:
    """Return the names of the folders of the ControlNets, as diffusers numbers them."""
    found = ["controlnet"]
    while several and (folder / (name := f"controlnet_{len(found)}")).is_dir():
        found.append(name)
    return found


def _prompts(folder: Path, index: Mapping[str, Any], network: Callable) -> AnyPrompts:
    """Return the tokenizers and text encoders of a folder.

    Args:
        folder: folder of the pipeline.
        index: content of its index.
        network: from a part and a class to the network of the part.
    """
    own, parts = index["_class_name"] in OWN, _parts(index)
    loaded: dict[str, Any] = {}
    for part in (*TEXT, *SECOND, *THIRD):
        if part not in parts or index[part][1] is None:
            continue
        if "encoder" in part:
            loaded[part] = network(part, T5Encoder if part in THIRD else TextEncoder)
        else:
            load = load_t5_tokenizer if part in THIRD else load_tokenizer
            loaded[part] = (WordTokenizer.from_pretrained if own else load)(folder / part)
    if THIRD[0] in parts:
        config = files.read_json(folder / _denoiser(index) / NETWORK_CONFIG)
        return PromptsSD3(**loaded, joint_attention_dim=config.get("joint_attention_dim"))
    if SECOND[0] in parts:
        chosen = {name: index[name] for name in XL_OPTIONS if name in index}
        return PromptsXL(**loaded, **chosen)
    return (WordPrompts if own else Prompts)(**loaded)


def _denoiser(index: Mapping[str, Any]) -> str:
    """Return the part that is the network."""
    return "transformer" if "transformer" in index else "unet"


def _place(folder: Path, part: str, config: str) -> Path:
    """Return the folder of a part: the pipeline's own for flat folders, as diffusers reads them."""
    inside = folder / part
    return folder if not inside.is_dir() and (folder / config).is_file() else inside


def _variants(folder: Path, index: Mapping[str, Any], variant: str | None) -> dict[str, str | None]:
    """Return the variant of each network: None, with a warning, where only others have it."""
    if variant is None:
        return {}
    networks = [part for part in index if part.rstrip("_23") in NETWORKS and index[part][1]]
    having = [part for part in networks if any((folder / part).glob(f"*.{variant}.*"))]
    if not having:
        return dict.fromkeys(networks, variant)  # whose files are then missing by name
    lacking = [part for part in networks if part not in having and (folder / part).is_dir()]
    if plain := [part for part in lacking if any((folder / part).glob("*.safetensors"))]:
        warnings.warn(
            f"{folder}: {', '.join(plain)} without variant {variant!r}, read in the plain one",
            stacklevel=4,
        )
    return dict.fromkeys(networks, variant) | dict.fromkeys(plain, None)


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
    classes = CLASSES | (_OWN_CLASSES if index["_class_name"] in OWN else {})
    allowed = {
        *parts,
        "vae",
        *((*EXTRA_NETWORKS, "controlnet") if index["_class_name"] in OWN else ()),
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
        may_lack = name not in parts or name in OPTIONAL.get(index["_class_name"], ())
        absent = may_lack and value == [None, None]
        if not absent and not _names_a_class(value):
            raise CheckpointError(f"{path}: {name} must be a library and a class, got {value!r}")
        kinds = classes.get(name) or classes.get(name.removesuffix("_2"))
        if kinds and not absent and value[1] not in kinds:
            raise CheckpointError(f"{path}: {name} must be one of {kinds}, got {value[1]!r}")
    if missing := [part for part in parts if part not in index]:
        raise CheckpointError(f"{path}: has no {missing[0]}")
    there = [part for part in ("vae", *TEXT, *EXTRA_NETWORKS) if (path.parent / part).is_dir()]
    if unlisted := [part for part in there if part not in index]:
        raise CheckpointError(f"{path}: has no {unlisted[0]}, but there is a folder of this name")
    if not isinstance(index.get("class_names", []), list):
        raise CheckpointError(f"{path}: class_names must be a list")


def _parts(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the parts that a pipeline must have; tokenizer and text encoder go together."""
    parts, kind = KINDS[index["_class_name"]], index["_class_name"]
    return (*parts, *TEXT) if kind in OWN and not index.keys().isdisjoint(TEXT) else parts


def _names_a_class(entry: object) -> bool:
    return (
        isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)
    )


def _scheduler(folder: Path, cls: type[Scheduler]) -> Scheduler:
    try:
        return cls.from_pretrained(folder)
    except InvalidArgument as error:
        raise CheckpointError(f"{folder / CONFIG_NAME}: {error}") from error


def write(folder: str | Path, pipe: "Pipeline", facts: card.Facts) -> None:
    """Write a pipeline; an existing one is replaced as a whole.

    Args:
        folder: folder of the pipeline, new, empty or with an earlier pipeline.
        pipe: the pipeline.
        facts: content of the model card.
    Raises:
        CheckpointError: the folder cannot be written, or holds something else.
        InvalidArgument: there is an extra network, which diffusers' pipelines do not have.
    """
    folder, prompts = files.user_path(folder), pipe.prompts
    check_replaceable(folder)
    parts = {name: getattr(pipe, name) for name in ("unet", "scheduler", "vae", *EXTRA_NETWORKS)}
    parts = {name: part for name, part in parts.items() if part is not None}
    parts = {pipe.unet.part if name == "unet" else name: part for name, part in parts.items()}
    options = {name: getattr(pipe, name) for name in (*OPTIONS, *LATER_OPTIONS)}
    index = _index(parts, prompts, options, "ControlNet" if pipe.controlnets else "")
    texts = {name: getattr(prompts, name, None) for name in (*TEXT, *SECOND, *THIRD)}
    parts |= {name: part for name, part in texts.items() if part is not None}
    with files.atomic_folder(folder) as temporary:
        for name, part in parts.items():
            part.save_pretrained(temporary / name)
            index[name] = [_library(name, part), _class(part)]
        for i, net in enumerate(pipe.controlnets):
            net.save_pretrained(temporary / (f"controlnet_{i}" if i else "controlnet"))
            index["controlnet"] = ["diffusers", SEVERAL if i else net.class_name]
        files.write_json(temporary / INDEX, index)
        for finish in pipe.finishers:
            if hasattr(finish, "margins"):  # a concept filter, of a higher floor
                finish.save(temporary / FILTER)
        card.write(temporary, folder, pipe, facts)


def check_replaceable(folder: Path) -> None:
    """Refuse a folder whose replacement by a pipeline would delete files of other people.

    Raises:
        CheckpointError: names files that are not those of a pipeline.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder}: not empty and not a pipeline, will not replace it")
    files = (path for path in folder.rglob("*") if not path.is_dir())
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    if foreign := [name for name in names if not _is_written(name)]:
        raise CheckpointError(
            f"{folder}: holds {', '.join(foreign[:3])}, and saving replaces the whole folder; "
            "choose a new or empty one"
        )


def _is_written(name: str) -> bool:
    """Return whether a pipeline writes a file of this name, relative to its folder."""
    part, _, file = name.rpartition("/")
    kind = re.sub(r"_\d+$", "", part)
    if kind == "scheduler":
        return file == CONFIG_NAME
    if kind == "tokenizer":
        return file.endswith((".json", ".txt"))
    if kind in NETWORKS:
        stem = (TextEncoder if kind == "text_encoder" else UNet).weights_name
        return file == NETWORK_CONFIG or own_files(stem).fullmatch(file) is not None
    return name in (INDEX, card.FILE, card.PICTURE, FILTER)


def _index(
    parts: Mapping[str, Any], prompts: Any, options: Mapping[str, Any], controlled: str
) -> dict[str, Any]:
    """Return an index without its parts: of diffusers' pipeline for them, or minidiff's own."""
    unet, scheduler = parts[_denoiser(parts)], parts["scheduler"]
    clip = prompts is not None and not isinstance(prompts, WordPrompts)
    absent = {name: [None, None] for name in UNUSED}
    if isinstance(prompts, PromptsSD3):
        absent |= {name: [None, None] for name in OPTIONAL[SD3]}
        index = {"_class_name": SD3, **absent}
    elif isinstance(prompts, PromptsXL):
        chosen = {name: getattr(prompts, name) for name in XL_OPTIONS}
        index = {"_class_name": f"StableDiffusionXL{controlled}Pipeline", **absent, **chosen}
    elif clip:
        distilled = unet.config.get("time_cond_proj_dim") and _class(scheduler) == "LCMScheduler"
        plain = f"StableDiffusion{controlled}Pipeline"
        kind = LCM if distilled and not controlled else plain
        unfiltered = {"safety_checker": [None, None], "requires_safety_checker": False}
        index = {"_class_name": kind, **absent, **unfiltered}
    else:
        plain = parts.keys() == {"unet", "scheduler"} and prompts is None
        plain = plain and _class(unet) == "UNet2DModel" and not unet.config.num_class_embeds
        known = plain and scheduler.config.prediction_type != "flow"  # which only minidiff has
        kind = UNCONDITIONAL.get(_class(scheduler)) if known else None
        if kind is None:
            return {"_class_name": OWN[0], **options}
        index = {"_class_name": kind}
    for name in parts.keys() & set(EXTRA_NETWORKS):
        raise InvalidArgument(f"{name} must be None: {index['_class_name']} has no place for it")
    return {**index, EXTRAS: options}


def _library(name: str, part: Any) -> str:
    if isinstance(part, SpaceToDepth | WordTokenizer | MLP):
        return "minidiff"
    return "transformers" if name.rstrip("_23") in TEXT else "diffusers"


def _class(part: Any) -> str:
    return getattr(part, "class_name", type(part).__name__)
