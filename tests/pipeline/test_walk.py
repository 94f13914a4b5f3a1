"""`Pipeline.walk`: the loop of a call, one step at a time."""

import inspect
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_pipelines import digits

from minidiff.errors import InvalidArgument
from minidiff.nn import UNet
from minidiff.schedulers import DDIMScheduler
from minidiff.schedulers.core.names import SAMPLERS, sampler

CALL = {"class_labels": [7, 3], "num_inference_steps": 4, "guidance_scale": 2.0, "seed": 1}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_walk_ends_in_the_pictures_of_a_call_bit_for_bit(name: str) -> None:
    pipe = digits()
    pipe.scheduler = sampler(name, pipe.scheduler)
    *_, last = pipe.walk(**CALL, output_type="pt")
    assert torch.equal(last.next_images, pipe(**CALL, output_type="pt").images)


def test_an_inpainted_walk_finishes_pictures_as_a_call_does() -> None:
    pipe, image = digits(), np.full((16, 16), 200, np.uint8)
    pipe.finishers.append(lambda images: images.clamp(-0.5, 0.5))
    more = {"image": image, "mask_image": np.eye(16, dtype=bool), "resamples": 2, "jump_length": 2}
    steps = list(pipe.walk(**CALL, **more))
    pictures = pipe(**CALL, **more).images
    assert [p.tobytes() for p in steps[-1].next_images] == [p.tobytes() for p in pictures]
    assert len(steps) > 4  # some steps are taken twice


def test_a_step_knows_its_level_its_noise_and_how_far_the_prediction_moved() -> None:
    pipe = digits()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    steps = list(pipe.walk(**CALL))
    before = torch.zeros_like(steps[0].x0)
    for step in steps:
        assert step.change == pytest.approx(float((step.x0 - before).square().mean() ** 0.5))
        x0, eps = pipe.scheduler.split(step.output, step.x, step.level)
        torch.testing.assert_close(x0, step.x0)
        torch.testing.assert_close(step.level.alpha * x0 + step.level.sigma * eps, step.x)
        before = step.x0
    assert [step.t for step in steps] == pipe.scheduler.grid
    assert all(torch.equal(a.next_x, b.x) for a, b in pairwise(steps))


def test_calls_between_two_steps_change_nothing() -> None:
    pipe = digits()
    alone = [step.next_x for step in pipe.walk(**CALL)]
    for step, expected in zip(pipe.walk(**CALL), alone, strict=True):
        pipe(num_images=1, num_inference_steps=2, seed=5)
        assert torch.equal(step.next_x, expected)


def test_pictures_are_decoded_when_they_are_read() -> None:
    pipe, decoded = digits(), []
    pipe.finishers.append(lambda images: decoded.append(1) or images)
    steps = list(pipe.walk(**CALL))
    assert not decoded
    assert steps[0].images is steps[0].images
    assert decoded == [1]


def test_a_callback_ends_a_walk_as_it_ends_a_call() -> None:
    def stop(pipe: object, step: int, timestep: object, tensors: dict) -> dict:
        pipe._interrupt = step == 1
        return tensors

    assert len(list(digits().walk(**CALL, callback_on_step_end=stop))) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"batch_size": 1}, "batch_size must be at least the number of images, 2"),
        ({"strength": 0, "image": np.zeros((16, 16), np.uint8)}, "strength must be above 0"),
        ({"seed": -1}, "seed must be"),
        ({"steps": 3}, "steps"),
    ],
)
def test_a_walk_refuses_at_once_what_it_cannot_do(more: dict, message: str) -> None:
    with pytest.raises((InvalidArgument, TypeError), match=message):
        digits().walk(**CALL | more)


def test_the_signature_of_a_network_names_its_options_and_their_defaults() -> None:
    parameters, made = inspect.signature(UNet).parameters, UNet().config
    assert {name for name in made if not name.startswith("_")} <= set(parameters)
    for name, value in made.items():
        if name in parameters and parameters[name].default is not None:
            default = parameters[name].default
            assert value == (list(default) if isinstance(value, list) else default)
