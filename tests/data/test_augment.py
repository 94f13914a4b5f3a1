"""Augmentations: a function of the image's position in the stream."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiff import data
from minidiff.data import ImageData, toys
from minidiff.data.augment import augmented
from minidiff.errors import InvalidArgument


def photos(n: int = 40, channels: int = 3, height: int = 6, width: int = 7) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    shape = (n, channels, height, width)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return ImageData("photos", images, torch.arange(n) % 2, ("a", "b"))


def candidates(x: torch.Tensor, shift: int, flip: bool, padding: str) -> list[torch.Tensor]:
    """Return all augmentations of x (C, H, W), computed with loops."""
    height, width = x.shape[1:]
    result = []
    for mirrored in (False, True) if flip else (False,):
        for down in range(-shift, shift + 1):
            for right in range(-shift, shift + 1):
                y = torch.full_like(x, -1.0)
                for row in range(height):
                    for column in range(width):
                        r = row + down
                        c = (width - 1 - column if mirrored else column) + right
                        if padding == "reflect":
                            r = abs(r) if r < height else 2 * (height - 1) - r
                            c = abs(c) if c < width else 2 * (width - 1) - c
                        if 0 <= r < height and 0 <= c < width:
                            y[:, row, column] = x[:, r, c]
                result.append(y)
    return result


@pytest.mark.parametrize("padding", ["background", "reflect"])
@pytest.mark.parametrize(("shift", "flip"), [(0, True), (1, False), (2, True)])
def test_all_shifts_and_flips_of_an_image_are_equally_frequent(shift, flip, padding):
    held = photos(1)
    plain = held.batch(torch.tensor([0]))[0][0]
    n = 100 * (2 * shift + 1) ** 2 * (1 + flip)
    x, labels = augmented(held, shift=shift, flip=flip, padding=padding).batch(
        torch.zeros(n, dtype=torch.int64)
    )
    same = torch.stack(
        [(x == y).flatten(1).all(1) for y in candidates(plain, shift, flip, padding)]
    )
    counts = same.sum(1)
    assert same.any(0).all()
    assert len(counts) == n // 100
    assert counts.min() > 50  # mean 100, standard deviation 10
    assert counts.max() < 150
    assert labels.tolist() == [0] * n


@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 10**12),
    st.integers(1, 12),
    st.integers(0, 11),
    st.integers(0, 4),
)
def test_a_batch_in_parts_or_resumed_is_the_same_batch(seed, position, size, cut, shift):
    held = augmented(photos(), shift=shift, flip=True, seed=seed)
    index = torch.randint(0, 40, (size,), generator=torch.Generator().manual_seed(seed))
    whole = held.batch(index, position)[0]
    cut = min(cut, size - 1)
    first, rest = held.batch(index[:cut], position)[0], held.batch(index[cut:], position + cut)[0]
    assert torch.equal(whole, torch.cat([first, rest]))


def test_another_pass_or_seed_gives_another_augmentation():
    held = photos()
    index = torch.arange(40)
    one = augmented(held, shift=2, flip=True, seed=1)
    first, again = one.batch(index, 0)[0], one.batch(index, 40)[0]
    other = augmented(held, shift=2, flip=True, seed=2).batch(index, 0)[0]
    for x in (again, other):
        assert 0.8 < (x != first).flatten(1).any(1).double().mean() < 1.0


def test_a_resumed_stream_is_augmented_like_the_whole_one():
    held = augmented(photos(), shift=1, flip=True)
    stream = data.batches(len(held), 16, seed=3)
    whole = [held.batch(next(stream), 16 * k)[0] for k in range(8)]
    resumed = data.batches(len(held), 16, seed=3, start=5)
    for k in range(5, 8):
        assert torch.equal(held.batch(next(resumed), 16 * k)[0], whole[k])


def test_augmented_data_have_the_interface_of_data():
    held = photos()
    one = augmented(held, flip=True).to("cpu")
    assert (one.name, one.class_names, one.num_classes) == ("photos", ("a", "b"), 2)
    assert (len(one), one.shape) == (40, (3, 6, 7))
    assert augmented(held) is held


def test_digits_get_a_black_border_and_are_never_flipped():
    digits = data.load("digits")
    x = augmented(digits, shift=3).batch(torch.arange(500))[0]
    plain = digits.batch(torch.arange(500))[0]
    assert x.shape == plain.shape
    assert x.min() == -1
    # A shift loses ink at the border and never adds any.
    assert (x.sum((1, 2, 3)) <= plain.sum((1, 2, 3)) + 1e-3).all()
    for name in ("digits", "mnist", "folder mnist", "captioned digits", "MNIST"):
        named = ImageData(name, digits.images[:1], None, ())
        with pytest.raises(InvalidArgument, match=f"flip must be False for {name}"):
            augmented(named, flip=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shift": 6}, r"shift must be in 0\.\.5, got 6"),
        ({"shift": -1}, "shift must be in"),
        ({"shift": 1.5}, "shift must be a whole number"),
        ({"flip": 1}, "flip must be True or False"),
        ({"flip": True, "seed": -1}, "seed must be in"),
        ({"shift": 1, "padding": "wrap"}, "padding must be one of background, reflect"),
    ],
)
def test_bad_augmentations_are_refused(arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        augmented(photos(), **arguments)


def test_points_are_not_augmented():
    with pytest.raises(InvalidArgument, match="data must be images, moons has items of shape"):
        augmented(toys.load("moons", count=3), shift=1)
