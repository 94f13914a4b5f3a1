"""A walk through latent space ends at its stops, and its noise keeps its variance."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff import shipped
from minidiff.errors import InvalidArgument
from minidiff.lab.walk import slerp, walk, write

STOPS = ["a big red 3 on a white background", "a big blue 8 on a yellow background"]
CALL = {"num_inference_steps": 5, "guide": "apg", "progress": False}


def distance(one: Image.Image, two: Image.Image) -> int:
    """Return the largest difference of two images, in grey levels."""
    return int(np.abs(np.asarray(one, int) - np.asarray(two, int)).max())


@pytest.fixture(scope="module")
def pipe():
    return shipped.load("digits-text")


def test_the_arc_between_two_noises_keeps_their_variance():
    one, two = torch.randn(2, 3, 64, 64)
    assert torch.equal(slerp(one, two, 0.0), one)
    torch.testing.assert_close(slerp(one, two, 1.0), two)
    for u in (0.25, 0.5, 0.9):
        assert slerp(one, two, u).var().item() == pytest.approx(1, abs=0.03)
    assert torch.lerp(one, two, 0.5).var().item() == pytest.approx(0.5, abs=0.03)


def test_the_arc_is_travelled_at_constant_speed():
    one, two = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    for u in (0.1, 0.5, 0.8):
        wanted = torch.tensor([math.cos(u * math.pi / 2), math.sin(u * math.pi / 2)]).double()
        torch.testing.assert_close(slerp(one, two, u), wanted)
    torch.testing.assert_close(slerp(one, 3 * one, 0.5), 2 * one)
    near = one + 1e-6 * two
    torch.testing.assert_close(slerp(one, near, 0.5), one + 0.5e-6 * two, rtol=0, atol=1e-12)


def test_the_stops_are_what_calls_draw_and_the_rest_lies_between(pipe):
    images = walk(pipe, STOPS, seeds=[4, 5], frames=3, **CALL)
    assert len(images) == 4
    for image, stop, seed in ((images[0], STOPS[0], 4), (images[-1], STOPS[1], 5)):
        (alone,) = pipe(stop, seed=seed, **CALL).images
        assert distance(alone, image) <= 1  # one by one and together round apart
    differ = [a.tobytes() != b.tobytes() for a, b in pairwise(images)]
    assert all(differ)


def test_a_walk_that_stands_still_repeats_one_image_even_with_fresh_noise_in_each_step(pipe):
    from minidiff.schedulers.core.names import sampler

    wild = shipped.load("digits-text")
    wild.scheduler = sampler("sde-dpm++", wild.scheduler)
    images = walk(wild, [STOPS[0]] * 2, seeds=3, frames=2, **CALL)
    assert all(distance(images[0], other) <= 1 for other in images[1:])


def test_a_walk_is_written_as_an_animation(pipe, tmp_path):
    images = walk(pipe, STOPS, frames=2, **CALL)
    write(images, tmp_path / "walk.gif", scale=2)
    with Image.open(tmp_path / "walk.gif") as film:
        assert (film.n_frames, film.size) == (3, (64, 64))


@pytest.mark.parametrize(
    ("stops", "options", "message"),
    [
        ("a red 7", {}, "stops must be a list of at least two prompts"),
        (["a red 7"], {}, "stops must be a list of at least two prompts"),
        (STOPS, {"seeds": [1]}, "seeds must be a number, or 2 of them"),
        (STOPS, {"seeds": [1, -1]}, "seed must be"),
        (STOPS, {"frames": 0}, "frames must be in 1..1000, got 0"),
        (STOPS, {"seed": 1}, "seed must be left out"),
        (STOPS, {"steps": 1}, "steps"),
    ],
)
def test_a_wrong_walk_is_refused(pipe, stops, options, message):
    with pytest.raises((InvalidArgument, TypeError), match=message):
        walk(pipe, stops, **options)


def test_between_two_classes_there_is_nothing():
    digits = shipped.load("mnist")
    with pytest.raises(InvalidArgument, match="stops must be one class"):
        walk(digits, [3, 8])
    assert len(walk(digits, [3, 3], seeds=[0, 1], frames=1, num_inference_steps=2)) == 2


@pytest.mark.parametrize("u", [-0.1, 1.1, math.nan])
def test_a_fraction_outside_of_the_arc_is_refused(u):
    with pytest.raises(InvalidArgument, match="u must be"):
        slerp(torch.ones(2), torch.ones(2), u)


def test_noises_of_two_shapes_are_refused():
    with pytest.raises(InvalidArgument, match="second must have the shape of first"):
        slerp(torch.ones(2), torch.ones(3), 0.5)
