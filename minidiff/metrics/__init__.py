"""Quality of samples, measured on the features of a small classifier of the same data.

distances.py    Fréchet and kernel distance between two sets of features
neighbours.py   density, coverage, and whether samples are copies of training images
classifier.py   classifiers: those that ship with minidiff, and those of a file
evaluator.py    scores of samples against one data set
scenes.py       scores of samples against their captions
protocol.py     all figures of a model, in one evaluation table

`minidiff/EVALUATION.md` defines each figure of `minidiff evaluate`, with its source.
"""

from minidiff.metrics.classifier import (
    SUMS,
    WEIGHTS,
    accuracy,
    features,
    load_classifier,
    read_classifier,
    read_digests,
    sha256,
    shipped,
)
from minidiff.metrics.distances import Moments, frechet_distance, kernel_distance, moments
from minidiff.metrics.evaluator import Evaluator, Scores, fixed_order
from minidiff.metrics.neighbours import NEIGHBOURS, copying, coverage, density_and_coverage
from minidiff.metrics.scenes import SceneEvaluator, SceneScores
from minidiff.runtime.tensors import read_metadata

__all__ = [
    "NEIGHBOURS", "SUMS", "WEIGHTS", "Evaluator", "Moments", "SceneEvaluator", "SceneScores",
    "Scores", "accuracy", "copying", "coverage", "density_and_coverage", "features",
    "fixed_order", "frechet_distance", "kernel_distance", "load_classifier", "moments",
    "read_classifier", "read_digests", "read_metadata", "sha256", "shipped",
]  # fmt: skip
