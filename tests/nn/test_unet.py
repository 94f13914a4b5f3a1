"""The U-Net: equal to diffusers' UNet2DModel, invariant, and with strict arguments."""

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import assert_same_network, distance, same_weights
from torch import Tensor

from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.nn import UNet
from minidiff.nn.blocks.layers import GroupNorm

diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()  # it warns at every `.to(float64)`

SMALL = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
EMBED_TYPES = ({"class_embed_type": "timestep"}, {"class_embed_type": "identity"})
UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")


def labels_for(config: dict, batch: int, dtype: torch.dtype) -> Tensor | None:
    if config.get("num_class_embeds"):
        return torch.randint(0, config["num_class_embeds"], (batch,))
    if config.get("class_embed_type") == "timestep":
        return torch.randint(0, 1000, (batch,))
    if config.get("class_embed_type") == "identity":
        return torch.randn(batch, 4 * config["block_out_channels"][0], dtype=dtype)
    return None


def pair(config: dict, seed: int = 0) -> tuple[UNet, torch.nn.Module]:
    return same_weights(UNet, diffusers.UNet2DModel, config, seed)


@st.composite
def configs(draw) -> dict:
    groups = draw(st.integers(1, 4))
    levels = draw(st.integers(1, 3))
    classes = draw(st.sampled_from([{}, {"num_class_embeds": 5}, *EMBED_TYPES]))
    return {
        "in_channels": draw(st.integers(1, 4)),
        "out_channels": draw(st.integers(1, 4)),
        "center_input_sample": draw(st.booleans()),
        "flip_sin_to_cos": draw(st.booleans()),
        "freq_shift": draw(st.integers(0, 1)),
        "block_out_channels": [4 * groups * draw(st.integers(1, 2)) for _ in range(levels)],
        "down_block_types": [draw(st.sampled_from(DOWN)) for _ in range(levels)],
        "up_block_types": [draw(st.sampled_from(UP)) for _ in range(levels)],
        "mid_block_type": draw(st.sampled_from(["UNetMidBlock2D", None])),
        "layers_per_block": draw(st.integers(1, 2)),
        "mid_block_scale_factor": draw(st.sampled_from([1, 1.5])),
        "downsample_padding": draw(st.integers(0, 1)),
        "downsample_type": draw(st.sampled_from(["conv", "resnet"])),
        "upsample_type": draw(st.sampled_from(["conv", "resnet"])),
        "act_fn": draw(st.sampled_from(["silu", "mish", "gelu", "relu"])),
        "attention_head_dim": draw(st.sampled_from([1, 2, 3, 4, None])),
        "norm_num_groups": groups,
        "attn_norm_num_groups": draw(st.sampled_from([None, 1, 2])),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "add_attention": draw(st.booleans()),
        "time_embedding_dim": draw(st.sampled_from([None, 12])) if not classes else None,
        **classes,
    }


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=configs(), height=st.integers(1, 3), width=st.integers(1, 3), seed=st.integers(0, 99))
def test_output_and_gradients_equal_diffusers(config, height, width, seed):
    ours, theirs = pair(config, seed)
    divisor = 2 ** (len(config["block_out_channels"]) - 1)
    for dtype in (torch.float32, torch.float64):
        if config.get("class_embed_type") == "timestep" and dtype == torch.float64:
            continue  # diffusers gives its float64 linear layer float32 features, and fails
        x = torch.randn(2, config["in_channels"], height * divisor, width * divisor, dtype=dtype)
        t, labels = torch.tensor([0, 700]), labels_for(config, 2, dtype)
        assert_same_network(
            ours.to(dtype),
            theirs.to(dtype),
            lambda net, x, t=t, labels=labels: net(x, t, class_labels=labels),
            x,
        )


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", [(7, 5), (6, 9), (28, 28), (3, 3)])
def test_odd_sizes_equal_diffusers_conditional_unet(size, padding):
    # UNet2DModel fails on them; UNet2DConditionModel without attention is the same network.
    levels = {
        "block_out_channels": (8, 8, 16),
        "down_block_types": 3 * ("DownBlock2D",),
        "up_block_types": 3 * ("UpBlock2D",),
        "mid_block_type": None,
        "norm_num_groups": 4,
        "in_channels": 1,
        "out_channels": 1,
        "downsample_padding": padding,
    }
    theirs, ours = diffusers.UNet2DConditionModel(**levels), UNet(**levels)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    if padding == 0 and min(size) < 4:
        with pytest.raises(InvalidArgument, match="sides >= 4"):
            ours(torch.zeros(1, 1, *size), 3)
        return
    x = torch.randn(2, 1, *size)
    with torch.no_grad():
        assert distance(ours(x, 9), theirs(x, 9, None).sample) < 1e-5


def test_fourier_times_equal_diffusers():
    ours, theirs = pair({**SMALL, "time_embedding_type": "fourier"})
    x, t = torch.randn(2, 3, 4, 6), torch.tensor([0.1, 20.0])
    assert distance(ours(x, t), theirs(x, t).sample) < 1e-5


def test_times_may_be_a_number_a_scalar_or_one_per_image():
    unet, x = UNet(**SMALL), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        expected = unet(x, torch.tensor([7, 7]))
        for t in (7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor([7.0, 7.0])):
            assert torch.equal(unet(x, t), expected)
        assert not torch.equal(unet(x, 7.5), expected)  # fractions of a step are not cut off


def test_one_image_of_a_batch_equals_the_image_alone():
    unet = UNet(**SMALL, num_class_embeds=4).double()
    x, t, labels = torch.randn(5, 3, 6, 5).double(), torch.arange(5) * 200, torch.arange(5) % 4
    with torch.no_grad():
        batch = unet(x, t, class_labels=labels)
        for i in range(5):
            assert (
                distance(unet(x[i : i + 1], t[i], class_labels=labels[i : i + 1])[0], batch[i])
                < 1e-13
            )


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("kind", ["conv", "resnet"])
def test_networks_of_1_2_and_3_dimensions_agree_on_thin_images(dims, kind):
    """A 2D U-Net whose kernels are zero except in the middle column equals one in 1D for images
    one column wide; likewise 3D and 2D."""
    options = {**SMALL, "resnet_time_scale_shift": "scale_shift", "upsample_type": kind}
    low, high = (UNet(**options, dims=d) for d in sorted((2, dims)))
    wide = high.state_dict()
    for name, value in low.state_dict().items():
        if value.dim() == wide[name].dim():
            wide[name] = value
        else:
            wide[name] = torch.zeros_like(wide[name])
            wide[name][..., wide[name].shape[-1] // 2] = value
    high.load_state_dict(wide)
    x = torch.randn(2, 3, *(8, 6)[: min(2, dims)])
    with torch.no_grad():
        assert distance(low(x, 5), high(x[..., None], 5)[..., 0]) < 1e-5


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_weight_gets_a_gradient(dims):
    unet = UNet(**SMALL, dims=dims, num_class_embeds=3)
    labels = torch.tensor([0, 2])
    x = torch.randn(2, 3, *(5, 4, 6)[:dims])
    unet(x, 3, class_labels=labels).square().sum().backward()
    for name, parameter in unet.named_parameters():
        if name.endswith("to_k.bias"):
            continue  # a softmax does not see what is added to all its arguments
        assert parameter.grad.abs().max() > 0, name


def test_bfloat16_stays_near_float32():
    unet, x = UNet(**SMALL).eval(), torch.randn(4, 3, 8, 8)
    channels_last = torch.channels_last
    with torch.no_grad():
        exact = unet(x, 500)
        with torch.autocast("cpu", torch.bfloat16):
            assert distance(unet(x, 500).float(), exact) < 2e-2
        unet.to(torch.bfloat16, memory_format=channels_last)
        out = unet(x.to(torch.bfloat16, memory_format=channels_last), 500)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=channels_last)
    assert distance(out.float(), exact) < 2e-2


def test_channels_last_changes_rounding_only():
    unet, x = UNet(**SMALL).double(), torch.randn(2, 3, 6, 6).double()
    with torch.no_grad():
        expected = unet(x, 1)
        unet.to(memory_format=torch.channels_last)
        assert distance(unet(x.to(memory_format=torch.channels_last), 1), expected) < 1e-13


@pytest.mark.parametrize("depth", [1, 6, 8, 16, 24])
@pytest.mark.parametrize("side", [1, 7, 32])
@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 2e-2), (torch.float64, 1e-12)])
def test_a_norm_keeps_the_memory_format_and_gives_the_same_numbers(depth, side, dtype, close):
    torch.manual_seed(0)
    norm = GroupNorm(2, 2 * depth, 1e-5, torch.nn.SiLU()).to(dtype)
    x = (3 * torch.randn(2, 2 * depth, side, side) + 10).to(dtype)
    expected = norm.double()(x.double())
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    for each in (x, last):
        out = norm.to(dtype)(each)
        assert out.dtype == dtype
        assert out.stride() == each.stride()
        assert (out - expected).abs().max() < close * max(1, expected.abs().max())
    out.sum().backward()
    assert last.grad.isfinite().all()


def test_time_features_stay_float32_in_a_bfloat16_network():
    unet, t = UNet(**SMALL), torch.tensor([999])
    assert torch.equal(unet.time_proj(t), unet.to(torch.bfloat16).time_proj(t))


# ----------------------------------------------------------------------------------- folders


def test_folders_round_trip_between_the_libraries_bit_for_bit(tmp_path):
    config = {**SMALL, "sample_size": 8, "num_class_embeds": 4, "norm_eps": 1e-6}
    _, theirs = pair(config)
    theirs.save_pretrained(tmp_path / "a")
    ours = UNet.from_pretrained(tmp_path / "a")
    ours.save_pretrained(tmp_path / "b")
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "b")
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])
        assert torch.equal(value, again.state_dict()[name])
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(theirs.eval()(x, 3, labels).sample, again(x, 3, labels).sample)
        assert distance(ours(x, 3, class_labels=labels), again(x, 3, labels).sample) < 1e-5
    assert not ours.training
    assert (ours.config.sample_size, ours.config["norm_eps"]) == (8, 1e-6)
    assert {**again.config, "_class_name": ""}.items() >= ours.config.items()


def test_dims_is_written_only_where_it_is_not_two(tmp_path):
    for dims in (1, 2, 3):
        UNet(**SMALL, dims=dims).save_pretrained(tmp_path / str(dims))
        written = json.loads((tmp_path / str(dims) / "config.json").read_text())
        assert written.get("dims", 2) == dims
        assert ("dims" in written) == (dims != 2)
        assert UNet.from_pretrained(tmp_path / str(dims)).conv_in.weight.dim() == dims + 2


def test_saving_over_other_files_is_refused(tmp_path):
    unet = UNet(**SMALL)
    unet.save_pretrained(tmp_path / "u")
    unet.save_pretrained(tmp_path / "u")  # over itself is fine
    (tmp_path / "u" / "notes.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        unet.save_pretrained(tmp_path / "u")
    assert (tmp_path / "u" / "notes.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_out_channels": [8, 32]}, "has shape"),
        ({"layers_per_block": 2}, "missing"),
        ({"layers_per_block": 1_000_000_000}, "layers_per_block must be in 1..16"),
        ({"block_out_channels": [16384, 16384]}, "unexpected"),  # refused before memory is taken
        ({"cross_attention_dim": 8}, "cross_attention_dim"),
        ({"_class_name": "UNet2DConditionModel"}, "'add_attention' is not an option of UNet2DCond"),
        ({"_class_name": "UNet1DModel"}, "_class_name must be one of UNet2DModel"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(tmp_path, change, message):
    UNet(**SMALL).save_pretrained(tmp_path / "u")
    config = tmp_path / "u" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        UNet.from_pretrained(tmp_path / "u")


def test_a_pickle_is_refused_with_advice(tmp_path):
    UNet(**SMALL).save_pretrained(tmp_path / "u")
    weights = tmp_path / "u" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="convert it with the library that wrote it"):
        UNet.from_pretrained(tmp_path / "u")


def test_notes_in_a_config_are_ignored():
    assert UNet.from_config({**SMALL, "_diffusers_version": "0.42.1", "_name_or_path": "x"})


# ---------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chanels": 3}, "'chanels' is not an option of UNet2DModel, which has sample_size, in_"),
        ({"dims": 4}, "dims must be in 1..3, got 4"),
        ({"in_channels": 0}, "in_channels must be"),
        ({"out_channels": 2.5}, "out_channels must be a whole number"),
        ({"sample_size": (8,)}, "sample_size must have 2 entries"),
        ({"sample_size": -1}, "sample_size must be"),
        ({"center_input_sample": 1}, "center_input_sample must be True or False"),
        ({"time_embedding_type": "learned"}, "time_embedding_type must be one of positional"),
        ({"time_embedding_dim": 0}, "time_embedding_dim must be"),
        ({"num_train_timesteps": 1000}, "num_train_timesteps must be None"),
        ({"freq_shift": 4}, "freq_shift must be below"),
        ({"freq_shift": float("nan")}, "freq_shift must be"),
        ({"down_block_types": ("DownBlock2D",)}, "down_block_types must have 2 entries, got 1"),
        ({"up_block_types": 3 * ("UpBlock2D",)}, "up_block_types must have 2 entries, got 3"),
        ({"up_block_types": "UpBlock2D"}, "up_block_types must be a list"),
        ({"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, "got 'SkipDownBlock2D'"),
        ({"mid_block_type": "UNetMidBlock2DSimple"}, "mid_block_type must be one of"),
        ({"block_out_channels": ()}, "block_out_channels must be in 1..8"),
        ({"block_out_channels": (8, 18)}, r"multiples of norm_num_groups \(4\), got 18"),
        ({"layers_per_block": 0}, "layers_per_block must be in 1..16"),
        ({"layers_per_block": (1, 2)}, "layers_per_block must be a whole number"),
        ({"mid_block_scale_factor": 0}, "mid_block_scale_factor must be"),
        ({"downsample_padding": 2}, "downsample_padding must be in 0..1"),
        ({"downsample_type": "pool"}, "downsample_type must be one of conv, resnet"),
        ({"upsample_type": None}, "upsample_type must be one of conv, resnet"),
        ({"dropout": 1.5}, "dropout must be"),
        ({"act_fn": "tanh"}, "act_fn must be one of silu"),
        ({"attention_head_dim": 0}, "attention_head_dim must be"),
        ({"attention_head_dim": 32}, "attention_head_dim must be in 1..16, got 32"),
        ({"norm_num_groups": None}, "norm_num_groups must be"),
        ({"attn_norm_num_groups": 3}, "attn_norm_num_groups must divide"),
        ({"norm_eps": 0}, "norm_eps must be"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift must be one of default"),
        ({"add_attention": None}, "add_attention must be True or False"),
        ({"class_embed_type": "projection"}, "class_embed_type must be one of None"),
        ({"class_embed_type": "timestep", "num_class_embeds": 3}, "class_embed_type must be None"),
        ({"class_embed_type": "timestep", "time_embedding_type": "fourier"}, "'positional'"),
        ({"num_class_embeds": 0}, "num_class_embeds must be"),
    ],
)
def test_a_bad_argument_is_refused_by_name(change, message):
    with pytest.raises(InvalidArgument, match=message):
        UNet(**{**SMALL, **change})


X, LABELS = torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "classes", "message"),
    [
        ((torch.zeros(2, 3, 4), 1), {}, r"sample must have shape \(B, 3, side, side\)"),
        ((torch.zeros(2, 4, 4, 4), 1), {}, r"sample must have shape .*got \(2, 4, 4, 4\)"),
        ((X[:0], 1), {}, "sample must have shape"),
        ((X[..., :0], 1), {}, "sample must have sides >= 1"),
        ((X.long(), 1), {}, "sample must be floating point"),
        (([0.0], 1), {}, "sample must be a tensor"),
        ((X, "1"), {}, "timestep must be a number or a tensor"),
        ((X, torch.zeros(3)), {}, r"timestep must have shape \(\) or \(2,\), got \(3,\)"),
        ((X, np.complex64(1)), {}, "timestep must be a number or a tensor"),
        ((X, torch.tensor(1 + 0j)), {}, "timestep must hold real numbers, got torch.complex64"),
        ((X, torch.tensor(True)), {}, "timestep must hold real numbers, got torch.bool"),
        ((X, 1, None, LABELS), {}, "class_labels must be None"),
        ((X, 1), {"num_class_embeds": 3}, r"class_labels must be a tensor of shape \(2,\)"),
        ((X, 1, None, LABELS.float()), {"num_class_embeds": 3}, "class_labels must be int64"),
        ((X, 1, None, LABELS[:1]), {"num_class_embeds": 3}, "class_labels must have shape"),
        ((X, 1, None, LABELS[:, None]), EMBED_TYPES[0], "class_labels must have"),
        ((X, 1, None, torch.zeros(2, 3)), EMBED_TYPES[1], r"shape \(2, 32\)"),
        ((X, 1, torch.zeros(2, 5, 8)), {}, "encoder_hidden_states must be None"),
        ((X, 1, None, None, torch.zeros(2, 8)), {}, "timestep_cond must be None"),
        ((X, 1, None, None, None, {"time_ids": X}), {}, "added_cond_kwargs must be None"),
        ((X, 1, None, None, None, None, X), {}, "encoder_attention_mask must be None"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, classes, message):
    with pytest.raises(InvalidArgument, match=message):
        UNet(**SMALL, **classes)(*arguments)
