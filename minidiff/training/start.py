"""Training that continues from a pipeline: what must fit, and the copy that is trained.

Network, noise schedule and prediction type are the start's. The config decides budget, optimizer,
objective and what is stored for sampling; of its options about the network those that depart from
their defaults must agree with the start.
"""

import copy
from dataclasses import replace
from typing import Any

import torch

from minidiff.data.protocol import Data, check_data
from minidiff.errors import InvalidArgument
from minidiff.nn import MLP, AutoencoderKL, DenoisingNetwork, SpaceToDepth, UNet
from minidiff.pipeline import Pipeline
from minidiff.runtime.checks import instance, optional
from minidiff.schedulers import FlowMatchEulerDiscreteScheduler, Scheduler
from minidiff.schedulers.core.names import sampler
from minidiff.schedulers.edm import EDMSigmas
from minidiff.training.config import TrainConfig, options_of

STORED = ("guidance_scale", "guidance_interval", "guide", "num_inference_steps")


def prediction_type_of(scheduler: Scheduler) -> str:
    """Return the `TrainConfig.prediction_type` of the networks that a scheduler samples."""
    if isinstance(scheduler, EDMSigmas):
        return "edm"
    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    if flow or scheduler.config.get("use_flow_sigmas"):
        return "flow"
    return scheduler.config.prediction_type


def adopted(config: TrainConfig, start: Pipeline) -> TrainConfig:
    """Return the config with the options that the start decides.

    Raises:
        InvalidArgument: an option that departs from its default disagrees with the start.
    """
    given = options_of(config)
    fixed = fixed_options(start)
    if config.prediction_type != (mine := fixed.pop("prediction_type")):
        raise InvalidArgument(
            f"prediction_type must be {mine!r}, which the start's scheduler "
            f"({type(start.scheduler).__name__}) samples; got {config.prediction_type!r}"
        )
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise InvalidArgument(
                f"{name} must be {value!r}, as in the start, or be left out; got {given[name]!r}"
            )
    stored = {name: getattr(start, name) for name in STORED if name not in given}
    return replace(config, **fixed, **stored)


def fixed_options(start: Pipeline) -> dict[str, Any]:
    """Return the options of a `TrainConfig` that a pipeline has decided."""
    scheduler = start.scheduler.config
    found = _sizes(start.unet) | {
        "block": _block(start),
        "num_train_timesteps": scheduler.num_train_timesteps,
        "learn_variance": str(scheduler.get("variance_type")).startswith("learned"),
    }
    if start.prompts is not None:
        text = start.prompts.text_encoder.config
        found |= {"text_width": text.hidden_size, "text_layers": text.num_hidden_layers}
    found["prediction_type"] = kind = prediction_type_of(start.scheduler)
    if kind == "edm":
        found["sigma_data"] = scheduler.sigma_data
    elif kind != "flow":
        found["beta_schedule"] = scheduler.beta_schedule
    return found


def _sizes(network: DenoisingNetwork) -> dict[str, Any]:
    """Return the options of a `TrainConfig` that make a network of this size.

    Raises:
        InvalidArgument: a network of a kind that is not trained.
    """
    if not isinstance(network, UNet | MLP):
        raise InvalidArgument(
            f"the start must have a UNet or an MLP to train, got {type(network).__name__}"
        )
    config = network.config
    if isinstance(network, MLP):
        return {"channels": (config.hidden_channels,), "layers": config.num_layers}
    sizes = {"channels": tuple(config.block_out_channels), "layers": config.layers_per_block}
    return {**sizes, "dropout": config.dropout}


def _block(start: Pipeline) -> int:
    """Return the side of the pixel blocks that are channels of the network."""
    return start.vae.block if isinstance(start.vae, SpaceToDepth) else 1


def check_fit(start: Pipeline, config: TrainConfig, data: Data) -> None:
    """Refuse data that the start's network cannot be trained on.

    Args:
        start: the pipeline.
        config: the config after `adopted`.
        data: the data.
    Raises:
        InvalidArgument: data of another space, size or number of classes, or without the captions
            or labels of the start, or labels are to be hidden and no label is "no class".
    """
    if not len(data):
        raise InvalidArgument(f"data {data.name} must hold at least one image, got none")
    _check_space(start, data)
    block, (_, *sides) = config.block, start.space.shape()
    wanted = (start.unet.config.in_channels // block**2, *(block * side for side in sides))
    if data.shape != wanted:
        raise InvalidArgument(
            f"data must be of shape {wanted}, as the start has it; {data.name} are {data.shape}"
        )
    if data.num_classes != len(start.class_names):
        raise InvalidArgument(
            f"data must have {len(start.class_names)} classes, as the start has; {data.name} have "
            f"{data.num_classes}"
        )
    if config.label_dropout and start.class_names and not start.has_null_class:
        raise InvalidArgument(
            "label_dropout must be 0 for a start without a label for 'no class', got "
            f"{config.label_dropout:g}"
        )
    with torch.device("meta"):
        prompts = data.condition(config).prompts
    wanted, given = (_vocabulary(texts) for texts in (prompts, start.prompts))
    if wanted != given and not (wanted and given and _extends(*wanted, *given)):
        raise InvalidArgument(
            f"start must have the tokenizer of {data.name}"
            if prompts is not None
            else f"data must have captions, as the start is trained on; {data.name} have none"
        )


def prepared(learner: Any, data: Data, start: Pipeline | None) -> tuple[Any, Data]:
    """Return the learner with what the data decide, and the data as it is trained on them.

    Args:
        learner: argument of `train`; its `prepare`, if it has one, decides (`minidiff.adapters`).
        data: images or latents; captions become tokens of the start.
        start: pipeline that the training starts from; None for fresh weights.
    Raises:
        InvalidArgument: no data set; a learner that needs a start, without one; or as `prepare`.
    """
    check_data(data)
    optional(instance(Pipeline))("start", start)
    prepare = getattr(learner, "prepare", None)
    if start is None:
        if prepare:
            raise InvalidArgument(f"start must be given for learner {type(learner).__name__}")
        return learner, data
    start.check_fused("training")
    if prepare:
        return prepare(start, data)
    return learner, data if start.prompts is None else data.tokenized(start.prompts)


def _check_space(start: Pipeline, data: Data) -> None:
    """Refuse pixels for a start of latents, latents of another vae, and latents for pixels."""
    if not isinstance(start.vae, AutoencoderKL):
        if data.decoder is not None:
            raise InvalidArgument(
                f"data must be images, as the start has no vae; {data.name} are latents"
            )
    elif data.decoder is None or not _same(start.vae, data.decoder):
        raise InvalidArgument(f"data must be LatentData of the start's vae, {data.name} are not")


def _same(one: AutoencoderKL, other: AutoencoderKL) -> bool:
    """Return whether two autoencoders have the same options and weights."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=False)
    return one.config == other.config and all(torch.equal(a, b.to(a)) for a, b in pairs)


def _vocabulary(prompts: Any) -> tuple | None:
    """Return what decides the token numbers of a caption; None without prompts."""
    if prompts is None:
        return None
    tokenizer = prompts.tokenizer
    return getattr(tokenizer, "words", type(tokenizer)), tokenizer.model_max_length


def _extends(words: Any, length: int, known: Any, known_length: int) -> bool:
    """Return whether a vocabulary is a known one with further words, which a learner may add."""
    return isinstance(words, tuple) and length == known_length and words[: len(known)] == known


def continued(start: Pipeline, config: TrainConfig, data: Data) -> Pipeline:
    """Return a copy of the start to be trained, in float32.

    Args:
        start: the pipeline.
        config: the config after `adopted`.
        data: the data.
    Raises:
        InvalidArgument: the sampler does not fit the start's scheduler.
    """
    pipe = copy.copy(start)
    pipe.stack = None  # what was fused into the start cannot be taken out of what is trained
    pipe = copy.deepcopy(pipe).to(dtype=torch.float32)
    encoders = () if pipe.prompts is None else pipe.prompts.encoders
    for network in (pipe.unet, *encoders):
        network.float().requires_grad_(True)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.scheduler = scheduler_from(start, config)
    pipe.class_names = data.class_names
    for name in STORED:
        setattr(pipe, name, getattr(config, name))
    return pipe


def scheduler_from(start: Pipeline, config: TrainConfig) -> Scheduler:
    """Return the scheduler that is stored with the model. Raises InvalidArgument."""
    own = start.scheduler
    return sampler(config.sampler, own) if config.sampler else copy.deepcopy(own)
