"""The parts of a pipeline: whether they fit each other."""

import math
from collections.abc import Sequence
from typing import Any, get_args

from minidiff.errors import InvalidArgument, listed, real_number
from minidiff.nn import AutoencoderKL, DenoisingNetwork, SpaceToDepth
from minidiff.runtime.checks import instance, optional
from minidiff.schedulers import Scheduler
from minidiff.text.sd3 import AnyPrompts

# Options in which a network and its guidance network must agree: their inputs and outputs.
_SHARED_OPTIONS = (
    "in_channels", "out_channels", "num_class_embeds", "class_embed_type", "cross_attention_dim",
    "encoder_hid_dim_type", "addition_embed_type", "projection_class_embeddings_input_dim",
    "time_cond_proj_dim", "num_embeds_ada_norm", "joint_attention_dim", "pooled_projection_dim",
)  # fmt: skip


def check_kinds(unet: Any, scheduler: Any, vae: Any, prompts: Any, weaker: Any) -> None:
    """Refuse arguments of a pipeline of another kind. Raises InvalidArgument naming one."""
    instance(DenoisingNetwork)("unet", unet)
    instance(Scheduler)("scheduler", scheduler)
    optional(instance(SpaceToDepth, AutoencoderKL))("vae", vae)
    optional(instance(*get_args(AnyPrompts)))("prompts", prompts)
    optional(instance(DenoisingNetwork))("weaker", weaker)


def check_parts(
    unet: DenoisingNetwork,
    vae: SpaceToDepth | AutoencoderKL | None,
    prompts: AnyPrompts | None,
    class_names: Sequence[str],
    channels: int,
) -> None:
    """Refuse parts of a pipeline that do not fit each other.

    Args:
        unet, vae, prompts, class_names: arguments of the pipeline.
        channels: channels of the samples that are denoised.
    Raises:
        InvalidArgument: names the part that does not fit.
    """
    if vae is not None:
        vae.check_channels(channels)
    wanted = unet.text_channels
    given = None if prompts is None else prompts.width
    if wanted != given:
        raise InvalidArgument(
            f"prompts must give tokens of {wanted} channels, as the network's cross-attention "
            f"takes (None: it has none), got {given}"
        )
    if prompts is not None and class_names:
        raise InvalidArgument(
            "class_names must be empty beside prompts: an image has a text or a class, "
            f"got {list(class_names)}"
        )
    pooled = unet.config.get("pooled_projection_dim")
    if prompts is not None and prompts.pooled_width != pooled:
        raise InvalidArgument(
            f"prompts must give a pooled text of {pooled} channels, as the network takes (None: "
            f"it takes none), got {prompts.pooled_width}"
        )
    numbers = unet.config.get("addition_embed_type") is not None
    if prompts is not None and prompts.adds_text_time != numbers:
        raise InvalidArgument(
            f"prompts must be {'PromptsXL' if numbers else 'Prompts'} for a network with "
            f"addition_embed_type={unet.config.addition_embed_type!r}"
        )
    summary = unet.config.get("projection_class_embeddings_input_dim") if not numbers else None
    if prompts is not None and (prompts.width if prompts.labels_are_pooled else None) != summary:
        raise InvalidArgument(
            f"prompts must {'' if summary else 'not '}be WordPrompts for a network with "
            f"projection_class_embeddings_input_dim={summary}"
        )


def check_guidance_network(network: DenoisingNetwork | None, unet: DenoisingNetwork) -> None:
    """Refuse a guidance network whose inputs or outputs differ from those of the network.

    Raises:
        InvalidArgument: names the option in which the two differ.
    """
    for name in () if network is None else _SHARED_OPTIONS:
        given, wanted = network.config.get(name), unet.config.get(name)
        if given != wanted:
            raise InvalidArgument(
                f"the guidance network must have {name}={wanted!r} like the network; got {given!r}"
            )


def check_autoguidance_scale(scale: float, network: DenoisingNetwork | None) -> float:
    """Return the scale of autoguidance.

    Raises:
        InvalidArgument: it is not finite, or not 1 without a guidance network.
    """
    scale = real_number("autoguidance_scale", scale, -math.inf)
    if scale != 1 and network is None:
        raise InvalidArgument(
            f"autoguidance_scale must be 1 for a model without a guidance network, got {scale:g}"
        )
    return scale


def check_guidance_scale(given: float, is_guidable: bool) -> float:
    """Return the scale of guidance.

    Raises:
        InvalidArgument: it is not finite, or not 1 for a model that cannot be guided.
    """
    scale = real_number("guidance_scale", given, -math.inf)
    if scale != 1 and not is_guidable:
        raise InvalidArgument(
            f"guidance_scale must be 1 for a model that takes no prompt and has no label for "
            f"'no class', got {scale:g}"
        )
    return scale


def check_class_names(names: Sequence[str], unet: DenoisingNetwork) -> tuple[str, ...]:
    """Return the names of a network's classes.

    Raises:
        InvalidArgument: they are not texts, or not as many as the network has classes.
    """
    if not all(isinstance(name, str) for name in listed("class_names", names)):
        raise InvalidArgument(f"class_names must be a list of strings, got {names!r}")
    embeds = unet.num_labels
    if embeds not in (len(names), len(names) + 1) or bool(embeds) != bool(names):
        raise InvalidArgument(
            f"class_names must name the network's {embeds} classes (all, or all but the last, "
            f"which then stands for no class); got {len(names)} names"
        )
    return tuple(names)
