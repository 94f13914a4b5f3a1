"""The watermark is read where it was written, survives what images go through, and is not seen."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from minidiff.data import load
from minidiff.data.captioned.captions import CaptionedDigits
from minidiff.errors import InvalidArgument
from minidiff.images.pixels import as_output, as_pixels, to_float
from minidiff.images.watermark import BITS, Watermark, message_of

MARK = Watermark(0x6D696E69, key=7)


@pytest.fixture(scope="module")
def scenes() -> Tensor:
    return to_float(CaptionedDigits().images(torch.arange(200)))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """In dB, one for each image."""
    error = ((a - b) * 127.5).square().mean(dim=(1, 2, 3)).double()
    return 10 * torch.log10(255**2 / error)


def after_jpeg(images: Tensor, quality: int) -> Tensor:
    files = []
    for image in as_output(images, "pil"):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        files.append(Image.open(file))
    return as_pixels(files, images.shape[1])


def bits_right(mark: Watermark, images: Tensor) -> float:
    return float(np.mean([reading.matches for reading in mark.read(images)])) / BITS


def test_it_is_invisible_and_survives_jpeg_and_noise(scenes: Tensor) -> None:
    marked = MARK(scenes)
    assert psnr(scenes, marked).mean() > 40.5
    assert psnr(scenes, marked).min() > 38
    readings = MARK.read(marked)
    assert {reading.message for reading in readings} == {MARK.message}
    assert all(reading.found for reading in readings)
    noise = torch.randn(marked.shape, generator=torch.Generator().manual_seed(0)) * 5 / 127.5
    assert bits_right(MARK, after_jpeg(marked, 75)) > 0.99
    assert bits_right(MARK, after_jpeg(marked, 50)) > 0.965
    assert bits_right(MARK, (marked + noise).clamp(-1, 1)) > 0.99


def test_images_without_it_and_other_keys_read_as_chance(scenes: Tensor) -> None:
    rows = [(MARK, scenes), (Watermark(MARK.message, key=8), MARK(scenes))]
    for mark, images in rows:
        assert bits_right(mark, images) == pytest.approx(0.5, abs=0.05)
        assert not any(reading.found for reading in mark.read(images))


@pytest.mark.parametrize("name", ["digits", "black", "white", "flat", "wide"])
def test_every_bit_is_there_in_saturated_flat_and_small_images(name: str) -> None:
    images = {
        "digits": to_float(load("digits").images[:100]),
        "black": -torch.ones(2, 1, 28, 28),
        "white": torch.ones(2, 3, 32, 32),
        "flat": torch.full((1, 1, 17, 23), 0.2),
        "wide": torch.linspace(-1, 1, 3 * 40 * 130).reshape(1, 3, 40, 130),
    }[name]
    assert {reading.matches for reading in MARK.read(MARK(images))} == {BITS}


@pytest.mark.parametrize("message", [0, 1, 2**32 - 1])
def test_marked_images_are_bytes_and_hold_any_message(message: int, scenes: Tensor) -> None:
    mark = Watermark(message)
    marked = mark(scenes[:5])
    levels = (marked.double() + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert {reading.message for reading in mark.read(marked)} == {message}
    again = as_pixels(as_output(marked, "pil"), 3)
    assert bits_right(mark, again) == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Watermark(2**32), "message must be"),
        (lambda: Watermark(1.5), "message must be"),
        (lambda: Watermark(1, key=-1), "key must be"),
        (lambda: Watermark(1, strength=float("nan")), "strength must be"),
        (lambda: MARK(torch.zeros(1, 1, 15, 64)), "at least 16×16 pixels.*15×64"),
        (lambda: MARK(torch.zeros(3, 32, 32)), "images must be"),
        (lambda: MARK.read(torch.zeros(1, 2, 32, 32)), "images must be"),
        (lambda: message_of("xyz"), "hexadecimal.*'xyz'"),
        (lambda: message_of("123456789"), "hexadecimal"),
        (lambda: message_of("-1"), "hexadecimal"),
    ],
)
def test_bad_input_is_refused_by_name(make, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        make()
