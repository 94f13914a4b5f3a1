"""The text encoder: equal to transformers' CLIP text models, causal, with strict arguments."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import distance
from safetensors.torch import load_file, save_file
from tiny_text import END_ID, VOCAB_SIZE, tiny_text_config
from torch import Tensor, nn

from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.nn import TextEncoder

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

PROJECTION = {"architectures": ["CLIPTextModelWithProjection"]}
TINY = tiny_text_config()

# The config.json of published text encoders.
_COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "vocab_size": 49408,
}
_LARGE = {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
PUBLISHED = {
    "Stable Diffusion 1.5": {
        "_name_or_path": "openai/clip-vit-large-patch14",
        **_COMMON,
        **_LARGE,
        "torch_dtype": "float32",
        "transformers_version": "4.22.0.dev0",
    },
    "Stable Diffusion 2.1": {
        "_name_or_path": "hf-models/stable-diffusion-v2-768x768/text_encoder",
        **_COMMON,
        "architectures": ["CLIPTextModel"],
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "projection_dim": 512,
        "torch_dtype": "float32",
        "transformers_version": "4.25.0.dev0",
    },
    "SDXL, first": {
        "_name_or_path": "openai/clip-vit-large-patch14",
        **_COMMON,
        **_LARGE,
        "torch_dtype": "float16",
        "transformers_version": "4.32.0.dev0",
    },
    "SDXL, second": {
        "_name_or_path": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
        **_COMMON,
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
        "torch_dtype": "float16",
        "transformers_version": "4.32.0.dev0",
    },
}
PARAMETERS = {
    "Stable Diffusion 1.5": 123_060_480,
    "Stable Diffusion 2.1": 340_387_840,
    "SDXL, first": 123_060_480,
    "SDXL, second": 694_659_840,
}


def published(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model of transformers under the names of published files.

    transformers 5 dropped the prefix in its own CLIPTextModel, and takes it off when it reads.
    """
    return {
        name if name.startswith("text_") else f"text_model.{name}": value
        for name, value in model.state_dict().items()
    }


def theirs_of(config: dict) -> nn.Module:
    model_class = getattr(transformers, config.get("architectures", ["CLIPTextModel"])[0])
    return model_class(transformers.CLIPTextConfig(**config)).eval()


def pair(config: dict, seed: int = 0) -> tuple[TextEncoder, nn.Module]:
    """Return an encoder of each library with the same random weights."""
    torch.manual_seed(seed)
    theirs, ours = theirs_of(config), TextEncoder(**config).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name or "bias" in name:  # fresh ones are 1 and 0, which would hide a swap
            nn.init.normal_(parameter, float("norm" in name), 0.3)
    ours.load_state_dict(published(theirs), strict=True)
    return ours, theirs


def random_ids(config: dict, length: int) -> Tensor:
    """Return three texts: two with an end (one of them with two) and one perhaps without."""
    ids = torch.randint(0, config["vocab_size"], (3, length))
    if config["eos_token_id"] < config["vocab_size"] and config["eos_token_id"] != 2:
        ids[:2, length // 2] = config["eos_token_id"]
        ids[1, -1] = config["eos_token_id"]
    return ids


# ------------------------------------------------------------------------ equal to transformers


@st.composite
def cases(draw) -> dict:
    heads = draw(st.integers(1, 4))
    vocab = draw(st.integers(3, 40))
    return {
        "config": {
            "architectures": [
                draw(st.sampled_from(["CLIPTextModel", "CLIPTextModelWithProjection"]))
            ],
            "vocab_size": vocab,
            "hidden_size": heads * draw(st.integers(1, 6)),
            "intermediate_size": draw(st.integers(1, 24)),
            "projection_dim": draw(st.integers(1, 9)),
            "num_hidden_layers": draw(st.integers(1, 4)),
            "num_attention_heads": heads,
            "max_position_embeddings": draw(st.integers(1, 12)),
            "hidden_act": draw(st.sampled_from(["quick_gelu", "gelu", "silu", "relu", "mish"])),
            "layer_norm_eps": draw(st.sampled_from([1e-5, 1e-6, 1e-3])),
            "attention_dropout": draw(st.sampled_from([0.0, 0.3])),
            "eos_token_id": draw(st.sampled_from([2, vocab - 1, 0, 49407])),
            "pad_token_id": draw(st.sampled_from([0, 1, None])),
        },
        "share": draw(st.floats(0, 1)),  # of the longest text
        "masked": draw(st.booleans()),
        "seed": draw(st.integers(0, 10**6)),
    }


def hold_to_transformers(case: dict) -> None:
    """Compare names, shapes, every output and every gradient, in both precisions."""
    config = case["config"]
    ours, theirs = pair(config, case["seed"])
    expected_shapes = {name: value.shape for name, value in published(theirs).items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == expected_shapes
    ids = random_ids(config, 1 + int(case["share"] * (config["max_position_embeddings"] - 1)))
    mask = torch.randint(0, 2, ids.shape) if case["masked"] else None
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        a = ours(ids, mask)
        b = theirs(ids, attention_mask=mask, output_hidden_states=True)
        summary, expected = (
            (a.text_embeds, b.text_embeds) if "text_embeds" in b else (a.pooled, b.pooler_output)
        )
        assert distance(a.last_hidden_state, b.last_hidden_state) < tolerance
        assert distance(summary, expected) < tolerance
        assert len(a.hidden_states) == len(b.hidden_states) == config["num_hidden_layers"] + 1
        for mine, other in zip(a.hidden_states, b.hidden_states, strict=True):
            assert distance(mine, other) < tolerance
        weights = torch.randn_like(a.last_hidden_state), torch.randn_like(summary)
        for last, vector in ((a.last_hidden_state, summary), (b.last_hidden_state, expected)):
            ((last * weights[0]).sum() + (vector * weights[1]).sum()).backward()
        expected_gradients = {
            name if name.startswith("text_") else f"text_model.{name}": value.grad
            for name, value in theirs.named_parameters()
        }
        # Some gradients are zero up to rounding (a bias of keys does not change a softmax), so
        # errors are relative to the largest one.
        largest = max(gradient.norm().item() for gradient in expected_gradients.values())
        for name, value in ours.named_parameters():
            error = (value.grad - expected_gradients[name]).norm().item()
            assert error < 10 * tolerance * largest, name
        ours.zero_grad(), theirs.zero_grad()


QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@settings(max_examples=40, **QUIET)
@given(case=cases())
def test_outputs_and_gradients_equal_transformers(case):
    hold_to_transformers(case)


@pytest.mark.slow
@settings(max_examples=300, **QUIET)
@given(case=cases())
def test_outputs_and_gradients_equal_transformers_at_length(case):
    hold_to_transformers(case)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_give_the_names_and_shapes_of_transformers(name):
    config = PUBLISHED[name]
    with torch.device("meta"):
        ours, theirs = TextEncoder.from_config(config), theirs_of(config)
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    assert shapes == {name: value.shape for name, value in published(theirs).items()}
    assert sum(shape.numel() for shape in shapes.values()) == PARAMETERS[name]
    assert ours.class_name == config["architectures"][0]
    kept = config.keys() & ours.config.keys()
    assert all(ours.config[option] == config[option] for option in kept)


def test_the_end_of_a_text_is_found_for_both_generations_of_configurations():
    ids = torch.tensor([[0, 5, 9, 5, 9], [7, 0, 0, 0, 0], [1, 2, 3, 4, 2]])
    # 2: the highest number, the first of equals. Otherwise: that token, the first of equals; in a
    # text without it, the first position.
    for eos, expected in ((2, [2, 0, 3]), (5, [1, 0, 0]), (4, [0, 0, 3]), (49407, [0, 0, 0])):
        ours, theirs = pair({**TINY, "eos_token_id": eos})
        with torch.no_grad():
            out = ours(ids)
            assert torch.equal(out.pooled, out.last_hidden_state[range(3), expected])
            assert distance(out.pooled, theirs(ids).pooler_output) < 1e-5


def test_without_a_projection_the_embedding_is_the_pooled_vector():
    ours, _ = pair(TINY)
    out = ours(random_ids(TINY, 5))
    assert out.text_embeds is out.pooled
    ours, _ = pair({**TINY, **PROJECTION})
    out = ours(random_ids(TINY, 5))
    assert out.text_embeds.shape == (3, TINY["projection_dim"])
    assert torch.equal(out.text_embeds, out.pooled @ ours.text_projection.weight.T)


def test_the_last_norm_of_the_last_state_is_the_result():
    ours, _ = pair(TINY)
    out = ours(random_ids(TINY, 7))
    assert torch.equal(ours.text_model.final_layer_norm(out.hidden_states[-1]), out[0])


# ------------------------------------------------------------------------------- causality, masks


@settings(max_examples=30, **QUIET)
@given(place=st.integers(1, 11), seed=st.integers(0, 999), masked=st.booleans())
def test_a_later_token_never_changes_an_earlier_position(place, seed, masked):
    encoder, _ = pair(TINY, seed)
    ids = random_ids(TINY, 12)
    mask = torch.ones_like(ids) if masked else None
    changed = ids.clone()
    changed[:, place:] = torch.randint(0, VOCAB_SIZE, changed[:, place:].shape)
    with torch.no_grad():
        before, after = encoder(ids, mask), encoder(changed, mask)
        alone = encoder(ids[:, :place])
    for x, y, z in zip(before.hidden_states, after.hidden_states, alone.hidden_states, strict=True):
        assert torch.equal(x[:, :place], y[:, :place])
        assert distance(z, x[:, :place]) < 1e-5
    assert not torch.equal(before.last_hidden_state[:, -1], after.last_hidden_state[:, -1])


def test_an_earlier_token_changes_every_later_position():
    encoder, _ = pair(TINY)
    ids = random_ids(TINY, 12)
    changed = ids.clone()
    changed[:, 3] = (ids[:, 3] + 1) % VOCAB_SIZE
    with torch.no_grad():
        moved = (encoder(ids).last_hidden_state - encoder(changed).last_hidden_state).norm(dim=2)
    assert torch.equal(moved > 0, (torch.arange(12) >= 3).expand(3, 12))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_a_masked_token_changes_no_other_position(dtype):
    encoder, _ = pair(TINY)
    ids, mask = random_ids(TINY, 12), torch.ones(3, 12, dtype=dtype)
    mask[:, 4] = 0
    changed = ids.clone()
    changed[:, 4] = (ids[:, 4] + 1) % VOCAB_SIZE
    others = torch.arange(12) != 4
    with torch.no_grad():
        before, after = (encoder(x, mask).last_hidden_state for x in (ids, changed))
        assert torch.equal(before[:, others], after[:, others])
        assert not torch.equal(before, encoder(ids).last_hidden_state)


def test_a_mask_that_hides_nothing_changes_nothing():
    encoder, _ = pair(TINY)
    encoder, ids = encoder.double(), random_ids(TINY, 9)
    with torch.no_grad():
        assert distance(encoder(ids, torch.ones_like(ids))[0], encoder(ids)[0]) < 1e-13


def test_one_text_of_a_batch_equals_the_text_alone():
    encoder, _ = pair({**TINY, **PROJECTION})
    encoder, ids = encoder.double(), random_ids(TINY, 9).int()
    with torch.no_grad():
        batch = encoder(ids)
        for i in range(3):
            alone = encoder(ids[i : i + 1])
            assert distance(alone.last_hidden_state[0], batch.last_hidden_state[i]) < 1e-13
            assert distance(alone.text_embeds[0], batch.text_embeds[i]) < 1e-13


# ----------------------------------------------------------------------- precision and training


def hold_to_float32(seed: int, dtype: torch.dtype) -> float:
    """Compare a random network in 16 bits with itself, of rounded weights, in float32.

    Embeddings and branches are scaled so that the largest activation, which is returned, is
    anywhere up to about 1e4.
    """
    torch.manual_seed(seed)
    config = tiny_text_config(
        **PROJECTION,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1 + seed % 4,
        num_attention_heads=(1, 2, 4, 8)[seed // 4 % 4],
        hidden_act=("quick_gelu", "gelu")[seed % 2],
    )
    scale = 10 ** (3.5 * torch.rand(()).item())
    wide = TextEncoder(**config).eval().requires_grad_(False)
    for name, parameter in wide.named_parameters():
        if "embedding" in name:
            parameter.mul_(scale / 0.02)
        elif "out_proj" in name or "fc2" in name:
            parameter.mul_(scale)
        elif "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
        parameter.copy_(parameter.to(dtype))
    narrow = TextEncoder(**config).eval()
    narrow.load_state_dict(wide.state_dict())
    narrow.to(dtype)
    ids = random_ids(config, 12)
    expected = wide(ids)
    with torch.no_grad():
        out = narrow(ids)
    for name in ("last_hidden_state", "text_embeds"):
        value = getattr(out, name)
        assert value.dtype == dtype
        assert distance(value.float(), getattr(expected, name)) < 1e-2, (name, seed)
    return max(state.abs().max().item() for state in expected.hidden_states)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_stay_near_float32_with_large_activations(dtype):
    largest = [hold_to_float32(seed, dtype) for seed in range(20)]
    assert 3e3 < max(largest) < 6e4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_stay_near_float32_in_a_hundred_networks(dtype):
    largest = [hold_to_float32(seed, dtype) for seed in range(100)]
    assert 3e3 < max(largest) < 6e4


def test_autocast_stays_near_float32():
    encoder, _ = pair({**TINY, **PROJECTION})
    ids = random_ids(TINY, 12)
    with torch.no_grad():
        exact = encoder(ids)
        with torch.autocast("cpu", torch.bfloat16):
            out = encoder(ids)
    assert distance(out.last_hidden_state.float(), exact.last_hidden_state) < 2e-2
    assert distance(out.text_embeds.float(), exact.text_embeds) < 2e-2


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
def test_it_compiles_as_one_graph():
    encoder, _ = pair(TINY)
    ids = random_ids(TINY, 12)
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(ids).pooled, encoder(ids).pooled)


def test_fresh_weights_are_drawn_as_in_clips_code():
    width, layers, factor = 128, 4, 0.5
    torch.manual_seed(0)
    encoder = TextEncoder(
        **PROJECTION,
        vocab_size=200,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        max_position_embeddings=100,
        initializer_factor=factor,
    )
    deep = (2 * layers) ** -0.5
    expected = {  # initialize_parameters in https://github.com/openai/CLIP, clip/model.py
        "token_embedding": 0.02,
        "position_embedding": 0.01,
        "q_proj": width**-0.5,
        "k_proj": width**-0.5,
        "v_proj": width**-0.5,
        "out_proj": width**-0.5 * deep,
        "fc1": (2 * width) ** -0.5,
        "fc2": width**-0.5 * deep,
        "text_projection": width**-0.5,
    }
    seen = set()
    for name, value in encoder.named_parameters():
        kind = name.split(".")[-2]
        if name.endswith("bias"):
            assert not value.any(), name
        elif kind in expected:
            seen.add(kind)
            assert value.mean().abs() < 0.05 * value.std(), name
            assert value.std().item() == pytest.approx(factor * expected[kind], rel=0.05), name
        else:
            assert torch.equal(value, torch.ones(width)), name
    assert seen == set(expected)


def test_every_weight_gets_a_gradient():
    encoder = TextEncoder(**TINY, **PROJECTION)
    out = encoder(torch.arange(VOCAB_SIZE)[: 12 * 43].view(43, 12))
    (out.last_hidden_state.square().sum() + out.text_embeds.square().sum()).backward()
    for name, parameter in encoder.named_parameters():
        if not name.endswith("k_proj.bias"):  # a softmax does not see what all arguments share
            assert parameter.grad.abs().max() > 0, name


def test_dropout_acts_in_training_only():
    encoder = TextEncoder(**{**TINY, "attention_dropout": 0.5})
    ids = random_ids(TINY, 12)
    assert not torch.equal(encoder(ids)[0], encoder(ids)[0])
    encoder.eval()
    assert torch.equal(encoder(ids)[0], encoder(ids)[0])


# ------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("extra", [{}, PROJECTION])
def test_folders_round_trip_between_the_libraries_bit_for_bit(tmp_path, extra):
    config = {**TINY, **extra, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "pad_token_id": 0}
    _, theirs = pair(config)
    theirs.save_pretrained(tmp_path / "a")
    ours = TextEncoder.from_pretrained(tmp_path / "a")
    ours.save_pretrained(tmp_path / "b")
    again, report = type(theirs).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(report.values())
    assert published(theirs).keys() == published(again).keys() == ours.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, published(theirs)[name])
        assert torch.equal(value, published(again)[name])
    assert not ours.training
    assert ours.class_name == type(theirs).__name__
    assert {**again.config.to_dict(), "architectures": [ours.class_name]}.items() >= {
        **ours.config
    }.items()
    ids = random_ids(config, 9)
    with torch.no_grad():
        assert torch.equal(theirs(ids).last_hidden_state, again(ids).last_hidden_state)
        assert distance(ours(ids).last_hidden_state, again(ids).last_hidden_state) < 1e-5


def test_files_have_the_published_names_and_nothing_else(tmp_path):
    encoder = TextEncoder(**TINY, **PROJECTION)
    encoder.save_pretrained(tmp_path / "e")
    assert sorted(file.name for file in (tmp_path / "e").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    names = load_file(tmp_path / "e" / "model.safetensors").keys()
    assert "text_projection.weight" in names
    assert all(name.startswith(("text_model.", "text_projection.")) for name in names)
    written = json.loads((tmp_path / "e" / "config.json").read_text())
    assert written == {**json.loads(json.dumps(encoder.config)), "model_type": "clip_text_model"}
    assert TextEncoder.from_config(encoder.config).config == encoder.config


def saved(folder: Path, tensors: dict, **config: object) -> Path:
    """Write a folder with these weights and a config.json with these changes."""
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    content = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **TINY}
    (folder / "config.json").write_text(json.dumps({**content, **config}))
    return folder


WEIGHTS = "model.safetensors"
POSITIONS = "text_model.embeddings.position_ids"


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16])
def test_files_of_older_versions_hold_the_numbers_of_the_positions(tmp_path, dtype):
    encoder = TextEncoder(**TINY)
    tensors = {**encoder.state_dict(), POSITIONS: torch.arange(12, dtype=dtype)[None]}
    again = TextEncoder.from_pretrained(saved(tmp_path / "e", tensors))
    assert again.state_dict().keys() == encoder.state_dict().keys()
    for wrong in (torch.arange(12) + 1, torch.arange(11), torch.arange(12) * 1.01):
        with pytest.raises(CheckpointError, match=r"position_ids must hold 0\.\.11"):
            TextEncoder.from_pretrained(saved(tmp_path / "e", {**tensors, POSITIONS: wrong}))


# transformers 4.41.2 writes all of these for a configuration made from a dict; older versions
# write most of them. From its PretrainedConfig().to_dict().
OF_ALL_MODELS = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "torchscript": False,
    "torch_dtype": "float32",
    "use_bfloat16": False,
    "tf_legacy_loss": False,
    "pruned_heads": {},
    "tie_word_embeddings": True,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "cross_attention_hidden_size": None,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "num_return_sequences": 1,
    "output_scores": False,
    "return_dict_in_generate": False,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "tokenizer_class": None,
    "prefix": None,
    "sep_token_id": None,
    "decoder_start_token_id": None,
    "task_specific_params": None,
    "problem_type": None,
    "_name_or_path": "",
    "transformers_version": "4.41.2",
    "_attn_implementation_autoset": True,
    "dropout": 0.1,
}


def test_options_that_transformers_writes_but_never_reads_are_ignored(tmp_path):
    encoder = TextEncoder(**TINY).eval()
    again = TextEncoder.from_pretrained(
        saved(tmp_path / "e", encoder.state_dict(), **OF_ALL_MODELS)
    )
    ids = random_ids(TINY, 12)
    with torch.no_grad():
        assert torch.equal(encoder(ids)[0], again(ids)[0])
    now = transformers.CLIPTextConfig(**TINY).to_dict()  # of the installed version
    assert TextEncoder.from_config({**now, "architectures": ["CLIPTextModel"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32}, "has shape"),
        ({"num_hidden_layers": 4}, "needs at least 64 tensors, there are 52"),
        ({"num_hidden_layers": 2}, "unexpected"),
        ({"num_hidden_layers": 1_000_000_000}, r"num_hidden_layers must be in 1\.\.128"),
        ({"vocab_size": 1 << 22, "hidden_size": 1 << 14}, "has shape"),  # before memory is taken
        (PROJECTION, "1 missing tensors: text_projection.weight"),
        ({"architectures": ["CLIPModel"]}, "architectures must be one of CLIPTextModel"),
        ({"architectures": ["CLIPTextModel", "CLIPModel"]}, "architectures must be a list of one"),
        ({"architectures": None}, "architectures must be a list of one name"),
        ({"model_type": "clip"}, "model_type must be 'clip_text_model', got 'clip'"),
        ({"model_type": "bert"}, "model_type must be"),
        ({"is_decoder": True}, "is_decoder must be False, got True"),
        ({"is_decoder": 0}, "is_decoder must be False, got 0"),
        ({"add_cross_attention": True}, "add_cross_attention must be False"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads must be"),
        ({"is_causal": False}, "'is_causal' is not an option of CLIPTextModel"),
        ({"quantization_config": {}}, "'quantization_config' is not an option of CLIPTextModel"),
        ({"rope_scaling": None}, "'rope_scaling' is not an option of CLIPTextModel"),
        ({"use_attention_mask": True}, "'use_attention_mask' is not an option of CLIPTextModel"),
        ({"text_config": {}}, "'text_config' is not an option of CLIPTextModel"),
    ],
)
def test_a_config_of_another_network_is_refused_by_name(tmp_path, change, message):
    folder = saved(tmp_path / "e", TextEncoder(**TINY).state_dict(), **change)
    with pytest.raises(CheckpointError, match=message):
        TextEncoder.from_pretrained(folder)


def test_weights_with_a_projection_are_not_read_without_it(tmp_path):
    tensors = TextEncoder(**TINY, **PROJECTION).state_dict()
    with pytest.raises(CheckpointError, match=r"unexpected tensors: text_projection\.weight"):
        TextEncoder.from_pretrained(saved(tmp_path / "e", tensors))


def test_a_pickle_is_refused_with_advice(tmp_path):
    TextEncoder(**TINY).save_pretrained(tmp_path / "e")
    (tmp_path / "e" / WEIGHTS).rename(tmp_path / "e" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="convert it with the library that wrote it"):
        TextEncoder.from_pretrained(tmp_path / "e")


def test_saving_over_other_files_is_refused(tmp_path):
    encoder = TextEncoder(**TINY)
    encoder.save_pretrained(tmp_path / "e")
    encoder.save_pretrained(tmp_path / "e")  # over itself is fine
    (tmp_path / "e" / "notes.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        encoder.save_pretrained(tmp_path / "e")


# ----------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 3}, "'hiden_size' is not an option of CLIPTextModel, which has arch"),
        ({"architectures": "CLIPTextModel"}, "architectures must be a list of one name"),
        ({"architectures": [["CLIPTextModel"]]}, "architectures must be one of"),
        ({"vocab_size": 0}, "vocab_size must be"),
        ({"hidden_size": 16.0}, "hidden_size must be a whole number"),
        ({"intermediate_size": None}, "intermediate_size must be a whole number"),
        ({"projection_dim": 0}, "projection_dim must be"),
        ({"projection_dim": None, **PROJECTION}, "projection_dim must be a whole number"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers must be in 1\.\.128"),
        ({"num_attention_heads": 17}, r"num_attention_heads must be in 1\.\.16"),
        ({"num_attention_heads": 3}, r"num_attention_heads must divide hidden_size \(16\), got 3"),
        ({"max_position_embeddings": True}, "max_position_embeddings must be a whole number"),
        ({"hidden_act": "tanh"}, "hidden_act must be one of quick_gelu"),
        ({"layer_norm_eps": 0}, "layer_norm_eps must be"),
        ({"attention_dropout": 1.5}, "attention_dropout must be"),
        ({"initializer_range": -1}, "initializer_range must be"),
        ({"initializer_factor": float("nan")}, "initializer_factor must be"),
        ({"pad_token_id": -1}, "pad_token_id must be"),
        ({"bos_token_id": "a"}, "bos_token_id must be"),
        ({"eos_token_id": None}, "eos_token_id must be a whole number"),
        ({"eos_token_id": [2, 3]}, "eos_token_id must be a whole number"),
        ({"eos_token_id": 1 << 40}, "eos_token_id must be"),
    ],
)
def test_a_bad_argument_is_refused_by_name(change, message):
    with pytest.raises(InvalidArgument, match=message):
        TextEncoder(**{**TINY, **change})


IDS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, 2]], None, "input_ids must be a tensor, got list"),
        (IDS.float(), None, "input_ids must be int64 or int32, got torch.float32"),
        (IDS.bool(), None, "input_ids must be int64 or int32, got torch.bool"),
        (IDS[0], None, r"input_ids must have shape \(B, length\) .* got \(5,\)"),
        (IDS[:0], None, r"got \(0, 5\)"),
        (IDS[:, :0], None, r"got \(2, 0\)"),
        (IDS.repeat(1, 3), None, r"length in 1\.\.12 \(max_position_embeddings\), got \(2, 15\)"),
        (IDS - 1, None, rf"input_ids must be in 0\.\.{END_ID}, got -1\.\.-1"),
        (IDS + VOCAB_SIZE, None, rf"input_ids must be in 0\.\.{END_ID}, got {VOCAB_SIZE}"),
        (IDS, [[1] * 5] * 2, "attention_mask must be a tensor of bool or whole numbers, got list"),
        (IDS, IDS.float(), "attention_mask must be a tensor of bool .* got torch.float32"),
        (IDS, IDS * 0 + 7, "attention_mask must hold 0 and 1 only, got"),
        (IDS, IDS[:1], r"attention_mask must have the shape of input_ids, \(2, 5\), got \(1, 5\)"),
    ],
)
def test_bad_input_is_refused_by_name(ids, mask, message):
    with pytest.raises(InvalidArgument, match=message):
        TextEncoder(**TINY)(ids, mask)
