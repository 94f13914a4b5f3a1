"""Scores of images against their captions: the fraction of captioned attributes that are right.

A classifier of real images (`weights/captions.safetensors`) answers the questions of
`data.captioned.scenes` about each sample; a caption determines some of the answers. The score of an
attribute is the fraction of right answers among the samples whose captions name it. A sample is
right altogether if all attributes of its caption are. Real images of other glyphs are the ceiling.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.data.captioned.captions import CaptionedDigits
from minidiff.data.captioned.scenes import NONE, QUESTIONS, SIDE
from minidiff.errors import InvalidArgument, whole_number
from minidiff.metrics.classifier import features, load_classifier
from minidiff.runtime.device import pick_device

SIMPLE = ("digit", "colour", "background")  # attributes that simple captions name
_SEARCHED = 8  # captions searched per simple caption; about every second one is simple


class SceneScores(NamedTuple):
    """Fractions of samples, 0..1.

    Attributes:
        right: fraction of right samples by attribute, among those whose captions name it;
            attributes that no caption names are left out.
        together: fraction of samples with all attributes right.
    """

    right: Mapping[str, float]
    together: float

    def __str__(self) -> str:
        each = ", ".join(f"{name} {fraction:.1%}" for name, fraction in self.right.items())
        return f"{each}; all together {self.together:.1%}"


class Task(NamedTuple):
    """N captions, and the answers that they determine.

    Attributes:
        prompts: N texts.
        wanted: int64 (N, questions), NONE where a caption leaves an answer open.
        index: numbers (N,) of the captions in their stream.
    """

    prompts: list[str]
    wanted: Tensor
    index: Tensor


def task(n: int, pairs: str = "seen", *, simple: bool = True, seed: int = 0) -> Task:
    """Return the first n captions of the test split.

    Args:
        n: number of captions.
        pairs: pairs of digit and colour, see `CaptionedDigits`.
        simple: True for captions of one digit that name it, its colour and the background, where
            these and the number of digits count; False for all captions and all attributes.
        seed: seed of the captions, see `CaptionedDigits`.
    Raises:
        InvalidArgument: n is not in 1..100,000.
    """
    n = whole_number("n", n, 1, 100_000)
    data = CaptionedDigits("test", pairs, seed)
    index = torch.arange(_SEARCHED * (n + 8) if simple else n)
    wanted = data.caption_answers(index)
    if simple:
        named = [QUESTIONS.index(name) for name in SIMPLE]
        fits = (wanted[:, named] != NONE).all(dim=1) & (wanted[:, 0] == 0)
        index, wanted = index[fits][:n], wanted[fits][:n]
        others = sorted(set(range(1, len(QUESTIONS))) - set(named))
        wanted[:, others] = NONE
    return Task(data.captions(index), wanted, index)


class SceneEvaluator:
    """Scores of images against captions.

    Args:
        device: device of the classifier.
    Raises:
        InvalidArgument: the device is not available.
        CheckpointError: the weights cannot be read, or have another SHA-256.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._net = load_classifier(CaptionedDigits.name).to(pick_device(device))

    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the answers to all questions, int64 (N, questions), and features float64 (N, D).

        Args:
            images: uint8 (N, 3, 32, 32).
        Raises:
            InvalidArgument: another dtype or shape.
        """
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (3, SIDE, SIDE):
            raise InvalidArgument(
                f"images must be uint8 (N, 3, {SIDE}, {SIDE}), got {images.dtype} "
                f"{tuple(images.shape)}"
            )
        answers, rows = features(self._net, images)
        return answers.cpu(), rows.cpu()

    def score(self, images: Tensor, wanted: Tensor) -> SceneScores:
        """Return the scores of samples.

        Args:
            images: uint8 (N, 3, 32, 32), N ≥ 1.
            wanted: int64 (N, questions), see `Task`.
        Raises:
            InvalidArgument: the shapes do not fit.
        """
        answers, _ = self.read(images)
        return compare(answers, wanted)

    def ceiling(self, n: int, pairs: str = "seen", *, simple: bool = True) -> SceneScores:
        """Return the scores of real images of the captions of `task`."""
        chosen = task(n, pairs, simple=simple)
        return self.score(CaptionedDigits("test", pairs).images(chosen.index), chosen.wanted)

    def table(self, draw: Callable[[list[str]], Tensor], n: int) -> Iterator[str]:
        """Yield lines with the scores of a model on three kinds of captions, and of real images.

        Args:
            draw: function from prompts to images, uint8 (N, 3, 32, 32).
            n: number of samples of each kind.
        """
        for title, pairs, simple in (
            ("one digit, pairs seen in training", "seen", True),
            ("one digit, pairs held out", "held out", True),
            ("all captions", "seen", False),
        ):
            chosen = task(n, pairs, simple=simple)
            yield f"{title}, {n} samples"
            yield f"  model  {self.score(draw(chosen.prompts), chosen.wanted)}"
            yield f"  real   {self.ceiling(n, pairs, simple=simple)}"


def compare(answers: Tensor, wanted: Tensor) -> SceneScores:
    """Return the scores of answers.

    Args:
        answers: answers of the classifier (N, questions), N ≥ 1.
        wanted: intended answers of the same shape, NONE where any is right.
    Raises:
        InvalidArgument: the shapes do not fit, or there are no samples.
    """
    if answers.shape != wanted.shape or not len(wanted) or wanted.shape[1:] != (len(QUESTIONS),):
        raise InvalidArgument(
            f"answers and wanted must both be (N, {len(QUESTIONS)}) with N ≥ 1, got "
            f"{tuple(answers.shape)} and {tuple(wanted.shape)}"
        )
    named, right = wanted != NONE, answers == wanted
    counts, hits = named.sum(dim=0).tolist(), (right & named).sum(dim=0).tolist()
    fractions = {name: hit / n for name, hit, n in zip(QUESTIONS, hits, counts, strict=True) if n}
    return SceneScores(fractions, (right | ~named).all(dim=1).double().mean().item())
