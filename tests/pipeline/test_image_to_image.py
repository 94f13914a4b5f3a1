"""Pictures that are given: image-to-image and inpainting against diffusers, and what stays."""

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


LONG = ("LCMScheduler", "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler",
        "UniPCMultistepScheduler", "DDIMScheduler, trailing")  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in (*TAKEN, *OPTIONS)],
)
def test_image_to_image_gives_the_pictures_of_diffusers(latent_folder, latent_pipe, name):
    scheduler = (name.split(",")[0], OPTIONS.get(name, {}))
    options = {"image": image(), "strength": 0.6, "num_inference_steps": 5}
    expected = theirs(
        latent_folder, "StableDiffusionImg2ImgPipeline", scheduler, generator=source(), **options
    )
    assert expected.std() > 0.01
    np.testing.assert_allclose(
        ours(latent_pipe, scheduler, generator=source(), **options), expected, atol=1e-4
    )


@pytest.mark.parametrize("strength", [0.26, 1.0])
@pytest.mark.parametrize("one_each", [False, True])
def test_any_strength_and_source_of_noise_gives_the_pictures_of_diffusers(
    latent_folder, latent_pipe, strength, one_each
):
    options = {"image": image(), "strength": strength, "num_inference_steps": 4, "eta": 0.5}
    expected = theirs(
        latent_folder, "StableDiffusionImg2ImgPipeline", None, generator=source(one_each), **options
    )
    mine = ours(latent_pipe, None, generator=source(one_each), **options)
    np.testing.assert_allclose(mine, expected, atol=1e-4)


INPAINTING = ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
              "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "strength"), [*((name, 0.6) for name in INPAINTING), *((n, 1) for n in INPAINTING[:3])]
)
def test_inpainting_gives_the_pictures_of_diffusers_and_keeps_the_rest(
    latent_folder, latent_pipe, name, strength
):
    """diffusers leaves around the hole what its autoencoder made of the picture; here it stays."""
    options = {"image": image(), "mask_image": mask(), "strength": strength}
    options["num_inference_steps"] = 4
    scheduler = (name, {})
    expected = theirs(
        latent_folder, "StableDiffusionInpaintPipeline", scheduler, generator=source(), **options
    )
    mine = ours(latent_pipe, scheduler, generator=source(), **options)
    hole = mask()[0, 0].bool().numpy()
    np.testing.assert_allclose(mine[:, hole], expected[:, hole], atol=1e-4)
    kept = (image() / 2 + 0.5).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(mine[:, ~hole], kept[:, ~hole])
    assert np.abs(mine[:, hole] - kept[:, hole]).mean() > 0.01


@pytest.mark.parametrize(
    ("name", "strength"), [("DDIMScheduler", 1.0), ("EulerAncestralDiscreteScheduler", 0.6)]
)
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
    never_ran(pipe)
    for arguments in ({}, {"image": image(1)}):
        with pytest.raises(InvalidArgument, match="image and mask_image must be given"):
            pipe("a cat", **arguments)


# --- what holds without diffusers -----------------------------------------------------------------


@pytest.fixture
def pipe_of_digits() -> Pipeline:
    return digits()


def in_forms(x: torch.Tensor) -> dict:
    """One picture each in every form that a pipeline takes, all of the same bytes."""
    array = to_uint8(x).permute(0, 2, 3, 1).numpy()
    return {
        "array": array,
        "array without N": array[0],
        "bytes": torch.from_numpy(array).permute(0, 3, 1, 2),
        "PIL": Image.fromarray(array[0]),
        "list of PIL": [Image.fromarray(one) for one in array],
        "floats": to_float(torch.from_numpy(array).permute(0, 3, 1, 2)),
    }


@pytest.mark.parametrize("form", in_forms(image(1)))
def test_strength_0_returns_the_bytes_of_the_image_and_asks_no_network(latent_pipe, form):
    never_ran(latent_pipe)
    options = {"image": in_forms(image(1))[form], "strength": 0, "num_inference_steps": 5}
    expected = in_forms(image(1))["array"]
    assert np.array_equal(latent_pipe("a cat", output_type="np", **options).images, expected)
    (picture,) = latent_pipe("a cat", **options).images
    assert np.array_equal(np.asarray(picture), expected[0])
    floats = latent_pipe("a cat", output_type="pt", **options).images
    assert torch.equal(floats, in_forms(image(1))["floats"])


@pytest.mark.parametrize(("strength", "n", "taken"), [(0.7, 100, 70), (0.5, 5, 2), (1, 4, 4)])
def test_strength_is_the_share_of_steps_taken(latent_pipe, strength, n, taken):
    latent_pipe.scheduler = DDIMScheduler()
    latent_pipe.unet.forward = lambda x, t, **condition: torch.zeros_like(x)
    steps = []
    options = {"num_inference_steps": n, "callback": steps.append, "guidance_scale": 1}
    latent_pipe("a cat", image=image(1), strength=strength, **options)
    assert len(steps) == taken
    latent_pipe.scheduler.set_timesteps(n)
    assert [step.t for step in steps] == latent_pipe.scheduler.grid[n - taken :]


def test_more_strength_leads_further_from_the_image(pipe_of_digits):
    """With the optimal network for N(0, ¼), of which the image is a sample."""
    pipe, data = pipe_of_digits, GaussianMixture([1.0], [[0.0] * 256], [0.5])
    pipe.unet.forward = lambda x, t, **condition: output_of(
        pipe.scheduler, data, x, pipe.scheduler.level(t)
    )
    given = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)).mul(0.3).tanh()
    options = {"num_inference_steps": 10, "seed": 0, "guidance_scale": 1, "output_type": "pt"}
    results = [
        pipe(3, image=given, strength=s, **options).images for s in (0, 0.2, 0.4, 0.6, 0.8, 1)
    ]
    distances = [(result - given).abs().mean().item() for result in results]
    assert distances[0] == 0
    assert all(a < b for a, b in pairwise(distances))


@pytest.mark.parametrize("name", ["ddpm", "dpm++"])
@pytest.mark.parametrize(
    ("given", "resamples"),
    [(("image",), 1), (("image", "mask_image"), 1), (("image", "mask_image"), 3)],
)
def test_a_changed_picture_is_its_own(pipe_of_digits, name, given, resamples):
    """One of a batch of sixteen, some of them, and that one alone."""
    pipe = pipe_of_digits
    pipe.scheduler = sampler(name, pipe.scheduler)
    pictures = torch.linspace(-1, 1, 16 * 256).view(16, 1, 16, 16)
    holes = torch.zeros(16, 1, 16, 16)
    holes[..., 4:12, 4:12] = torch.linspace(0, 1, 16).view(16, 1, 1, 1)
    everything = {"image": pictures, "mask_image": holes}
    options = {"num_inference_steps": 4, "strength": 0.75, "seed": 3, "output_type": "pt"}
    options |= {"resamples": resamples}
    labels = [i % 10 for i in range(16)]
    started: list = []

    def run(part: slice, **more: object) -> torch.Tensor:
        steps: list = []
        chosen = {key: everything[key][part] for key in given}
        images = pipe(labels[part], **chosen, **options, **more, callback=steps.append).images
        started.append(steps[0].x)
        return images

    together = run(slice(0, 16))
    in_parts = run(slice(0, 16), batch_size=5)
    alone = run(slice(11, 12), first_index=11)
    assert torch.equal(started[0][11], started[2][0])  # the noise, to the bit
    assert (together - in_parts).abs().max() < 1e-4
    assert (together[11] - alone[0]).abs().max() < 1e-4
    assert (together[10] - together[11]).abs().max() > 1e-2


def test_a_mask_of_nothing_and_a_mask_of_everything(latent_pipe):
    options = {"num_inference_steps": 2, "seed": 1, "output_type": "pt", "guidance_scale": 2}
    nothing = latent_pipe(
        "a cat", image=image(1), mask_image=torch.zeros(SIDE, SIDE), **options
    ).images
    assert torch.equal(nothing, image(1))
    # All of it, from noise alone: the autoencoder's draw comes before the start.
    everything = latent_pipe(
        "a cat", image=image(1), mask_image=torch.ones(SIDE, SIDE), **options
    ).images
    start = {"latents": after_one_draw(seed=1)}
    options.pop("seed")
    assert torch.equal(everything, latent_pipe("a cat", **start, **options, seed=1).images)


def after_one_draw(seed: int) -> torch.Tensor:
    sources = image_generators(seed, [0])
    randn((1, 4, 16, 16), sources)
    return randn((1, 4, 16, 16), sources)


def test_grey_of_a_mask_blends(latent_pipe):
    """A network whose pictures are known: whatever it makes, half of it is the image."""
    options = {"num_inference_steps": 2, "seed": 1, "output_type": "pt", "guidance_scale": 1}
    grey = torch.full((SIDE, SIDE), 0.25)
    last: list = []
    mixed = latent_pipe(
        "a cat", image=image(1), mask_image=grey, callback=last.append, **options
    ).images
    made = latent_pipe.decode(last[-1].next_x)
    torch.testing.assert_close(mixed, 0.75 * image(1) + 0.25 * made)


def test_masks_of_every_form_mean_the_same():
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


def test_one_image_or_one_each_and_neighbours_share_an_original(latent_pipe):
    options = {"strength": 0, "num_inference_steps": 1, "output_type": "pt"}
    one = latent_pipe(PROMPTS, image=image(1), **options).images
    assert torch.equal(one, image(1).expand(2, -1, -1, -1))
    each = latent_pipe("a cat", image=image(2), num_images_per_prompt=2, **options).images
    assert torch.equal(each, image(2).repeat_interleave(2, 0))
    with pytest.raises(InvalidArgument, match=r"image must be one picture, .* 2; got 3"):
        latent_pipe("a cat", num_images=2, image=image(3), **options)
    with pytest.raises(InvalidArgument, match="prompt must be one text, or 3 of them; got 2"):
        latent_pipe(PROMPTS, image=image(3), **options)


# --- RePaint --------------------------------------------------------------------------------------


def test_repaint_walks_as_in_the_reference_code():
    """`get_schedule_jump` of RePaint's code, for t_T = 6, jump_length 2, jump_n_sample 2: it counts
    5 4 3 2 | 3 4 3 2 … ; entries of the grid count the other way."""
    passes = stretches(0, 6, jump_length=2, resamples=2)
    assert passes == [(0, 3), (1, 3), (3, 5), (3, 5), (5, 6)]
    assert stretches(0, 3, 1, 3) == [(0, 1), (0, 1), (0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]
    assert stretches(2, 7, 2, 1) == [(2, 7)]
    assert sum(end - begin for begin, end in stretches(4, 10, 3, 5)) == 6 + 3 * 4


def test_the_forward_process_goes_on_where_it_stopped():
    """From clean to s to t is from clean to t: the same mean and variance."""
    schedule = NoiseSchedule.named()
    s, t = schedule[300], schedule[700]
    x0 = torch.full((40_000, 1), 2.0, dtype=torch.float64)
    source = torch.Generator().manual_seed(0)
    x = noised_again(add_noise(x0, randn(x0.shape, source, dtype=x0.dtype), s), s, t, source)
    assert x.mean().item() == pytest.approx(2 * t.alpha, abs=0.02)
    assert x.std().item() == pytest.approx(t.sigma, rel=0.02)


def test_resampling_brings_what_is_made_into_agreement_with_what_is_kept():
    """Two coordinates that must be equal but for a little: without resampling the second is made
    before it is known what the first will be."""
    joint = GaussianMixture([0.5, 0.5], [[-1.0, -1.0], [1.0, 1.0]], [0.15, 0.15])
    scheduler = DDIMScheduler(clip_sample=False, compat="exact", timestep_spacing="trailing")
    known = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(2000, 2)
    hole = torch.tensor([[0.0, 1.0]], dtype=torch.float64)

    def agreeing(resamples: int) -> float:
        """The share of second coordinates in the component of the first."""
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

    once, often = agreeing(1), agreeing(10)
    assert 1 - once > 0.05
    assert 1 - often < (1 - once) / 2


def test_reconstruction_guidance_brings_what_is_made_into_agreement_with_what_is_kept():
    """The same two coordinates, in one descent."""
    joint = GaussianMixture([0.5, 0.5], [[-1.0, -1.0], [1.0, 1.0]], [0.15, 0.15])
    scheduler = DDIMScheduler(clip_sample=False, compat="exact", timestep_spacing="trailing")
    scheduler.set_timesteps(8)
    x = randn((2000, 2), torch.Generator().manual_seed(0), dtype=torch.float64)
    known = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(2000, 2)
    hole = torch.tensor([[0.0, 1.0]], dtype=torch.float64)

    def agreeing(scale: float) -> float:
        led = reconstructing(denoise, known, hole, meaning_of(scheduler), scale)
        kept = keeping(known, hole, lambda: x, scheduler)
        *_, last = trajectory(led, scheduler, x, after=kept)
        assert torch.equal(last.next_x[:, 0], known[:, 0])
        return (last.next_x[:, 1] > 0).double().mean().item()

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        return joint.noise(x, scheduler.level(t))

    without, with_guidance = agreeing(0), agreeing(5)
    assert 1 - without > 0.05
    assert 1 - with_guidance < (1 - without) / 5


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow", "edm"])
@pytest.mark.parametrize("t", [0.3, 0.9])
def test_reconstruction_guidance_moves_the_guess_by_equation_7(kind, t):
    """On normal data with covariance C the guess is linear, x̂0 = K·x with
    K = αC(α²C + σ²)⁻¹, so its gradient is known; for any meaning of the output."""
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
        guess = x @ gain.T
        return p * guess + q * (x - alpha * guess) / sigma

    x, x0 = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.tensor([[0.0, 1.0, 0.25]], dtype=torch.float64)
    out = reconstructing(denoise, x0, mask, lambda t: at, 3.0)(x, t)
    guess = x @ gain.T
    expected = guess + 3 * alpha * ((1 - mask) * (x0 - guess)) @ gain
    torch.testing.assert_close(at.split(out, x)[0], expected)
    assert not out.requires_grad
    unmoved = reconstructing(denoise, x0, mask, lambda t: at, 0.0)(x, t)
    torch.testing.assert_close(unmoved, denoise(x, t))


@pytest.mark.parametrize("name", ["ddpm", "dpm++", "euler"])
def test_reconstruction_guidance_keeps_what_is_kept_and_changes_the_rest(pipe_of_digits, name):
    pipe = pipe_of_digits
    pipe.scheduler = sampler(name, pipe.scheduler)
    given = image(3)[:, :1, :16, :16]
    hole = torch.zeros(16, 16)
    hole[:, 8:] = 1
    options = {"image": given, "mask_image": hole, "seed": 1, "num_inference_steps": 4}
    options |= {"output_type": "pt", "guidance_scale": 2.0}

    def made(**more: object) -> torch.Tensor:
        return pipe([1, 2, 3], **options, **more).images

    plain, led = made(), made(reconstruction_guidance=5)
    assert torch.equal(led[..., :8], given[..., :8])
    assert not torch.allclose(led[..., 8:], plain[..., 8:], atol=1e-3)
    assert torch.equal(made(reconstruction_guidance=0), plain)
    torch.testing.assert_close(made(reconstruction_guidance=5, batch_size=1), led)


# --- bad input ------------------------------------------------------------------------------------


def never_ran(pipe: Pipeline) -> None:
    """Networks that fail when they are asked."""

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
        ({"image": []}, "image must hold at least one picture"),
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
        ({"image": Image.fromarray(BYTES).convert("L")}, "image must be a picture of mode RGB"),
        ({"image": Image.fromarray(BYTES).convert("P")}, "of mode RGB, got 'P': convert it"),
        ({"image": [image(), image()[..., :16]]}, "image must hold pictures of one size"),
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
        ({"image": image(), "mask_image": Image.fromarray(BYTES)}, "mask_image must be a picture"),
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
        ({"guide": 3}, "guide must be a function"),
        ({"guide": lambda pair, w: None, "guidance_rescale": 0.5}, "either guide or guidance_resc"),
        ({"num_images": 2, "num_images_per_prompt": 2}, "either num_images or num_images_per"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be in 1"),
        ({"generator": [torch.Generator()], "num_images": 2}, "generator must list 2 generators"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name_before_a_network_runs(latent_pipe, arguments, message):
    never_ran(latent_pipe)
    number = {"num_images": 2} if "image" in arguments else {}
    with pytest.raises(InvalidArgument, match=message):
        latent_pipe("a cat", **number | arguments)


def test_pictures_that_pil_does_not_have_are_made_as_arrays_alone():
    unet = UNet(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
        layers_per_block=1,
    ).eval()  # fmt: skip
    pipe = Pipeline(unet, DDIMScheduler())
    with pytest.raises(InvalidArgument, match="output_type must be np or pt for pictures of 2"):
        pipe(num_inference_steps=1)
    assert pipe(num_inference_steps=1, output_type="np").images.shape == (1, 8, 8, 2)


def test_resampling_is_refused_for_samplers_whose_steps_have_stages(latent_pipe):
    latent_pipe.scheduler = SCHEDULERS["HeunDiscreteScheduler"]()
    with pytest.raises(InvalidArgument, match="resamples must be 1 for HeunDiscreteScheduler"):
        latent_pipe("a cat", image=image(1), mask_image=mask(), resamples=2, num_inference_steps=4)
