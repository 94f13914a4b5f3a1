"""What a callback at the end of a step may do, and what else a call accepts."""

import numpy as np
import pytest
import torch

from minidiff import Pipeline, trajectory
from minidiff.errors import InvalidArgument
from minidiff.noise import randn

OPTIONS = {"class_labels": 3, "num_inference_steps": 6, "seed": 0, "output_type": "pt"}


def test_interrupt_ends_sampling_after_the_step_and_returns_what_is_there(pipe):
    steps = []

    def stop(pipe, index, t, given):
        steps.append(given["latents"])
        pipe._interrupt = index == 2
        return given

    images = pipe(**OPTIONS, callback_on_step_end=stop).images
    assert len(steps) == 3
    assert torch.equal(images, pipe.decode(steps[-1]))
    assert len(pipe(**OPTIONS | {"class_labels": [1, 2, 3]}, batch_size=2,
                    callback_on_step_end=stop).images) == 2  # fmt: skip
    steps.clear()
    pipe(**OPTIONS, callback_on_step_end=lambda pipe, i, t, given: steps.append(i))
    assert len(steps) == 6  # the next call is not interrupted


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: x,
        lambda x: True,
        lambda x: [x],
        lambda x: {"latents": None},
        lambda x: {"latents": x.half()},
        lambda x: {"latents": x[:, :1]},
        lambda x: {"latents": x.numpy()},
        lambda x: {"prompt_embeds": 1},
    ],
)
def test_an_answer_that_is_not_latents_is_refused_by_name(pipe, answer):
    with pytest.raises(InvalidArgument, match="callback_on_step_end may return None, or"):
        pipe(**OPTIONS, callback_on_step_end=lambda p, i, t, given: answer(given["latents"]))


def test_an_attribute_without_effect_is_refused_and_removed(pipe):
    def dim(pipe, index, t, given):
        pipe._guidance_scale = 0.0

    with pytest.raises(InvalidArgument, match=r"set pipe\._guidance_scale, which has no effect"):
        pipe(**OPTIONS, callback_on_step_end=dim)
    assert not hasattr(pipe, "_guidance_scale")


def test_classes_are_given_by_number_by_name_or_as_an_array(pipe):
    expected = pipe(**OPTIONS | {"class_labels": [1, 7]})
    for given in (["1", "7"], np.array([1, 7]), torch.tensor([1, 7]), (1, "7")):
        result = pipe(**OPTIONS | {"class_labels": given})
        assert torch.equal(result.images, expected.images)
        assert result.labels.tolist() == [1, 7]
    with pytest.raises(InvalidArgument, match=r"class_labels must be one of 0, 1, .*; got 'seven'"):
        pipe(class_labels="seven")


def test_a_name_that_is_a_numeral_means_the_class_of_that_name():
    from tiny_pipelines import digits

    pipe = digits()
    pipe.class_names = ("1", "10", "2", "3", "4", "5", "6", "7", "8", "9")
    assert pipe(class_labels="10", num_inference_steps=1).labels.tolist() == [1]
    assert pipe(class_labels=2, num_inference_steps=1).labels.tolist() == [2]


def test_an_interval_may_be_an_array(pipe):
    given = {"guidance_scale": 3.0, "guidance_interval": (0.4, 6.0)}
    expected = pipe(**OPTIONS, **given).images
    given["guidance_interval"] = np.array([0.4, 6.0])
    assert torch.equal(pipe(**OPTIONS, **given).images, expected)


def test_latents_of_a_call_decode_to_its_images(pipe):
    images = pipe(**OPTIONS).images
    latents = pipe(**OPTIONS | {"output_type": "latent"}).images
    assert torch.equal(pipe.decode(latents), images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_call_within_autocast_samples_in_float32(pipe, dtype):
    expected = pipe(**OPTIONS).images
    with torch.autocast("cpu", dtype):
        images = pipe(**OPTIONS).images
        labels, x = torch.tensor([3]), torch.randn(1, 4, 8, 8)
        pipe.scheduler.set_timesteps(3)
        *_, last = trajectory(pipe.denoiser(labels, 2.0), pipe.scheduler, x)
    assert images.dtype == last.next_x.dtype == torch.float32
    assert (images - expected).abs().mean() < 0.1


@pytest.mark.parametrize("generator", [3, "seed", [3], (None,)])
def test_what_is_not_a_generator_is_refused_by_name(pipe, generator):
    with pytest.raises(InvalidArgument, match=r"generator must be a torch\.Generator"):
        randn((1, 2), generator)
    with pytest.raises(InvalidArgument, match=r"generator must be a torch\.Generator"):
        pipe(class_labels=3, generator=generator)


def test_pipelines_of_a_folder_are_independent_in_their_wraps(run_folder):
    first, second = (Pipeline.from_pretrained(run_folder / "model") for _ in range(2))
    first.wraps.append(lambda denoise: denoise)
    assert second.wraps == []
