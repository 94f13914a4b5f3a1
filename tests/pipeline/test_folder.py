"""Folders of pipelines in layouts found in practice, and foreign files in them."""

import json
import shutil
import warnings

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import DDIM, digits, stable_diffusion, stable_diffusion_xl

from minidiff import Pipeline, UNet
from minidiff.errors import CheckpointError
from minidiff.pipeline.folder import UNCONDITIONAL
from minidiff.schedulers import SCHEDULERS

FOREIGN = (
    "notes.md",
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


# --- folders that diffusers reads as a whole ----------------------------------------------------


def distilled(path) -> diffusers.LatentConsistencyModelPipeline:
    """Return diffusers' pipeline of a latent consistency model, with random weights."""
    pipe = stable_diffusion(path, unet={"time_cond_proj_dim": 8})
    parts = {name: part for name, part in pipe.components.items() if name != "scheduler"}
    theirs = diffusers.LatentConsistencyModelPipeline(
        **parts, scheduler=diffusers.LCMScheduler(), requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs


def ours(images: torch.Tensor) -> np.ndarray:
    """Return minidiff's images as diffusers' pipelines do, (N, H, W, C) in [0, 1]."""
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0, "num_inference_steps": 1},
        {"guidance_scale": 7.3, "num_inference_steps": 8, "height": 24, "width": 40},
        {"timesteps": [999, 759, 499, 259]},
    ],
)
def test_a_latent_consistency_model_draws_the_pictures_of_diffusers(tmp_path, options):
    theirs, prompts = distilled(tmp_path), ["a cat on a dog", "dog"]
    theirs.save_pretrained(tmp_path / "lcm")
    pipe = Pipeline.from_pretrained(tmp_path / "lcm")
    assert (pipe.guidance_scale, pipe.num_inference_steps) == (8.5, 4)
    size = options.get("height", 32) // 2, options.get("width", 32) // 2
    latents, g = torch.randn(2, 4, *size), torch.Generator()
    g.manual_seed(3)
    expected = theirs(prompts, latents=latents, generator=g, output_type="np", **options).images
    g.manual_seed(3)
    images = pipe(prompts, latents=latents, generator=g, output_type="pt", **options).images
    assert expected.std() > 0.01
    np.testing.assert_allclose(ours(images), expected, atol=1e-4)
    pipe.save_pretrained(tmp_path / "again")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert type(again) is diffusers.LatentConsistencyModelPipeline
    again.set_progress_bar_config(disable=True)
    g.manual_seed(3)
    copy = again(prompts, latents=latents, generator=g, output_type="np", **options).images
    np.testing.assert_allclose(copy, expected, atol=1e-6)


@pytest.mark.filterwarnings(r"ignore:[\s\S]*`steps_offset` should be set to 1:FutureWarning")
def test_a_distilled_network_with_another_scheduler_is_written_as_stable_diffusion(tmp_path):
    distilled(tmp_path).save_pretrained(tmp_path / "lcm")
    pipe = Pipeline.from_pretrained(tmp_path / "lcm")
    pipe.scheduler = SCHEDULERS["DDIMScheduler"].from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "mine")
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "mine")
    assert type(theirs) is diffusers.StableDiffusionPipeline
    again = Pipeline.from_pretrained(tmp_path / "mine")
    assert (again.guidance_scale, again.num_inference_steps) == (8.5, 4)  # minidiff's own options


def unconditional(**changes) -> UNet:
    """Return a network in pixels with random weights."""
    torch.manual_seed(0)
    return UNet(**{
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
        "layers_per_block": 1, "norm_num_groups": 4, **changes,
    }).eval()  # fmt: skip


@pytest.mark.parametrize("name", UNCONDITIONAL)
def test_diffusers_draws_the_pictures_of_an_unconditional_model_from_its_folder(tmp_path, name):
    options = {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}
    scheduler = SCHEDULERS[name](**options, compat="diffusers")
    pipe = Pipeline(unconditional(), scheduler, num_inference_steps=7)
    pipe.save_pretrained(tmp_path / "mine")
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "mine")
    assert type(theirs).__name__ == UNCONDITIONAL[name]
    theirs.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(1)
    expected = theirs(batch_size=2, generator=g, num_inference_steps=7, output_type="np").images
    again = Pipeline.from_pretrained(tmp_path / "mine")
    assert again.num_inference_steps == 7
    images = again(num_images=2, generator=g.manual_seed(1), output_type="pt").images
    np.testing.assert_allclose(ours(images), expected, atol=1e-5)
    exact = SCHEDULERS[name].from_config(scheduler.config, compat="exact")
    Pipeline(unconditional(), exact).save_pretrained(tmp_path / "exact")
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "exact")
    assert type(theirs).__name__ == UNCONDITIONAL[name]
    assert Pipeline.from_pretrained(tmp_path / "exact").scheduler.config.compat == "exact"


@pytest.mark.parametrize(
    ("network", "scheduler", "options"),
    [
        ({}, ("EulerDiscreteScheduler", {}), {}),  # DDPMPipeline does not scale the sample
        ({}, ("UniPCMultistepScheduler", {}), {}),  # DDPMPipeline gives every step a generator
        ({}, ("DDPMScheduler", {"prediction_type": "flow"}), {}),
        ({"num_class_embeds": 2}, ("DDIMScheduler", {}), {"class_names": ["a", "b"]}),
        ({}, ("DDIMScheduler", {}), {"weaker": unconditional()}),
    ],
)
def test_other_models_have_a_kind_that_diffusers_refuses_by_name(
    tmp_path, network, scheduler, options
):
    name, config = scheduler
    pipe = Pipeline(unconditional(**network), SCHEDULERS[name](**config), **options)
    pipe.save_pretrained(tmp_path / "mine")
    with pytest.raises(AttributeError, match="diffusers has no attribute MinidiffPipeline"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "mine")
    again = Pipeline.from_pretrained(tmp_path / "mine")
    assert (again.class_names, type(again.scheduler)) == (pipe.class_names, type(pipe.scheduler))
    diffusers.UNet2DModel.from_pretrained(tmp_path / "mine" / "unet")


def test_a_folder_of_an_earlier_version_is_read(tmp_path):
    digits().save_pretrained(tmp_path / "mine")
    index = tmp_path / "mine" / "model_index.json"
    content = json.loads(index.read_text())
    assert content["_class_name"] == "MinidiffPipeline"
    index.write_text(json.dumps(content | {"_class_name": "Pipeline"}))
    assert Pipeline.from_pretrained(tmp_path / "mine").guidance_scale == 2.0


@pytest.mark.parametrize("extras", [[], 3, {"unet": ["os", "system"]}, {"seed": 1}])
def test_minidiffs_own_part_of_an_index_holds_options_alone(tmp_path, extras):
    Pipeline(unconditional(), SCHEDULERS["DDPMScheduler"]()).save_pretrained(tmp_path / "mine")
    index = tmp_path / "mine" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_minidiff": extras}))
    with pytest.raises(CheckpointError, match=r"model_index\.json: _minidiff must hold options"):
        Pipeline.from_pretrained(tmp_path / "mine")
