"""Inversion and panoramas: against closed forms, and through whole pipelines."""

import math
from itertools import pairwise

import pytest
import torch
from tiny_pipelines import DDIM_V, digits, stable_diffusion
from torch import Tensor

from minidiff import DDIMScheduler, Pipeline
from minidiff.errors import InvalidArgument
from minidiff.lab.order import MIXTURE, output_of
from minidiff.pipeline.edit import climb, ddim_of, invert, reconstruct, swap
from minidiff.pipeline.windows import panorama, windowed
from minidiff.sample import trajectory
from minidiff.schedule import CLEAN
from minidiff.schedulers import (
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    Scheduler,
    UniPCMultistepScheduler,
)

# --- inversion ------------------------------------------------------------------------------------

SCHEDULER = DDIMScheduler(compat="exact", clip_sample=False)
CLEAN_POINTS = torch.linspace(-2.0, 2.5, 19, dtype=torch.float64)[:, None]


def optimal(x: Tensor, t: float) -> Tensor:
    return output_of(SCHEDULER, MIXTURE, x, SCHEDULER.level(t))


def reconstruction_error(n: int) -> float:
    """Return the largest distance between a point and its reconstruction in n steps."""
    noise = climb(optimal, SCHEDULER, CLEAN_POINTS, n)
    SCHEDULER.set_timesteps(n)
    *_, last = trajectory(optimal, SCHEDULER, noise)
    return (last.next_x - CLEAN_POINTS).abs().max().item()


def test_the_reconstruction_error_is_of_first_order_in_the_step_size():
    errors = [reconstruction_error(n) for n in (25, 50, 100, 200)]
    for larger, smaller in pairwise(errors):
        assert 0.8 < math.log2(larger / smaller) < 1.6
    assert errors[-1] < 0.08


def test_inversion_ends_at_the_noise_of_the_probability_flow():
    noise = climb(optimal, SCHEDULER, CLEAN_POINTS, 1000)
    ddim = ddim_of(SCHEDULER)
    ddim.set_timesteps(1000)
    truth = MIXTURE.flow(CLEAN_POINTS, CLEAN, ddim.levels[0])
    torch.testing.assert_close(noise, truth, rtol=0, atol=0.02)
    assert 0.5 < noise.std() < 2


def test_the_same_label_reconstructs_a_picture_and_another_label_changes_it():
    pipe, image = digits(), torch.rand(2, 1, 16, 16) * 2 - 1
    options = {"num_inference_steps": 24, "output_type": "pt"}
    again = reconstruct(pipe, image, [3, 4], **options).images
    coarse = reconstruct(pipe, image, [3, 4], **options | {"num_inference_steps": 6}).images
    other = swap(pipe, image, [3, 4], [5, 6], guidance_scale=2.0, **options).images
    assert (again - image).abs().max() < (coarse - image).abs().max() / 2
    assert (again - image).abs().max() < (other - image).abs().max() / 4


def test_a_latent_model_inverts_the_mode_of_the_encoded_image(tmp_path):
    stable_diffusion(tmp_path, DDIM_V).save_pretrained(tmp_path / "sd")
    pipe = Pipeline.from_pretrained(tmp_path / "sd")
    pipe.unet.forward = lambda x, t, **condition: 0.3 * x.tanh()
    image = torch.rand(1, 3, 24, 40) * 2 - 1  # not the usual size
    assert invert(pipe, image, "a cat", num_inference_steps=1).shape == (1, 4, 12, 20)
    again, other = (
        reconstruct(pipe, image, "a cat", num_inference_steps=100, output_type="pt").images
        for _ in range(2)
    )
    assert torch.equal(again, other)
    with torch.no_grad():
        decoded = pipe.decode(pipe.space.mode(image))
    torch.testing.assert_close(again, decoded, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": None, "prompt": 3}, "image must be given"),
        ({"image": torch.zeros(1, 1, 16, 16)}, "prompt must be given"),
        ({"image": torch.zeros(1, 1, 15, 16), "prompt": 3}, "height must be a multiple of 2"),
        ({"image": torch.zeros(2, 1, 16, 16), "prompt": [3]}, "class_labels must name one class"),
        (
            {"image": torch.zeros(1, 1, 16, 16), "prompt": 3, "num_inference_steps": 0},
            "num_inference_steps must be in 1..1000",
        ),
    ],
)
def test_invalid_arguments_of_inversion_are_refused_by_name(arguments, message):
    pipe = digits()
    pipe.unet.forward = None
    with pytest.raises(InvalidArgument, match=message):
        invert(pipe, **arguments)


def test_a_scheduler_without_betas_has_no_ddim():
    for scheduler in (FlowMatchEulerDiscreteScheduler(), EDMEulerScheduler(),
                      UniPCMultistepScheduler(use_flow_sigmas=True)):  # fmt: skip
        with pytest.raises(InvalidArgument, match="scheduler must have a schedule of β"):
            ddim_of(scheduler)


# --- windows --------------------------------------------------------------------------------------


def local(x: Tensor, t: float) -> Tensor:
    """Return an output that depends on the mean of the window, so that windows differ."""
    return x * 2 + x.mean(dim=(-2, -1), keepdim=True) + t


@pytest.mark.parametrize("circular", [False, True])
def test_adjacent_windows_without_overlap_are_independent(circular):
    x = torch.randn(3, 2, 8, 24)
    wide = windowed(local, (8, 8), 8, circular=circular)(x, 5)
    parts = [local(part, 5) for part in x.chunk(3, dim=-1)]
    torch.testing.assert_close(wide, torch.cat(parts, dim=-1))
    torch.testing.assert_close(windowed(local, (8, 8), 8)(x[..., :8], 5), parts[0])


@pytest.mark.parametrize("stride", [1, 3, (2, 5), 8])
@pytest.mark.parametrize("size", [(8, 8), (8, 20), (17, 30)])
@pytest.mark.parametrize("circular", [False, True])
def test_a_pointwise_function_of_windows_is_that_function_of_the_canvas(stride, size, circular):
    x = torch.randn(2, 1, *size)
    constant = windowed(lambda x, t: torch.full_like(x, 0.7), (8, 8), stride, circular=circular)
    torch.testing.assert_close(constant(x, 1), torch.full_like(x, 0.7))
    pointwise = windowed(lambda x, t: x.tanh() + t, (8, 8), stride, circular=circular)
    torch.testing.assert_close(pointwise(x, 1), x.tanh() + 1)


def test_overlapping_windows_are_averaged():
    x = torch.zeros(1, 1, 4, 6)
    values = iter([1.0, 4.0])
    out = windowed(lambda x, t: torch.full_like(x, next(values)), (4, 4), (4, 2))(x, 0)
    assert out[0, 0, 0].tolist() == [1, 1, 2.5, 2.5, 4, 4]


def test_a_circular_canvas_has_no_seam():
    """Rolling the canvas by one stride rolls the output with it."""
    x = torch.randn(1, 2, 8, 24)
    wide = windowed(local, (8, 8), 4, circular=True)
    rolled = wide(x.roll(4, dims=-1), 3).roll(-4, dims=-1)
    torch.testing.assert_close(rolled, wide(x, 3))
    flat = windowed(local, (8, 8), 4)
    assert not torch.allclose(flat(x.roll(4, dims=-1), 3).roll(-4, dims=-1), flat(x, 3))


def test_a_panorama_evaluates_the_network_on_windows_of_the_canvas():
    pipe = digits()
    options = {"num_inference_steps": 3, "seed": 0, "output_type": "pt"}
    same = panorama(pipe)(3, **options).images
    assert torch.equal(same, pipe(3, **options).images)
    shapes: set = set()
    pipe.unet.register_forward_pre_hook(lambda module, args: shapes.add(tuple(args[0].shape)))
    wide = panorama(pipe, stride=(8, 2))(3, width=64, **options).images
    assert wide.shape == (1, 1, 16, 64)
    assert shapes == {(2, 4, 8, 8)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: windowed(local, (8, 8), 9), "stride must be in 1..8, got 9"),
        (lambda: windowed(local, (8, 8), 0), "stride must be in 1..8, got 0"),
        (lambda: windowed(local, 8, 4), "window must be a list or a tuple"),
        (lambda: windowed(local, (8, 0), 4), "window must be at least 1"),
        (lambda: windowed(local, (8, 8), 4, circular=1), "circular must be True or False"),
        (lambda: windowed(local, (8, 8), 4)(torch.zeros(1, 1, 8, 7), 0), "width of the canvas"),
        (lambda: panorama(digits(), 50), "stride must be in 1..8, got 50"),
    ],
)
def test_invalid_windows_are_refused_by_name(make, message):
    with pytest.raises(InvalidArgument, match=message):
        make()


def test_the_ddim_of_a_scheduler_keeps_its_noise_schedule_and_does_not_clip():
    for scheduler in (SCHEDULER, DDIMScheduler(beta_schedule="scaled_linear", clip_sample=True)):
        ddim: Scheduler = ddim_of(scheduler)
        assert ddim.config.clip_sample is False
        assert ddim.level(500) == scheduler.level(500)
        assert ddim.config.compat == scheduler.config.compat
