"""DiT, MMDiT and T5: equal to diffusers' and transformers' networks, with strict arguments."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import assert_same_network, distance
from tiny_pipelines import SD3_TRANSFORMER, t5_encoder
from torch import nn

from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.nn import DiT, MMDiT, T5Encoder
from minidiff.nn.blocks.adaptive import positions

diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()

FEW = settings(
    max_examples=6, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
DIT = {
    "sample_size": 8, "in_channels": 3, "num_layers": 2, "num_attention_heads": 2,
    "attention_head_dim": 8, "num_embeds_ada_norm": 5,
}  # fmt: skip
T, LABELS = torch.tensor([3.0, 500.0]), torch.tensor([1, 5])


@st.composite
def shared(draw: st.DrawFn) -> dict:
    patch = draw(st.sampled_from([1, 2, 4]))
    return {
        "patch_size": patch, "sample_size": patch * draw(st.integers(2, 4)),
        "in_channels": draw(st.integers(1, 4)), "num_layers": draw(st.integers(1, 3)),
        "out_channels": draw(st.sampled_from([None, 1, 5])),
        "num_attention_heads": draw(st.integers(1, 3)), "attention_head_dim": 8,
    }  # fmt: skip


def same_weights(ours: type, theirs: type, config: dict, dtype: torch.dtype) -> tuple:
    """Return both networks with the same random weights, loaded strictly both ways."""
    torch.manual_seed(len(str(config)))
    ours, theirs = ours(**config).to(dtype), theirs(**config).to(dtype)
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=max(weight.shape[-1], 4) ** -0.5)  # as if trained, not zero
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@FEW
@given(options=shared(), bias=st.booleans(), affine=st.booleans())
def test_a_dit_equals_that_of_diffusers(dtype, options, bias, affine):
    options = {"num_embeds_ada_norm": 5, **options}
    options |= {"attention_bias": bias, "norm_elementwise_affine": affine}
    ours, theirs = same_weights(DiT, diffusers.DiTTransformer2DModel, options, dtype)
    x = torch.randn(2, options["in_channels"], *2 * [options["sample_size"]], dtype=dtype)
    assert_same_network(ours, theirs, lambda net, x: net(x, timestep=T, class_labels=LABELS), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@FEW
@given(options=shared(), dual=st.sets(st.integers(0, 2)), sides=st.tuples(*2 * [st.integers(1, 5)]))
def test_an_mmdit_equals_that_of_diffusers_at_every_size(dtype, options, dual, sides):
    width = options["num_attention_heads"] * options["attention_head_dim"]
    options |= {
        "joint_attention_dim": 12, "caption_projection_dim": width, "pooled_projection_dim": 10,
        "pos_embed_max_size": 5,
        "dual_attention_layers": tuple(i for i in dual if i < options["num_layers"]),
    }  # fmt: skip
    assert_same_mmdit(options, sides, dtype)
    if dtype == torch.float32:  # the norm of diffusers is float32 in a network of float64
        assert_same_mmdit({**options, "qk_norm": "rms_norm"}, sides, dtype)


def assert_same_mmdit(options, sides, dtype) -> None:
    ours, theirs = same_weights(MMDiT, diffusers.SD3Transformer2DModel, options, dtype)
    x = torch.randn(
        2, options["in_channels"], *(options["patch_size"] * n for n in sides), dtype=dtype
    )
    text = {
        "encoder_hidden_states": torch.randn(2, 7, 12, dtype=dtype),
        "pooled_projections": torch.randn(2, 10, dtype=dtype),
    }
    assert_same_network(ours, theirs, lambda net, x: net(x, timestep=T, **text), x)


def test_a_dit_takes_images_that_are_not_square_and_of_any_number_of_patches():
    """diffusers' takes squares only. A row of patches does not depend on those beside it."""
    table = positions(16, 3, 5, 4, torch.device("cpu")).view(3, 5, 4, 4)
    column, row = table[..., :2, :], table[..., 2:, :]
    assert torch.equal(column, column[:1].expand_as(column))
    assert torch.equal(row, row[:, :1].expand_as(row))
    dit = DiT(**DIT).eval()
    assert dit(torch.randn(2, 3, 4, 10), 5, LABELS).shape == (2, 3, 4, 10)


def test_every_weight_of_a_dit_is_trained():
    torch.manual_seed(0)
    dit = DiT(**DIT)
    out = dit(torch.randn(4, 3, 8, 8), torch.rand(4), torch.arange(4))
    out.sub(1).square().mean().backward()
    untrained = [name for name, p in dit.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [name for name in untrained if "to_k.bias" not in name]  # softmax ignores these


@pytest.mark.parametrize("network", ["DiT", "MMDiT"])
def test_folders_are_read_both_ways(tmp_path, network):
    cls, config = (DiT, DIT) if network == "DiT" else (MMDiT, SD3_TRANSFORMER)
    theirs = getattr(diffusers, cls.class_name)(**config)
    theirs.save_pretrained(tmp_path / "a")
    ours = cls.from_pretrained(tmp_path / "a")
    ours.save_pretrained(tmp_path / "b")
    again = type(theirs).from_pretrained(tmp_path / "b")
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("length", [1, 40])
def test_t5_equals_that_of_transformers(tmp_path, length):
    """At both ends of the distances: the last bucket begins at 20 tokens here."""
    torch.manual_seed(0)
    few = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
    theirs = t5_encoder(**few)
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=max(weight.shape[-1], 4) ** -0.5)
    theirs.save_pretrained(tmp_path / "a")
    ours = T5Encoder.from_pretrained(tmp_path / "a")
    ids = torch.randint(0, 16, (2, length))
    assert distance(ours(ids), theirs(ids)[0]) < 1e-5
    ours.save_pretrained(tmp_path / "b")
    again = type(theirs).from_pretrained(tmp_path / "b").eval()
    assert distance(again(ids)[0], theirs(ids)[0]) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 3}, "'depth' is not an option of DiTTransformer2DModel"),
        ({"norm_type": "layer_norm"}, "norm_type must be one of ada_norm_zero"),
        ({"activation_fn": "geglu"}, "activation_fn must be"),
        ({"sample_size": 9}, r"sample_size must be a multiple of patch_size \(2\), got 9"),
        ({"attention_head_dim": 3}, "must be a multiple of 4"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm must be"),
        ({"num_layers": 0}, "num_layers must be"),
        ({"dropout": 2.0}, "dropout must be"),
    ],
)
def test_bad_options_of_a_dit_are_refused(options, message):
    with pytest.raises(InvalidArgument, match=message):
        DiT(**DIT | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_projection_dim": 30}, r"caption_projection_dim must be .* \(32\), got 30"),
        ({"dual_attention_layers": (2,)}, r"dual_attention_layers must be in 0\.\.1, got 2"),
        ({"qk_norm": "layer_norm"}, "qk_norm must be"),
        ({"pos_embed_max_size": 4}, "pos_embed_max_size must be at least"),
        ({"joint_attention_dim": None}, "joint_attention_dim must be"),
    ],
)
def test_bad_options_of_an_mmdit_are_refused(options, message):
    with pytest.raises(InvalidArgument, match=message):
        MMDiT(**SD3_TRANSFORMER | options)


TOKENS, POOLED = torch.zeros(2, 3, 40), torch.zeros(2, 20)


@pytest.mark.parametrize(
    ("shape", "text", "message"),
    [
        ((2, 16, 5, 8), (TOKENS, POOLED), r"sides that are multiples of 2 \(patch_size\)"),
        ((2, 16, 26, 8), (TOKENS, POOLED), "sides of at most 24"),
        ((2, 4, 8, 8), (TOKENS, POOLED), r"sample must have shape \(B, 16, H, W\)"),
        ((0, 16, 8, 8), (TOKENS, POOLED), "sample must have shape"),
        ((2, 16, 8, 8), (None, POOLED), "encoder_hidden_states must be"),
        ((2, 16, 8, 8), (TOKENS, None), "pooled_projections must be"),
        ((2, 16, 8, 8), (TOKENS[..., :3], POOLED), "encoder_hidden_states"),
        ((2, 16, 8, 8), (TOKENS, POOLED[:1]), "pooled_projections"),
    ],
)
def test_bad_input_of_an_mmdit_is_refused(shape, text, message):
    with pytest.raises(InvalidArgument, match=message):
        MMDiT(**SD3_TRANSFORMER)(torch.zeros(shape), 1.0, *text)


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((2, 3, 7, 8), LABELS, "multiples of 2"),
        ((2, 3, 8, 8), None, "class_labels must be"),
        ((2, 3, 8, 8), LABELS + 1, r"class_labels must be in 0\.\.5"),
        ((2, 3, 8), LABELS, "sample must have shape"),
    ],
)
def test_bad_input_of_a_dit_is_refused(shape, labels, message):
    with pytest.raises(InvalidArgument, match=message):
        DiT(**DIT)(torch.zeros(shape), 1.0, labels)


def test_bad_input_of_t5_is_refused(tmp_path):
    encoder = T5Encoder(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(InvalidArgument, match=r"input_ids must be in 0\.\.8, got 3\.\.9"):
        encoder(torch.tensor([[3, 9]]))
    with pytest.raises(InvalidArgument, match="input_ids must be int64"):
        encoder(torch.zeros(1, 3))
    with pytest.raises(InvalidArgument, match="feed_forward_proj must be"):
        T5Encoder(feed_forward_proj="relu")
    with pytest.raises(InvalidArgument, match="relative_attention_max_distance must be above"):
        T5Encoder(relative_attention_max_distance=8)
    encoder.save_pretrained(tmp_path / "t5")
    config = tmp_path / "t5" / "config.json"
    config.write_text(config.read_text().replace('"num_layers": 1', '"num_layers": 100'))
    with pytest.raises(CheckpointError, match="needs at least 800 tensors"):
        T5Encoder.from_pretrained(tmp_path / "t5")
