"""Training on any map-style `torch.utils.data.Dataset`, with or without worker processes.

    from_dataset(dataset, workers=4)                              images as bytes or PIL
    from_dataset(dataset, value_range=(0, 1), class_names=names)  images as floats
    from_dataset(dataset, image_key="img", label_key="label")     items that are dicts

An item is an image, (image, label), or a dict with both under two keys, as data sets of Hugging
Face have it. While a data set builds an item, `random`, `numpy.random`
and torch are seeded by (seed, position in the stream) alone, see `minidiff.data.protocol`. The
states of the caller's generators are restored. So the batches are the same for any number of
workers, and after an interruption at any position.

Workers build the next batch during a training step, if batches are requested in the order of the
seed. They are processes of `concurrent.futures` and return items through a pipe; nothing is written
to disk.
"""

import contextlib
import copy
import multiprocessing
import os
import pickle
import random
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.data import batches
from minidiff.data.protocol import Data, Purpose, random_words
from minidiff.errors import DataError, InvalidArgument, listed, real_number, whole_number
from minidiff.images.pixels import to_float
from minidiff.noise import MAX_SEED
from minidiff.runtime.checks import text

MAX_WORKERS = 256
_ROUNDING = 1e-4  # fraction of a range by which resizing and rounding may exceed it


class Items:
    """The items of a data set, checked and converted to one form.

    Args:
        dataset, name, value_range, seed: arguments of `from_dataset`.
        keys: its `image_key` and `label_key`, without those that are None.
    Attributes:
        shape: shape (C, H, W) of every image, that of item 0; `from_dataset` sets it.
        num_classes: number of labels, 0 for items without; `from_dataset` sets it.
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        value_range: tuple[float, float] | None,
        seed: int,
        keys: tuple[str, ...] = (),
    ) -> None:
        self.dataset, self.name, self.value_range, self.seed = dataset, name, value_range, seed
        self.keys = keys
        self.shape: tuple[int, ...] | None = None  # unknown before item 0
        self.num_classes: int | None = None

    def first(self) -> tuple[np.ndarray, Any]:
        """Return image and label (or None) of item 0, whose form all items must have."""
        with _restored_random_state():
            return self._split(0, self._raw(0, [0, 0, 0]))

    def make(self, numbers: Sequence[int], position: int) -> tuple[np.ndarray, np.ndarray]:
        """Return images (B, C, H, W), uint8 or float32 in [−1, 1], and labels int64 (B,) or (0,).

        Raises:
            DataError: names the item that fails, or that differs in form from item 0.
        """
        images, labels = [], []
        words = random_words(self.seed, Purpose.ITEM, position, len(numbers)).tolist()
        with _restored_random_state():
            for number, seeds in zip(numbers, words, strict=True):
                image, label = self._split(number, self._raw(number, seeds))
                if image.shape != self.shape:
                    self._refuse(number, f"has shape {image.shape}, item 0 has {self.shape}")
                if (label is not None) != (self.num_classes > 0):
                    self._refuse(number, "has a label and item 0 has none, or the other way round")
                images.append(image)
                if label is not None:
                    labels.append(self._label(number, label))
        return np.stack(images), np.array(labels, dtype=np.int64)

    def _raw(self, number: int, seeds: Sequence[int]) -> Any:
        random.seed(seeds[0])
        np.random.seed(seeds[1] >> 32)  # noqa: NPY002 - for data sets that use this one
        torch.default_generator.manual_seed(seeds[2] >> 1)
        try:
            return self.dataset[number]
        except Exception as error:  # a data set may raise anything
            self._refuse(number, f"raised {type(error).__name__}: {error}", error)

    def _refuse(self, number: int, reason: str, cause: Exception | None = None) -> None:
        raise DataError(f"{self.name}: item {number} {reason}") from cause

    def _split(self, number: int, item: Any) -> tuple[np.ndarray, Any]:
        """Return image and label of an item."""
        if isinstance(item, Mapping):
            item = self._values(number, item)
        elif self.keys:
            self._refuse(number, f"is {type(item).__name__}, but image_key is for dicts")
        if not isinstance(item, tuple | list):
            return self._image(number, item), None
        if len(item) not in (1, 2):
            self._refuse(number, f"has {len(item)} parts, expected an image, or image and label")
        return self._image(number, item[0]), item[1] if len(item) == 2 else None

    def _values(self, number: int, item: Mapping) -> tuple:
        """Return the image of a dict, and its label if there is a key for it."""
        known = ", ".join(map(repr, item))
        if not self.keys:
            self._refuse(number, f"is a dict with the keys {known}; name that of the image: "
                                 "image_key, and that of the label, if any: label_key")  # fmt: skip
        for key in self.keys:
            if key not in item:
                self._refuse(number, f"has no key {key!r}; there are {known}")
        return tuple(item[key] for key in self.keys)

    def _image(self, number: int, image: Any) -> np.ndarray:
        """Return an image as uint8 or float32 (C, H, W)."""
        if isinstance(image, list):
            image = _from_lists(image)
        pillow = hasattr(image, "getbands")
        if not (pillow or isinstance(image, Tensor | np.ndarray)):
            self._refuse(number, f"is {type(image).__name__}, expected a tensor (C, H, W), an "
                                 "array (H, W, C) or a PIL image")  # fmt: skip
        if pillow and image.mode not in ("L", "RGB"):
            self._refuse(number, f"is a PIL image of mode {image.mode}, expected L or RGB")
        try:
            array = _as_array(image)
        except Exception as error:  # from Pillow's decoder, or a sparse tensor
            self._refuse(number, f"cannot be read as an array: {error}", error)
        if array.ndim == 3 and not isinstance(image, Tensor):
            array = array.transpose(2, 0, 1)
        array = array[None] if array.ndim == 2 else array
        if array.ndim != 3 or array.shape[0] not in (1, 3) or array.size == 0:
            self._refuse(number, f"is an image of shape {array.shape}, expected (C, H, W) with "
                                 "C = 1 or 3; of an array (H, W, C)")  # fmt: skip
        return (
            self._bytes(number, array) if self.value_range is None else self._floats(number, array)
        )

    def _bytes(self, number: int, array: np.ndarray) -> np.ndarray:
        if array.dtype != np.uint8:
            self._refuse(number, f"is an image of {array.dtype}, expected uint8; for "
                                 "floats, set value_range to (black, white)")  # fmt: skip
        return array

    def _floats(self, number: int, array: np.ndarray) -> np.ndarray:
        low, high = self.value_range
        if not np.issubdtype(array.dtype, np.floating):
            self._refuse(number, f"is an image of {array.dtype}, expected floats in "
                                 f"value_range [{low:g}, {high:g}]")  # fmt: skip
        wide = array.astype(np.float64)
        slack = _ROUNDING * (high - low)
        if not (wide.min() >= low - slack and wide.max() <= high + slack):  # NaN is refused too
            self._refuse(number, f"has values in [{wide.min():g}, {wide.max():g}], outside of "
                                 f"value_range [{low:g}, {high:g}]")  # fmt: skip
        return ((wide - low) * (2 / (high - low)) - 1).astype(np.float32)

    def _label(self, number: int, label: Any) -> int:
        try:
            return whole_number("label", label, 0, self.num_classes - 1)
        except InvalidArgument as error:
            self._refuse(number, f": {error}", error)


def _from_lists(image: list) -> Any:
    """Return nested lists of numbers as an array, of bytes where they fit; others as they are."""
    try:
        array = np.array(image)
    except ValueError:  # rows of different lengths
        return image
    is_bytes = array.dtype.kind == "i" and array.size and 0 <= array.min() <= array.max() <= 255
    return array.astype(np.uint8) if is_bytes else array


def _as_array(image: Any) -> np.ndarray:
    if not isinstance(image, Tensor):
        return np.asarray(image)
    tensor = image.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def from_dataset(
    dataset: Any,
    name: str = "dataset",
    *,
    value_range: tuple[float, float] | None = None,
    class_names: Sequence[str] | None = None,
    seed: int = 0,
    workers: int = 0,
    image_key: str | None = None,
    label_key: str | None = None,
) -> "DatasetImages":
    """Wrap a data set for training.

    Args:
        dataset: object with `len()` and `[i]`, whose items are images or pairs (image, label). An
            image is a tensor (C, H, W), an array (H, W, C) or a PIL image (L or RGB), C = 1 or 3;
            all have the shape of item 0.
        name: name of the data in error messages and reports.
        value_range: None for images of bytes (uint8, PIL); (black, white) for floats.
        class_names: one name per class, in the order of the labels 0, 1, …; by default the
            `classes` of the data set, as in torchvision, or the names of the feature `label_key`,
            as in Hugging Face's. Required with labels, refused without.
        seed: seed of the data set's random numbers. With the seed of the training, the workers
            know the next batch.
        workers: number of processes that build items; 0 for the calling process. Where they are
            not forked (macOS, Windows), a script that trains needs `if __name__ == "__main__":`.
        image_key: key of the image, where items are dicts.
        label_key: key of the label there; None for dicts without labels.
    Raises:
        InvalidArgument: an argument that is not allowed, a data set without length or items, or
            one that workers cannot be sent.
        DataError: item 0 cannot be used.
    """
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")) or not len(dataset):
        raise InvalidArgument(
            f"dataset must be of the map style, with [i] and a len() of at least 1, "
            f"got {type(dataset).__name__}"
        )
    if value_range is not None:
        low, high = (
            real_number("value_range", x, -1e30) for x in listed("value_range", value_range, 2)
        )
        if not low < high:
            raise InvalidArgument(f"value_range must be (black, white), got {value_range!r}")
        value_range = (low, high)
    text("name", name)
    seed = whole_number("seed", seed, 0, MAX_SEED)
    workers = whole_number("workers", workers, 0, MAX_WORKERS)
    if label_key is not None and image_key is None:
        raise InvalidArgument(f"image_key must be given with label_key, {label_key!r}")
    keys = tuple(key for key in (image_key, label_key) if key is not None)
    items = Items(dataset, name, value_range, seed, keys)
    image, label = items.first()
    if class_names is None and label is not None:
        class_names = _names_of(dataset, label_key)
    names = () if class_names is None else listed("class_names", class_names)
    if (label is None) == bool(names) or not all(isinstance(n, str) for n in names):
        raise InvalidArgument(
            "class_names must name the classes where items have labels, and be None where not; "
            f"items have {'no labels' if label is None else 'labels'}, got {class_names!r}"
        )
    items.shape, items.num_classes = image.shape, len(names)
    if workers and (method := start_method()) != "fork":
        _check_sendable(items, method)
    return DatasetImages(items, names, workers)


def _names_of(dataset: Any, label_key: str | None) -> Sequence[str] | None:
    """Return the class names that a data set of torchvision or Hugging Face knows."""
    if label_key is None:
        return getattr(dataset, "classes", None)
    return getattr((getattr(dataset, "features", None) or {}).get(label_key), "names", None)


def start_method() -> str:
    """Return how processes are started; unlike multiprocessing's function it decides nothing."""
    chosen = multiprocessing.get_start_method(allow_none=True)
    return chosen or multiprocessing.get_all_start_methods()[0]


def _check_sendable(items: Items, method: str) -> None:
    """Refuse items that cannot be sent to a process. Raises InvalidArgument."""
    try:
        with open(os.devnull, "wb") as nowhere:
            pickle.dump(items, nowhere)
    except Exception as error:  # objects raise nearly anything
        raise InvalidArgument(
            f"workers must be 0 for this data set: processes are started by {method!r} and it "
            f"cannot be sent to one ({error}); define its functions and classes in a module"
        ) from error


class Request(NamedTuple):
    """A request for a batch: the numbers of its items, and the position of the first."""

    numbers: tuple[int, ...]
    position: int


class DatasetImages(Data):
    """The data that `from_dataset` returns."""

    def __init__(self, items: Items, class_names: tuple[str, ...], workers: int) -> None:
        self.items, self.class_names, self.workers = items, class_names, workers
        self.device = torch.device("cpu")
        self._ahead: ReadAhead | None = None

    def __len__(self) -> int:
        return len(self.items.dataset)

    @property
    def name(self) -> str:
        """Name of the data in error messages and reports."""
        return self.items.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image: (C, H, W)."""
        return self.items.shape

    def to(self, device: torch.device | str) -> "DatasetImages":
        """Return the data with its batches on `device`."""
        other = copy.copy(self)
        other.device, other._ahead = torch.device(device), None
        return other

    def digests(self) -> dict[str, str]:
        """Return the parameters that the items depend on; their content is not read for this."""
        keys = {"keys": repr(self.items.keys)} if self.items.keys else {}
        return {"value_range": repr(self.items.value_range), "seed": str(self.items.seed)} | keys

    def batch(self, index: Tensor, position: int = 0) -> tuple[Tensor, Tensor | None]:
        """Return the images at `index`; see `Data.batch`.

        Raises:
            DataError: names the item that cannot be used, or a worker died.
        """
        request = Request(tuple(index.tolist()), position)
        if not self.workers:
            parts = [self.items.make(*request)]
        else:
            self._ahead = self._ahead or ReadAhead(self.items, self.workers)
            parts = self._ahead.take(request)
        images, labels = (
            self._moved(np.concatenate(arrays)) for arrays in zip(*parts, strict=True)
        )
        x = to_float(images) if images.dtype == torch.uint8 else images
        return x, labels if self.class_names else None

    def _moved(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":  # a copy from pinned memory does not block
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


# --- workers -----------------------------------------------------------------------------------


class ReadAhead:
    """Worker processes that build the next batch while the current one is used.

    The next one is a guess: it follows in the order of the seed, at the distance of this batch from
    the last. A wrong guess costs only time.
    """

    def __init__(self, items: Items, workers: int) -> None:
        self.workers, self.length, self.seed = workers, len(items.dataset), items.seed
        self.pool = ProcessPoolExecutor(workers, initializer=_begin_work, initargs=(items,))
        self.order, self.at = batches(self.length, 1, self.seed), 0
        self.last = 0
        self.guess: tuple[Request, list[Future]] | None = None

    def take(self, request: Request) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the parts of a batch, in order. Raises DataError."""
        try:
            guess, parts = self.guess or (None, [])
            guessed = guess == request
            if not guessed:
                parts = self._submit(request)
            self.guess = self._next(request, guessed)
            self.last = request.position
            return [part.result() for part in parts]
        except RuntimeError as error:
            in_worker = "bootstrapping" in str(error)  # in a worker, which trains itself
            if not (in_worker or isinstance(error, BrokenProcessPool)):
                raise
            why = "is memory short?"
            if (method := start_method()) != "fork":
                why = (
                    f"processes are started by {method!r}, so the script that trains must be "
                    'guarded by `if __name__ == "__main__":`; if it is, memory may be short'
                )
            raise DataError(f"a worker that builds items died; {why}") from error

    def _submit(self, request: Request) -> list[Future]:
        size = -(-len(request.numbers) // self.workers)
        return [
            self.pool.submit(_work, request.numbers[k : k + size], request.position + k)
            for k in range(0, len(request.numbers), size)
        ]

    def _next(self, request: Request, guessed: bool) -> tuple[Request, list[Future]] | None:
        """Submit the batch that follows this one, if this one is in the order of the seed."""
        count, step = len(request.numbers), request.position - self.last
        if not guessed and self._in_order(request.position, count) != request.numbers:
            return None
        position = request.position + (step if step > 0 else count)
        following = Request(self._in_order(position, count), position)
        return following, self._submit(following)

    def _in_order(self, position: int, count: int) -> tuple[int, ...]:
        """Return the items at a position of the order of the seed."""
        if not 0 <= position - self.at <= 10 * count:  # elsewhere, or far ahead
            self.order, self.at = batches(self.length, 1, self.seed, start=position), position
        skip = position - self.at
        self.at = position + count
        return tuple(int(number) for number in islice(self.order, skip, skip + count))


_items: Items | None = None  # of a worker process


def _begin_work(items: Items) -> None:
    """Initialize a worker process."""
    global _items
    _items = items
    torch.set_num_threads(1)  # the workers share the cores
    # The parent handles Ctrl-C and ends its workers, which must not inherit its handlers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """Exit with the parent: a killed parent would leave its workers waiting forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(numbers: Sequence[int], position: int) -> tuple[np.ndarray, np.ndarray]:
    return _items.make(numbers, position)


@contextlib.contextmanager
def _restored_random_state() -> Iterator[None]:
    """Restore the states of the global random generators on exit."""
    before = random.getstate(), torch.default_generator.get_state()
    numpy_state = np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        torch.default_generator.set_state(before[1])
        np.random.set_state(numpy_state)  # noqa: NPY002
