"""Four ways to teach a model something of yours from a few pictures.

    LoRA                low-rank differences of layers       Hu et al. 2021, arXiv:2106.09685
    TextualInversion    the vectors of a new word alone      Gal et al. 2022, arXiv:2208.01618
    DreamBooth          all weights                          Ruiz et al. 2022, arXiv:2208.12242
    CustomDiffusion     what reads the text                  Kumari et al. 2022, arXiv:2212.04488

All of them learn the words of the captions that the model does not know. All but the second also
train on a *prior*: pictures that the model itself draws before training, of captions that it knows,
so that it does not forget them (DreamBooth, section 4.2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from minidiff.adapters.learners import (
    MAX_PRIOR,
    MAX_RANK,
    MAX_VECTORS,
    PRIOR,
    TARGETS,
    Adaptation,
    flag,
)
from minidiff.errors import InvalidArgument
from minidiff.runtime.checks import each, optional, positive, text, whole

if TYPE_CHECKING:
    from minidiff.adapters.change import Change
    from minidiff.data.protocol import Data
    from minidiff.pipeline import Pipeline
    from minidiff.training.learner import Learner

WORDS = each(text, least=1)


@dataclass(frozen=True)
class Personal(Adaptation):
    """What the four have in common.

    Args:
        word: new words that the captions use; None for those that the model does not know.
        vectors: vectors of each new word.
        init_word: known word whose vector the new ones begin with; None for the mean of all.
        prior: number of pictures that the model draws before training; None for 96 where it has
            the captions of `minidiff.data.load("captions")` to draw, else 0.
        prior_prompts: captions of these pictures, instead of those.
    """

    word: tuple[str, ...] | None = flag(
        None, "new words that the captions use, with commas (default: those that the model does "
        "not know)", optional(WORDS), tuple,
    )  # fmt: skip
    vectors: int = flag(1, "vectors of each new word", whole(1, MAX_VECTORS))
    init_word: str | None = flag(
        None, "known word whose vector the new ones begin with (default: the mean of all)",
        optional(text), str,
    )  # fmt: skip
    prior: int | None = flag(
        None, "pictures that the model draws before training, and goes on learning, so that it "
        f"does not forget them; 0 for none (default: {PRIOR}, for --learn word 0)",
        optional(whole(0, MAX_PRIOR)), int,
    )  # fmt: skip
    prior_prompts: tuple[str, ...] | None = None

    learns_words: ClassVar[bool] = True
    keeps_prior: ClassVar[bool] = True

    def change_of(self, pipe: "Pipeline") -> "Change":
        """Return the differences that are learned, at their beginning. Raises InvalidArgument."""
        raise NotImplementedError

    def prepare(self, start: "Pipeline", data: "Data") -> tuple["Personal", "Data"]:
        from minidiff.adapters.prior import prepared

        self.check(start)
        return prepared(self, start, data)

    def check(self, start: "Pipeline") -> None:
        """Refuse a start that this cannot be learned by. Raises InvalidArgument."""
        import torch

        with torch.device("meta"):
            self.change_of(start)

    def __call__(self, pipe: "Pipeline") -> "Learner":
        from minidiff.adapters.learner import ChangeLearner
        from minidiff.adapters.words import fresh_vectors

        words = self.word or ()
        first = {w: fresh_vectors(pipe.prompts, self.vectors, self.init_word) for w in words}
        return ChangeLearner(self.name, pipe, self.change_of(pipe), first)

    @property
    def name(self) -> str:
        """Name of the adapter in the pipeline that `train` returns."""
        return type(self).__name__.lower()

    def save(self, pipe: "Pipeline", folder: Path) -> None:
        pipe.save_adapter(folder, self.name)

    def load(self, start: "Pipeline", folder: Path) -> "Pipeline":
        import copy

        return copy.copy(start).load_adapter(folder, name=self.name)


@dataclass(frozen=True)
class LoRA(Personal):
    """Low-rank differences (alpha/r)·B·A of the weights of chosen layers.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r, a scale of 1.
        targets: layers of the U-Net: "attention", "cross-attention", "convolution", "linear", or
            ends of module names such as "to_q".
        text_rank: rank for the attention of the text encoder; 0 for none.
        word, vectors, init_word, prior, prior_prompts: see `Personal`.
    Raises:
        InvalidArgument: an option is not allowed.
    """

    title: ClassVar[str] = "low-rank differences of chosen layers"
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-3, "weight_decay": 0.0}

    rank: int = flag(8, "rank of the differences, at most the smaller side of a weight",
                     whole(1, MAX_RANK))  # fmt: skip
    alpha: float | None = flag(
        None, "numerator of the scale alpha/rank (default: the rank)", optional(positive), float
    )
    targets: tuple[str, ...] = flag(
        ("attention",), f"layers, with commas: {', '.join(TARGETS)}, or ends of their names",
        WORDS, tuple,
    )  # fmt: skip
    text_rank: int = flag(0, "rank for the text encoder; 0 for none", whole(0, MAX_RANK))

    def change_of(self, pipe: "Pipeline") -> "Change":
        from minidiff.adapters.change import Change, LowRank, matching

        ranks = {f"unet.{name}": self.rank for name in matching(pipe.unet, self.targets)}
        if self.text_rank:
            if pipe.prompts is None:
                raise InvalidArgument("text_rank must be 0 for a model without texts")
            encoder = pipe.prompts.text_encoder
            names = matching(encoder, ("attention",))
            ranks |= {f"text_encoder.{name}": self.text_rank for name in names}
        return Change({
            name: LowRank(_weight(pipe, name).shape, rank, self.alpha, name)
            for name, rank in ranks.items()
        })  # fmt: skip


@dataclass(frozen=True)
class TextualInversion(Personal):
    """The vectors of new words; every other weight stays as it is.

    A network that never drew a shape does not draw it for a new word; a new colour it does.

    Args:
        word, vectors, init_word, prior, prior_prompts: see `Personal`; no prior by default.
    """

    title: ClassVar[str] = "the vectors of new words"
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 5e-3, "weight_decay": 0.0}
    keeps_prior: ClassVar[bool] = False

    def change_of(self, pipe: "Pipeline") -> "Change":
        from minidiff.adapters.change import Change

        return Change({})


@dataclass(frozen=True)
class DreamBooth(Personal):
    """All weights of the network and the text encoder, with a prior that is preserved.

    Args:
        word, vectors, init_word, prior, prior_prompts: see `Personal`.
    """

    title: ClassVar[str] = "all weights, with a prior that is preserved"
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 5e-4}

    def change_of(self, pipe: "Pipeline") -> "Change":
        from minidiff.adapters.change import Change, Dense, trained_weights

        names = [f"unet.{name}" for name in trained_weights(pipe.unet)]
        if pipe.prompts is not None:
            encoder = pipe.prompts.text_encoder
            names += [f"text_encoder.{name}" for name in trained_weights(encoder)]
        return Change({name: Dense(_weight(pipe, name).shape) for name in names})


@dataclass(frozen=True)
class CustomDiffusion(Personal):
    """Keys and values of cross-attention, the map of the text's summary, and the word.

    Args:
        word, vectors, init_word, prior, prior_prompts: see `Personal`.
    """

    title: ClassVar[str] = "what reads the text: keys, values and the text's summary"
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-3}

    def change_of(self, pipe: "Pipeline") -> "Change":
        from minidiff.adapters.change import Change, Dense, matching

        layers = [name.removesuffix(".weight") for name in matching(pipe.unet, TARGETS[1:2])]
        names = [
            f"unet.{name}" for name, _ in pipe.unet.named_parameters()
            if name.rpartition(".")[0] in layers
        ]  # fmt: skip
        return Change({name: Dense(_weight(pipe, name).shape) for name in names})


def _weight(pipe: "Pipeline", name: str) -> Any:
    """Return a weight of "unet.…" or "text_encoder.…"."""
    part, _, rest = name.partition(".")
    network = pipe.unet if part == "unet" else pipe.prompts.text_encoder
    return network.get_parameter(rest)
