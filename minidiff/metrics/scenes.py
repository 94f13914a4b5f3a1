"""Pictures scored against their captions: is every thing as it was asked for?

A classifier of real pictures (`weights/captions.safetensors`) answers the questions of
`data.captioned.scenes` about each sample; a caption asks for some of the answers. An attribute's
score is the share of samples that have it right among those of which it was asked, and a sample
is right altogether when all that its caption says is. Real pictures of other glyphs, scored in
the same way, are the ceiling.
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

SIMPLE = ("digit", "colour", "background")  # what the captions of the first table say
_SEARCHED = 8  # captions looked through for each that is wanted; every second one is simple


class SceneScores(NamedTuple):
    """Shares of samples, 0..1.

    Attributes:
        right: attribute → share of those it was asked of; without attributes that were asked of
            none.
        together: share with everything right.
    """

    right: Mapping[str, float]
    together: float

    def __str__(self) -> str:
        each = ", ".join(f"{name} {share:.1%}" for name, share in self.right.items())
        return f"{each}; all together {self.together:.1%}"


class Task(NamedTuple):
    """N captions, and what they ask for.

    Attributes:
        prompts: N texts.
        wanted: int64 (N, questions), NONE where a caption leaves it open.
        index: (N,), the numbers of the captions in their stream.
    """

    prompts: list[str]
    wanted: Tensor
    index: Tensor


def task(n: int, pairs: str = "seen", *, simple: bool = True, seed: int = 0) -> Task:
    """The first n captions of the test split.

    Args:
        pairs, seed: see `CaptionedDigits`.
        simple: only those of one digit that name it, its colour and the background, of which
            these three and the number of digits are asked for; otherwise all captions, those of
            a single word and of two digits too, and everything that they say.
    Raises:
        InvalidArgument: n is not in 1..100,000.
    """
    n = whole_number("n", n, 1, 100_000)
    data = CaptionedDigits("test", pairs, seed)
    index = torch.arange(_SEARCHED * (n + 8) if simple else n)
    wanted = data.wanted(index)
    if simple:
        named = [QUESTIONS.index(name) for name in SIMPLE]
        fits = (wanted[:, named] != NONE).all(dim=1) & (wanted[:, 0] == 0)
        index, wanted = index[fits][:n], wanted[fits][:n]
        others = sorted(set(range(1, len(QUESTIONS))) - set(named))
        wanted[:, others] = NONE
    return Task(data.captions(index), wanted, index)


class SceneEvaluator:
    """Scores pictures against captions.

    Args:
        device: where the classifier runs.
    Raises:
        InvalidArgument: a device that is not there.
        CheckpointError: the weights cannot be read, or are not the published ones.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._net = load_classifier(CaptionedDigits.name).to(pick_device(device))

    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The answers to every question, int64 (N, questions), and features float64 (N, D).

        Args:
            images: uint8 (N, 3, 32, 32).
        Raises:
            InvalidArgument: other pictures.
        """
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (3, SIDE, SIDE):
            raise InvalidArgument(
                f"images must be uint8 (N, 3, {SIDE}, {SIDE}), got {images.dtype} "
                f"{tuple(images.shape)}"
            )
        answers, rows = features(self._net, images)
        return answers.cpu(), rows.cpu()

    def score(self, images: Tensor, wanted: Tensor) -> SceneScores:
        """Score samples.

        Args:
            images: uint8 (N, 3, 32, 32), N ≥ 1.
            wanted: int64 (N, questions), see `Task`.
        Raises:
            InvalidArgument: the shapes do not fit.
        """
        answers, _ = self.read(images)
        return compare(answers, wanted)

    def ceiling(self, n: int, pairs: str = "seen", *, simple: bool = True) -> SceneScores:
        """What real pictures of the captions of `task` score."""
        asked = task(n, pairs, simple=simple)
        return self.score(CaptionedDigits("test", pairs).images(asked.index), asked.wanted)

    def table(self, draw: Callable[[list[str]], Tensor], n: int) -> Iterator[str]:
        """The scores of a model on three kinds of captions, line by line, above those of real ones.

        Args:
            draw: prompts → pictures, uint8 (N, 3, 32, 32).
            n: samples a kind.
        """
        for title, pairs, simple in (
            ("one digit, pairs seen in training", "seen", True),
            ("one digit, pairs held out", "held out", True),
            ("all that captions say", "seen", False),
        ):
            asked = task(n, pairs, simple=simple)
            yield f"{title}, {n} samples"
            yield f"  model  {self.score(draw(asked.prompts), asked.wanted)}"
            yield f"  real   {self.ceiling(n, pairs, simple=simple)}"


def compare(answers: Tensor, wanted: Tensor) -> SceneScores:
    """Scores of what was read (N, questions) against what was wanted, NONE for whatever.

    Raises InvalidArgument: shapes that do not fit, or no samples.
    """
    if answers.shape != wanted.shape or not len(wanted) or wanted.shape[1:] != (len(QUESTIONS),):
        raise InvalidArgument(
            f"answers and wanted must both be (N, {len(QUESTIONS)}) with N ≥ 1, got "
            f"{tuple(answers.shape)} and {tuple(wanted.shape)}"
        )
    asked, right = wanted != NONE, answers == wanted
    count, hits = asked.sum(dim=0).tolist(), (right & asked).sum(dim=0).tolist()
    shares = {name: hit / n for name, hit, n in zip(QUESTIONS, hits, count, strict=True) if n}
    return SceneScores(shares, (right | ~asked).all(dim=1).double().mean().item())
