"""A call of a pipeline: one request, one grid, and functions that compose from outside."""

import inspect
import sys

import pytest
import torch

from minidiff import Pipeline
from minidiff.pipeline import inpaint
from minidiff.pipeline.request import Request


def test_a_request_takes_the_arguments_of_a_call_with_the_same_defaults(pipe):
    given = {"num_images": 3, "num_inference_steps": 2, "seed": 0}
    by_name, by_place = Request.of(pipe, **given), Request.of(pipe, None, None, 3, seed=0)
    assert by_name.batches == by_place.batches
    assert (
        by_name.output_type
        == inspect.signature(Pipeline.__call__).parameters["output_type"].default
    )
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        Request.of(pipe, steps=3)


def test_the_grid_is_set_once_per_call_and_every_batch_starts_at_its_first_step(pipe, monkeypatch):
    calls, original = [], type(pipe.scheduler).set_timesteps
    monkeypatch.setattr(
        type(pipe.scheduler),
        "set_timesteps",
        lambda self, *args, **options: (calls.append(args), original(self, *args, **options)),
    )
    options = {"num_images": 5, "num_inference_steps": 4, "seed": 1, "output_type": "pt"}
    in_batches = pipe(batch_size=2, **options).images
    assert len(calls) == 1
    torch.testing.assert_close(in_batches, pipe(**options).images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_only_a_mask_enters_the_code_of_inpainting(pipe, masked):
    entered: set[str] = set()

    def profile(frame, event, arg):
        if event == "call" and frame.f_code.co_filename == inpaint.__file__:
            entered.add(frame.f_code.co_name)

    image = torch.zeros(1, 1, 16, 16)
    images = {"image": image, "mask_image": torch.ones(16, 16)} if masked else {"image": image}
    sys.setprofile(profile)
    try:
        pipe(class_labels=3, num_inference_steps=2, seed=0, **images)
        pipe(class_labels=3, num_inference_steps=2, seed=0)
    finally:
        sys.setprofile(None)
    assert bool(entered) == masked


def test_wraps_apply_in_order_to_the_guided_denoiser_of_every_call(pipe):
    options = {"class_labels": [1, 2], "num_inference_steps": 3, "seed": 0, "output_type": "pt"}
    plain = pipe(**options).images
    pipe.wraps = [
        lambda denoise: lambda x, t: denoise(x, t) + 1,
        lambda denoise: lambda x, t: denoise(x, t) * 2,
    ]
    x, t = torch.randn(2, 4, 8, 8), 500
    labels = torch.tensor([1, 2])
    wrapped = pipe.denoiser(labels, 2.0)(x, t)
    wraps, pipe.wraps = pipe.wraps, []
    assert torch.equal(wrapped, (pipe.denoiser(labels, 2.0)(x, t) + 1) * 2)
    assert torch.equal(pipe(**options).images, plain)
    pipe.wraps = wraps
    assert not torch.equal(pipe(**options).images, plain)


def test_finishers_apply_in_order_to_the_decoded_images(pipe):
    options = {"class_labels": [1, 2], "num_inference_steps": 3, "seed": 0, "output_type": "pt"}
    plain = pipe(**options).images
    pipe.finishers = [lambda images: images + 1, lambda images: images * 2]
    assert torch.equal(pipe(**options).images, (plain + 1) * 2)
