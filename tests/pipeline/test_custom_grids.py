"""Timesteps, σ and callback tensors given in a call: the trajectories of diffusers' pipelines."""

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import DDIM, stable_diffusion, stable_diffusion_xl
from torch import Tensor

from minidiff import Pipeline
from minidiff.errors import InvalidArgument
from minidiff.schedulers import SCHEDULERS

PROMPTS, NEGATIVE = ["a cat on a dog", "dog"], ["cat", ""]
# "Align Your Steps" for Stable Diffusion 1.5 (Sabour et al. 2024, arXiv:2404.14507), rounded.
TIMESTEPS = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
SIGMAS = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Folders of diffusers with random weights: Stable Diffusion, the same distilled, and XL."""
    path = tmp_path_factory.mktemp("folders")
    stable_diffusion(path, DDIM).save_pretrained(path / "1")
    distilled = stable_diffusion(path, DDIM, unet={"time_cond_proj_dim": 8})
    distilled.save_pretrained(path / "distilled")
    stable_diffusion_xl(path).save_pretrained(path / "XL")
    return {name: str(path / name) for name in ("1", "distilled", "XL")}


def both(folder: str, scheduler: str | None = None):
    """Return the pipelines of minidiff and diffusers in this folder, with another scheduler."""
    cls = diffusers.StableDiffusionXLPipeline if folder.endswith("XL") else (
        diffusers.StableDiffusionPipeline
    )  # fmt: skip
    mine, theirs = Pipeline.from_pretrained(folder), cls.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    if scheduler is not None:
        mine.scheduler = SCHEDULERS[scheduler].from_config(mine.scheduler.config)
        theirs.scheduler = getattr(diffusers, scheduler).from_config(theirs.scheduler.config)
    return mine, theirs


def compare(mine, theirs, change=lambda step, tensors: None, names=("latents",), **options):
    """Compare x after every step, and the pictures; `change` is a callback of both."""
    trajectories: list[list[Tensor]] = []
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def keep(pipe: object, step: int, t: object, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if "latents" in tensors:
            trajectories[-1].append(tensors["latents"])
        change(step, tensors)
        return tensors

    pictures = []
    for pipe, kind in ((mine, "pt"), (theirs, "np")):
        trajectories.append([])
        generator = torch.Generator().manual_seed(1)
        result = pipe(
            PROMPTS, latents=latents, generator=generator, output_type=kind,
            callback_on_step_end=keep, callback_on_step_end_tensor_inputs=list(names), **options,
        )  # fmt: skip
        pictures.append(result.images)
    for a, b in zip(*trajectories, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    images = (pictures[0] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(images, pictures[1], atol=1e-4)
    return trajectories


@pytest.mark.parametrize(
    "name",
    [
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LCMScheduler",
    ],
)
def test_custom_timesteps_give_the_trajectory_of_diffusers(folders, name):
    steps, _ = compare(*both(folders["1"], name), timesteps=TIMESTEPS, guidance_scale=3.0)
    assert len(steps) == (19 if name.startswith("Heun") else 10)


@pytest.mark.parametrize("folder", ["1", "XL"])
def test_custom_sigmas_give_the_trajectory_of_diffusers(folders, folder):
    mine, theirs = both(folders[folder], "EulerDiscreteScheduler")
    steps, _ = compare(mine, theirs, sigmas=SIGMAS, negative_prompt=NEGATIVE, guidance_scale=4.0)
    assert len(steps) == 10


def test_custom_timesteps_of_an_edit_begin_at_its_strength(folders):
    pipe, _ = both(folders["1"])
    seen, image = [], torch.rand(1, 3, 32, 32) * 2 - 1
    pipe("a cat", image=image, strength=0.5, timesteps=[900, 600, 300, 100], seed=0,
         callback=lambda step: seen.append(step.t))  # fmt: skip
    assert seen == [300, 100]


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        ("DDIMScheduler", {"timesteps": [3, 2], "num_inference_steps": 2}, "give one of num_inf"),
        ("EulerDiscreteScheduler", {"timesteps": [3], "sigmas": [3, 0]}, "give one of timesteps"),
        ("DDIMScheduler", {"timesteps": [2, 3]}, "timesteps must be strictly falling"),
        ("DDIMScheduler", {"timesteps": []}, "timesteps must be strictly falling"),
        ("DDIMScheduler", {"timesteps": 7}, "timesteps must be a list of numbers, got 7"),
        ("DDIMScheduler", {"timesteps": [1000]}, r"timesteps must be in 0\.\.999, got 1000"),
        ("EulerDiscreteScheduler", {"sigmas": [1.0, 2.0, 0.0]}, "sigmas must be strictly falling"),
        ("EulerDiscreteScheduler", {"sigmas": [1.0]}, "sigmas must hold a first and a last"),
        ("EulerDiscreteScheduler", {"sigmas": 2.0}, "sigmas must be a list of numbers"),
        ("DDIMScheduler", {"sigmas": [1.0, 0.0]}, "sigmas must be None: DDIMScheduler takes none"),
        ("EulerAncestralDiscreteScheduler", {"timesteps": [5]}, "timesteps must be None: EulerAnc"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(folders, scheduler, options, message):
    pipe, _ = both(folders["1"], scheduler)
    pipe.unet.forward = None
    with pytest.raises(InvalidArgument, match=message):
        pipe("a cat", **options)


# --- tensors of a callback ----------------------------------------------------------------------


def turned(name: str, at: int):
    """Return a change of one tensor at one step: its last axis is rolled by one."""

    def change(step: int, tensors: dict[str, Tensor]) -> None:
        if step == at:
            tensors[name] = tensors[name].roll(1, -1)

    return change


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", ["latents", "prompt_embeds"])
@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
def test_a_callback_replaces_tensors_as_in_diffusers(folders, scheduler, name, scale):
    mine, theirs = both(folders["1"], scheduler)
    options = {"num_inference_steps": 5, "guidance_scale": scale, "names": ("latents", name)}
    compare(mine, theirs, turned(name, 2), **options)


@pytest.mark.parametrize("name", ["add_text_embeds", "add_time_ids", "prompt_embeds"])
def test_a_callback_replaces_the_inputs_of_xl_as_in_diffusers(folders, name):
    mine, theirs = both(folders["XL"])
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "negative_prompt": NEGATIVE}
    kept, _ = compare(mine, theirs, turned(name, 1), ("latents", name), **options)
    plain, _ = compare(mine, theirs, **options)
    assert torch.equal(kept[1], plain[1])
    assert not torch.equal(kept[2], plain[2])


def test_prompt_embeds_are_those_of_diffusers_negative_ones_first(folders):
    mine, theirs = both(folders["1"])
    seen = []
    for pipe in (mine, theirs):
        pipe(PROMPTS, negative_prompt=NEGATIVE, guidance_scale=2.0, num_inference_steps=1,
             callback_on_step_end=lambda pipe, i, t, given: seen.append(given) or {},
             callback_on_step_end_tensor_inputs=["prompt_embeds"])  # fmt: skip
    torch.testing.assert_close(seen[0]["prompt_embeds"], seen[1]["prompt_embeds"])
    assert seen[0]["prompt_embeds"].shape[0] == 4


def test_denoised_is_the_clean_sample_and_cannot_be_replaced(folders):
    mine, _ = both(folders["distilled"], "LCMScheduler")
    steps, seen = [], []
    options = {"num_inference_steps": 3, "callback_on_step_end_tensor_inputs": ["denoised"]}
    mine("a cat", callback=steps.append, **options,
         callback_on_step_end=lambda pipe, i, t, given: seen.append(given) or given)  # fmt: skip
    assert all(torch.equal(s.x0, g["denoised"]) for s, g in zip(steps, seen, strict=True))
    with pytest.raises(InvalidArgument, match="callback_on_step_end may return None, or any of"):
        mine("a cat", **options, callback_on_step_end=lambda p, i, t, given: {
            "denoised": given["denoised"] + 1})  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "names", "message"),
    [
        ("1", ["latent"], "must be one of latents, denoised, prompt_embeds; got 'latent'"),
        ("1", ["w_embedding"], "must be one of latents, denoised, prompt_embeds; got 'w_emb"),
        ("1", "latents", "must be a list"),
        ("1", [3], "must be a text"),
        ("XL", ["negative"], "one of latents, denoised, prompt_embeds, add_text_embeds, add_time"),
        ("distilled", ["x"], "must be one of latents, denoised, w_embedding, prompt_embeds; got"),
    ],
)
def test_a_tensor_that_the_model_lacks_is_refused_and_the_others_are_named(folders, folder, names,
                                                                           message):  # fmt: skip
    mine, _ = both(folders[folder])
    with pytest.raises(InvalidArgument, match=f"callback_on_step_end_tensor_inputs.*{message}"):
        mine("a cat", callback_on_step_end_tensor_inputs=names)


def test_inputs_that_vary_between_steps_cannot_be_replaced(folders):
    mine, _ = both(folders["1"])
    with pytest.raises(InvalidArgument, match="cannot have 'prompt_embeds' with guidance_interval"):
        mine("a cat", callback_on_step_end_tensor_inputs=["prompt_embeds"],
             guidance_interval=(0.1, 1.0))  # fmt: skip
