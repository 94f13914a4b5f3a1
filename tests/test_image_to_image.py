"""Pictures that are given: image-to-image and inpainting against diffusers, and what stays."""

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import DDIM, stable_diffusion

from minidiff import Pipeline
from minidiff.schedulers import SCHEDULERS

SIDE = 32
PROMPTS = ["a cat on a dog", "dog"]
# Whatever diffusers' StableDiffusionImg2ImgPipeline runs with.
TAKEN = [name for name in SCHEDULERS if not name.startswith(("FlowMatch", "DDIMInverse"))]
OPTIONS = {
    "DPMSolverMultistepScheduler, SDE": {"algorithm_type": "sde-dpmsolver++"},
    "EulerDiscreteScheduler, Karras": {"use_karras_sigmas": True},
    "DDIMScheduler, trailing": {"timestep_spacing": "trailing"},
    "PNDMScheduler, Runge-Kutta": {"skip_prk_steps": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd")
    stable_diffusion(path, DDIM).save_pretrained(path / "sd")
    return path / "sd"


@pytest.fixture
def pipe(folder) -> Pipeline:
    return Pipeline.from_pretrained(folder)


def image(n: int = 2, seed: int = 0) -> torch.Tensor:
    """Smooth pictures (n, 3, SIDE, SIDE) in [−1, 1]."""
    noise = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, size=SIDE, mode="bicubic").tanh()


def mask() -> torch.Tensor:
    """White in an off-centre square, (1, 1, SIDE, SIDE)."""
    white = torch.zeros(1, 1, SIDE, SIDE)
    white[..., 8:24, 4:20] = 1
    return white


def made(cls: type, pipe, options: dict):
    """A scheduler of either library for the noise schedule of a pipeline; EDM has its own."""
    if cls.__name__.startswith("EDM"):
        return cls(**options)
    return cls.from_config(pipe.scheduler.config, **options)


def theirs(folder, kind: str, scheduler, **options) -> np.ndarray:
    """diffusers' pictures, (N, H, W, C) in [0, 1]."""
    pipe = getattr(diffusers, kind).from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = made(getattr(diffusers, scheduler[0]), pipe, scheduler[1])
    return pipe(PROMPTS, guidance_scale=3.0, output_type="np", **options).images


def ours(pipe: Pipeline, scheduler, **options) -> np.ndarray:
    if scheduler is not None:
        pipe.scheduler = made(SCHEDULERS[scheduler[0]], pipe, scheduler[1])
    images = pipe(PROMPTS, guidance_scale=3.0, output_type="pt", **options).images
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def source(one_each: bool = False):
    made = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    return made if one_each else made[0]


@pytest.mark.parametrize("name", [*TAKEN, *OPTIONS])
def test_image_to_image_gives_the_pictures_of_diffusers(folder, pipe, name):
    scheduler = (name.split(",")[0], OPTIONS.get(name, {}))
    options = {"image": image(), "strength": 0.6, "num_inference_steps": 8}
    expected = theirs(
        folder, "StableDiffusionImg2ImgPipeline", scheduler, generator=source(), **options
    )
    assert expected.std() > 0.01
    np.testing.assert_allclose(
        ours(pipe, scheduler, generator=source(), **options), expected, atol=1e-4
    )


@pytest.mark.parametrize("strength", [0.26, 1.0])
@pytest.mark.parametrize("one_each", [False, True])
def test_any_strength_and_source_of_noise_gives_the_pictures_of_diffusers(
    folder, pipe, strength, one_each
):
    options = {"image": image(), "strength": strength, "num_inference_steps": 4, "eta": 0.5}
    expected = theirs(
        folder, "StableDiffusionImg2ImgPipeline", None, generator=source(one_each), **options
    )
    mine = ours(pipe, None, generator=source(one_each), **options)
    np.testing.assert_allclose(mine, expected, atol=1e-4)


INPAINTING = ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
              "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]  # fmt: skip


@pytest.mark.parametrize("name", INPAINTING)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_gives_the_pictures_of_diffusers_and_keeps_the_rest(
    folder, pipe, name, strength
):
    """diffusers leaves around the hole what its autoencoder made of the picture; here it stays."""
    options = {"image": image(), "mask_image": mask(), "strength": strength}
    options["num_inference_steps"] = 6
    scheduler = (name, {})
    expected = theirs(
        folder, "StableDiffusionInpaintPipeline", scheduler, generator=source(), **options
    )
    mine = ours(pipe, scheduler, generator=source(), **options)
    hole = mask()[0, 0].bool().numpy()
    np.testing.assert_allclose(mine[:, hole], expected[:, hole], atol=1e-4)
    kept = (image() / 2 + 0.5).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(mine[:, ~hole], kept[:, ~hole])
    assert np.abs(mine[:, hole] - kept[:, hole]).mean() > 0.01


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_network_that_is_shown_the_mask_gives_the_pictures_of_diffusers(tmp_path, name, strength):
    unet = {"in_channels": 9}
    stable_diffusion(tmp_path, DDIM, unet=unet).save_pretrained(tmp_path / "sd")
    options = {"image": image(), "mask_image": mask(), "strength": strength}
    options["num_inference_steps"] = 4
    scheduler = (name, {})
    expected = theirs(
        tmp_path / "sd", "StableDiffusionInpaintPipeline", scheduler, generator=source(), **options
    )
    pipe = Pipeline.from_pretrained(tmp_path / "sd")
    mine = ours(pipe, scheduler, generator=source(), **options)
    hole = mask()[0, 0].bool().numpy()
    np.testing.assert_allclose(mine[:, hole], expected[:, hole], atol=1e-4)
