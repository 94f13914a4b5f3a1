"""ControlNet: equal to diffusers' ControlNetModel, and to the U-Net alone where training begins."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import distance, same_weights
from test_unet_condition import ACTIVATIONS, one_or_many

from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.nn import ControlNet, UNet

diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()

SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
UNET = SMALL | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
DOWN = ("CrossAttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")


@st.composite
def configs(draw: st.DrawFn) -> dict:
    groups, levels = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kinds = [
        {"num_class_embeds": 5},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 7},
        {"class_embed_type": "identity"},
        {"addition_embed_type": "text_time", "addition_time_embed_dim": 6,
         "projection_class_embeddings_input_dim": 10 + 6 * 6},
        {},
    ]  # fmt: skip
    return {
        "in_channels": draw(st.integers(1, 4)),
        "conditioning_channels": draw(st.integers(1, 3)),
        "flip_sin_to_cos": draw(st.booleans()),
        "freq_shift": draw(st.integers(0, 1)),
        "block_out_channels": [4 * groups * draw(st.integers(1, 2)) for _ in range(levels)],
        "down_block_types": [draw(st.sampled_from(DOWN)) for _ in range(levels)],
        "mid_block_type": draw(st.sampled_from(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"])),
        "only_cross_attention": one_or_many(draw, st.booleans(), levels),
        "layers_per_block": draw(st.integers(1, 2)),
        "downsample_padding": draw(st.integers(0, 1)),
        "mid_block_scale_factor": draw(st.sampled_from([1, 1.5])),
        "act_fn": draw(st.sampled_from(ACTIVATIONS)),
        "norm_num_groups": groups,
        "cross_attention_dim": draw(st.sampled_from([6, 8])),
        "transformer_layers_per_block": one_or_many(draw, st.integers(1, 2), levels),
        "attention_head_dim": one_or_many(draw, st.integers(1, 4), levels),
        "use_linear_projection": draw(st.booleans()),
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "controlnet_conditioning_channel_order": draw(st.sampled_from(["rgb", "bgr"])),
        "conditioning_embedding_out_channels": draw(
            st.lists(st.integers(3, 6), min_size=1, max_size=3)
        ),
        **draw(st.sampled_from(kinds)),
    }


def inputs(config: dict, dtype: torch.dtype) -> dict:
    """Return random inputs of a network for a batch of two of 8×8."""
    side = 8 * 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    types = [*config["down_block_types"], config["mid_block_type"]]
    width, first = config["cross_attention_dim"], config["block_out_channels"][0]
    given = {"controlnet_cond": torch.rand(2, config["conditioning_channels"], side, side)}
    if any("CrossAttn" in kind for kind in types):
        given["encoder_hidden_states"] = torch.randn(2, 3, width)
    if config.get("num_class_embeds"):
        given["class_labels"] = torch.tensor([1, 4])
    elif config.get("class_embed_type"):
        size = 7 if config["class_embed_type"] == "projection" else 4 * first
        given["class_labels"] = torch.randn(2, size)
    elif config.get("addition_embed_type"):
        added = {"text_embeds": torch.randn(2, 10), "time_ids": torch.randn(2, 6)}
        given["added_cond_kwargs"] = {k: v.to(dtype) for k, v in added.items()}
    floats = {k: v for k, v in given.items() if k not in ("class_labels", "added_cond_kwargs")}
    labels = given.get("class_labels")
    if labels is not None and labels.is_floating_point():
        floats["class_labels"] = labels
    return given | {name: value.to(dtype) for name, value in floats.items()}


def filled(network: torch.nn.Module) -> torch.nn.Module:
    """Return a network whose zero convolutions hold random numbers."""
    for name, parameter in network.named_parameters():
        if name.startswith(("controlnet_down", "controlnet_mid", "controlnet_cond_embedding.co")):
            torch.nn.init.normal_(parameter, std=0.3)
    return network


@given(configs(), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 99))
@settings(max_examples=12, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
def test_residuals_and_gradients_are_those_of_diffusers(
    config: dict, dtype: torch.dtype, seed: int
) -> None:
    ours, theirs = same_weights(ControlNet, diffusers.ControlNetModel, config, seed)
    ours.load_state_dict(filled(theirs).state_dict(), strict=True)
    ours, theirs = ours.to(dtype).eval(), theirs.to(dtype).eval()
    given = inputs(config, dtype)
    xs = [torch.randn(2, config["in_channels"], 8, 8, dtype=dtype, requires_grad=True)]
    xs.append(xs[0].detach().clone().requires_grad_())
    residuals = ours(xs[0], 7, **given)
    text = given.pop("encoder_hidden_states", torch.zeros(2, 3, 6, dtype=dtype))
    down, mid = theirs(xs[1], 7, text, return_dict=False, **given)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    assert len(residuals) == len(down) + 1
    for a, b in zip(residuals, [*down, mid], strict=True):
        assert a.shape == b.shape
        assert distance(a, b) < tolerance
    for outputs in (residuals, [*down, mid]):
        sum((out * (i + 1)).square().sum() for i, out in enumerate(outputs)).backward()
    assert distance(xs[0].grad, xs[1].grad) < 10 * tolerance
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    largest = max(gradient.norm().item() for gradient in expected.values())
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            error = (parameter.grad - expected.pop(name, 0)).norm().item()
            assert error < 10 * tolerance * largest, name
    assert not [name for name, gradient in expected.items() if gradient.any()]


def test_a_copy_of_a_network_begins_as_that_of_diffusers_and_leaves_it_bit_equal() -> None:
    unet, theirs = same_weights(UNet, diffusers.UNet2DConditionModel, UNET, 0)
    net = ControlNet.from_unet(unet, 1, (5, 6))
    other = diffusers.ControlNetModel.from_unet(
        theirs, conditioning_channels=1, conditioning_embedding_out_channels=(5, 6)
    )
    wanted = other.state_dict()
    assert wanted.keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        if not name.startswith("controlnet_cond_embedding."):  # whose first layers are random
            assert torch.equal(value, wanted[name]), name
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 12)
    residuals = net(x, 9, torch.rand(2, 1, 16, 16), text)
    assert not any(residual.any() for residual in residuals)
    assert torch.equal(unet(x, 9, text, residuals=residuals), unet(x, 9, text))


def test_the_network_takes_residuals_as_that_of_diffusers_does() -> None:
    unet, theirs = same_weights(UNet, diffusers.UNet2DConditionModel, UNET, 0)
    net = filled(ControlNet.from_unet(unet, 1, (5,)))
    x, text, image = torch.randn(2, 4, 9, 7), torch.randn(2, 3, 12), torch.rand(2, 1, 9, 7)
    *down, mid = net(x, 9, image, text)
    expected = theirs(
        x, 9, text, down_block_additional_residuals=down, mid_block_additional_residual=mid
    ).sample
    assert distance(unet(x, 9, text, residuals=[*down, mid]), expected) < 1e-5
    assert distance(unet(x, 9, text), expected) > 1e-2


def test_folders_are_read_by_diffusers_and_the_other_way_round(tmp_path) -> None:
    net = filled(ControlNet(**SMALL, conditioning_channels=1))
    net.save_pretrained(tmp_path / "ours")
    theirs = diffusers.ControlNetModel.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = ControlNet.from_pretrained(tmp_path / "theirs")
    assert again.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    written = {k: list(v) if isinstance(v, tuple) else v for k, v in net.config.items()}
    assert {k: theirs.config[k] for k in written} | {} == {
        k: tuple(v) if isinstance(theirs.config[k], tuple) else v for k, v in written.items()
    }
    with pytest.raises(CheckpointError, match="_class_name must be one of ControlNetModel"):
        UNet(**UNET).save_pretrained(tmp_path / "unet")
        ControlNet.from_pretrained(tmp_path / "unet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditioning_channels": 0}, "conditioning_channels must be"),
        ({"conditioning_embedding_out_channels": ()}, "must list at least 1"),
        ({"controlnet_conditioning_channel_order": "grb"}, "must be one of rgb, bgr"),
        ({"global_pool_conditions": True}, "global_pool_conditions=True is not supported"),
        ({"block_out_channels": 8}, "block_out_channels must be a list"),
        ({"down_block_types": ("Down",)}, "down_block_types"),
        ({"out_channels": 3}, "'out_channels' is not an option of ControlNetModel"),
        ({"class_embed_type": "timestep", "act_fn": "gelu"}, "act_fn must be 'silu'"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        ControlNet(**SMALL | options)


def test_a_network_that_it_cannot_copy_is_refused_by_the_option() -> None:
    with pytest.raises(InvalidArgument, match="class of the U-Net must be one of UNet2DCondition"):
        ControlNet.from_unet(UNet(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
                                  down_block_types=("DownBlock2D",),
                                  up_block_types=("UpBlock2D",)))  # fmt: skip
    with pytest.raises(InvalidArgument, match="conv_in_kernel of the U-Net must be 3"):
        ControlNet.from_unet(UNet(**UNET, conv_in_kernel=5))


def test_a_control_image_of_another_shape_is_refused() -> None:
    net = ControlNet(**SMALL, conditioning_channels=1, conditioning_embedding_out_channels=(4, 4))
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 12)
    for shape in ((1, 1, 8, 8), (1, 3, 16, 16), (2, 1, 16, 16)):
        with pytest.raises(InvalidArgument, match=r"must have shape \(1, 1, 16, 16"):
            net(x, 3, torch.rand(shape), text)
