"""diffusers' loaders of LoRA and new words draw the same pictures, in both directions."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minidiff.adapters.change import Change, LowRank, matching
from minidiff.adapters.files import LORA, WORDS
from minidiff.adapters.stack import Adapter, add
from minidiff.pipeline import Pipeline

tiny = pytest.importorskip("tiny_pipelines")
pytest.importorskip("peft")
PROMPT, STEPS = "a cat", 2


@pytest.fixture
def pair(tmp_path: Path):
    """diffusers' pipeline and ours, with the same random weights."""
    theirs = tiny.stable_diffusion(tmp_path, scheduler=tiny.DDIM)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "model")
    return theirs, Pipeline.from_pretrained(tmp_path / "model")


def noise() -> torch.Tensor:
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))


def difference(theirs, ours, prompt: str = PROMPT) -> float:
    options = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "latents": noise()}
    first = theirs(prompt, output_type="pt", **options).images
    second = ours([prompt], output_type="pt", progress=False, **options).images
    return float((first - (second / 2 + 0.5).clamp(0, 1)).abs().max())


def lora(pipe: Pipeline, alpha: float, text: bool = True) -> Adapter:
    torch.manual_seed(0)
    parts = {}
    for part, net in (("unet", pipe.unet), ("text_encoder", pipe.prompts.text_encoder)):
        targets = ("attention", "convolution") if part == "unet" else ("attention",)
        for name in matching(net, targets) if text or part == "unet" else ():
            parts[f"{part}.{name}"] = own = LowRank(net.get_parameter(name).shape, 2, alpha)
            torch.nn.init.normal_(own.lora_B.weight, std=0.3)
    return Adapter(Change(parts), {})


@pytest.mark.parametrize(("alpha", "text"), [(2.0, False), (5.0, True)])
def test_diffusers_reads_our_lora(alpha, text, pair, tmp_path):
    theirs, ours = pair
    before = difference(theirs, ours)
    add(ours, "style", lora(ours, alpha, text), 1.0)
    assert difference(theirs, ours) > 1e-2
    ours.save_adapter(tmp_path / "mine")
    theirs.load_lora_weights(tmp_path / "mine")
    assert difference(theirs, ours) <= max(1e-4, 2 * before)
    theirs.fuse_lora(lora_scale=0.5)
    theirs.unload_lora_weights()
    ours.set_adapter("style", 0.5).fuse()
    assert difference(theirs, ours) <= 1e-4


def test_we_read_what_diffusers_writes(pair, tmp_path):
    """Without and with the text encoder, whose names depend on the version of transformers."""
    import diffusers
    import peft

    theirs, ours = pair
    torch.manual_seed(5)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_v", "conv1"],
                             init_lora_weights=False)  # fmt: skip
    peft.inject_adapter_in_model(config, theirs.unet, "default")
    text = peft.LoraConfig(r=3, target_modules=["q_proj", "out_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(text, theirs.text_encoder, "default")
    state = peft.get_peft_model_state_dict(theirs.unet)
    words = peft.get_peft_model_state_dict(theirs.text_encoder)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "theirs", unet_lora_layers=state, text_encoder_lora_layers=words,
        unet_lora_adapter_metadata={"r": 3, "lora_alpha": 6}, text_encoder_lora_adapter_metadata={
            "r": 3, "lora_alpha": 8
        },
    )  # fmt: skip
    assert [file.name for file in (tmp_path / "theirs").iterdir()] == [LORA]
    assert difference(theirs, ours) > 1e-2
    ours.load_adapter(tmp_path / "theirs")
    assert difference(theirs, ours) <= 1e-4


@pytest.mark.parametrize("vectors", [1, 3])
def test_new_words_are_read_both_ways(vectors, pair, tmp_path):
    theirs, ours = pair
    torch.manual_seed(1)
    rows = torch.randn(vectors, ours.prompts.text_encoder.config.hidden_size)
    save_file({"<thing>": rows}, tmp_path / WORDS)
    theirs.load_textual_inversion(tmp_path / WORDS)
    prompt = "a <thing> cat"
    assert difference(theirs, ours, prompt) > 1e-4
    ours.load_adapter(tmp_path / WORDS)
    assert difference(theirs, ours, prompt) <= 1e-4
    assert difference(theirs, ours) <= 1e-4
    ours.save_adapter(tmp_path / "again")
    assert torch.equal(load_file(tmp_path / "again" / WORDS)["<thing>"], rows)
