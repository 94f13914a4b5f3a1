"""Folders of Stable Diffusion 1.x, 2.x and XL: the pictures of diffusers, in both directions."""

import json
import warnings

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import DDIM, DDIM_V, stable_diffusion, stable_diffusion_xl

from minidiff import Pipeline
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.schedulers import SCHEDULERS

PROMPTS, NEGATIVE = ["a cat on a dog", "dog"], ["cat", ""]


def pictures(pipe, negative, scale, latents, steps=4, **options) -> np.ndarray:
    """Return the pictures of diffusers, (N, H, W, C) in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        PROMPTS,
        negative_prompt=negative,
        guidance_scale=scale,
        latents=latents,
        num_inference_steps=steps,
        output_type="np",
        **options,
    ).images


def ours(pipe, negative, scale, latents, steps=4, **options) -> np.ndarray:
    """Return the pictures of minidiff, (N, H, W, C) in [0, 1]."""
    images = pipe(
        PROMPTS,
        negative_prompt=negative,
        guidance_scale=scale,
        latents=latents,
        num_inference_steps=steps,
        output_type="pt",
        **options,
    ).images
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


GENERATIONS = {
    "1": lambda path: stable_diffusion(path),
    "1, DDIM": lambda path: stable_diffusion(path, DDIM),
    "2": lambda path: stable_diffusion(
        path,
        DDIM_V,
        {"hidden_act": "gelu"},
        {"use_linear_projection": True, "attention_head_dim": [1, 2]},
    ),
    "XL": stable_diffusion_xl,
    "XL, encoded empty prompt": lambda path: stable_diffusion_xl(
        path, force_zeros_for_empty_prompt=False
    ),
}


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(("negative", "scale"), [(None, 7.5), (NEGATIVE, 3.0), (None, 1.0)])
def test_a_folder_of_diffusers_gives_the_same_pictures(tmp_path, generation, negative, scale):
    theirs = GENERATIONS[generation](tmp_path)
    theirs.save_pretrained(tmp_path / "sd")
    latents = torch.randn(2, 4, 16, 16)
    expected = pictures(theirs, negative, scale, latents)
    pipe = Pipeline.from_pretrained(tmp_path / "sd")
    assert expected.std() > 0.01
    np.testing.assert_allclose(ours(pipe, negative, scale, latents), expected, atol=1e-4)


@pytest.mark.parametrize("generation", ["1", "XL"])
def test_diffusers_draws_the_same_pictures_from_a_folder_of_minidiff(tmp_path, generation):
    theirs = GENERATIONS[generation](tmp_path)
    theirs.save_pretrained(tmp_path / "a")
    pipe = Pipeline.from_pretrained(tmp_path / "a")
    pipe.save_pretrained(tmp_path / "b")
    again = type(theirs).from_pretrained(tmp_path / "b")
    latents = torch.randn(2, 4, 16, 16)
    expected = pictures(theirs, NEGATIVE, 3.0, latents)
    np.testing.assert_allclose(pictures(again, NEGATIVE, 3.0, latents), expected, atol=1e-6)
    for part in ("unet", "vae", "text_encoder"):
        before, after = getattr(theirs, part).state_dict(), getattr(again, part).state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("generation", ["1", "XL"])
def test_other_sizes_give_the_same_pictures(tmp_path, generation):
    theirs = GENERATIONS[generation](tmp_path)
    theirs.save_pretrained(tmp_path / "sd")
    latents, size = torch.randn(2, 4, 10, 14), {"height": 20, "width": 28}
    # diffusers wants multiples of 8 though this autoencoder halves once only.
    with pytest.raises(ValueError, match="divisible by 8"):
        pictures(theirs, None, 5.0, latents, **size)
    latents, size = torch.randn(2, 4, 12, 20), {"height": 24, "width": 40}
    expected = pictures(theirs, None, 5.0, latents, **size)
    pipe = Pipeline.from_pretrained(tmp_path / "sd")
    np.testing.assert_allclose(ours(pipe, None, 5.0, latents, **size), expected, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"]
)
def test_another_scheduler_gives_the_same_pictures(tmp_path, name):
    stable_diffusion(tmp_path).save_pretrained(tmp_path / "sd")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
    pipe = Pipeline.from_pretrained(tmp_path / "sd")
    theirs.scheduler = getattr(diffusers, name).from_config(theirs.scheduler.config)
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)
    latents = torch.randn(2, 4, 16, 16)
    expected = pictures(theirs, None, 4.0, latents, steps=6)
    np.testing.assert_allclose(ours(pipe, None, 4.0, latents, steps=6), expected, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_a_distilled_network_takes_the_guidance_scale_as_input(tmp_path, scale):
    """Latent consistency models take w as an argument and need one evaluation per step."""
    distilled = stable_diffusion(tmp_path, DDIM, unet={"time_cond_proj_dim": 8})
    distilled.save_pretrained(tmp_path / "sd")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
    pipe = Pipeline.from_pretrained(tmp_path / "sd")
    latents = torch.randn(2, 4, 16, 16)
    expected = pictures(theirs, None, scale, latents)
    np.testing.assert_allclose(ours(pipe, None, scale, latents), expected, atol=1e-4)
    with pytest.raises(InvalidArgument, match="negative_prompt must be None"):
        ours(pipe, NEGATIVE, scale, latents)


def test_half_precision_variants_and_shards_are_read(tmp_path):
    theirs = stable_diffusion(tmp_path).to(dtype=torch.float16)
    theirs.save_pretrained(tmp_path / "sd", variant="fp16", max_shard_size="40KB")
    unet = tmp_path / "sd" / "unet"
    assert (unet / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    with pytest.raises(CheckpointError, match="no such file"):
        Pipeline.from_pretrained(tmp_path / "sd")
    single = Pipeline.from_pretrained(tmp_path / "sd", variant="fp16")
    half = Pipeline.from_pretrained(tmp_path / "sd", variant="fp16", torch_dtype=torch.float16)
    assert next(half.unet.parameters()).dtype == torch.float16
    latents = torch.randn(2, 4, 16, 16)
    expected = pictures(theirs.to(dtype=torch.float32), None, 4.0, latents)
    np.testing.assert_allclose(ours(single, None, 4.0, latents), expected, atol=1e-4)
    np.testing.assert_allclose(ours(half, None, 4.0, latents), expected, atol=2e-2)


def test_the_default_guidance_and_size_are_those_of_diffusers(tmp_path):
    theirs = stable_diffusion_xl(tmp_path)
    theirs.save_pretrained(tmp_path / "sd")
    pipe = Pipeline.from_pretrained(tmp_path / "sd")
    latents = torch.randn(1, 4, 16, 16)
    expected = theirs("cat", latents=latents, output_type="np", num_inference_steps=3).images
    image = pipe("cat", latents=latents, output_type="pt", num_inference_steps=3).images
    image = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(image, expected, atol=1e-4)


def test_pictures_of_one_prompt_differ_and_do_not_depend_on_their_batch(tmp_path):
    stable_diffusion(tmp_path, DDIM_V).save_pretrained(tmp_path / "sd")
    pipe = Pipeline.from_pretrained(tmp_path / "sd")
    options = {"num_inference_steps": 2, "seed": 3, "output_type": "np", "guidance_scale": 3}
    together = pipe("a cat", num_images=3, **options).images.astype(int)
    alone = pipe("a cat", first_index=2, **options).images.astype(int)
    in_batches = pipe(["a cat"] * 3, batch_size=2, **options).images.astype(int)
    assert np.abs(together[2] - alone[0]).max() <= 1
    assert np.abs(together - in_batches).max() <= 1
    assert np.abs(together[0] - together[1]).max() > 1


def test_a_safety_checker_is_not_loaded_and_a_warning_names_it(tmp_path):
    stable_diffusion(tmp_path, DDIM_V).save_pretrained(tmp_path / "sd")
    index = tmp_path / "sd" / "model_index.json"
    content = json.loads(index.read_text())
    content["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="safety_checker is not loaded"):
        Pipeline.from_pretrained(tmp_path / "sd")


def test_unconditional_pipelines_are_read(tmp_path):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=2 * ("DownBlock2D",),
        up_block_types=2 * ("UpBlock2D",),
        norm_num_groups=4,
    )
    theirs = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=20))
    theirs.save_pretrained(tmp_path / "ddpm")
    pipe = Pipeline.from_pretrained(tmp_path / "ddpm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = pipe(seed=0, num_inference_steps=5, output_type="np").images
    assert image.shape == (1, 8, 8, 3)
    assert pipe.guidance_scale == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "FluxPipeline"},
            "_class_name must be one of MinidiffPipeline, Pipeline, DDPMPipeline",
        ),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "'controlnet' is not a part or option"),
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "unet must be one of"),
        ({"unet": "UNet2DConditionModel"}, "unet must be a library and a class"),
        ({"vae": [None, None]}, "vae must be a library and a class"),
        ({"scheduler": ["diffusers", "KarrasVeScheduler"]}, "scheduler must be one of"),
        ({"tokenizer": ["transformers", "T5Tokenizer"]}, "tokenizer must be one of"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder must be one of"),
        ({"_class_name": "StableDiffusionXLPipeline"}, "has no tokenizer_2"),
    ],
)
def test_an_index_with_unsupported_parts_is_refused(tmp_path, change, message):
    stable_diffusion(tmp_path, DDIM_V).save_pretrained(tmp_path / "sd")
    index = tmp_path / "sd" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        Pipeline.from_pretrained(tmp_path / "sd")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    stable_diffusion(folder, DDIM_V).save_pretrained(folder / "sd")
    return Pipeline.from_pretrained(folder / "sd")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "prompt must be given"),
        ({"prompt": 7}, "prompt must be a text or a list of texts, got 7"),
        ({"prompt": []}, "prompt must be one text, or at least 1 of them; got 0"),
        ({"prompt": ["cat", 3]}, "prompt must be a text or a list of texts"),
        ({"prompt": ["cat", "dog"], "num_images": 3}, "prompt must be one text, or 3 of them"),
        ({"prompt": "cat", "class_labels": 1}, "class_labels must be None"),
        ({"prompt": "cat", "negative_prompt": ["a", "b"]}, "negative_prompt must be one text"),
        ({"prompt": "cat", "height": 31}, "height must be a multiple of 2, got 31"),
        ({"prompt": "cat", "width": 0}, "width must be in 1"),
        (
            {"prompt": "cat", "latents": torch.zeros(1, 4, 8, 8)},
            r"latents must be a tensor of shape",
        ),
        (
            {"prompt": "cat", "latents": torch.zeros(1, 4, 16, 16).long()},
            "latents must be floating",
        ),
        ({"prompt": "cat", "seed": 1, "generator": torch.Generator()}, "either seed or generator"),
        ({"prompt": "cat", "guidance_scale": float("nan")}, "guidance_scale must be finite"),
    ],
)
def test_invalid_arguments_are_refused_by_name(small, arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        small(**arguments)


def test_a_negative_prompt_without_guidance_has_no_effect_and_warns(small):
    options = {"guidance_scale": 1, "seed": 0, "num_inference_steps": 1, "output_type": "pt"}
    with pytest.warns(UserWarning, match="negative_prompt has no effect without guidance"):
        warned = small("cat", negative_prompt="dog", **options).images
    assert torch.equal(warned, small("cat", **options).images)


def test_parts_of_different_sizes_are_refused(small):
    with pytest.raises(InvalidArgument, match="prompts must give tokens of 16 channels"):
        Pipeline(small.unet, small.scheduler, small.vae)
    with pytest.raises(InvalidArgument, match="class_names must be empty beside prompts"):
        unet = type(small.unet)(**{**small.unet.config, "num_class_embeds": 2})
        Pipeline(unet, small.scheduler, small.vae, ["a", "b"], prompts=small.prompts)
    with pytest.raises(InvalidArgument, match="as many in_channels as the vae latent_channels"):
        vae = type(small.vae)(**{**small.vae.config, "latent_channels": 3})
        Pipeline(small.unet, small.scheduler, vae, prompts=small.prompts)
