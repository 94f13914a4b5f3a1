"""Folders as people have them: names of 2022, notes of training scripts, and failed downloads."""

import json

import pytest
import torch
from networks import distance, with_old_attention, with_random_norms
from safetensors.torch import load_file, save_file

from minidiff import Pipeline, shipped
from minidiff.errors import CheckpointError
from minidiff.nn import AutoencoderKL, SpaceToDepth, TextEncoder, UNet
from minidiff.schedulers import DDIMScheduler
from minidiff.text.clip import load_tokenizer
from minidiff.text.words import WordTokenizer

diffusers = pytest.importorskip("diffusers")
from diffusers.training_utils import EMAModel  # noqa: E402

WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
TEXT = {**UNET, "cross_attention_dim": 8, "mid_block_type": "UNetMidBlock2DCrossAttn"}
VAE = {"block_out_channels": (8,), "norm_num_groups": 4}
NETWORKS = {"UNet2DModel": UNET, "UNet2DConditionModel": TEXT, "AutoencoderKL": VAE}
EMA_NOTES = {
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma",
    "power",
}  # fmt: skip
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aaaa\nsize 1234567\n"
PAGE = "<!DOCTYPE html><html>404 Not Found</html>"


@pytest.mark.parametrize("shard", ["10GB", "10KB"])
@pytest.mark.parametrize(("cls", "places"), [("UNet2DModel", 4), ("UNet2DConditionModel", 3)])
def test_picture_attention_under_the_names_of_2022_gives_diffusers_output(
    tmp_path, cls, places, shard
):
    torch.manual_seed(0)
    theirs = with_random_norms(getattr(diffusers, cls)(**NETWORKS[cls]))
    names = theirs.state_dict().keys()
    assert len(with_old_attention(theirs.state_dict()).keys() - names) == 8 * places
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    for file in tmp_path.glob("*.safetensors"):
        save_file(with_old_attention(load_file(file)), file)
    for index in tmp_path.glob("*.index.json"):
        content = json.loads(index.read_text())
        content["weight_map"] = with_old_attention(content["weight_map"])
        index.write_text(json.dumps(content))
    ours = UNet.from_pretrained(tmp_path)
    channels, text = theirs.config.in_channels, {}
    if cls == "UNet2DConditionModel":
        text = {"encoder_hidden_states": torch.randn(2, 5, 8)}
    x = torch.randn(2, channels, 8, 8)
    with torch.no_grad():
        assert distance(ours(x, 7, **text), theirs(x, 7, **text).sample) < 1e-5


@pytest.mark.parametrize("cls", [UNet, AutoencoderKL])
@pytest.mark.parametrize("old", ["query.bias", "query", "mid_block"])
def test_attention_under_old_and_new_names_in_one_checkpoint_is_refused(tmp_path, cls, old):
    cls(**(VAE | {"block_out_channels": (8, 8), "down_block_types": 2 * ("DownEncoderBlock2D",),
                  "up_block_types": 2 * ("UpDecoderBlock2D",)} if cls is AutoencoderKL else UNET)
        ).save_pretrained(tmp_path)  # fmt: skip
    tensors, mixed = load_file(tmp_path / WEIGHTS), {}
    for name, value in tensors.items():
        (renamed,) = with_old_attention({name: value})
        mixed[renamed if old in renamed and "encoder" not in renamed else name] = value
    assert len(tensors.keys() - mixed.keys()) > 0
    save_file(mixed, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"is a name of 2022, but .* is today's"):
        cls.from_pretrained(tmp_path)


@pytest.mark.parametrize("cls", NETWORKS)
def test_the_averaged_network_of_diffusers_training_scripts_is_read(tmp_path, cls):
    theirs = getattr(diffusers, cls)(**NETWORKS[cls])
    average = EMAModel(
        theirs.parameters(), use_ema_warmup=True, model_cls=type(theirs), model_config=theirs.config
    )
    average.step(theirs.parameters())
    average.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).keys() >= EMA_NOTES
    ours = (AutoencoderKL if cls == "AutoencoderKL" else UNet).from_pretrained(tmp_path)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])
    assert not ours.config.keys() & EMA_NOTES


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (POINTER, "a Git LFS pointer, not the content: run git lfs pull"),
        (PAGE, "a web page saved under this name: download the file again"),
        ("", "the file is empty"),
    ],
)
@pytest.mark.parametrize(
    "file", ["model_index.json", "unet/config.json", f"unet/{WEIGHTS}", "scheduler"]
)
def test_a_failed_download_is_named_as_such(tmp_path, file, content, cause):
    Pipeline.from_pretrained(shipped.folder("mnist")).save_pretrained(tmp_path / "m")
    name = "scheduler/scheduler_config.json" if file == "scheduler" else file
    (tmp_path / "m" / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{name}: not .*\({cause}\)"):
        Pipeline.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    "read",
    [
        Pipeline.from_pretrained, UNet.from_pretrained, AutoencoderKL.from_pretrained,
        TextEncoder.from_pretrained, SpaceToDepth.from_pretrained, DDIMScheduler.from_pretrained,
        WordTokenizer.from_pretrained, load_tokenizer,
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["google/ddpm-cifar10-32", "stable-diffusion-v1-5"])
def test_a_name_on_the_hub_is_refused_with_the_command_that_downloads_it(
    tmp_path, monkeypatch, read, name
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"{name}: no such folder; .* hf download {name}"):
        read(name)
