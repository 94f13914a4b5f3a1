"""The parts of a pipeline: whether they fit each other."""

import math
from collections.abc import Sequence

from minidiff.errors import InvalidArgument, real_number
from minidiff.nn import AutoencoderKL, SpaceToDepth, UNet
from minidiff.text.prompts import Prompts, PromptsXL


def check_parts(
    unet: UNet,
    vae: SpaceToDepth | AutoencoderKL | None,
    prompts: Prompts | PromptsXL | None,
    class_names: Sequence[str],
    channels: int,
) -> None:
    """Refuse parts of a pipeline that do not fit each other. Raises InvalidArgument.

    Args:
        channels: of what is denoised.
    """
    if vae is not None:
        vae.check_channels(channels)
    wanted = unet.text_channels
    given = None if prompts is None else prompts.width
    if wanted != given:
        raise InvalidArgument(
            f"prompts must give tokens of {wanted} channels, which the network looks at "
            f"(None: it looks at none), got {given}"
        )
    if prompts is not None and class_names:
        raise InvalidArgument(
            "class_names must be empty beside prompts: a picture is of a text or of a class, "
            f"got {list(class_names)}"
        )
    numbers = unet.config.get("addition_embed_type") is not None
    if prompts is not None and prompts.needs_numbers != numbers:
        raise InvalidArgument(
            f"prompts must be {'PromptsXL' if numbers else 'Prompts'} for a network with "
            f"addition_embed_type={unet.config.addition_embed_type!r}"
        )
    summary = unet.config.get("projection_class_embeddings_input_dim") if not numbers else None
    if prompts is not None and (prompts.width if prompts.sums_up else None) != summary:
        raise InvalidArgument(
            f"prompts must {'' if summary else 'not '}be WordPrompts for a network with "
            f"projection_class_embeddings_input_dim={summary}"
        )


# What a network must have in common with a weaker one: what it is shown, is told and says.
_ALIKE = (
    "in_channels", "out_channels", "num_class_embeds", "class_embed_type", "cross_attention_dim",
    "encoder_hid_dim_type", "addition_embed_type", "projection_class_embeddings_input_dim",
    "time_cond_proj_dim",
)  # fmt: skip


def check_weaker(weaker: UNet | None, unet: UNet) -> None:
    """Refuse a weaker network that is told or says something else. Raises InvalidArgument."""
    for name in () if weaker is None else _ALIKE:
        given, wanted = weaker.config.get(name), unet.config.get(name)
        if given != wanted:
            raise InvalidArgument(
                f"weaker must have {name}={wanted!r}, as the network that it is to guide; "
                f"got {given!r}"
            )


def autoguidance_of(scale: float, weaker: UNet | None) -> float:
    """The scale of autoguidance. Raises InvalidArgument: not finite, or nothing to lead from."""
    scale = real_number("autoguidance_scale", scale, -math.inf)
    if scale != 1 and weaker is None:
        raise InvalidArgument(
            f"autoguidance_scale must be 1 for a model without a weaker network, got {scale:g}"
        )
    return scale


def class_names_of(names: Sequence[str], unet: UNet) -> Sequence[str]:
    """The names of a network's classes. Raises InvalidArgument: not as many as it has."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise InvalidArgument(f"class_names must be a list of strings, got {names!r}")
    embeds = unet.config.num_class_embeds or 0
    if embeds not in (len(names), len(names) + 1) or bool(embeds) != bool(names):
        raise InvalidArgument(
            f"class_names must name the network's {embeds} classes (all, or all but the last, "
            f"which then stands for no class); got {len(names)} names"
        )
    return names


def scale_of(given: float, is_guidable: bool) -> float:
    """The scale of guidance. Raises InvalidArgument: not finite, or nothing can be guided."""
    scale = real_number("guidance_scale", given, -math.inf)
    if scale != 1 and not is_guidable:
        raise InvalidArgument(
            f"guidance_scale must be 1 for a model that takes no prompt and knows no label for "
            f"'no class', got {scale:g}"
        )
    return scale
