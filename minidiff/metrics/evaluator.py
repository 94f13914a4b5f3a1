"""Scores of samples against one data set, always by the same rules.

Two scores of real images stand beside those of a model. Held-out images give the best score to
expect (`Evaluator.ceiling`). Equally many training images, drawn with replacement, give the score
of a perfect model at this number of samples (`Evaluator.floor`).
"""

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff import data
from minidiff.data import ImageData
from minidiff.errors import InvalidArgument, whole_number
from minidiff.metrics.classifier import accuracy, features, load_classifier
from minidiff.metrics.distances import Moments, frechet_distance, kernel_distance, moments
from minidiff.metrics.neighbours import density_and_coverage, radii
from minidiff.nn.classifier import Classifier
from minidiff.runtime.checks import instance, optional
from minidiff.runtime.device import pick_device

MAX_COVERAGE = 10_000  # real images, and samples, compared; the cost is quadratic
_ORDER_SEED = 0  # of the order in which images stand for the data


class Scores(NamedTuple):
    """The figures of a set of samples; higher is better, except for the two distances."""

    accuracy: float | None  # 0..1; None for samples without intended labels
    fd: float  # FD‰, see `frechet_distance`
    coverage: float  # 0..1
    density: float  # about 1 for real images
    kd: float  # KD‰, see `kernel_distance`

    def __str__(self) -> str:
        accuracy = "–" if self.accuracy is None else f"{self.accuracy:.2%}"
        return f"accuracy {accuracy}, FD {self.fd:.2f} ‰, coverage {self.coverage:.3f}"


def fixed_order(images: ImageData) -> Tensor:
    """Return a fixed shuffle of all images in which every stretch holds each class evenly.

    Most of the variance of features lies between classes. With an ordinary shuffle, the random
    class counts would add more noise to a figure than all other sources together.
    """
    generator = torch.Generator().manual_seed(_ORDER_SEED)
    labels = images.labels
    if labels is None:
        return torch.randperm(len(images), generator=generator)
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        shuffled = members[torch.randperm(len(members), generator=generator)]
        position[shuffled] = (torch.arange(len(members)).double() + 0.5) / len(members)
    return position.argsort(stable=True)


class Evaluator:
    """Scores of samples against one data set, always by the same protocol.

    The distances are taken to the whole training set. Density and coverage compare with as many
    training images as there are samples, at most 10,000 and at most half of all, in a fixed order.
    All figures depend on the classes: draw samples in the proportions of the training labels, or
    that difference is measured as well.

    Args:
        name: data set with a shipped classifier, such as "digits" or "mnist".
        data_dir: folder of the data, see `minidiff.data.load`.
        device: device of the classifier and of the features.

    Raises:
        InvalidArgument: the data set has no shipped classifier, or the device is not available.
        DataError, CheckpointError: the data or the weights cannot be read.
    """

    def __init__(
        self, name: str, data_dir: str | Path | None = None, device: torch.device | str = "cpu"
    ) -> None:
        if name == "captions":
            raise InvalidArgument(
                "name must be data with one class per image; captions are for SceneEvaluator"
            )
        net = load_classifier(name).to(pick_device(device))
        splits = (data.load(name, split, data_dir) for split in data.SPLITS)
        self._set_up(*splits, net)

    @classmethod
    def of(cls, train: ImageData, test: ImageData, net: Classifier) -> "Evaluator":
        """Return an evaluator of two splits by a classifier, on its device.

        Raises:
            InvalidArgument: the classifier is for other channels or classes, the splits differ in
                shape, or there are too few training images.
        """
        evaluator = cls.__new__(cls)
        evaluator._set_up(train, test, net)
        return evaluator

    def _set_up(self, train: ImageData, test: ImageData, net: Classifier) -> None:
        for name, split in (("train", train), ("test", test)):
            instance(ImageData)(name, split)
        check_classifier(net, train)
        if train.images.shape[1:] != test.images.shape[1:]:
            raise InvalidArgument(
                "training and held-out images must have the same shape, got "
                f"{tuple(train.images.shape[1:])} and {tuple(test.images.shape[1:])}"
            )
        self._net, self.train, self.test = net, train, test
        self.order = fixed_order(train)
        self._radii: dict[int, Tensor] = {}
        whole_number(f"number of training images of {train.name}", len(train), 2 * self.min_images)

    @cached_property
    def _real(self) -> tuple[Tensor, Tensor]:
        """Predicted labels and features of all training images, in the fixed order."""
        return features(self._net, self.train.images[self.order])

    @cached_property
    def _real_moments(self) -> Moments:
        return moments(self._real[1])

    @property
    def test_images(self) -> int:
        """The number of held-out images."""
        return len(self.test)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape (C, H, W) of the images that can be scored."""
        return tuple(self.train.images.shape[1:])

    @property
    def min_images(self) -> int:
        """The smallest number of images that can be scored, twice the number of features."""
        return 2 * self._net.head.in_features

    def score(self, images: Tensor, labels: Tensor | None = None) -> Scores:
        """Return the scores of samples.

        Args:
            images: uint8 (N, C, H, W) of the size of the data, N ≥ 2·D = 192.
            labels: intended classes of the samples, int64 (N,); None for none.

        Raises:
            InvalidArgument: dtype, shape or number of the images does not fit.
        """
        self._check(images, labels)
        return self._scores(*features(self._net, images), labels)

    def _scores(self, predicted: Tensor, fake: Tensor, labels: Tensor | None) -> Scores:
        """Return the scores of images by their predicted labels and features."""
        _, reference = self._real
        # Samples may be sorted by class, so a part of them must be drawn at random.
        fake = _shuffled(fake)
        density, covered = self._neighbourhoods(reference, fake)
        return Scores(
            None if labels is None else accuracy(predicted, labels),
            frechet_distance(self._real_moments, fake),
            covered,
            density,
            # Blocks with equal class counts would be more alike than random ones, and the
            # estimate would be biased.
            kernel_distance(_shuffled(reference), fake)[0],
        )

    def ceiling(self, n: int) -> Scores:
        """Return the scores of n held-out images, or of all where there are fewer.

        They are drawn in a fixed order, since the first half of MNIST's test file is the easier.

        Raises:
            InvalidArgument: there are fewer than `min_images` held-out images.
        """
        chosen = fixed_order(self.test)[: whole_number("n", n, 1)]
        return self.score(self.test.images[chosen], _at(self.test.labels, chosen))

    def floor(self, n: int, seed: int = 0) -> Scores:
        """Return the scores of n training images: those of a perfect model at n samples.

        They are drawn with replacement, each class in its proportion, and without the images that
        density and coverage compare with.
        """
        drawn = self._drawn_again(
            whole_number("n", n, self.min_images), whole_number("seed", seed, 0)
        )
        predicted, real = (rows[drawn.to(rows.device)] for rows in self._real)
        return self._scores(predicted, real, _at(self.train.labels, self.order[drawn]))

    def _drawn_again(self, n: int, seed: int) -> Tensor:
        """Return positions (n,) in the fixed order of the images that `floor` draws."""
        first = self._references(n)
        labels = self.train.labels
        classes = torch.zeros(len(self.train)) if labels is None else labels[self.order]
        classes = classes[first:]
        intended = classes[torch.arange(n) % len(classes)]
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.empty(n, dtype=torch.int64)
        for label in intended.unique():
            members, places = (
                (labels == label).nonzero().squeeze(1) for labels in (classes, intended)
            )
            drawn[places] = members[torch.randint(len(members), places.shape, generator=generator)]
        return drawn + first

    def _references(self, n: int) -> int:
        """Return the number of training images that density and coverage compare n samples with."""
        return min(n, len(self.train) // 2, MAX_COVERAGE)

    def _neighbourhoods(self, reference: Tensor, fake: Tensor) -> tuple[float, float]:
        n = self._references(len(fake))
        if n not in self._radii:
            self._radii[n] = radii(reference[:n])
        return density_and_coverage(reference[:n], fake[:n], known_radii=self._radii[n])

    def _check(self, images: Tensor, labels: Tensor | None) -> None:
        instance(Tensor)("images", images)
        optional(instance(Tensor))("labels", labels)
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.image_shape:
            raise InvalidArgument(
                f"images must be uint8 (N, {', '.join(map(str, self.image_shape))}) "
                f"like {self.train.name}, got {images.dtype} {tuple(images.shape)}"
            )
        if len(images) < self.min_images:
            raise InvalidArgument(f"images must be at least {self.min_images}, got {len(images)}")
        if labels is not None and labels.shape != images.shape[:1]:
            raise InvalidArgument(f"labels must be ({len(images)},), got {tuple(labels.shape)}")


def check_classifier(net: Classifier, images: ImageData) -> None:
    """Refuse a classifier for other channels or classes. Raises InvalidArgument."""
    instance(Classifier)("net", net)
    first = next(module for module in net.modules() if isinstance(module, torch.nn.Conv2d))
    found = (first.in_channels, net.head.out_features)
    wanted = (images.images.shape[1], images.num_classes or found[1])
    if found != wanted:
        raise InvalidArgument(
            f"the classifier must be for {wanted[0]} channels and {wanted[1]} classes like "
            f"{images.name}, got {found[0]} channels and {found[1]} classes"
        )


def _shuffled(rows: Tensor) -> Tensor:
    """Return the rows in a fixed random order."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(_ORDER_SEED))
    return rows[order.to(rows.device)]


def _at(labels: Tensor | None, index: Tensor) -> Tensor | None:
    """Return the labels of an index, None where there are none."""
    return None if labels is None else labels[index]
