"""Image-to-image and inpainting: against diffusers, closed forms, and the pixels to keep."""

import math
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import DDIM, digits, stable_diffusion

from minidiff import DDIMScheduler, NoiseSchedule, Pipeline, UNet, add_noise
from minidiff.errors import InvalidArgument
from minidiff.exact import GaussianMixture
from minidiff.guidance import Meaning
from minidiff.images.pixels import as_mask, to_float, to_uint8
from minidiff.lab.order import output_of
from minidiff.noise import image_generators, randn
from minidiff.pipeline.inpaint import (
    keeping,
    noised_again,
    reconstructing,
    repaint,
    stretches,
)
from minidiff.prediction import edm_row, row
from minidiff.sample import meaning_of, trajectory
from minidiff.schedule import Level
from minidiff.schedulers import SCHEDULERS
from minidiff.schedulers.core.names import sampler

# Both libraries are given the same tensor in [−1, 1].
pytestmark = pytest.mark.filterwarnings(
    r"ignore:Passing `image` as torch tensor with value range in \[-1,1\]:FutureWarning"
)

SIDE = 32
PROMPTS = ["a cat on a dog", "dog"]
# The schedulers that diffusers' StableDiffusionImg2ImgPipeline supports.
SUPPORTED = [name for name in SCHEDULERS if not name.startswith(("FlowMatch", "DDIMInverse"))]
OPTIONS = {
    "DPMSolverMultistepScheduler, SDE": {"algorithm_type": "sde-dpmsolver++"},
    "EulerDiscreteScheduler, Karras": {"use_karras_sigmas": True},
    "DDIMScheduler, trailing": {"timestep_spacing": "trailing"},
    "PNDMScheduler, Runge-Kutta": {"skip_prk_steps": False},
}


def image(n: int = 2, seed: int = 0) -> torch.Tensor:
    """Return smooth pictures (n, 3, SIDE, SIDE) in [−1, 1]."""
    noise = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, size=SIDE, mode="bicubic").tanh()


def mask() -> torch.Tensor:
    """Return a mask (1, 1, SIDE, SIDE), white in an off-centre square."""
    white = torch.zeros(1, 1, SIDE, SIDE)
    white[..., 8:24, 4:20] = 1
    return white


def scheduler_for(pipe, cls: type, options: dict):
    """Return a scheduler of either library with the pipeline's noise schedule; EDM has its own."""
    if cls.__name__.startswith("EDM"):
        return cls(**options)
    return cls.from_config(pipe.scheduler.config, **options)


def theirs(folder, kind: str, scheduler, **options) -> np.ndarray:
    """Return the pictures of diffusers, (N, H, W, C) in [0, 1]."""
    pipe = getattr(diffusers, kind).from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = scheduler_for(pipe, getattr(diffusers, scheduler[0]), scheduler[1])
    return pipe(PROMPTS, guidance_scale=3.0, output_type="np", **options).images


def ours(pipe: Pipeline, scheduler, **options) -> np.ndarray:
    """Return the pictures of minidiff, (N, H, W, C) in [0, 1]."""
    if scheduler is not None:
        pipe.scheduler = scheduler_for(pipe, SCHEDULERS[scheduler[0]], scheduler[1])
    images = pipe(PROMPTS, guidance_scale=3.0, output_type="pt", **options).images
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def generators(per_image: bool = False):
    """Return one generator, or a list of one per image."""
    both = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    return both if per_image else both[0]


SLOW = ("LCMScheduler", "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler",
        "UniPCMultistepScheduler", "DDIMScheduler, trailing")  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in (*SUPPORTED, *OPTIONS)],
)
def test_image_to_image_gives_the_pictures_of_diffusers(latent_folder, latent_pipe, name):
    scheduler = (name.split(",")[0], OPTIONS.get(name, {}))
    options = {"image": image(), "strength": 0.6, "num_inference_steps": 5}
    expected = theirs(
        latent_folder,
        "StableDiffusionImg2ImgPipeline",
        scheduler,
        generator=generators(),
        **options,
    )
    assert expected.std() > 0.01
    np.testing.assert_allclose(
        ours(latent_pipe, scheduler, generator=generators(), **options), expected, atol=1e-4
    )


@pytest.mark.parametrize("strength", [0.26, 1.0])
@pytest.mark.parametrize("per_image", [False, True])
def test_any_strength_and_kind_of_generator_gives_the_pictures_of_diffusers(
    latent_folder, latent_pipe, strength, per_image
):
    options = {"image": image(), "strength": strength, "num_inference_steps": 4, "eta": 0.5}
    expected = theirs(
        latent_folder,
        "StableDiffusionImg2ImgPipeline",
        None,
        generator=generators(per_image),
        **options,
    )
    mine = ours(latent_pipe, None, generator=generators(per_image), **options)
    np.testing.assert_allclose(mine, expected, atol=1e-4)


INPAINTING = ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
              "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "strength"), [*((name, 0.6) for name in INPAINTING), *((n, 1) for n in INPAINTING[:3])]
)
def test_inpainting_fills_the_hole_as_diffusers_and_keeps_the_pixels_around_it(
    latent_folder, latent_pipe, name, strength
):
    """Around the hole diffusers returns the autoencoder's reconstruction; minidiff the picture."""
    options = {"image": image(), "mask_image": mask(), "strength": strength}
    options["num_inference_steps"] = 4
    scheduler = (name, {})
    expected = theirs(
        latent_folder,
        "StableDiffusionInpaintPipeline",
        scheduler,
        generator=generators(),
        **options,
    )
    mine = ours(latent_pipe, scheduler, generator=generators(), **options)
    hole = mask()[0, 0].bool().numpy()
    np.testing.assert_allclose(mine[:, hole], expected[:, hole], atol=1e-4)
    kept = (image() / 2 + 0.5).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(mine[:, ~hole], kept[:, ~hole])
    assert np.abs(mine[:, hole] - kept[:, hole]).mean() > 0.01


@pytest.mark.parametrize(
    ("name", "strength"), [("DDIMScheduler", 1.0), ("EulerAncestralDiscreteScheduler", 0.6)]
)
def test_an_inpainting_network_gives_the_pictures_of_diffusers(tmp_path, name, strength):
    """Its nine input channels are the latents, the mask and the masked picture."""
    unet = {"in_channels": 9}
    stable_diffusion(tmp_path, DDIM, unet=unet).save_pretrained(tmp_path / "sd")
    options = {"image": image(), "mask_image": mask(), "strength": strength}
    options["num_inference_steps"] = 4
    scheduler = (name, {})
    expected = theirs(
        tmp_path / "sd",
        "StableDiffusionInpaintPipeline",
        scheduler,
        generator=generators(),
        **options,
    )
    pipe = Pipeline.from_pretrained(tmp_path / "sd")
    mine = ours(pipe, scheduler, generator=generators(), **options)
    hole = mask()[0, 0].bool().numpy()
    np.testing.assert_allclose(mine[:, hole], expected[:, hole], atol=1e-4)
    forbid_evaluations(pipe)
    for arguments in ({}, {"image": image(1)}):
        with pytest.raises(InvalidArgument, match="image and mask_image must be given"):
            pipe("a cat", **arguments)


# --- properties, without diffusers ----------------------------------------------------------------


@pytest.fixture
def pipe_of_digits() -> Pipeline:
    return digits()


def in_forms(x: torch.Tensor) -> dict:
    """Return the same picture in every form that a pipeline accepts."""
    array = to_uint8(x).permute(0, 2, 3, 1).numpy()
    return {
        "array": array,
        "array without N": array[0],
        "bytes": torch.from_numpy(array).permute(0, 3, 1, 2),
        "PIL": Image.fromarray(array[0]),
        "list of PIL": [Image.fromarray(picture) for picture in array],
        "floats": to_float(torch.from_numpy(array).permute(0, 3, 1, 2)),
    }


@pytest.mark.parametrize("form", in_forms(image(1)))
def test_strength_0_returns_the_bytes_of_the_image_without_evaluating_a_network(latent_pipe, form):
    forbid_evaluations(latent_pipe)
    options = {"image": in_forms(image(1))[form], "strength": 0, "num_inference_steps": 5}
    expected = in_forms(image(1))["array"]
    assert np.array_equal(latent_pipe("a cat", output_type="np", **options).images, expected)
    (picture,) = latent_pipe("a cat", **options).images
    assert np.array_equal(np.asarray(picture), expected[0])
    floats = latent_pipe("a cat", output_type="pt", **options).images
    assert torch.equal(floats, in_forms(image(1))["floats"])


@pytest.mark.parametrize(("strength", "n", "taken"), [(0.7, 100, 70), (0.5, 5, 2), (1, 4, 4)])
def test_strength_is_the_fraction_of_steps_taken(latent_pipe, strength, n, taken):
    latent_pipe.scheduler = DDIMScheduler()
    latent_pipe.unet.forward = lambda x, t, **condition: torch.zeros_like(x)
    steps = []
    options = {"num_inference_steps": n, "callback": steps.append, "guidance_scale": 1}
    latent_pipe("a cat", image=image(1), strength=strength, **options)
    assert len(steps) == taken
    latent_pipe.scheduler.set_timesteps(n)
    assert [step.t for step in steps] == latent_pipe.scheduler.grid[n - taken :]


def test_the_distance_from_the_image_grows_with_strength(pipe_of_digits):
    """The network is the optimal one for pixels from N(0, ¼)."""
    pipe, data = pipe_of_digits, GaussianMixture([1.0], [[0.0] * 256], [0.5])
    pipe.unet.forward = lambda x, t, **condition: output_of(
        pipe.scheduler, data, x, pipe.scheduler.level(t)
    )
    original = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    original = original.mul(0.3).tanh()
    options = {"num_inference_steps": 10, "seed": 0, "guidance_scale": 1, "output_type": "pt"}
    results = [
        pipe(3, image=original, strength=s, **options).images for s in (0, 0.2, 0.4, 0.6, 0.8, 1)
    ]
    distances = [(result - original).abs().mean().item() for result in results]
    assert distances[0] == 0
    assert all(a < b for a, b in pairwise(distances))


@pytest.mark.parametrize("name", ["ddpm", "dpm++"])
@pytest.mark.parametrize(
    ("inputs", "resamples"),
    [(("image",), 1), (("image", "mask_image"), 1), (("image", "mask_image"), 3)],
)
def test_a_changed_picture_does_not_depend_on_its_batch(pipe_of_digits, name, inputs, resamples):
    """A batch of sixteen equals batches of five and one picture changed alone."""
    pipe = pipe_of_digits
    pipe.scheduler = sampler(name, pipe.scheduler)
    pictures = torch.linspace(-1, 1, 16 * 256).view(16, 1, 16, 16)
    holes = torch.zeros(16, 1, 16, 16)
    holes[..., 4:12, 4:12] = torch.linspace(0, 1, 16).view(16, 1, 1, 1)
    images = {"image": pictures, "mask_image": holes}
    options = {"num_inference_steps": 4, "strength": 0.75, "seed": 3, "output_type": "pt"}
    options |= {"resamples": resamples}
    labels = [i % 10 for i in range(16)]
    initial: list = []

    def run(part: slice, **more: object) -> torch.Tensor:
        steps: list = []
        chosen = {key: images[key][part] for key in inputs}
        result = pipe(labels[part], **chosen, **options, **more, callback=steps.append).images
        initial.append(steps[0].x)
        return result

    together = run(slice(0, 16))
    in_batches = run(slice(0, 16), batch_size=5)
    alone = run(slice(11, 12), first_index=11)
    assert torch.equal(initial[0][11], initial[2][0])  # equal noise, to the bit
    assert (together - in_batches).abs().max() < 1e-4
    assert (together[11] - alone[0]).abs().max() < 1e-4
    assert (together[10] - together[11]).abs().max() > 1e-2


def test_a_black_mask_keeps_the_image_and_a_white_mask_replaces_all_of_it(latent_pipe):
    options = {"num_inference_steps": 2, "seed": 1, "output_type": "pt", "guidance_scale": 2}
    kept = latent_pipe(
        "a cat", image=image(1), mask_image=torch.zeros(SIDE, SIDE), **options
    ).images
    assert torch.equal(kept, image(1))
    # The autoencoder draws from the generator before the initial noise is drawn.
    replaced = latent_pipe(
        "a cat", image=image(1), mask_image=torch.ones(SIDE, SIDE), **options
    ).images
    latents = second_draw(seed=1)
    assert torch.equal(replaced, latent_pipe("a cat", latents=latents, **options).images)


def second_draw(seed: int) -> torch.Tensor:
    """Return the second noise that the generator of the first image draws."""
    generators = image_generators(seed, [0])
    randn((1, 4, 16, 16), generators)
    return randn((1, 4, 16, 16), generators)


def test_a_grey_mask_blends_the_sampled_picture_with_the_image(latent_pipe):
    options = {"num_inference_steps": 2, "seed": 1, "output_type": "pt", "guidance_scale": 1}
    grey = torch.full((SIDE, SIDE), 0.25)
    steps: list = []
    mixed = latent_pipe(
        "a cat", image=image(1), mask_image=grey, callback=steps.append, **options
    ).images
    sampled = latent_pipe.decode(steps[-1].next_x)
    torch.testing.assert_close(mixed, 0.75 * image(1) + 0.25 * sampled)


def test_every_form_of_a_mask_gives_the_same_tensor():
    white = mask()
    forms = [
        white,
        white[0],
        white[0, 0],
        white[0, 0].numpy(),
        white[0, 0].bool(),
        (white[0, 0] * 255).byte().numpy(),
        (white[0, 0, :, :, None] * 255).byte().numpy(),
        Image.fromarray((white[0, 0] * 255).byte().numpy()),
        Image.fromarray((white[0, 0] * 255).byte().numpy()).convert("1"),
        [white],
    ]
    for form in forms:
        assert torch.equal(as_mask(form, (SIDE, SIDE)), white)
    several = np.stack([white[0, 0].numpy(), 1 - white[0, 0].numpy()])
    assert torch.equal(as_mask(several, (SIDE, SIDE)), torch.cat([white, 1 - white]))


def test_one_image_is_used_for_all_pictures_and_several_for_consecutive_ones(latent_pipe):
    options = {"strength": 0, "num_inference_steps": 1, "output_type": "pt"}
    one = latent_pipe(PROMPTS, image=image(1), **options).images
    assert torch.equal(one, image(1).expand(2, -1, -1, -1))
    each = latent_pipe("a cat", image=image(2), num_images_per_prompt=2, **options).images
    assert torch.equal(each, image(2).repeat_interleave(2, 0))
    with pytest.raises(InvalidArgument, match=r"image must be one image, .* 2 to generate; got 3"):
        latent_pipe("a cat", num_images=2, image=image(3), **options)
    with pytest.raises(InvalidArgument, match="prompt must be one text, or 3 of them; got 2"):
        latent_pipe(PROMPTS, image=image(3), **options)


# --- RePaint --------------------------------------------------------------------------------------


def test_the_timestep_schedule_of_repaint_is_that_of_its_reference_code():
    """`get_schedule_jump` of RePaint's code, for t_T = 6, jump_length 2, jump_n_sample 2, counts
    5 4 3 2 | 3 4 3 2 … ; entries of the grid count upwards instead."""
    passes = stretches(0, 6, jump_length=2, resamples=2)
    assert passes == [(0, 3), (1, 3), (3, 5), (3, 5), (5, 6)]
    assert stretches(0, 3, 1, 3) == [(0, 1), (0, 1), (0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]
    assert stretches(2, 7, 2, 1) == [(2, 7)]
    assert sum(end - begin for begin, end in stretches(4, 10, 3, 5)) == 6 + 3 * 4


def test_noising_from_s_to_t_continues_the_forward_process():
    """Noising from clean to s to t gives the mean and variance of noising from clean to t."""
    schedule = NoiseSchedule.named()
    s, t = schedule[300], schedule[700]
    x0 = torch.full((40_000, 1), 2.0, dtype=torch.float64)
    source = torch.Generator().manual_seed(0)
    x = noised_again(add_noise(x0, randn(x0.shape, source, dtype=x0.dtype), s), s, t, source)
    assert x.mean().item() == pytest.approx(2 * t.alpha, abs=0.02)
    assert x.std().item() == pytest.approx(t.sigma, rel=0.02)


def test_resampling_makes_the_sampled_part_agree_with_the_kept_part():
    """Two coordinates are almost equal, and the first is kept. Without resampling the second is
    chosen while the first is still noise."""
    joint = GaussianMixture([0.5, 0.5], [[-1.0, -1.0], [1.0, 1.0]], [0.15, 0.15])
    scheduler = DDIMScheduler(clip_sample=False, compat="exact", timestep_spacing="trailing")
    known = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(2000, 2)
    hole = torch.tensor([[0.0, 1.0]], dtype=torch.float64)

    def agreement(resamples: int) -> float:
        """Return the fraction of second coordinates in the component of the first."""
        restart(0)
        source = torch.Generator().manual_seed(0)
        kept = keeping(
            known, hole, lambda: randn((2000, 2), source, dtype=torch.float64), scheduler
        )
        x = randn((2000, 2), source, dtype=torch.float64)
        passes = stretches(0, 8, 1, resamples)
        *_, last = repaint(denoise, scheduler, x, source, kept, passes=passes, eta=1.0)
        assert torch.equal(last.next_x[:, 0], known[:, 0])
        return (last.next_x[:, 1] > 0).double().mean().item()

    def restart(begin: int) -> None:
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(begin)

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        return joint.noise(x, scheduler.level(t))

    once, often = agreement(1), agreement(10)
    assert 1 - once > 0.05
    assert 1 - often < (1 - once) / 2


def test_reconstruction_guidance_makes_the_sampled_part_agree_with_the_kept_part():
    """Two coordinates are almost equal, and the first is kept."""
    joint = GaussianMixture([0.5, 0.5], [[-1.0, -1.0], [1.0, 1.0]], [0.15, 0.15])
    scheduler = DDIMScheduler(clip_sample=False, compat="exact", timestep_spacing="trailing")
    scheduler.set_timesteps(8)
    x = randn((2000, 2), torch.Generator().manual_seed(0), dtype=torch.float64)
    known = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(2000, 2)
    hole = torch.tensor([[0.0, 1.0]], dtype=torch.float64)

    def agreement(scale: float) -> float:
        guided = reconstructing(denoise, known, hole, meaning_of(scheduler), scale)
        kept = keeping(known, hole, lambda: x, scheduler)
        *_, last = trajectory(guided, scheduler, x, after_step=kept)
        assert torch.equal(last.next_x[:, 0], known[:, 0])
        return (last.next_x[:, 1] > 0).double().mean().item()

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        return joint.noise(x, scheduler.level(t))

    without, with_guidance = agreement(0), agreement(5)
    assert 1 - without > 0.05
    assert 1 - with_guidance < (1 - without) / 5


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow", "edm"])
@pytest.mark.parametrize("t", [0.3, 0.9])
def test_reconstruction_guidance_moves_x0_by_equation_7_for_every_prediction_type(kind, t):
    """On normal data with covariance C the prediction is linear: x̂0 = K·x with
    K = αC(α²C + σ²)⁻¹, so its gradient is known."""
    root = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.3, 0.4, 0.6]], dtype=torch.float64)
    cov, one = root @ root.T, torch.eye(3, dtype=torch.float64)
    level = {"flow": Level(1 - t, t), "edm": Level(1.0, 4 * t)}.get(
        kind, Level(math.cos(t * math.pi / 2), math.sin(t * math.pi / 2))
    )
    alpha, sigma = level
    gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * one)
    at = Meaning(level, edm_row(level, 0.5) if kind == "edm" else row(kind, level))
    p, q = at.row

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        x0 = x @ gain.T
        return p * x0 + q * (x - alpha * x0) / sigma

    x, x0 = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.tensor([[0.0, 1.0, 0.25]], dtype=torch.float64)
    out = reconstructing(denoise, x0, mask, lambda t: at, 3.0)(x, t)
    predicted = x @ gain.T
    expected = predicted + 3 * alpha * ((1 - mask) * (x0 - predicted)) @ gain
    torch.testing.assert_close(at.split(out, x)[0], expected)
    assert not out.requires_grad
    unguided = reconstructing(denoise, x0, mask, lambda t: at, 0.0)(x, t)
    torch.testing.assert_close(unguided, denoise(x, t))


@pytest.mark.parametrize("name", ["ddpm", "dpm++", "euler"])
def test_reconstruction_guidance_keeps_pixels_outside_the_mask_and_changes_the_rest(
    pipe_of_digits, name
):
    pipe = pipe_of_digits
    pipe.scheduler = sampler(name, pipe.scheduler)
    original = image(3)[:, :1, :16, :16]
    hole = torch.zeros(16, 16)
    hole[:, 8:] = 1
    options = {"image": original, "mask_image": hole, "seed": 1, "num_inference_steps": 4}
    options |= {"output_type": "pt", "guidance_scale": 2.0}

    def draw(**more: object) -> torch.Tensor:
        return pipe([1, 2, 3], **options, **more).images

    plain, guided = draw(), draw(reconstruction_guidance=5)
    assert torch.equal(guided[..., :8], original[..., :8])
    assert not torch.allclose(guided[..., 8:], plain[..., 8:], atol=1e-3)
    assert torch.equal(draw(reconstruction_guidance=0), plain)
    torch.testing.assert_close(draw(reconstruction_guidance=5, batch_size=1), guided)


# --- invalid arguments ----------------------------------------------------------------------------


def forbid_evaluations(pipe: Pipeline) -> None:
    """Make every network of a pipeline fail when it is evaluated."""

    def fail(*args: object) -> None:
        raise AssertionError("a network ran")

    for network in (pipe.unet, pipe.vae.encoder, pipe.vae.decoder):
        network.register_forward_pre_hook(fail)
    pipe.prompts.condition = fail


NAN = torch.full((1, 3, SIDE, SIDE), float("nan"))
BYTES = np.zeros((SIDE, SIDE, 3), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": "cat.png"}, "image must be a PIL image, an array or a tensor, or a list of"),
        ({"image": []}, "image must hold at least one image"),
        ({"image": image() * 1.2}, r"image of floats must lie in \[-1, 1\], got -1.* to 1"),
        ({"image": NAN}, r"image of floats must lie in \[-1, 1\], got nan"),
        ({"image": image().double()}, "image must be uint8, or a tensor of float32"),
        ({"image": image().numpy()}, "image must have 3 channels"),
        ({"image": BYTES.astype(np.float32)}, "image must be uint8, or a tensor of float32"),
        ({"image": BYTES.astype(np.int64)}, "image must be uint8"),
        ({"image": BYTES.astype(str)}, "image must hold numbers"),
        ({"image": BYTES[..., :1]}, "image must have 3 channels"),
        ({"image": image()[:, :1]}, r"image must have 3 channels.* got shape \(2, 1, 32, 32\)"),
        ({"image": torch.zeros(0, 3, 32, 32)}, "image must have 3 channels"),
        ({"image": Image.fromarray(BYTES).convert("L")}, "image must be a PIL image of mode RGB"),
        ({"image": Image.fromarray(BYTES).convert("P")}, "of mode RGB, got 'P': convert it"),
        ({"image": [image(), image()[..., :16]]}, "image must hold images of one size"),
        ({"image": image()[..., :31]}, "width must be a multiple of 2, got 31"),
        ({"image": image(), "height": 64}, "height must be that of image, 32, got 64"),
        ({"image": image(), "strength": 1.1}, r"strength must be in \[0, 1\], got 1.1"),
        ({"image": image(), "strength": -0.1}, "strength"),
        ({"image": image(), "strength": float("nan")}, "strength"),
        ({"image": image(), "strength": 0.1, "num_inference_steps": 9}, "strength must be 0"),
        ({"strength": 0.5}, "strength needs an image"),
        ({"mask_image": mask()}, "mask_image needs an image"),
        ({"image": image(), "mask_image": mask()[..., :16]}, "mask_image must have the size of"),
        ({"image": image(), "mask_image": image()}, "mask_image must have the size of image"),
        ({"image": image(), "mask_image": mask() * 2}, "mask_image of floats must lie in"),
        ({"image": image(), "mask_image": NAN[:, 0]}, "mask_image of floats must lie"),
        ({"image": image(), "mask_image": mask().byte()}, "mask_image of uint8 counts from 0"),
        ({"image": image(), "mask_image": mask().long()}, "mask_image must be uint8, bool or"),
        ({"image": image(), "mask_image": "mask.png"}, "mask_image must be a PIL image"),
        ({"image": image(), "mask_image": Image.fromarray(BYTES)}, "mask_image must be a PIL"),
        ({"image": image(), "mask_image": torch.cat([mask()] * 3)}, "mask_image must be one mask"),
        ({"resamples": 2}, "resamples needs a mask_image"),
        ({"image": image(), "mask_image": mask(), "resamples": 0}, "resamples must be in 1"),
        ({"image": image(), "mask_image": mask(), "jump_length": 2}, "jump_length needs resamples"),
        (
            {"image": image(), "mask_image": mask(), "resamples": 2, "jump_length": 50},
            "jump_length must be in 1..49, got 50",
        ),
        ({"reconstruction_guidance": 1}, "reconstruction_guidance needs a mask_image, got 1"),
        (
            {"image": image(), "mask_image": mask(), "reconstruction_guidance": -1},
            "reconstruction_guidance must be finite and at least 0, got -1",
        ),
        ({"guidance_scale": float("inf")}, "guidance_scale must be finite"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale must be in \[0, 1\]"),
        ({"guidance_rescale": float("nan")}, "guidance_rescale"),
        ({"guidance_interval": (2, 1)}, "guidance_interval must rise, got 2 and 1"),
        ({"guidance_interval": 3}, "guidance_interval must be a list or a tuple"),
        ({"guidance_interval": (float("nan"), 1)}, "guidance_interval"),
        ({"guide": 3}, "guide must be one of cfg, rescale, apg"),
        ({"guide": lambda pair, w: None, "guidance_rescale": 0.5}, "either guide or guidance_resc"),
        ({"num_images": 2, "num_images_per_prompt": 2}, "either num_images or num_images_per"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be in 1"),
        ({"generator": [torch.Generator()], "num_images": 2}, "generator must list 2 generators"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_refused_by_name_before_a_network_runs(
    latent_pipe, arguments, message
):
    forbid_evaluations(latent_pipe)
    number = {"num_images": 2} if "image" in arguments else {}
    with pytest.raises(InvalidArgument, match=message):
        latent_pipe("a cat", **number | arguments)


def test_pictures_with_two_channels_are_returned_as_arrays_only():
    unet = UNet(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
        layers_per_block=1,
    ).eval()  # fmt: skip
    pipe = Pipeline(unet, DDIMScheduler())
    with pytest.raises(InvalidArgument, match="output_type must be np or pt for images of 2"):
        pipe(num_inference_steps=1)
    assert pipe(num_inference_steps=1, output_type="np").images.shape == (1, 8, 8, 2)


def test_resampling_is_refused_for_samplers_whose_steps_have_stages(latent_pipe):
    latent_pipe.scheduler = SCHEDULERS["HeunDiscreteScheduler"]()
    with pytest.raises(InvalidArgument, match="resamples must be 1 for HeunDiscreteScheduler"):
        latent_pipe("a cat", image=image(1), mask_image=mask(), resamples=2, num_inference_steps=4)
