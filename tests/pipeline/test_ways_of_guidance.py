"""Ways of guidance by name: what they compute, what is stored, and what is refused."""

import json

import pytest
import torch

from minidiff import Pipeline
from minidiff.errors import InvalidArgument
from minidiff.guidance import METHODS, extrapolated, projected, rescaled
from minidiff.names import GUIDES
from minidiff.sample import meaning_of

CALL = {"class_labels": [7, 3], "num_inference_steps": 3, "seed": 0, "output_type": "pt"}


def named(pipe: Pipeline) -> dict:
    """Return each way of guidance as a function."""
    return {
        "cfg": extrapolated,
        "rescale": lambda pair, w: rescaled(pair, w, 0.7),
        "apg": lambda pair, w: projected(pair, w, meaning_of(pipe.scheduler)),
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_name_is_the_function_that_it_names(pipe, name) -> None:
    by_name = pipe(**CALL, guide=name, guidance_scale=3.0).images
    by_function = pipe(**CALL, guide=named(pipe)[name], guidance_scale=3.0).images
    assert torch.equal(by_name, by_function)
    plain = pipe(**CALL, guidance_scale=3.0).images
    assert torch.equal(by_name, plain) == (name == "cfg")


@pytest.mark.parametrize("name", METHODS)
def test_at_scale_1_every_way_is_the_conditional_network(pipe, name) -> None:
    alone = pipe(**CALL, guidance_scale=1.0).images
    assert torch.equal(pipe(**CALL, guide=name, guidance_scale=1.0).images, alone)
    as_function = pipe(**CALL, guide=named(pipe)[name], guidance_scale=1.0).images
    torch.testing.assert_close(as_function, alone, rtol=0, atol=1e-5)


def test_a_model_stores_its_way_and_a_call_may_choose_another(pipe, tmp_path) -> None:
    expected = pipe(**CALL, guide="apg", guidance_scale=3.0).images
    rescaled_images = pipe(**CALL, guidance_rescale=0.7, guidance_scale=3.0).images
    pipe.guide = "apg"
    pipe.save_pretrained(tmp_path / "model")
    read = Pipeline.from_pretrained(tmp_path / "model")
    assert read.guide == "apg"
    assert torch.equal(read(**CALL, guidance_scale=3.0).images, expected)
    given = read(**CALL, guidance_rescale=0.7, guidance_scale=3.0).images
    assert torch.equal(given, rescaled_images)


def test_a_folder_without_a_way_of_guidance_extrapolates(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    content = json.loads(index.read_text())
    del content["guide"]
    index.write_text(json.dumps(content))
    assert Pipeline.from_pretrained(tmp_path / "model").guide == "cfg"


@pytest.mark.parametrize("given", ["CFG", "projected", 3, ["cfg"], ""])
def test_an_unknown_way_is_refused(pipe, given) -> None:
    with pytest.raises(InvalidArgument, match="guide must be one of cfg, rescale, apg"):
        pipe(**CALL, guide=given, guidance_scale=3.0)
    with pytest.raises(InvalidArgument, match="guide must be"):
        pipe(**CALL, guide=given, guidance_scale=1.0)
    with pytest.raises(InvalidArgument, match="guide must be"):
        Pipeline(pipe.unet, pipe.scheduler, class_names=pipe.class_names, guide=given)


def test_two_ways_at_once_are_refused(pipe) -> None:
    with pytest.raises(InvalidArgument, match="either guide or guidance_rescale"):
        pipe(**CALL, guide="apg", guidance_rescale=0.7)


def test_the_names_of_options_are_those_of_the_functions() -> None:
    assert set(GUIDES) == set(METHODS)
