"""Folders of pipelines in layouts found in practice, and foreign files in them."""

import shutil
import warnings

import diffusers
import pytest
import torch
from tiny_pipelines import DDIM, digits, stable_diffusion, stable_diffusion_xl

from minidiff import Pipeline
from minidiff.errors import CheckpointError

FOREIGN = (
    "README.md",
    ".git/HEAD",
    "samples/best.png",
    "lora.safetensors",
    "unet/lora.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "scheduler/notes.json",
    "feature_extractor/preprocessor_config.json",
)


@pytest.mark.parametrize("name", FOREIGN)
def test_saving_over_a_folder_with_foreign_files_is_refused_and_changes_nothing(tmp_path, name):
    pipe, folder = digits(), tmp_path / "mine"
    pipe.save_pretrained(folder)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=f"holds {name}"):
        pipe.save_pretrained(folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_saving_over_an_earlier_pipeline_replaces_it(tmp_path):
    pipe = digits()
    pipe.save_pretrained(tmp_path / "mine")
    pipe.guidance_scale = 3.0
    pipe.save_pretrained(tmp_path / "mine")
    assert Pipeline.from_pretrained(tmp_path / "mine").guidance_scale == 3.0


def test_a_stable_diffusion_pipeline_can_be_saved_over_its_own_folder(latent_pipe, tmp_path):
    for _ in range(2):
        latent_pipe.save_pretrained(tmp_path / "sd")


def test_a_flat_folder_of_an_unconditional_pipeline_is_read(tmp_path):
    theirs = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8),
            norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        ),
        diffusers.DDPMScheduler(),
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    nested = Pipeline.from_pretrained(tmp_path)
    for part in ("unet", "scheduler"):
        for file in (tmp_path / part).iterdir():
            shutil.move(file, tmp_path / file.name)
        (tmp_path / part).rmdir()
    flat = Pipeline.from_pretrained(tmp_path)
    options = {"seed": 0, "num_inference_steps": 3, "output_type": "pt"}
    assert torch.equal(flat(**options).images, nested(**options).images)


def test_a_missing_part_is_named_by_its_folder(tmp_path):
    digits().save_pretrained(tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine" / "unet")
    with pytest.raises(CheckpointError, match="mine/unet"):
        Pipeline.from_pretrained(tmp_path / "mine")


def test_a_part_without_the_variant_is_read_without_it_and_a_warning_names_it(tmp_path):
    stable_diffusion(tmp_path, DDIM).save_pretrained(tmp_path / "sd")
    weights = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.warns(UserWarning, match="vae, text_encoder without variant 'fp16'|text_encoder, "):
        Pipeline.from_pretrained(tmp_path / "sd", variant="fp16")
    with pytest.raises(CheckpointError, match=r"text_encoder.*fp16|unet.*bf16"):
        Pipeline.from_pretrained(tmp_path / "sd", variant="bf16")


@pytest.mark.parametrize("make", [lambda path: stable_diffusion(path, DDIM), stable_diffusion_xl])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, -1.0])
def test_stable_diffusion_is_guided_only_by_scales_above_1_as_in_diffusers(tmp_path, make, scale):
    theirs = make(tmp_path)
    theirs.save_pretrained(tmp_path / "sd")
    theirs.set_progress_bar_config(disable=True)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"guidance_scale": scale, "latents": x, "num_inference_steps": 3}
    expected = theirs("cat", **options, output_type="pt").images
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = Pipeline.from_pretrained(tmp_path / "sd")("cat", **options, output_type="pt").images
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=1e-5)


def test_scale_0_of_a_minidiff_model_samples_the_unconditional_network_and_warns(pipe):
    options = {"num_inference_steps": 3, "seed": 0, "output_type": "pt", "guidance_scale": 0.0}
    with pytest.warns(UserWarning, match="unconditional network"):
        first = pipe(class_labels=3, **options).images
    with pytest.warns(UserWarning, match="unconditional network"):
        second = pipe(class_labels=7, **options).images
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
