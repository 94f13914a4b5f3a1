"""Adapters in files: diffusers and peft read ours, ours are theirs, and bad files are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minidiff.adapters.change import Change, Dense, LowRank, matching
from minidiff.adapters.files import DENSE, LORA, LORA_METADATA, WORDS
from minidiff.adapters.stack import Adapter, add
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.nn import UNet
from minidiff.pipeline import Pipeline
from minidiff.schedulers import DDIMScheduler
from minidiff.text.prompts import WordPrompts
from minidiff.text.words import WordTokenizer

QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
WORDS_KNOWN = ["a", "blue", "red", "seven"]


def network(width: int = 8) -> UNet:
    torch.manual_seed(width)
    unet = UNet(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(width, 2 * width), attention_head_dim=2, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        class_embed_type="projection", projection_class_embeddings_input_dim=8,
    )  # fmt: skip
    return unet.eval().requires_grad_(False)


def base(width: int = 8) -> Pipeline:
    """A small model of texts with random weights."""
    unet = network(width)
    prompts = WordPrompts.fresh(WordTokenizer(WORDS_KNOWN, 8), 8, 1)
    prompts.text_encoder.eval().requires_grad_(False)
    return Pipeline(unet, DDIMScheduler(clip_sample=False), prompts=prompts, num_inference_steps=2)


def lora(pipe: Pipeline, rank: int = 2, alpha: float = 3.0, seed: int = 0) -> Change:
    """Low-rank differences of attention and convolutions with random factors."""
    torch.manual_seed(seed)
    parts = {}
    for part, net in (("unet", pipe.unet), ("text_encoder", pipe.prompts.text_encoder)):
        targets = ("attention", "convolution") if part == "unet" else ("attention",)
        for name in matching(net, targets):
            parts[f"{part}.{name}"] = LowRank(net.get_parameter(name).shape, rank, alpha)
            torch.nn.init.normal_(parts[f"{part}.{name}"].lora_B.weight, std=0.3)
    return Change(parts)


def picture(pipe: Pipeline, prompt: str = "a red seven") -> torch.Tensor:
    return pipe([prompt], seed=1, output_type="pt", progress=False, guidance_scale=2.0).images


@pytest.fixture
def pipe() -> Pipeline:
    return base()


def saved(pipe: Pipeline, folder: Path, name: str = "style") -> Path:
    add(pipe, name, Adapter(lora(pipe), {"heart": torch.randn(1, 8)}), 1.0)
    pipe.save_adapter(folder)
    return folder


# --- scales, stacks, fusing ------------------------------------------------------------------


def test_scale_zero_and_removal_give_the_base_bit_for_bit(pipe, tmp_path):
    before, unet, prompts = picture(pipe), pipe.unet, pipe.prompts
    saved(pipe, tmp_path / "a")
    changed = picture(pipe)
    assert not torch.equal(changed, before)
    assert torch.equal(picture(pipe.set_adapter("style", 0)), before)
    assert torch.equal(picture(pipe.set_adapter("style", 1)), changed)
    pipe.remove_adapter("style")
    assert (pipe.unet, pipe.prompts) == (unet, prompts)
    assert torch.equal(picture(pipe), before)
    assert pipe.adapters == {}


def test_adapters_add_up_in_any_order(tmp_path):
    found = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        pipe = base()
        for i in order:
            words = {("heart", "star", "moon")[i]: torch.full((1, 8), 0.1 * i)}
            add(pipe, f"number {i}", Adapter(lora(pipe, seed=i), words), 0.5 + i)
        assert pipe.adapters == {f"number {i}": 0.5 + i for i in order}
        found.append(picture(pipe, "a red star"))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_fused_equals_not_fused_and_unfusing_gives_the_base_back(pipe, tmp_path):
    before = picture(pipe)
    saved(pipe, tmp_path / "a")
    loose = picture(pipe)
    assert (picture(pipe.fuse()) - loose).abs().max() <= 1e-5
    assert pipe.adapters == {}
    add(pipe, "more", Adapter(lora(pipe, seed=5), {}), 1.0)
    with pytest.raises(InvalidArgument, match=r"loaded since fuse\(\) removed: more"):
        pipe.unfuse()
    pipe.fuse()  # a second time
    pipe.unfuse().remove_adapter("more")
    assert torch.equal(picture(pipe), loose)
    pipe.unfuse()
    assert pipe.adapters == {"style": 1.0}
    assert torch.equal(picture(pipe.remove_adapter("style")), before)
    with pytest.raises(InvalidArgument, match="needs a pipeline after fuse"):
        pipe.unfuse()


def test_a_fused_pipeline_is_saved_as_any_other(pipe, tmp_path):
    saved(pipe, tmp_path / "a")
    with pytest.raises(InvalidArgument, match="save_pretrained needs one set of weights"):
        pipe.save_pretrained(tmp_path / "model")
    pipe.fuse().save_pretrained(tmp_path / "model")
    other = Pipeline.from_pretrained(tmp_path / "model")
    assert torch.equal(picture(other, "a red heart"), picture(pipe, "a red heart"))


def test_a_difference_equals_the_layer_beside_the_layer(pipe):
    """W·x + s·(alpha/r)·B·(A·x), as peft evaluates it, for a linear layer and a convolution."""
    change = lora(pipe)
    for layer in ("down_blocks.0.resnets.0.conv1", QUERY.removeprefix("unet.")):
        part, module = change.parts[f"unet.{layer}.weight"], pipe.unet.get_submodule(layer)
        a, b, w = part.lora_A.weight, part.lora_B.weight, module.weight
        if w.ndim == 4:
            x = torch.randn(2, w.shape[1], 6, 6)
            beside = torch.conv2d(torch.conv2d(x, a, padding=1), b)
            merged = torch.conv2d(x, w + part(), padding=1) - torch.conv2d(x, w, padding=1)
        else:
            x = torch.randn(2, w.shape[1])
            beside, merged = x @ a.T @ b.T, x @ (w + part()).T - x @ w.T
        assert torch.allclose(merged, 1.5 * beside, atol=1e-4)


# --- files -----------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(pipe, tmp_path):
    saved(pipe, tmp_path / "mine")
    drawn = picture(pipe, "a heart")
    assert {file.name for file in (tmp_path / "mine").iterdir()} == {LORA, WORDS}
    other = base().load_adapter(tmp_path / "mine")
    assert other.adapters == {"mine": 1.0}
    assert torch.equal(picture(other, "a heart"), drawn)


def test_whole_differences_are_saved_too(pipe, tmp_path):
    change = Change({"unet.conv_in.weight": Dense(pipe.unet.conv_in.weight.shape)})
    torch.nn.init.normal_(change.parts["unet.conv_in.weight"].difference)
    add(pipe, "dense", Adapter(change, {}), 1.0)
    pipe.save_adapter(tmp_path / "d")
    assert [file.name for file in (tmp_path / "d").iterdir()] == [DENSE]
    assert torch.equal(picture(base().load_adapter(tmp_path / "d")), picture(pipe))


def renamed(path: Path, new: Path, rename) -> Path:
    """Write a LoRA file of the U-Net with other names, and alpha as tensors."""
    found = {}
    for key, tensor in load_file(path / LORA).items():
        if key.startswith("unet."):
            layer, _, side = key.removesuffix(".weight").rpartition(".lora_")
            found |= rename(layer.removeprefix("unet."), side, tensor)
    save_file(found, new)
    return new


def processors(layer: str, side: str, tensor: torch.Tensor) -> dict:
    if ".attn" not in layer:
        return {}
    module, _, name = layer.removesuffix(".0").rpartition(".")
    way = {"A": "down", "B": "up"}[side]
    return {f"{module}.processor.{name}_lora.{way}.weight": tensor}


def kohya(layer: str, side: str, tensor: torch.Tensor) -> dict:
    name = f"lora_unet_{layer.replace('.', '_')}"
    way = {"A": "down", "B": "up"}[side]
    return {f"{name}.lora_{way}.weight": tensor, f"{name}.alpha": torch.tensor(3.0)}


def before_peft(layer: str, side: str, tensor: torch.Tensor) -> dict:
    way = {"A": "down", "B": "up"}[side]
    return {f"unet.{layer}.lora.{way}.weight": tensor}


@pytest.mark.parametrize(
    ("rename", "alpha"), [(processors, 2.0), (kohya, 3.0), (before_peft, 2.0)],
    ids=["attention processors", "Kohya", "diffusers before peft"],
)  # fmt: skip
def test_older_names_are_read(rename, alpha, pipe, tmp_path):
    saved(pipe, tmp_path / "a")
    mine = pipe.stack.adapters["style"][0].change.parts
    path = renamed(tmp_path / "a", tmp_path / "old.safetensors", rename)
    other = base().load_adapter(path)
    theirs = other.stack.adapters["old"][0].change.parts
    wanted = {
        n for n in mine if n.startswith("unet.") and (rename is not processors or "attn" in n)
    }
    assert theirs.keys() == wanted
    for name, part in theirs.items():
        assert part.alpha == alpha
        assert torch.allclose(part() / part.alpha, mine[name]() / mine[name].alpha)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda t: t.pop(f"{QUERY}.lora_B.weight"), "attn1.to_q has no B"),
        (lambda t: t[f"{QUERY}.lora_A.weight"].fill_(torch.nan), "must hold finite real numbers"),
        (lambda t: t.update({"unet.nothing.lora_A.weight": torch.zeros(2, 8)}), "no layer"),
        (lambda t: t.update({f"{QUERY}.lora_magnitude_vector": torch.zeros(8)}), "is not read"),
        (lambda t: t.update({f"{QUERY}.alpha": torch.zeros(3)}), "must be one number"),
        (lambda t: t.update({f"{QUERY}.lora_B.weight": torch.zeros(8, 5)}), "do not fit each"),
    ],
)
def test_a_damaged_file_is_refused(damage, text, pipe, tmp_path):
    saved(pipe, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / LORA)
    damage(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=text):
        base().load_adapter(tmp_path / "bad.safetensors")


def test_an_adapter_of_another_network_names_layer_and_both_shapes(pipe, tmp_path):
    saved(pipe, tmp_path / "a")
    text = r"layer unet.down_blocks.0.+ of shape \(8, .+, that of this model is \(16, "
    with pytest.raises(CheckpointError, match=text):
        base(16).load_adapter(tmp_path / "a")


def test_names_words_scales_and_pickles_are_refused(pipe, tmp_path):
    path = saved(pipe, tmp_path / "a")
    other = base().load_adapter(path)
    with pytest.raises(InvalidArgument, match="an adapter 'a' is loaded"):
        other.load_adapter(path)
    with pytest.raises(InvalidArgument, match="adapter 'a' has 'heart'"):
        other.load_adapter(path, name="b")
    for scale, text in ((float("inf"), "finite|in"), (float("nan"), "in"), ("1", "a number")):
        with pytest.raises(InvalidArgument, match=f"scale must be .*{text}"):
            base().load_adapter(path, scale=scale)
    for name, action in (("c", other.remove_adapter), ("c", lambda n: other.set_adapter(n, 1))):
        with pytest.raises(InvalidArgument, match="name must be one of a"):
            action(name)
    save_file({"red": torch.zeros(8)}, tmp_path / "w.safetensors")
    with pytest.raises(InvalidArgument, match="new to the model, which knows"):
        base().load_adapter(tmp_path / "w.safetensors")
    save_file({"heart": torch.zeros(5)}, tmp_path / "n.safetensors")
    with pytest.raises(InvalidArgument, match=r"vectors of 'heart' must be \(n, 8\), got \(1, 5\)"):
        base().load_adapter(tmp_path / "n.safetensors")
    (tmp_path / "p.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="a pickle can run code"):
        base().load_adapter(tmp_path / "p.bin")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        base().load_adapter(tmp_path / "nothing")


def test_other_kinds_of_lora_are_refused_by_name(pipe, tmp_path):
    path = saved(pipe, tmp_path / "a") / LORA
    metadata = {LORA_METADATA: json.dumps({"unet.use_dora": True})}
    save_file(load_file(path), tmp_path / "d.safetensors", metadata)
    with pytest.raises(CheckpointError, match="use_dora is not read"):
        base().load_adapter(tmp_path / "d.safetensors")


# --- oracles ---------------------------------------------------------------------------------


def test_peft_computes_the_same(pipe):
    peft = pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")}
    theirs = diffusers.UNet2DConditionModel.from_config(config)
    theirs.load_state_dict(pipe.unet.state_dict())
    change = lora(pipe)
    own = {n.removeprefix("unet."): p for n, p in change.parts.items() if n.startswith("unet.")}
    names = [name.removesuffix(".weight") for name in own]
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, lora_alpha=3, target_modules=names), theirs, "default"
    )
    state = {
        f"{name.removesuffix('.weight')}.lora_{side}.weight": getattr(part, f"lora_{side}").weight
        for name, part in own.items() for side in "AB"
    }  # fmt: skip
    peft.set_peft_model_state_dict(theirs, state, "default")
    add(pipe, "style", Adapter(Change(own and {f"unet.{n}": p for n, p in own.items()}), {}), 1.0)
    x, t, text = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.randn(2, 4, 8)
    more = {"encoder_hidden_states": text, "class_labels": torch.randn(2, 8)}
    with torch.no_grad():
        difference = pipe.unet(x, t, **more) - theirs(x, t, **more).sample
    assert difference.abs().max() <= 1e-5
