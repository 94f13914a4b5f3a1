"""How good samples are: label accuracy, Fréchet distance and coverage, on our own features.

A small classifier (`nn/classifier.py`, trained on real images only) maps each image to its
penultimate layer. On these features:

    accuracy   the share of samples that the classifier takes for the class they were asked for
    FD‰        1000·(|μ_r − μ_f|² + tr(C_r + C_f − 2·(C_r·C_f)^½)) / tr(C_r)
    coverage   the share of real images that have a sample among their near neighbours

The first says whether samples are legible and obey, the second whether they are distributed like
the data, the third whether any part of the data is missing. FD‰ uses the formula of the Fréchet
inception distance but neither its network nor its scale, so it must never be called FID: 1000
means as far off as the data are wide, and real held-out images show about 1.

Sources: M. Heusel et al. 2017, arXiv:1706.08500, eq. 6; M. F. Naeem et al. 2020,
arXiv:2002.09797, section 3.
"""

import hashlib
import json
import math
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from minidiff import data
from minidiff.device import pick_device
from minidiff.errors import CheckpointError, InvalidArgument, whole_number
from minidiff.nn.classifier import FeatureNet
from minidiff.weights import headers, load_weights

WEIGHTS = Path(__file__).with_name("weights")
SUMS = "SHA256SUMS"
NEIGHBOURS = 5  # k of coverage, the value of its paper
MAX_COVERAGE = 10_000  # images a side; the work grows with the square
_MAX_DISTANCES = 2**24  # held at a time: 128 MiB
_ORDER_SEED = 0  # fixes which training images stand for the data in coverage and floor


class Scores(NamedTuple):
    """What a set of samples is worth; higher is better but for fd."""

    accuracy: float | None  # 0..1; None for samples without intended labels
    fd: float  # FD‰, see `frechet_distance`
    coverage: float  # 0..1

    def __str__(self) -> str:
        legible = "–" if self.accuracy is None else f"{self.accuracy:.2%}"
        return f"accuracy {legible}, FD {self.fd:.2f} ‰, coverage {self.coverage:.3f}"


class Moments(NamedTuple):
    """A Gaussian fit: mean (D,) and unbiased covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor


def load_classifier(name: str, folder: str | Path = WEIGHTS) -> FeatureNet:
    """The shipped classifier of a data set, on the CPU and in eval mode.

    Raises:
        InvalidArgument: for a data set without one.
        CheckpointError: the weights are missing or not the published ones, by SHA-256.
    """
    if name not in data.NAMES:
        raise InvalidArgument(
            f"metrics exist for {' and '.join(data.NAMES)}, not for {str(name)!r}: they need a "
            "classifier of that data; python -m minidiff.train_classifier trains one, whose "
            "features frechet_distance() and coverage() take"
        )
    path = Path(folder) / f"{name}.safetensors"
    expected = read_digests(path.with_name(SUMS)).get(path.name)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if expected is None:
        raise CheckpointError(f"{path.with_name(SUMS)}: has no entry for {path.name}")
    if (found := sha256(path)) != expected:
        raise CheckpointError(
            f"{path}: SHA-256 is {found[:12]}…, expected {expected[:12]}…; figures measured with "
            "other weights cannot be compared"
        )
    net = FeatureNet(**json.loads(read_metadata(path)["architecture"]))
    load_weights(net, headers([path]))
    return net.to(memory_format=torch.channels_last).eval()


def read_metadata(path: Path) -> dict[str, str]:
    """What `train_classifier` wrote beside the weights: data, test_accuracy, seed, …"""
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_digests(path: Path) -> dict[str, str]:
    """File name → SHA-256, from a file as `sha256sum` writes it. Raises CheckpointError."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a readable list of SHA-256 sums ({error})") from error
    pairs = [line.split() for line in lines if line.strip()]
    if any(len(pair) != 2 or len(pair[0]) != 64 for pair in pairs):
        raise CheckpointError(f"{path}: every line must be a SHA-256 sum and a file name")
    return {name: digest for digest, name in pairs}


@torch.inference_mode()
def features(net: FeatureNet, images: Tensor, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """What the classifier makes of images.

    Args:
        net: in eval mode; the work is done on its device.
        images: uint8 (N, C, H, W), on any device.
        batch_size: bounds the memory; in eval mode the result does not depend on it.

    Returns:
        Predicted labels int64 (N,) and features float64 (N, D), both on the device of the net.
    """
    device = next(net.parameters()).device
    labels, rows = [], []
    for chunk in images.split(batch_size):
        logits, feature = net(data.to_float(chunk.to(device)))
        labels.append(logits.argmax(dim=1))
        rows.append(feature.double())
    return torch.cat(labels), torch.cat(rows)


def accuracy(predicted: Tensor, intended: Tensor) -> float:
    """The share of samples, in 0..1, whose predicted label (N,) is the intended one (N,)."""
    if predicted.shape != intended.shape:
        raise InvalidArgument(
            f"predicted and intended labels must have one shape, got {tuple(predicted.shape)} "
            f"and {tuple(intended.shape)}"
        )
    return (predicted == intended.to(predicted.device)).double().mean().item()


def moments(samples: Tensor) -> Moments:
    """Fit a Gaussian to features (N, D).

    Raises:
        InvalidArgument: fewer than 2·D samples, of which no covariance can be estimated, or
            values that are not finite.
    """
    if samples.ndim != 2 or len(samples) < 2 * samples.shape[1]:
        raise InvalidArgument(
            "a Fréchet distance needs features (N, D) with N ≥ 2·D, "
            f"got {tuple(samples.shape)}: draw more samples"
        )
    _require_finite("features", samples)
    samples = samples.double()
    return Moments(samples.mean(dim=0), torch.cov(samples.T))


def frechet_distance(real: Tensor | Moments, fake: Tensor | Moments) -> float:
    """FD‰ between the Gaussian fits of two sets of features.

    It is 0 for equal fits and 1000 at the distance of the whole variance of the real features:
    that scale makes figures comparable between data sets. A finite sample of a perfect model does
    not reach 0; compare with `Evaluator.floor`.

    Args:
        real, fake: features (N, D), or their `moments` where those are known already.

    Raises:
        InvalidArgument: too few samples, different D, or real features that are all the same.

    Source: Heusel et al. 2017, arXiv:1706.08500, eq. 6, divided by tr(C_real).
    """
    real, fake = (x if isinstance(x, Moments) else moments(x) for x in (real, fake))
    if real.mean.shape != fake.mean.shape:
        raise InvalidArgument(
            f"real and fake must have equally many features, got {len(real.mean)} and "
            f"{len(fake.mean)}"
        )
    # tr (C_r·C_f)^½ = tr (S·C_f·S)^½ with S = C_r^½: the same eigenvalues, but of a symmetric
    # matrix, so that no complex square root is ever taken.
    root = _symmetric_root(real.covariance)
    cross = torch.linalg.eigvalsh(root @ fake.covariance @ root).clamp(min=0).sqrt().sum()
    shift = (real.mean - fake.mean).square().sum()
    spread = real.covariance.trace()
    if spread <= 0:
        raise InvalidArgument("real features must differ from each other, got copies of one")
    distance = shift + spread + fake.covariance.trace() - 2 * cross
    return 1000 * max(distance.item(), 0.0) / spread.item()  # rounding may fall below 0


def _require_finite(name: str, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise InvalidArgument(f"{name} must be finite, got NaN or infinity")


def _symmetric_root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric matrix without negative eigenvalues (but for rounding)."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def coverage(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> float:
    """The share of real samples that have a fake one in their neighbourhood, in 0..1.

    The neighbourhood of a real sample is the closed ball whose radius is the distance to its k-th
    nearest other real sample. With as many fake as real samples of one distribution about
    1 − 2⁻ᵏ of the balls are hit.

    Args:
        real: features (N, D), N > k.
        fake: features (M, D).
        k: how many real neighbours the ball reaches.

    Raises:
        InvalidArgument: k is not in 1..N−1, there is no fake sample, D differs, or a value is
            not finite.

    Source: Naeem et al. 2020, arXiv:2002.09797, section 3.
    """
    k = whole_number("k", k, 1, len(real) - 1)
    whole_number("number of fake samples", len(fake), 1)
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise InvalidArgument(
            f"real and fake must be (N, D) and (M, D), got {tuple(real.shape)} and "
            f"{tuple(fake.shape)}"
        )
    _require_finite("real", real)
    _require_finite("fake", fake)
    real, fake = real.double(), fake.double().to(real.device)  # float32 loses near duplicates
    covered = 0
    rows = max(1, _MAX_DISTANCES // max(len(real), len(fake)))
    for start in range(0, len(real), rows):
        centres = real[start : start + rows]
        distances = torch.cdist(centres, real)
        itself = torch.arange(len(centres), device=real.device)
        distances[itself, itself + start] = math.inf
        radius = distances.topk(k, dim=1, largest=False).values[:, -1]
        covered += (torch.cdist(centres, fake).amin(dim=1) <= radius).sum().item()
    return covered / len(real)


def _stratified_order(labels: Tensor) -> Tensor:
    """A fixed shuffle of all images, of which every stretch holds each class in its share.

    Most of the variance of features lies between classes. An ordinary shuffle would add the
    chance of the class counts to every figure, more than all the rest of its noise.
    """
    generator = torch.Generator().manual_seed(_ORDER_SEED)
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        shuffled = members[torch.randperm(len(members), generator=generator)]
        position[shuffled] = (torch.arange(len(members)).double() + 0.5) / len(members)
    return position.argsort(stable=True)


class Evaluator:
    """Scores samples against one data set, always by the same protocol.

    The Fréchet distance is taken to the whole training set. Coverage compares as many training
    images as there are samples, at most 10,000, drawn once by a fixed seed. Both see the classes
    too: ask for samples in the proportions of the training labels, or that difference is
    measured as well.

    Args:
        name: "digits" or "mnist".
        data_dir: where mnist is, see `minidiff.data.load`.
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
        self._net = load_classifier(name).to(pick_device(device))
        self._train = data.load(name, "train", data_dir)
        self._test = data.load(name, "test", data_dir)
        self._order = _stratified_order(self._train.labels)

    @cached_property
    def _reference(self) -> tuple[Tensor, Moments]:
        """Features of all training images in the fixed order, and their moments."""
        _, reference = features(self._net, self._train.images[self._order])
        return reference, moments(reference)

    @property
    def test_images(self) -> int:
        """How many held-out images there are."""
        return len(self._test)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the images that can be scored."""
        return tuple(self._train.images.shape[1:])

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
        predicted, fake = features(self._net, images)
        reference, reference_moments = self._reference
        return Scores(
            None if labels is None else accuracy(predicted, labels),
            frechet_distance(reference_moments, fake),
            self._coverage(reference, fake),
        )

    def ceiling(self, n: int) -> Scores:
        """What real held-out images score: n of the test split, or all if it has fewer.

        They too are drawn in a fixed order: the first half of MNIST's test file is known to be
        the easier one.
        """
        chosen = _stratified_order(self._test.labels)[: whole_number("n", n, 1)]
        return self.score(self._test.images[chosen], self._test.labels[chosen])

    def floor(self, n: int) -> Scores:
        """What n real training images score: the least FD‰ to expect of so few images.

        They are drawn from the end of the fixed order, each class in its share, and apart from
        those that coverage compares with; therefore at most half of the training set is taken.
        """
        n = min(whole_number("n", n, 1), len(self._train) // 2)
        last = self._order[-n:]
        return self.score(self._train.images[last], self._train.labels[last])

    def _coverage(self, reference: Tensor, fake: Tensor) -> float:
        n = min(len(reference), len(fake), MAX_COVERAGE)
        # Samples may come sorted by class, so a part of them must be a random part.
        chosen = torch.randperm(len(fake), generator=torch.Generator().manual_seed(_ORDER_SEED))[:n]
        return coverage(reference[:n], fake[chosen.to(fake.device)])

    def _check(self, images: Tensor, labels: Tensor | None) -> None:
        for name, value in (("images", images), ("labels", labels)):
            if not isinstance(value, Tensor) and not (name == "labels" and value is None):
                raise InvalidArgument(f"{name} must be a tensor, got {type(value).__name__}")
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.image_shape:
            raise InvalidArgument(
                f"images must be uint8 (N, {', '.join(map(str, self.image_shape))}) "
                f"like {self._train.name}, got {images.dtype} {tuple(images.shape)}"
            )
        if len(images) < self.least:
            raise InvalidArgument(
                f"images must be at least {self.least} to be scored, got {len(images)}"
            )
        if labels is not None and labels.shape != images.shape[:1]:
            raise InvalidArgument(f"labels must be ({len(images)},), got {tuple(labels.shape)}")
