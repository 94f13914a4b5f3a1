"""Data sets of torch: one stream for any number of workers, and errors that name the item."""

import io
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset, TensorDataset, random_split

from minidiff import data
from minidiff.data import ImageData
from minidiff.data.augment import augmented
from minidiff.data.dataset import from_dataset, start_method
from minidiff.errors import DataError, InvalidArgument

N = 23
BYTES = torch.randint(
    0, 256, (N, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
LABELS = torch.arange(N) % 3
NAMES = ("a", "b", "c")


class Noisy(Dataset):
    """A data set that draws from all global generators."""

    classes = NAMES

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple:
        noise = random.random() + np.random.rand() + torch.rand(3, 4, 5)  # noqa: NPY002
        return noise / 3, i % 3


class Listed(Dataset):
    """A data set of listed items; functions are called, to raise or to end the process."""

    def __init__(self, items: list) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> object:
        item = self.items[i]
        return item() if callable(item) else item


def noisy(workers: int, seed: int = 5):
    return from_dataset(Noisy(), value_range=(0, 1), seed=seed, workers=workers)


def stream(held, size: int, count: int, seed: int = 5, start: int = 0) -> list:
    order = data.batches(len(held), size, seed, start)
    return [held.batch(next(order), size * k) for k in range(start, start + count)]


def test_batches_are_the_same_for_any_number_of_workers_and_from_any_position():
    expected = stream(noisy(0), 7, 9)
    assert len({x.sum().item() for x, _ in expected}) == 9
    for workers in (1, 3):
        held = noisy(workers)
        for start, count in ((0, 9), (4, 5), (2, 1)):  # the same workers, taken up elsewhere
            for (x, y), (xe, ye) in zip(
                stream(held, 7, count, start=start), expected[start:], strict=False
            ):
                assert torch.equal(x, xe)
                assert torch.equal(y, ye)
        other = stream(held, 7, 2, seed=6)  # in another order than that of its seed
        for (x, _), (xe, _) in zip(other, stream(noisy(0), 7, 2, seed=6), strict=True):
            assert torch.equal(x, xe)
    assert not torch.equal(stream(noisy(0, seed=6), 7, 1)[0][0], expected[0][0])


def test_workers_build_the_next_batch_ahead_also_if_processes_share_it():
    held, order = noisy(2), data.batches(N, 4, 5)
    first, second = next(order), next(order)
    held.batch(first, 0)
    assert held._ahead.guess[0] == (tuple(second.tolist()), 4)
    held.batch(second, 4)
    # Two ranks, each with half of every batch of 8: positions 12, 20, 28 for the second one.
    held = noisy(2)
    order = data.batches(N, 8, 5)
    halves = [next(order)[4:] for _ in range(3)]
    guesses = []
    for k, half in enumerate(halves):
        held.batch(half, 8 * k + 4)
        guesses.append(held._ahead.guess)
    assert guesses[1][0] == (tuple(halves[2].tolist()), 20)


@settings(deadline=None)
@given(st.lists(st.integers(0, N - 1), min_size=1, max_size=9), st.integers(0, 10**9))
def test_an_item_depends_on_its_position_and_the_callers_generators_are_restored(numbers, position):
    held = noisy(0)
    random.seed(1), torch.manual_seed(1), np.random.seed(1)  # noqa: NPY002
    expected = random.random(), torch.rand(1), np.random.rand()  # noqa: NPY002
    random.seed(1), torch.manual_seed(1), np.random.seed(1)  # noqa: NPY002
    whole = held.batch(torch.tensor(numbers), position)[0]
    assert (random.random(), torch.rand(1), np.random.rand()) == expected  # noqa: NPY002
    last = held.batch(torch.tensor(numbers[-1:]), position + len(numbers) - 1)[0]
    assert torch.equal(whole[-1:], last)


AS_ARRAY = [image.permute(1, 2, 0).numpy() for image in BYTES]
FORMS = {
    "tensors": (TensorDataset(BYTES, LABELS), {"class_names": NAMES}),
    "a part": (
        random_split(TensorDataset(BYTES, LABELS), [N, 0])[0].dataset,
        {"class_names": NAMES},
    ),
    "arrays": (Listed(list(zip(AS_ARRAY, LABELS.tolist(), strict=True))), {"class_names": NAMES}),
    "PIL": (
        Listed([[Image.fromarray(a), np.int64(y)] for a, y in zip(AS_ARRAY, LABELS, strict=True)]),
        {"class_names": NAMES},
    ),
    "floats": (
        TensorDataset(BYTES.double() / 255 * 3 - 1, LABELS),
        {"class_names": NAMES, "value_range": (-1, 2)},
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("workers", [0, 2])
def test_all_forms_of_an_image_give_the_same_item(form, workers):
    dataset, options = FORMS[form]
    held = from_dataset(dataset, "mine", workers=workers, **options)
    assert (len(held), held.shape, held.num_classes, held.name) == (N, (3, 4, 5), 3, "mine")
    index = torch.tensor([3, 22, 0, 3])
    x, labels = held.to("cpu").batch(index, 9)
    expected, _ = ImageData("plain", BYTES, LABELS, NAMES).batch(index)
    assert x.dtype == torch.float32
    assert torch.allclose(x, expected, atol=1e-6)
    assert form == "floats" or torch.equal(x, expected)
    assert labels.tolist() == LABELS[index].tolist()


def test_grey_images_without_labels_need_no_channel_axis():
    for dataset in (TensorDataset(BYTES[:, 0]), Listed([image[0].numpy() for image in BYTES])):
        x, labels = from_dataset(dataset).batch(torch.tensor([1, 2]))
        assert labels is None
        assert torch.equal(x, BYTES[1:3, :1] / 127.5 - 1)


def test_floats_may_have_16_bits():
    half = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1)
    for dtype in (torch.bfloat16, torch.float16):
        held = from_dataset(TensorDataset(half.to(dtype)), value_range=(0, 1))
        assert held.batch(torch.arange(3))[0].flatten().tolist() == [-1, 0, 1]


def test_wrapped_data_can_be_augmented():
    held = augmented(noisy(2), flip=True, shift=1)
    x, _ = held.batch(torch.arange(6), 11)
    plain = augmented(noisy(0), flip=True, shift=1).batch(torch.arange(6), 11)[0]
    assert torch.equal(x, plain)


def fail() -> None:
    raise KeyError("lost.png")


def cut_short() -> Image.Image:
    """Return a truncated image; Pillow has read only its header."""
    file = io.BytesIO()
    Image.fromarray(AS_ARRAY[0]).save(file, "BMP")
    return Image.open(io.BytesIO(file.getvalue()[:-20]))


GOOD = BYTES[0]
BAD = {
    "another shape": (GOOD[:, :3], r"has shape \(3, 3, 5\), item 0 has \(3, 4, 5\)"),
    "two channels": (GOOD[:2], r"is an image of shape \(2, 4, 5\), expected"),
    "a batch": (GOOD[None], r"is an image of shape \(1, 3, 4, 5\)"),
    "empty": (GOOD[:, :0], "is an image of shape"),
    "another type": (GOOD.float(), "is an image of float32, expected uint8.*value_range"),
    "a label": ((GOOD, 1), "has a label and item 0 has none"),
    "three parts": ((GOOD, 1, 2), "has 3 parts"),
    "no image": ("cat.png", "is str, expected a tensor"),
    "nothing": (None, "is NoneType"),
    "a palette": (Image.new("P", (5, 4)), "is a PIL image of mode P, expected L or RGB"),
    "no array": (GOOD.to_sparse(), "cannot be read as an array"),
    "an image cut short": (cut_short, r"cannot be read as an array: .*truncated"),
    "an exception": (fail, "raised KeyError: 'lost.png'"),
}


@pytest.mark.parametrize(
    ("workers", "mistake"),
    [*((0, mistake) for mistake in BAD), (1, "a batch"), (2, "an exception")],
)
def test_a_mistake_is_named_by_its_item(workers, mistake):
    item, message = BAD[mistake]
    held = from_dataset(Listed([GOOD, GOOD, item]), "mine", workers=workers)
    assert held.batch(torch.tensor([0, 1]))[0].shape == (2, 3, 4, 5)
    with pytest.raises(DataError, match=f"mine: item 2 {message}"):
        held.batch(torch.tensor([0, 2]), 1)
    with pytest.raises((DataError, InvalidArgument), match=r"item 0|class_names"):
        from_dataset(Listed([item, GOOD]), "mine").batch(torch.tensor([1]))


@pytest.mark.parametrize("value", [1.001, -0.001, float("nan"), float("inf")])
def test_a_value_outside_the_declared_range_is_named_by_its_item(value):
    images = torch.rand(3, 1, 2, 2)
    images[2, 0, 1, 1] = value
    held = from_dataset(TensorDataset(images), value_range=(0, 1))
    with pytest.raises(DataError, match=r"item 2 has values in .* outside of value_range \[0, 1\]"):
        held.batch(torch.tensor([2]))
    held = from_dataset(Listed([images[0], GOOD]), value_range=(0, 1))
    with pytest.raises(DataError, match="item 1 is an image of uint8, expected floats"):
        held.batch(torch.tensor([1]))


@pytest.mark.parametrize("label", [3, -1, 1.0, True, "a", torch.tensor([1, 2])])
def test_a_label_out_of_range_is_named_by_its_item(label):
    held = from_dataset(Listed([(GOOD, 0), (GOOD, label)]), class_names=NAMES)
    with pytest.raises(DataError, match=r"item 1.*label must be"):
        held.batch(torch.tensor([1]))
    with pytest.raises(DataError, match=r"item 1 has a label and item 0 has none, or"):
        from_dataset(Listed([(GOOD, 0), GOOD]), class_names=NAMES).batch(torch.tensor([1]))


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (iter([GOOD]), {}, "dataset must be of the map style"),
        (Listed([]), {}, "len.. of at least 1"),
        (Listed([(GOOD, 0)]), {}, "class_names must name the classes"),
        (Listed([GOOD]), {"class_names": NAMES}, "no labels"),
        (Listed([(GOOD, 0)]), {"class_names": [0, 1]}, "class_names"),
        (Listed([GOOD]), {"workers": -1}, "workers must be in"),
        (Listed([GOOD]), {"seed": 2**32}, "seed must be in"),
        (Listed([GOOD]), {"value_range": (1, 0)}, "value_range must be"),
        (Listed([GOOD]), {"value_range": 255}, "value_range must be a list or a tuple"),
    ],
)
def test_unsuitable_data_sets_are_refused(dataset, options, message):
    with pytest.raises(InvalidArgument, match=message):
        from_dataset(dataset, **options)


def end() -> None:
    os._exit(1)


def test_the_death_of_a_worker_is_reported():
    held = from_dataset(Listed([GOOD, end]), workers=1)
    with pytest.raises(DataError, match="a worker that builds items died"):
        held.batch(torch.tensor([1]))


KILLED = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
from test_dataset import noisy
held = noisy(2)
held.batch(torch.arange(4), 0)
print(*held._ahead.pool._processes, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_workers_exit_when_their_parent_is_killed():
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(number) for number in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.send_signal(signal.SIGKILL)
        parent.stdout.read()  # ends when the workers, which have inherited it, are gone


TRAINS = """
import multiprocessing, sys
sys.path.insert(0, sys.argv[1])
from test_dataset import BYTES, Listed
from minidiff.data.dataset import from_dataset
if multiprocessing.parent_process() is None:
    multiprocessing.set_start_method("spawn")
import torch
from_dataset(Listed(list(BYTES)), workers=1).batch(torch.arange(2))
"""


@pytest.mark.slow
def test_a_script_without_a_guard_is_refused_by_name(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TRAINS)
    command = [sys.executable, str(script), str(Path(__file__).parent)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "processes are started by 'spawn'" in last
    assert 'must be guarded by `if __name__ == "__main__":`' in last


def test_a_data_set_that_cannot_be_sent_to_a_worker_is_refused(monkeypatch):
    items = Listed([GOOD, lambda: GOOD])
    assert len(from_dataset(items, workers=1)) == 2 or start_method() != "fork"
    monkeypatch.setattr("minidiff.data.dataset.start_method", lambda: "spawn")
    with pytest.raises(InvalidArgument, match=r"workers must be 0 .*'spawn'.*lambda"):
        from_dataset(items, workers=1)
    assert len(from_dataset(items)) == 2
    assert len(from_dataset(Listed([GOOD]), workers=1)) == 1


# --- items that are dicts ----------------------------------------------------------------------


class Feature:
    """A feature of labels, as data sets of Hugging Face have it."""

    names = NAMES


class Dicts(Listed):
    """A data set with the attributes of Hugging Face's."""

    @property
    def features(self) -> dict:
        return {"label": Feature(), "img": object()}


IMAGES = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in BYTES]
KINDS = {
    "PIL": IMAGES,
    "tensors": list(BYTES),
    "arrays": [image.permute(1, 2, 0).numpy() for image in BYTES],
    "lists": [image.permute(1, 2, 0).tolist() for image in BYTES],
}


@pytest.mark.parametrize("form", KINDS)
@pytest.mark.parametrize("workers", [0, 1])
def test_dicts_give_the_batches_of_pairs(form, workers):
    items = [
        {"img": x, "label": int(y), "id": "x"} for x, y in zip(KINDS[form], LABELS, strict=True)
    ]
    held = from_dataset(Dicts(items), image_key="img", label_key="label", workers=workers)
    assert held.class_names == NAMES
    pairs = from_dataset(Listed(list(zip(BYTES, LABELS, strict=True))), class_names=NAMES)
    for one, other in zip(*(x.batch(torch.arange(N)) for x in (held, pairs)), strict=True):
        assert torch.equal(one, other)
    alone = from_dataset(Dicts(items), image_key="img")
    assert (alone.class_names, alone.batch(torch.arange(2))[1]) == ((), None)


@pytest.mark.parametrize(
    ("item", "keys", "message"),
    [
        ({"img": BYTES[0], "label": 0}, {}, "'img', 'label'; name that of the image: image_key"),
        ({"img": BYTES[0]}, {"image_key": "image"}, "item 0 has no key 'image'; there are 'img'"),
        ({"img": BYTES[0]}, {"image_key": "img", "label_key": "y"}, "no key 'y'; there are 'img'"),
        (BYTES[0], {"image_key": "img"}, "is Tensor, but image_key is for dicts"),
        ({"img": "a.png"}, {"image_key": "img"}, "is str, expected a tensor"),
        ({"img": [[1, 2], [3]]}, {"image_key": "img"}, "is list, expected a tensor"),
        ({"img": [[300, 2], [3, 4]]}, {"image_key": "img"}, "is an image of int64, expected uint8"),
        ({}, {"image_key": "img"}, "has no key 'img'"),
    ],
)  # fmt: skip
def test_a_dict_that_cannot_be_used_is_named_with_its_keys(item, keys, message):
    with pytest.raises(DataError, match=message):
        from_dataset(Listed([item]), **keys)


def test_a_label_needs_an_image():
    with pytest.raises(InvalidArgument, match="image_key must be given with label_key, 'label'"):
        from_dataset(Listed([{"img": BYTES[0], "label": 0}]), label_key="label")


def test_class_names_may_be_an_array_but_no_text():
    items = Listed([(BYTES[0], 0), (BYTES[1], 1)])
    assert from_dataset(items, class_names=np.array(["a", "b"])).class_names == ("a", "b")
    items.classes = np.array(["c", "d"])
    assert from_dataset(items).class_names == ("c", "d")
    with pytest.raises(InvalidArgument, match="class_names must be a list or a tuple, got 'ab'"):
        from_dataset(items, class_names="ab")
