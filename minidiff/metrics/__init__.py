"""How good samples are, measured on the features of a small classifier of the same data.

distances.py    Fréchet and kernel distance between two sets of features
neighbours.py   density, coverage, and whether samples are copies of training images
classifier.py   the classifiers: shipped ones and those of a file
evaluator.py    one data set, and samples scored against it
scenes.py       samples scored against their captions

What each figure of `minidiff evaluate` is, in one place with its sources: `minidiff/EVALUATION.md`.
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
    "NEIGHBOURS",
    "SUMS",
    "WEIGHTS",
    "Evaluator",
    "Moments",
    "SceneEvaluator",
    "SceneScores",
    "Scores",
    "accuracy",
    "copying",
    "coverage",
    "density_and_coverage",
    "features",
    "fixed_order",
    "frechet_distance",
    "kernel_distance",
    "load_classifier",
    "moments",
    "read_classifier",
    "read_digests",
    "read_metadata",
    "sha256",
    "shipped",
]
