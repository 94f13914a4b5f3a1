"""Calls of a network with bad input: each is refused, or warned of, by the name of the argument."""

import math

import pytest
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.nn import AutoencoderKL, UNet
from minidiff.nn.mlp import MLP

CLASSES = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (8,), "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "num_class_embeds": 5,
}  # fmt: skip
TEXT = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (8,), "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
    "cross_attention_dim": 12, "attention_head_dim": 2, "time_cond_proj_dim": 6,
}  # fmt: skip
NAN, INF = math.nan, math.inf


def x_of(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tokens(length: int = 4) -> Tensor:
    return x_of(2, length, 12)


def spoilt(x: Tensor, value: float) -> Tensor:
    """Return a copy whose last entry is `value`."""
    x = x.clone()
    x.view(-1)[-1] = value
    return x


@pytest.mark.parametrize("network", ["unet", "mlp"])
@pytest.mark.parametrize("labels", [[0, 5], [-1, 0], [0, 2**40]])
def test_class_labels_out_of_range_are_refused_on_the_cpu(network, labels):
    net, x = (UNet(**CLASSES), x_of(2, 3, 8, 8))
    if network == "mlp":
        net, x = MLP(num_class_embeds=5), x_of(2, 2)
    match = rf"class_labels must be in 0\.\.4, got {min(labels)} to {max(labels)}"
    with pytest.raises(InvalidArgument, match=match):
        net(x, 3, class_labels=torch.tensor(labels))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("network", ["unet", "mlp"])
def test_a_sample_that_is_not_finite_is_warned_of_on_the_cpu(network, value):
    net, x = (UNet(**CLASSES), x_of(2, 3, 8, 8))
    if network == "mlp":
        net, x = MLP(num_class_embeds=5), x_of(2, 2)
    labels, kind = torch.tensor([0, 1]), "NaN" if value != value else "infinite"
    with pytest.warns(UserWarning, match=f"sample must be finite, got {kind} in"):
        net(spoilt(x, value), 3, class_labels=labels)


def test_a_large_sample_whose_sum_overflows_is_finite(recwarn):
    x = torch.full((2, 3, 8, 8), 3e38)
    assert UNet(**CLASSES)(x, 3, class_labels=torch.tensor([0, 1])).shape == x.shape
    assert not recwarn.list


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "form", [float, torch.tensor, lambda v: torch.tensor([1.0, v]), lambda v: torch.tensor([v] * 2)]
)
def test_a_time_that_is_not_finite_is_refused(form, value):
    for net, x in ((UNet(**CLASSES), x_of(2, 3, 8, 8)), (MLP(num_class_embeds=5), x_of(2, 2))):
        with pytest.raises(InvalidArgument, match="timestep must be finite, got"):
            net(x, form(value), class_labels=torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "t", [torch.tensor(1j), torch.tensor([1j, 2]), torch.tensor(True), torch.tensor([True, False])]
)
def test_a_complex_or_boolean_time_is_refused(t):
    with pytest.raises(InvalidArgument, match="timestep must hold real numbers, got torch"):
        UNet(**CLASSES)(x_of(2, 3, 8, 8), t, class_labels=torch.tensor([0, 1]))


def test_a_text_without_tokens_is_refused():
    with pytest.raises(InvalidArgument, match=r"hidden_states must have tokens, got \(2, 0, 12\)"):
        UNet(**TEXT)(x_of(2, 3, 8, 8), 3, tokens(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sample", "encoder_hidden_states", "timestep_cond"])
def test_an_input_of_another_dtype_is_refused_by_name_unless_autocast_converts_it(name, dtype):
    unet = UNet(**TEXT)
    inputs = {
        "sample": x_of(2, 3, 8, 8), "encoder_hidden_states": tokens(), "timestep_cond": x_of(2, 6),
    }  # fmt: skip
    inputs[name] = inputs[name].to(dtype)
    match = f"{name} must have the dtype of the network, torch.float32, got {dtype}"
    with pytest.raises(InvalidArgument, match=match):
        unet(timestep=3, **inputs)
    if dtype != torch.float64:  # which autocast leaves as it is
        with torch.autocast("cpu", torch.bfloat16):
            assert unet(timestep=3, **inputs).isfinite().all()


@pytest.mark.parametrize("value", [NAN, INF])
def test_conditioning_that_is_not_finite_is_warned_of_by_name(value):
    unet, inputs = UNet(**TEXT), {"encoder_hidden_states": tokens(), "timestep_cond": x_of(2, 6)}
    for name, x in inputs.items():
        with pytest.warns(UserWarning, match=f"{name} must be finite"):
            unet(x_of(2, 3, 8, 8), 3, **inputs | {name: spoilt(x, value)})


def test_conditioning_of_another_kind_is_refused_by_name_in_one_line():
    unet, inputs = UNet(**TEXT), {"encoder_hidden_states": tokens(), "timestep_cond": x_of(2, 6)}
    for name, x in inputs.items():
        for bad in (x.numpy(), x.long(), x[:1], 5, "x", [1]):
            with pytest.raises(InvalidArgument, match=f"^{name} must.*, got") as error:
                unet(x_of(2, 3, 8, 8), 3, **inputs | {name: bad})
            assert "\n" not in str(error.value)
    for bad in (5, "x", {"a": 1}):
        with pytest.raises(InvalidArgument, match="added_cond_kwargs must be None"):
            unet(x_of(2, 3, 8, 8), 3, **inputs, added_cond_kwargs=bad)


def test_a_mask_of_tokens_holds_zeros_and_ones():
    unet, mask = UNet(**TEXT), torch.ones(2, 4)
    call = {"sample": x_of(2, 3, 8, 8), "timestep": 3, "encoder_hidden_states": tokens()}
    for bad in (mask / 2, -mask, mask * NAN):
        with pytest.raises(InvalidArgument, match="encoder_attention_mask must hold 0 and 1 only"):
            unet(**call, encoder_attention_mask=bad)
    for good in (mask, mask.bool(), mask.long()):
        assert torch.equal(unet(**call, encoder_attention_mask=good), unet(**call))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_every_network_refuses_inputs_of_another_dtype(dtype):
    vae, mlp = AutoencoderKL(**VAE), MLP()
    for call, x, name in (
        (vae, x_of(1, 3, 8, 8), "x"), (vae.encode, x_of(1, 3, 8, 8), "x"),
        (vae.decode, x_of(1, 4, 4, 4), "z"), (lambda x: mlp(x, 3), x_of(2, 2), "sample"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match=f"{name} must have the dtype of the network"):
            call(x.to(dtype))


def test_a_sparse_input_is_refused():
    for call, x in (
        (lambda x: UNet(**TEXT)(x, 3, tokens()), x_of(2, 3, 8, 8)),
        (AutoencoderKL(**VAE).encode, x_of(1, 3, 8, 8)),
    ):
        with pytest.raises(InvalidArgument, match=r"must be dense, got torch\.sparse_coo"):
            call(x.to_sparse())


VAE = {
    "block_out_channels": (8, 8), "down_block_types": 2 * ("DownEncoderBlock2D",),
    "up_block_types": 2 * ("UpDecoderBlock2D",), "norm_num_groups": 4,
}  # fmt: skip


@pytest.mark.parametrize("sides", [(9, 8), (8, 9), (9, 9)])
def test_a_vae_warns_of_sides_that_it_does_not_give_back(sides):
    with pytest.warns(UserWarning, match="not divisible by 2: its last rows or columns are lost"):
        out = AutoencoderKL(**VAE)(x_of(1, 3, *sides))
    assert out.shape == (1, 3, 8, 8)


def test_a_vae_warns_of_pixels_as_bytes(recwarn):
    vae = AutoencoderKL(**VAE)
    vae(x_of(1, 3, 8, 8))
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"x reaches 255, pixels must be in \[−1, 1\]"):
        vae(torch.linspace(0, 255, 192).view(1, 3, 8, 8))


@pytest.mark.filterwarnings("ignore:x reaches inf")
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_vae_warns_of_images_and_latents_that_are_not_finite(value):
    vae = AutoencoderKL(**VAE)
    with pytest.warns(UserWarning, match="x must be finite"):
        vae.encode(spoilt(torch.zeros(1, 3, 8, 8), value))
    with pytest.warns(UserWarning, match="z must be finite"):
        vae.decode(spoilt(x_of(1, 4, 4, 4), value))
