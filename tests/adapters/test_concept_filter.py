"""The concept filter: what it finds, what it leaves alone, and how it is switched off."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minidiff import shipped
from minidiff.adapters.concept_filter import ConceptFilter, best_threshold
from minidiff.cli import main
from minidiff.data import load
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.images.pixels import to_float
from minidiff.pipeline import Pipeline
from minidiff.pipeline.late import FILTER

TRAIN = load("digits", "train")
IMAGES, LABELS = TRAIN.images[:1500], TRAIN.labels[:1500]


def examples(*classes: int) -> dict[str, torch.Tensor]:
    return {f"digit {c}": IMAGES[LABELS.eq(c)] for c in classes}


def others(*classes: int) -> torch.Tensor:
    return IMAGES[~torch.isin(LABELS, torch.tensor(classes))]


@pytest.fixture(scope="module")
def sevens() -> ConceptFilter:
    return ConceptFilter.learn("digits", examples(7), others(7))


@pytest.fixture
def declared(tmp_path: Path) -> Path:
    """A copy of the MNIST model whose folder declares a filter that finds everything."""
    pipe = shipped.load("mnist")
    found = ConceptFilter("mnist", ["anything"], torch.zeros(1, 96), torch.tensor([-1.0]))
    pipe.finishers.append(found)
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_sevens_become_black_and_all_other_images_stay_bit_for_bit(
    sevens: ConceptFilter,
) -> None:
    test = load("digits", "test")
    images, is_seven = to_float(test.images[:1000]), test.labels[:1000] == 7
    made, flagged = sevens(images)
    found = torch.tensor([names == ("digit 7",) for names in flagged])
    hits = (found & is_seven).sum()
    assert hits / found.sum() > 0.98
    assert hits / is_seven.sum() > 0.98
    assert (made[found] == -1).all()
    assert torch.equal(made[~found], images[~found])


def test_each_concept_is_found_under_its_own_name() -> None:
    both = ConceptFilter.learn("digits", examples(1, 7), others(1, 7))
    for digit in (1, 7):
        _, flagged = both(to_float(IMAGES[LABELS.eq(digit)][:100]))
        assert sum(names == (f"digit {digit}",) for names in flagged) > 97
    _, flagged = both(to_float(IMAGES[LABELS == 3][:100]))
    assert sum(names == () for names in flagged) > 97


def test_the_best_threshold_is_that_of_a_search_over_all() -> None:
    generator = torch.Generator().manual_seed(0)
    positive = torch.randn(40, generator=generator).double() + 1
    negative = torch.randn(60, generator=generator).double() - 1

    def f1(threshold: float) -> float:
        hits = (positive > threshold).sum().item()
        return 2 * hits / (hits + (negative > threshold).sum().item() + len(positive))

    best = max(f1(value - 1e-9) for value in torch.cat([positive, negative]).tolist())
    assert f1(best_threshold(positive, negative).item()) == pytest.approx(best)
    assert best_threshold(positive.abs() + 2, negative - 5) < 2.5  # halfway where all is clear


def test_a_pipeline_says_what_was_found_and_nothing_without_a_filter(
    sevens: ConceptFilter,
) -> None:
    pipe = shipped.load("mnist")
    options = {
        "seed": 0,
        "num_inference_steps": 1,
        "output_type": "pt",
        "progress": False,
    }
    plain = pipe([3, 7], **options)
    assert plain.flagged is None
    found = ConceptFilter("mnist", ["anything"], torch.zeros(1, 96), torch.tensor([-1.0]))
    pipe.finishers += [found, ConceptFilter("mnist", ["no", "yes"], torch.zeros(2, 96),
                                            torch.tensor([1.0, -1.0]))]  # fmt: skip
    black = pipe([3, 7], **options)
    assert black.flagged == [("anything", "yes")] * 2
    assert (black.images == -1).all()
    for filter_ in pipe.finishers:
        filter_.enabled = False
    off = pipe([3, 7], **options)
    assert off.flagged == [(), ()]
    assert torch.equal(off.images, plain.images)


def test_a_model_declares_its_filter_and_the_command_switches_it_off(
    declared: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    pipe = Pipeline.from_pretrained(declared)
    assert [filter_.names for filter_ in pipe.finishers] == [("anything",)]
    pipe.save_pretrained(declared)  # its own file does not stand in the way
    monkeypatch.chdir(tmp_path)
    words = ["sample", str(declared), "--num", "2", "--steps", "1", "--class", "7"]
    assert main(words) == 0
    assert "2 of 2 images are black, as the model's filter found: any" in capsys.readouterr().out
    assert main([*words, "--no-filter"]) == 0
    assert "black" not in capsys.readouterr().out
    (declared / FILTER).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=FILTER):
        Pipeline.from_pretrained(declared)


def test_a_file_gives_the_same_filter_again(sevens: ConceptFilter, tmp_path: Path) -> None:
    sevens.save(tmp_path / "sevens.safetensors")
    again = ConceptFilter.load(tmp_path / "sevens.safetensors")
    images = to_float(IMAGES[:20])
    assert again.names == sevens.names
    assert torch.equal(again.margins(images), sevens.margins(images))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="holds no concept filter"):
        ConceptFilter.load(path)
    with pytest.raises(CheckpointError, match="no such file"):
        ConceptFilter.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("classifier", "concepts", "rest", "words"),
    [
        ("letters", {}, others(7), "a classifier is shipped for"),
        ("digits", {}, others(7), "must name at least one concept"),
        ("digits", {"others": others(7)}, others(7), "none of them 'others'"),
        (
            "digits",
            {"seven": others(7)[:19]},
            others(7),
            "at least 20, got torch.uint8 and 19",
        ),
        ("digits", {"seven": others(7) / 255}, others(7), "must be uint8"),
        ("digits", examples(7), others(7)[:0], "images of others must be"),
        ("cifar10", examples(7), others(7), r"must be \(B, 3, H, W\)"),
    ],
)
def test_examples_that_do_not_fit_are_refused(classifier, concepts, rest, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        ConceptFilter.learn(classifier, concepts, rest)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(2, 3, 16, 16), r"images must be \(B, 1, H, W\)"),
        (torch.zeros(1, 16, 16), r"images must be \(B, 1, H, W\)"),
        (torch.full((1, 1, 16, 16), torch.nan), "images must be finite"),
    ],
)
def test_images_that_do_not_fit_are_refused(sevens, images: torch.Tensor, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        sevens(images)


@pytest.mark.parametrize(
    ("names", "directions", "thresholds", "words"),
    [
        ([], torch.zeros(0, 96), torch.zeros(0), "must have different names"),
        (["a", "a"], torch.zeros(2, 96), torch.zeros(2), "must have different names"),
        (["a"], torch.zeros(1, 95), torch.zeros(1), "directions must be"),
        (["a"], torch.zeros(1, 96), torch.zeros(2), "thresholds must be"),
        (
            ["a"],
            torch.full((1, 96), torch.inf),
            torch.zeros(1),
            "directions must be finite",
        ),
    ],
)
def test_a_filter_of_another_shape_is_refused(names, directions, thresholds, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        ConceptFilter("digits", names, directions, thresholds)
