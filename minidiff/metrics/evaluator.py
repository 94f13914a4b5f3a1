"""Samples scored against one data set, always by the same rules.

Beside the scores of a model stand those of real images: held-out ones, which no model can be asked
to beat (`Evaluator.ceiling`), and as many training images drawn again, which show what so few
samples of a perfect model would score (`Evaluator.floor`).
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
from minidiff.runtime.device import pick_device

MAX_COVERAGE = 10_000  # images a side; the work grows with the square
_ORDER_SEED = 0  # fixes which training images stand for the data


class Scores(NamedTuple):
    """What a set of samples is worth; higher is better but for the two distances."""

    accuracy: float | None  # 0..1; None for samples without intended labels
    fd: float  # FD‰, see `frechet_distance`
    coverage: float  # 0..1
    density: float  # about 1 for real images
    kd: float  # KD‰, see `kernel_distance`

    def __str__(self) -> str:
        legible = "–" if self.accuracy is None else f"{self.accuracy:.2%}"
        return f"accuracy {legible}, FD {self.fd:.2f} ‰, coverage {self.coverage:.3f}"


def fixed_order(images: ImageData) -> Tensor:
    """A fixed shuffle of all images, of which every stretch holds each class in its share.

    Most of the variance of features lies between classes. An ordinary shuffle would add the
    chance of the class counts to every figure, more than all the rest of its noise.
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
    """Scores samples against one data set, always by the same protocol.

    The distances are taken to the whole training set. Density and coverage compare as many
    training images as there are samples, at most 10,000 and at most half of all, drawn once by a
    fixed seed. All see the classes too: ask for samples in the proportions of the training labels
    (`intended`), or that difference is measured as well.

    Args:
        name: "digits", "mnist" or other data that a classifier is shipped for.
        data_dir: where the data is, see `minidiff.data.load`.
        device: where the classifier runs and the features stay.

    Raises:
        InvalidArgument: a data set without a shipped classifier, or a device that is not there.
        DataError, CheckpointError: the data or the weights cannot be read.
    """

    def __init__(
        self,
        name: str,
        data_dir: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if name == "captions":
            raise InvalidArgument(
                "name must be data of one class an image; captions are for SceneEvaluator"
            )
        net = load_classifier(name).to(pick_device(device))
        splits = (data.load(name, split, data_dir) for split in data.SPLITS)
        self._measure(*splits, net)

    @classmethod
    def of(cls, train: ImageData, test: ImageData, net: Classifier) -> "Evaluator":
        """Score against these images by this classifier, on its device.

        Raises:
            InvalidArgument: the classifier is for images of other channels or other classes, the
                two splits differ in shape, or there are too few training images.
        """
        evaluator = cls.__new__(cls)
        evaluator._measure(train, test, net)
        return evaluator

    def _measure(self, train: ImageData, test: ImageData, net: Classifier) -> None:
        check_classifier(net, train)
        if train.images.shape[1:] != test.images.shape[1:]:
            raise InvalidArgument(
                "training and held-out images must have one shape, got "
                f"{tuple(train.images.shape[1:])} and {tuple(test.images.shape[1:])}"
            )
        self._net, self.train, self.test = net, train, test
        self.order = fixed_order(train)
        self._radii: dict[int, Tensor] = {}
        whole_number(f"number of training images of {train.name}", len(train), 2 * self.least)

    @cached_property
    def _real(self) -> tuple[Tensor, Tensor]:
        """Predicted labels and features of all training images, in the fixed order."""
        return features(self._net, self.train.images[self.order])

    @cached_property
    def _real_moments(self) -> Moments:
        return moments(self._real[1])

    @property
    def test_images(self) -> int:
        """How many held-out images there are."""
        return len(self.test)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the images that can be scored."""
        return tuple(self.train.images.shape[1:])

    @property
    def least(self) -> int:
        """The fewest images that can be scored: twice as many as there are features."""
        return 2 * self._net.head.in_features

    def score(self, images: Tensor, labels: Tensor | None = None) -> Scores:
        """Score samples.

        Args:
            images: uint8 (N, C, H, W) of the size of the data, N ≥ 2·D = 192.
            labels: the classes the samples were asked for, int64 (N,); None if for none.

        Raises:
            InvalidArgument: dtype, shape or number do not fit.
        """
        self._check(images, labels)
        return self._scores(*features(self._net, images), labels)

    def _scores(self, predicted: Tensor, fake: Tensor, labels: Tensor | None) -> Scores:
        """Scores from what the classifier makes of images."""
        _, reference = self._real
        # Samples may come sorted by class, so a part of them must be a random part.
        fake = _shuffled(fake)
        density, covered = self._neighbourhoods(reference, fake)
        return Scores(
            None if labels is None else accuracy(predicted, labels),
            frechet_distance(self._real_moments, fake),
            covered,
            density,
            # Blocks that held each class in its share would be more alike than by chance, and
            # the estimate no longer unbiased.
            kernel_distance(_shuffled(reference), fake)[0],
        )

    def ceiling(self, n: int) -> Scores:
        """What real held-out images score: n of the test split, or all if it has fewer.

        They too are drawn in a fixed order: the first half of MNIST's test file is known to be
        the easier one.

        Raises:
            InvalidArgument: there are fewer held-out images than can be scored, `least`.
        """
        chosen = fixed_order(self.test)[: whole_number("n", n, 1)]
        return self.score(self.test.images[chosen], _at(self.test.labels, chosen))

    def floor(self, n: int, seed: int = 0) -> Scores:
        """What n real training images score: the least to expect of so few samples.

        They are drawn with replacement, as a perfect model would draw them, each class in its
        share, and apart from those that density and coverage compare with.
        """
        drawn = self._drawn_again(whole_number("n", n, self.least), whole_number("seed", seed, 0))
        predicted, real = (rows[drawn.to(rows.device)] for rows in self._real)
        return self._scores(predicted, real, _at(self.train.labels, self.order[drawn]))

    def _drawn_again(self, n: int, seed: int) -> Tensor:
        """Places (n,) in the fixed order, as `floor` draws them."""
        first = self._references(n)
        labels = self.train.labels
        classes = torch.zeros(len(self.train)) if labels is None else labels[self.order]
        classes = classes[first:]
        wanted = classes[torch.arange(n) % len(classes)]
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.empty(n, dtype=torch.int64)
        for label in wanted.unique():
            members, places = ((of == label).nonzero().squeeze(1) for of in (classes, wanted))
            drawn[places] = members[torch.randint(len(members), places.shape, generator=generator)]
        return drawn + first

    def _references(self, n: int) -> int:
        """How many training images density and coverage compare n samples with."""
        return min(n, len(self.train) // 2, MAX_COVERAGE)

    def _neighbourhoods(self, reference: Tensor, fake: Tensor) -> tuple[float, float]:
        n = self._references(len(fake))
        if n not in self._radii:
            self._radii[n] = radii(reference[:n])
        return density_and_coverage(reference[:n], fake[:n], known_radii=self._radii[n])

    def _check(self, images: Tensor, labels: Tensor | None) -> None:
        for name, value in (("images", images), ("labels", labels)):
            if not isinstance(value, Tensor) and not (name == "labels" and value is None):
                raise InvalidArgument(f"{name} must be a tensor, got {type(value).__name__}")
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.image_shape:
            raise InvalidArgument(
                f"images must be uint8 (N, {', '.join(map(str, self.image_shape))}) "
                f"like {self.train.name}, got {images.dtype} {tuple(images.shape)}"
            )
        if len(images) < self.least:
            raise InvalidArgument(
                f"images must be at least {self.least} to be scored, got {len(images)}"
            )
        if labels is not None and labels.shape != images.shape[:1]:
            raise InvalidArgument(f"labels must be ({len(images)},), got {tuple(labels.shape)}")


def check_classifier(net: Classifier, images: ImageData) -> None:
    """Refuse a classifier of images of other channels or other classes. Raises InvalidArgument."""
    first = next(module for module in net.modules() if isinstance(module, torch.nn.Conv2d))
    found = (first.in_channels, net.head.out_features)
    wanted = (images.images.shape[1], images.num_classes or found[1])
    if found != wanted:
        raise InvalidArgument(
            f"the classifier must be of images with {wanted[0]} channels in {wanted[1]} classes "
            f"like {images.name}, got {found[0]} channels and {found[1]} classes"
        )


def _shuffled(rows: Tensor) -> Tensor:
    """The rows in a fixed random order."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(_ORDER_SEED))
    return rows[order.to(rows.device)]


def _at(labels: Tensor | None, index: Tensor) -> Tensor | None:
    return None if labels is None else labels[index]
