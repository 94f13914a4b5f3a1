"""Our schedulers inside diffusers' pipelines: the pictures equal those of its schedulers.

The networks are tiny and random, and the prompts are embeddings, as the text encoder never meets
the scheduler; so nothing is downloaded. Classes that minidiff does not have yet join by themselves.
"""

import inspect
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.schedulers import SCHEDULERS

diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()
# The pipelines say that they overwrite a default config, and overwrite it: that is tested here.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The configuration file:FutureWarning",
    "ignore:__array__ implementation:DeprecationWarning",
)

SHARED = [
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "UniPCMultistepScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "DEISMultistepScheduler",
]
LEFT_OUT = {
    "DDIMInverseScheduler": "walks from the picture to the noise; these pipelines walk back",
    "FlowMatchEulerDiscreteScheduler": "its network predicts a flow; Stable Diffusion's predicts ε",
    "EDMEulerScheduler": "its network has EDM's preconditioning; Stable Diffusion's has none",
    "EDMDPMSolverMultistepScheduler": "as EDMEulerScheduler",
    "KDPM2DiscreteScheduler": "inpainting of diffusers noises the kept part to the end of a step "
    "already at its midpoint; trajectories are compared in test_adams_bashforth.py",
}
NAMES = [name for name in SHARED if name in SCHEDULERS]

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
CONFIGS = {"stable-diffusion": STABLE_DIFFUSION, "defaults": {}}

TOLERANCE = 1e-4  # of a picture in [0, 1], and of latents relative to their largest value


# --- the pipelines ------------------------------------------------------------------------------


@cache
def denoiser(channels: int = 4) -> Any:
    """Stable Diffusion's U-Net in miniature; 9 channels take the mask and the picture as well."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
    ).eval()


@cache
def autoencoder() -> Any:
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        sample_size=32,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


@cache
def pixel_denoiser() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


def stable_diffusion(task: str, scheduler: Any, channels: int = 4) -> Any:
    """A pipeline of diffusers: "" draws from a prompt, "Img2Img" and "Inpaint" change a picture."""
    pytest.importorskip("transformers")  # their modules import it, though no test calls it
    pipe = getattr(diffusers, f"StableDiffusion{task}Pipeline")(
        unet=denoiser(channels),
        vae=autoencoder(),
        scheduler=scheduler,
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Drawing(NamedTuple):
    """The result of a call: pictures in [0, 1], (B, H, W, C), and the latents after each step."""

    pictures: np.ndarray
    latents: list[Tensor]


def draw(pipe: Any, *, steps: int = 7, seed: int = 0, **arguments: Any) -> Drawing:
    """Return two pictures, with guidance, from fixed embeddings."""
    g = torch.Generator().manual_seed(5)
    prompt, nothing = torch.randn(2, 2, 5, 8, generator=g)
    if "strength" in arguments:
        arguments["image"] = torch.rand(2, 3, 32, 32, generator=g)
    if "Inpaint" in type(pipe).__name__:
        arguments["mask_image"] = torch.zeros(2, 1, 32, 32)
        arguments["mask_image"][..., 8:24, 4:20] = 1
    latents = []

    def keep(pipe: Any, i: int, t: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(state["latents"].clone())
        return state

    arguments.setdefault("generator", torch.Generator().manual_seed(seed))
    output = pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=nothing,
        guidance_scale=5.0,
        num_inference_steps=steps,
        output_type="np",
        callback_on_step_end=keep,
        **arguments,
    )
    return Drawing(output.images, latents)


def their_scheduler(name: str, options: dict[str, Any]) -> Any:
    return getattr(diffusers, name)(**known(name, options))


def our_scheduler(name: str, options: dict[str, Any]) -> Any:
    return SCHEDULERS[name](**known(name, options))


def known(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return those of the options that diffusers' class has."""
    has = inspect.signature(getattr(diffusers, name)).parameters
    return {option: value for option, value in options.items() if option in has}


def assert_same_pictures(mine: np.ndarray, theirs: np.ndarray) -> None:
    assert np.isfinite(theirs).all()
    inside = (theirs > 0) & (theirs < 1)
    assert inside.mean() > 0.5  # black and white pixels would agree whatever the scheduler does
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=TOLERANCE)


def assert_same(mine: Drawing, theirs: Drawing) -> None:
    assert len(mine.latents) == len(theirs.latents) > 0
    for a, b in zip(mine.latents, theirs.latents, strict=True):
        assert torch.isfinite(b).all()
        assert (a - b).abs().max() <= TOLERANCE * b.abs().max().clamp(min=1)
    assert_same_pictures(mine.pictures, theirs.pictures)


# --- which schedulers ---------------------------------------------------------------------------


def test_each_scheduler_of_diffusers_is_compared_here_or_left_out_for_a_reason() -> None:
    assert {name for name in SCHEDULERS if hasattr(diffusers, name)} <= {*SHARED, *LEFT_OUT}
    assert all(hasattr(diffusers, name) for name in [*SHARED, *LEFT_OUT])


def test_any_two_schedulers_draw_different_pictures() -> None:
    """Else the tests below would pass with a wrong scheduler."""
    pictures = {
        name: draw(stable_diffusion("", our_scheduler(name, STABLE_DIFFUSION))).pictures
        for name in NAMES
    }
    for a, b in combinations(NAMES, 2):
        assert np.abs(pictures[a] - pictures[b]).max() > 10 * TOLERANCE, (a, b)


# --- drawing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "eta"), [(4, 0.0), (7, 0.5)])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_text_to_image_draws_the_same_pictures(
    name: str, config: str, steps: int, eta: float
) -> None:
    """eta is DDIM's alone; the pipeline passes it to those schedulers that know it."""
    mine, theirs = (
        draw(stable_diffusion("", scheduler(name, CONFIGS[config])), steps=steps, eta=eta)
        for scheduler in (our_scheduler, their_scheduler)
    )
    assert_same(mine, theirs)


@pytest.mark.parametrize("strength", [0.3, pytest.param(0.8, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
def test_changing_a_picture_gives_the_same_pictures(
    task: str, name: str, config: str, strength: float
) -> None:
    """Sampling begins inside the grid, and inpainting adds noise to the picture after each step."""
    mine, theirs = (
        draw(stable_diffusion(task, scheduler(name, CONFIGS[config])), strength=strength, eta=0.5)
        for scheduler in (our_scheduler, their_scheduler)
    )
    assert_same(mine, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_inpainting_with_a_network_that_takes_the_mask_gives_the_same_pictures(name: str) -> None:
    mine, theirs = (
        draw(
            stable_diffusion("Inpaint", scheduler(name, STABLE_DIFFUSION), channels=9),
            steps=4,
            strength=0.8,
        )
        for scheduler in (our_scheduler, their_scheduler)
    )
    assert_same(mine, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_a_generator_for_each_picture_draws_the_same_pictures(name: str) -> None:
    mine, theirs = (
        draw(
            stable_diffusion("", scheduler(name, STABLE_DIFFUSION)),
            steps=4,
            eta=1.0,
            generator=[torch.Generator().manual_seed(i) for i in (3, 4)],
        )
        for scheduler in (our_scheduler, their_scheduler)
    )
    assert_same(mine, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_call_of_a_pipeline_does_not_depend_on_the_first(name: str) -> None:
    used = stable_diffusion("", our_scheduler(name, STABLE_DIFFUSION))
    draw(used, steps=5, seed=1)
    fresh = stable_diffusion("", their_scheduler(name, STABLE_DIFFUSION))
    assert_same(draw(used, steps=4), draw(fresh, steps=4))


OWN_GRIDS = [
    (name, {"timesteps": [899, 599, 299, 19]})  # of the fifty that LCM knows
    for name in NAMES
    if "timesteps" in inspect.signature(getattr(diffusers, name).set_timesteps).parameters
] + [(name, {"sigmas": [14.0, 4.0, 1.0, 0.2]}) for name in NAMES if name.startswith("EulerDiscr")]


@pytest.mark.parametrize(("name", "grid"), OWN_GRIDS)
def test_custom_timesteps_or_sigmas_draw_the_same_pictures(name: str, grid: dict) -> None:
    mine, theirs = (
        draw(stable_diffusion("", scheduler(name, STABLE_DIFFUSION)), **grid)
        for scheduler in (our_scheduler, their_scheduler)
    )
    assert_same(mine, theirs)


SDE = {"algorithm_type": "sde-dpmsolver++"}
KARRAS = {"use_karras_sigmas": True}
OPTIONS = [
    ("DDPMScheduler", {"variance_type": "fixed_large"}),
    ("DDIMScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"euler_at_final": True, "timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", SDE),
    ("DPMSolverMultistepScheduler", KARRAS),
    ("DPMSolverMultistepScheduler", SDE | KARRAS),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3, "lower_order_final": True}),
    ("DPMSolverSinglestepScheduler", KARRAS),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", KARRAS),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("HeunDiscreteScheduler", KARRAS),
    ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("UniPCMultistepScheduler", KARRAS),
    ("PNDMScheduler", {"timestep_spacing": "trailing"}),
    ("LCMScheduler", {"original_inference_steps": 100}),
]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, id=f"{name}-{'-'.join(options)}")
        for name, options in OPTIONS
        if name in NAMES
    ],
)
def test_an_option_draws_the_same_pictures_or_is_refused_by_name(name: str, options: dict) -> None:
    options = STABLE_DIFFUSION | options
    if options.get("rescale_betas_zero_snr"):
        options["prediction_type"] = "v_prediction"
    refused = [
        o for o, only in SCHEDULERS[name].unsupported.items() if options.get(o, only) != only
    ]
    if refused:
        with pytest.raises(InvalidArgument, match="|".join(refused)):
            our_scheduler(name, options)
        return
    for task, arguments in (("", {}), ("Img2Img", {"strength": 0.8})):
        mine, theirs = (
            draw(stable_diffusion(task, scheduler(name, options)), **arguments)
            for scheduler in (our_scheduler, their_scheduler)
        )
        assert_same(mine, theirs)


# DDPMPipeline scales no input, as Euler's and Heun's would want, and hands every step a generator.
UNSCALED = [
    name
    for name in NAMES
    if "generator" in inspect.signature(getattr(diffusers, name).step).parameters
    and "Euler" not in name
]


# x0 from an untrained network's ε lies far outside [0, 1] unless clipped; from its v it does not.
VELOCITY = {"prediction_type": "v_prediction"}
PIXEL_CONFIGS = {
    "defaults": {},
    "velocity": VELOCITY,
    "velocity-stable-diffusion": VELOCITY | STABLE_DIFFUSION,
}
PIXEL_CASES = [
    (name, config)
    for name in UNSCALED
    for config in PIXEL_CONFIGS
    if config != "defaults" or getattr(diffusers, name)().config.get("clip_sample")
]


@pytest.mark.parametrize("steps", [4, 7, 30])
@pytest.mark.parametrize(("name", "config"), PIXEL_CASES)
def test_ddpm_pipeline_draws_the_same_pictures(name: str, config: str, steps: int) -> None:
    mine, theirs = (
        draw_pixels(
            diffusers.DDPMPipeline(pixel_denoiser(), scheduler(name, PIXEL_CONFIGS[config])), steps
        )
        for scheduler in (our_scheduler, their_scheduler)
    )
    assert_same_pictures(mine, theirs)


def draw_pixels(pipe: Any, steps: int) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return pipe(2, generator, num_inference_steps=steps, output_type="np").images


# --- changing a pipeline's scheduler, saving, opening -------------------------------------------


@pytest.mark.parametrize(
    ("source", "options"),
    [("PNDMScheduler", STABLE_DIFFUSION), ("DDIMScheduler", {})],
    ids=["as-Stable-Diffusion-ships", "overwritten-by-the-pipeline"],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_built_from_the_pipelines_config_replaces_it(
    name: str, source: str, options: dict
) -> None:
    drawings = []
    for cls in (SCHEDULERS[name], getattr(diffusers, name)):
        pipe = stable_diffusion("", their_scheduler(source, options))
        assert isinstance(pipe.scheduler.config, diffusers.configuration_utils.FrozenDict)
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        drawings.append(draw(pipe, steps=4))
    assert_same(*drawings)


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_made_from_another_keeps_our_scheduler(name: str) -> None:
    drawings = []
    for scheduler in (our_scheduler, their_scheduler):
        first = stable_diffusion("", scheduler(name, STABLE_DIFFUSION))
        draw(first, steps=5, seed=1)
        second = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(first)
        assert second.scheduler is first.scheduler
        second.set_progress_bar_config(disable=True)
        drawings.append(draw(second, steps=5, strength=0.5))
    assert_same(*drawings)


@pytest.mark.parametrize("name", NAMES)
def test_a_default_config_that_a_pipeline_overwrites_reads_in_diffusers(
    name: str, tmp_path: Path
) -> None:
    mine = stable_diffusion("", our_scheduler(name, {})).scheduler
    theirs = stable_diffusion("", their_scheduler(name, {})).scheduler
    mine.save_pretrained(tmp_path)
    read = type(theirs).from_pretrained(tmp_path).config
    expected = {k: v for k, v in theirs.config.items() if not k.startswith("_")}
    assert {k: read[k] for k in expected} == expected
    assert expected.get("steps_offset", 1) == 1
    assert expected.get("clip_sample", False) is False


@pytest.mark.parametrize("name", UNSCALED)
def test_a_saved_pipeline_with_our_scheduler_config_opens_in_diffusers(
    name: str, tmp_path: Path
) -> None:
    diffusers.DDPMPipeline(pixel_denoiser(), their_scheduler(name, {})).save_pretrained(tmp_path)
    mine = our_scheduler(name, VELOCITY | STABLE_DIFFUSION)
    mine.save_pretrained(tmp_path / "scheduler")
    opened = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(opened.scheduler) is getattr(diffusers, name)
    theirs = draw_pixels(opened, 4)
    opened.scheduler = type(mine).from_pretrained(tmp_path, subfolder="scheduler")
    assert_same_pictures(draw_pixels(opened, 4), theirs)
    opened.scheduler = our_scheduler(name, {})
    assert np.abs(draw_pixels(opened, 4) - theirs).max() > 10 * TOLERANCE


def test_a_pipeline_saved_with_our_scheduler_opens_when_given_one_again(tmp_path: Path) -> None:
    """diffusers saves only components of its classes, and warns: ours saves itself."""
    scheduler = our_scheduler("DDIMScheduler", VELOCITY | STABLE_DIFFUSION)
    pipe = diffusers.DDPMPipeline(pixel_denoiser(), scheduler)
    pipe.save_pretrained(tmp_path)
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    again = diffusers.DDPMPipeline.from_pretrained(
        tmp_path, scheduler=SCHEDULERS["DDIMScheduler"].from_pretrained(tmp_path / "scheduler")
    )
    for option, value in pipe.scheduler.config.items():
        assert option[0] == "_" or again.scheduler.config[option] == value
    assert_same_pictures(draw_pixels(again, 4), draw_pixels(pipe, 4))
