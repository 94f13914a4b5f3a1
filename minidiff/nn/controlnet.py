"""ControlNet: a trainable copy of a U-Net's down path that reads an image beside the noisy sample.

    hint = E(image)                          a few convolutions, the last of them zero
    steps = contract(conv_in(x) + hint)      the copy: every result down to the middle
    residualsᵢ = Zᵢ(stepsᵢ)                  1×1 convolutions that begin at zero

The residuals are added to the results of the U-Net's own down path. The U-Net stays as it is, and
because every way out of the copy begins at zero, training starts at the U-Net bit for bit.

Source: Zhang, Rao & Agrawala 2023, "Adding Conditional Control to Text-to-Image Diffusion Models",
https://arxiv.org/abs/2302.05543, section 3. Options and names are those of diffusers'
`ControlNetModel`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.errors import InvalidArgument, listed, one_of
from minidiff.nn.blocks.layers import CONVOLUTIONS
from minidiff.nn.configs.checks import IMAGE_CHANNELS, WIDTH
from minidiff.nn.configs.unet import UNet2DConditionModelConfig, unsupported
from minidiff.nn.model import describe_options, parse_options
from minidiff.nn.unet import UNet
from minidiff.runtime.checks import check_fields, choice, each, option, optional, whole
from minidiff.runtime.files import Config
from minidiff.runtime.shapes import warn_unless_finite


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig:
    """The options of diffusers' `ControlNetModel`; those of the U-Net mean the same there.

    Raises:
        InvalidArgument: a value is not allowed, or two contradict each other.
    """

    in_channels: int = 4
    conditioning_channels: int = option(3, "channels of the control image", IMAGE_CHANNELS)
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: Sequence[str] = (*3 * ("CrossAttnDownBlock2D",), "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    only_cross_attention: bool | Sequence[bool] = False
    block_out_channels: Sequence[int] = (320, 640, 1280, 1280)
    layers_per_block: int = option(2, "residual blocks per level", whole(1, 16))
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = option(1280, "channels of a token", WIDTH)
    transformer_layers_per_block: int | Sequence[int] = 1
    encoder_hid_dim: int | None = option(None, "not supported", unsupported(None))
    encoder_hid_dim_type: str | None = option(None, "not supported", unsupported(None))
    attention_head_dim: int | Sequence[int] = 8
    num_attention_heads: int | None = option(None, "not supported", unsupported(None))
    use_linear_projection: bool = False
    class_embed_type: str | None = option(
        None, "kind of class", choice(None, "timestep", "identity", "projection")
    )
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = option(None, "number of labels", optional(whole(1, 1 << 20)))
    upcast_attention: bool = False
    resnet_time_scale_shift: str = "default"
    projection_class_embeddings_input_dim: int | None = None
    controlnet_conditioning_channel_order: str = option(
        "rgb", "order of the control image's channels", choice("rgb", "bgr")
    )
    conditioning_embedding_out_channels: Sequence[int] = option(
        (16, 32, 96, 256), "channels of the hint's levels", each(WIDTH, least=1)
    )
    global_pool_conditions: bool = option(False, "not supported", unsupported(False))
    addition_embed_type_num_heads: int = 64

    def __post_init__(self) -> None:
        check_fields(self)
        if self.class_embed_type == "timestep" and self.act_fn != "silu":
            raise InvalidArgument(
                f"act_fn must be 'silu' beside class_embed_type 'timestep', got {self.act_fn!r}"
            )

    @property
    def unet_options(self) -> dict[str, Any]:
        """Options of the U-Net whose down path this is; its up path has no attention."""
        options = {name: value for name, value in asdict(self).items() if name in _SHARED}
        levels = len(listed("block_out_channels", self.block_out_channels))
        return options | {"up_block_types": levels * ("UpBlock2D",), "out_channels": 1}


_SHARED = {field.name for field in fields(ControlNetConfig)} & {
    field.name for field in fields(UNet2DConditionModelConfig)
}  # options that mean the same in both
# What a U-Net may have besides, and the value without which its copy would be another function.
_DEPARTURES = {
    "class_embeddings_concat": False, "time_embedding_type": "positional", "conv_in_kernel": 3,
    "time_embedding_dim": None, "timestep_post_act": None, "time_embedding_act_fn": None,
    "center_input_sample": False,
}  # fmt: skip


class ControlNet(UNet):
    """The down path and the middle of a U-Net, with a hint at its input and zero convolutions.

    Args:
        config: arguments of diffusers' `ControlNetModel`, with diffusers' defaults.
    Raises:
        InvalidArgument: an unknown name, a value that is not allowed, or two that contradict
            each other.
    """

    class_names = ("ControlNetModel",)

    def __init__(self, **config: object):
        c = _config_of(config)
        super().__init__(_class_name="UNet2DConditionModel", **c.unet_options)
        del self.up_blocks, self.conv_norm_out, self.conv_out
        self.config, self.class_name = Config(asdict(c)), self.class_names[0]
        self.controlnet_cond_embedding = Hint(c)
        widths = [c.block_out_channels[0]]
        for block, width in zip(self.down_blocks, c.block_out_channels, strict=True):
            widths += [width] * (len(block.resnets) + len(block.downsamplers))
        self.controlnet_down_blocks = nn.ModuleList(_zero(2, width, width, 1) for width in widths)
        self.controlnet_mid_block = _zero(2, widths[-1], widths[-1], 1)

    def forward(
        self,
        sample: Tensor,
        timestep: int | float | Tensor,
        controlnet_cond: Tensor,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> list[Tensor]:
        """Map a noisy sample, its time and a control image to the residuals of a U-Net.

        Args:
            sample, timestep, encoder_hidden_states, class_labels: see `UNet.forward`.
            added_cond_kwargs, encoder_attention_mask: see `UNet.forward`.
            controlnet_cond: control image, (B, conditioning_channels, H, W), of
                `stride` times the sides of the sample.
        Returns:
            The argument `residuals` of `UNet.forward`; all zero for fresh weights.
        Raises:
            InvalidArgument: as `UNet.forward`, or a control image of another shape.
        """
        _, emb, text = self.embed(sample, timestep, encoder_hidden_states, class_labels, None,
                                  added_cond_kwargs, encoder_attention_mask)  # fmt: skip
        wanted = (
            len(sample),
            self.config.conditioning_channels,
            *(self.stride * side for side in sample.shape[2:]),
        )
        if controlnet_cond.shape != wanted:
            raise InvalidArgument(
                f"controlnet_cond must have shape {wanted}, got {tuple(controlnet_cond.shape)}"
            )
        warn_unless_finite("controlnet_cond", controlnet_cond)
        if self.config.controlnet_conditioning_channel_order == "bgr":
            controlnet_cond = controlnet_cond.flip(1)
        x = self.conv_in(sample) + self.controlnet_cond_embedding(controlnet_cond)
        zeros = (*self.controlnet_down_blocks, self.controlnet_mid_block)
        return [zero(x) for zero, x in zip(zeros, self.contract(x, emb, text), strict=True)]

    @property
    def stride(self) -> int:
        """Sides of the control image divided by those of the sample."""
        return 2 ** (len(self.config.conditioning_embedding_out_channels) - 1)

    @classmethod
    def from_unet(
        cls,
        unet: UNet,
        conditioning_channels: int = 3,
        conditioning_embedding_out_channels: Sequence[int] = (16, 32, 96, 256),
        controlnet_conditioning_channel_order: str = "rgb",
    ) -> "ControlNet":
        """Return a ControlNet that begins as a copy of a U-Net's down path.

        Args:
            unet: network that is to be controlled; it is not changed.
            conditioning_channels: channels of the control image.
            conditioning_embedding_out_channels: channels of the hint's levels, every level after
                the first halves the control image.
            controlnet_conditioning_channel_order: "rgb" or "bgr".
        Raises:
            InvalidArgument: the U-Net is no `UNet2DConditionModel`, or has an option that a
                ControlNet does not have.
        """
        one_of("class of the U-Net", unet.class_name, ("UNet2DConditionModel",))
        for name, value in _DEPARTURES.items():
            if unet.config[name] != value:
                raise InvalidArgument(
                    f"{name} of the U-Net must be {value!r} for a ControlNet, "
                    f"got {unet.config[name]!r}"
                )
        net = cls(
            conditioning_channels=conditioning_channels,
            conditioning_embedding_out_channels=conditioning_embedding_out_channels,
            controlnet_conditioning_channel_order=controlnet_conditioning_channel_order,
            **{name: unet.config[name] for name in _SHARED},
        )
        weights = unet.state_dict()
        own = {name for name in net.state_dict() if not name.startswith("controlnet_")}
        net.load_state_dict({name: weights[name] for name in own}, strict=False)
        return net.to(unet.conv_in.weight)

    @classmethod
    def min_tensors(cls, config: Mapping) -> int:
        return 5 * len(listed("block_out_channels", _config_of(config).block_out_channels))


describe_options(ControlNet, ControlNetConfig)


def _config_of(config: Mapping) -> ControlNetConfig:
    """Return the options of a folder or of the constructor. Raises InvalidArgument."""
    (name,) = ControlNet.class_names
    one_of("_class_name", config.get("_class_name", name), ControlNet.class_names)
    given = {option: value for option, value in config.items() if not option.startswith("_")}
    return parse_options(ControlNetConfig, given, name)


class Hint(nn.Module):
    """The embedding of the control image, in the size of the sample; its last layer is zero.

    The layers before it are not, and they matter: a zero convolution alone that reads the pixels
    does not learn (https://github.com/lllyasviel/ControlNet/issues/373).
    """

    def __init__(self, c: ControlNetConfig):
        super().__init__()
        widths = c.conditioning_embedding_out_channels
        self.conv_in = nn.Conv2d(c.conditioning_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in pairwise(widths):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, wider, 3, padding=1, stride=2))
        self.conv_out = _zero(2, widths[-1], c.block_out_channels[0], 3)

    def forward(self, image: Tensor) -> Tensor:
        x = F.silu(self.conv_in(image))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


def _zero(dims: int, in_channels: int, width: int, kernel: int) -> nn.Module:
    layer = CONVOLUTIONS[dims](in_channels, width, kernel, padding=kernel // 2)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def guessing(residuals: Sequence[Tensor]) -> list[Tensor]:
    """Return residuals scaled from 0.1 at the largest size to 1 in the middle (guess mode).

    Source: the code of Zhang et al. 2023, where the prompt of such a call is empty.
    """
    scales = torch.logspace(-1, 0, len(residuals)).tolist()
    return [residual * scale for residual, scale in zip(residuals, scales, strict=True)]
