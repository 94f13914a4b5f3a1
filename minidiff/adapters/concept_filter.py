"""A concept filter: images that show a named concept become black, and the output says why.

    sevens = ConceptFilter.learn("mnist", {"seven": images_of_sevens}, other_images)
    pipe.finishers.append(sevens)
    pipe(class_labels=7).flagged  # [("seven",)]

An image is embedded by the features f of a classifier. Each concept has a direction w and a
threshold b, and is found where w·f > b. The direction is Fisher's discriminant (R. Fisher 1936):
the difference of the means of f with and without the concept, whitened by the variance in both.

    w = S⁻¹ (m₁ − m₀)

The threshold is the one with the best F1 score on examples that the direction was not fitted to.
So it depends on how often the concept occurs among the examples.

Limits: the filter knows only what its classifier tells apart. Images of another kind than the
examples get an answer too, and it means nothing. A filter protects nobody from whoever runs the
model, who can switch it off. Stable Diffusion's safety checker has the same design and limits: J.
Rando et al. 2022, "Red-Teaming the Stable Diffusion Safety Filter", arXiv:2210.04610.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.images.pixels import to_uint8
from minidiff.metrics.classifier import features, load_classifier
from minidiff.nn.classifier import Classifier
from minidiff.pipeline.late import Flagged
from minidiff.runtime import files
from minidiff.runtime.checks import instance
from minidiff.runtime.tensors import (
    read_headers,
    read_metadata,
    read_tensor,
    write_tensors,
)

MIN_EXAMPLES = 20  # images of each kind; fewer give no threshold to rely on
SHRINKAGE = 1e-2  # part of the mean variance added to S, for features that never vary


class ConceptFilter:
    """A finisher of a pipeline that blacks out images of named concepts.

    Args:
        classifier: name of the shipped classifier whose features are the embedding, see
            `minidiff.metrics.classifier.shipped`.
        names: names of the K concepts.
        directions: float64 (K, D), one w per concept.
        thresholds: float64 (K,), one b per concept.
    Attributes:
        enabled: whether it does anything; set it to False to switch the filter off.
    Raises:
        InvalidArgument: no such classifier, no concepts, a name twice, or another shape.
    """

    def __init__(
        self,
        classifier: str,
        names: Sequence[str],
        directions: Tensor,
        thresholds: Tensor,
    ) -> None:
        self.net, self.classifier, self.names = (
            load_classifier(classifier),
            classifier,
            (*names,),
        )
        if not self.names or len(set(self.names)) < len(self.names) or "" in self.names:
            raise InvalidArgument(f"concepts must have different names, got {self.names}")
        shape = (len(self.names), self.net.head.in_features)
        for name, tensor, wanted in (
            ("directions", directions, shape),
            ("thresholds", thresholds, shape[:1]),
        ):
            if tuple(tensor.shape) != wanted or not tensor.isfinite().all():
                raise InvalidArgument(
                    f"{name} must be finite numbers of shape {wanted}, got shape "
                    f"{tuple(tensor.shape)}"
                )
        self.directions, self.thresholds = directions.double(), thresholds.double()
        self.enabled = True

    @classmethod
    def learn(
        cls, classifier: str, concepts: Mapping[str, Tensor], others: Tensor
    ) -> "ConceptFilter":
        """Return a filter for concepts that are given by examples.

        Every second image fits the directions, and the rest choose the thresholds.

        Args:
            classifier: name of a shipped classifier.
            concepts: images of each concept by its name, uint8 (N, C, H, W), N ≥ 20. Images of the
                other concepts are examples of what it is not.
            others: images without any of the concepts, of the same form.
        Raises:
            InvalidArgument: no such classifier, no concepts, or too few images or other ones.
        """
        net = load_classifier(classifier)
        groups = {**concepts, "others": others}
        if not concepts or "others" in concepts:
            raise InvalidArgument(
                "concepts must name at least one concept, and none of them 'others', got "
                f"{list(concepts)}"
            )
        embedded = {}
        for name, images in groups.items():
            instance(Tensor)(name, images)
            _check(net, name, images)
            if images.dtype != torch.uint8 or len(images) < MIN_EXAMPLES:
                raise InvalidArgument(
                    f"images of {name} must be uint8 and at least {MIN_EXAMPLES}, got "
                    f"{images.dtype} and {len(images)}"
                )
            embedded[name] = features(net, images)[1]
        found = [_discriminant(name, embedded) for name in concepts]
        directions, thresholds = (torch.stack(part) for part in zip(*found, strict=True))
        return cls(classifier, list(concepts), directions, thresholds)

    def margins(self, images: Tensor) -> Tensor:
        """Return w·f − b of images in [−1, 1], float64 (B, K), above 0 where a concept is found.

        Raises:
            InvalidArgument: images of another shape, or with values that are not finite.
        """
        _check(self.net, "images", images)
        if not images.isfinite().all():
            raise InvalidArgument("images must be finite, got NaN or infinity")
        _, rows = features(self.net, to_uint8(images))
        return rows.cpu() @ self.directions.T - self.thresholds

    def __call__(self, images: Tensor) -> Flagged:
        """Return images with those of a concept in black, and the concepts of each.

        Args:
            images: (B, C, H, W) in [−1, 1].
        Raises:
            InvalidArgument: images of another shape, or with values that are not finite.
        """
        if not self.enabled:
            return Flagged(images, [()] * len(images))
        found = self.margins(images) > 0
        names = [tuple(self.names[k] for k in row.nonzero()[:, 0].tolist()) for row in found]
        black = found.any(dim=1).to(images.device)[:, None, None, None]
        return Flagged(torch.where(black, torch.full_like(images, -1), images), names)

    def save(self, path: str | Path) -> None:
        """Write the filter as one safetensors file. Raises CheckpointError.

        A model whose folder holds it as `concept_filter.safetensors` is filtered by default.
        """
        tensors = {"directions": self.directions, "thresholds": self.thresholds}
        facts = {"classifier": self.classifier, "concepts": json.dumps(self.names)}
        write_tensors(Path(path), tensors, facts)

    @classmethod
    def load(cls, path: str | Path) -> "ConceptFilter":
        """Return the filter of a file. Raises CheckpointError if it is missing or damaged."""
        path = files.user_path(path)
        facts = read_metadata(path)
        tensors = {name: read_tensor(entry) for name, entry in read_headers([path]).items()}
        try:
            names = files.parse_json(facts["concepts"])
            return cls(facts["classifier"], names, tensors["directions"], tensors["thresholds"])
        except (
            KeyError,
            TypeError,
            ValueError,
        ) as error:  # an InvalidArgument is a ValueError
            raise CheckpointError(f"{path}: holds no concept filter ({error})") from error


def _check(net: Classifier, name: str, images: Tensor) -> None:
    """Refuse images that the classifier cannot read. Raises InvalidArgument."""
    first = next(module for module in net.modules() if isinstance(module, torch.nn.Conv2d))
    wanted = first.in_channels
    if images.ndim != 4 or images.shape[1] != wanted or min(images.shape[-2:]) < 4:
        raise InvalidArgument(
            f"{name} must be (B, {wanted}, H, W) with H, W ≥ 4 for this classifier, got shape "
            f"{tuple(images.shape)}"
        )


def _discriminant(concept: str, embedded: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return w (D,) and b () of a concept.

    Args:
        concept: its name.
        embedded: features (N, D) by concept, and of others.
    """
    with_it = embedded[concept]
    without = torch.cat([rows for name, rows in embedded.items() if name != concept])
    groups = (with_it[::2], without[::2])
    spread = sum(torch.cov(rows.T) * len(rows) for rows in groups) / sum(map(len, groups))
    spread += SHRINKAGE * spread.diagonal().mean() * torch.eye(len(spread), dtype=spread.dtype)
    w = torch.linalg.solve(spread, groups[0].mean(0) - groups[1].mean(0))
    return w, best_threshold(with_it[1::2] @ w, without[1::2] @ w)


def best_threshold(positive: Tensor, negative: Tensor) -> Tensor:
    """Return the threshold () whose F1 score is highest, halfway between two of the values.

    Args:
        positive, negative: scores (N,) and (M,) with the concept and without it.
    """
    scores, order = torch.cat([positive, negative]).sort()
    hits = (order < len(positive)).double().flip(0).cumsum(0).flip(0)  # positives at or above
    above = torch.arange(len(scores), 0, -1, dtype=torch.float64)
    best = int((2 * hits / (above + len(positive))).argmax())
    below = scores[best - 1] if best else scores[0] - 1
    return (scores[best] + below) / 2
