"""Scores of images against their captions: the attributes that count, and when they are right."""

import dataclasses

import pytest
import torch

from minidiff import data, metrics
from minidiff.data.captioned.captions import CaptionedDigits, Questions
from minidiff.data.captioned.scenes import COLOURS, HELD_OUT, NONE, QUESTIONS
from minidiff.errors import InvalidArgument
from minidiff.metrics import train_classifier
from minidiff.metrics.scenes import SIMPLE, SceneEvaluator, compare, task
from minidiff.nn.classifier import SceneNet
from minidiff.training.presets import RECIPES


@pytest.fixture(scope="module")
def evaluator() -> SceneEvaluator:
    return SceneEvaluator()


def test_only_attributes_that_the_caption_names_count():
    wanted = torch.full((4, len(QUESTIONS)), NONE)
    wanted[:, QUESTIONS.index("digit")] = torch.tensor([7, 7, NONE, 3])
    wanted[:, QUESTIONS.index("colour")] = 2
    answers = torch.zeros_like(wanted)
    answers[:, QUESTIONS.index("digit")] = torch.tensor([7, 1, 9, 3])
    answers[:, QUESTIONS.index("colour")] = torch.tensor([2, 2, 2, 5])
    scores = compare(answers, wanted)
    assert scores.right == {"digit": 2 / 3, "colour": 0.75}
    assert scores.together == 0.5
    assert str(scores) == "digit 66.7%, colour 75.0%; all together 50.0%"


@pytest.mark.parametrize("shape", [(0, 9), (2, 8), (2,)])
def test_answers_of_another_shape_are_refused(shape):
    with pytest.raises(InvalidArgument, match=r"must both be \(N, 9\)"):
        compare(torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize("pairs", ["seen", "held out"])
def test_simple_prompts_name_one_digit_its_colour_and_the_background(pairs):
    chosen = task(60, pairs)
    assert len(chosen.prompts) == len(chosen.wanted) == len(chosen.index) == 60
    digit, colour, background = (chosen.wanted[:, QUESTIONS.index(name)] for name in SIMPLE)
    names = list(COLOURS)
    for prompt, d, c, b in zip(chosen.prompts, digit, colour, background, strict=True):
        assert ((int(d), int(c)) in HELD_OUT) == (pairs == "held out")
        assert {names[c], names[b]} <= set(prompt.split())
    scenes = CaptionedDigits("test", pairs).scenes(chosen.index)
    assert torch.equal(scenes.digit[:, 0], digit)
    named = {name for name, row in zip(QUESTIONS, chosen.wanted.T, strict=True) if row[0] != NONE}
    assert named == {"arrangement", *SIMPLE}
    assert (scenes.relation == NONE).all()


def test_all_prompts_are_the_first_captions_of_the_test_split():
    chosen = task(50, simple=False)
    assert chosen.prompts == CaptionedDigits("test").captions(torch.arange(50))
    assert (chosen.wanted[:, QUESTIONS.index("other digit")] != NONE).any()
    with pytest.raises(InvalidArgument, match="n must be in 1"):
        task(0)


def test_labels_are_the_answers_and_every_epoch_has_other_images():
    questions = Questions("test", length=40)
    first, labels = questions.batch(torch.arange(40))
    assert torch.equal(labels, questions.labels)
    assert torch.equal(first, data.to_float(questions.images))
    later, _ = questions.batch(torch.arange(40), position=80)
    digits = CaptionedDigits("test", "all")
    assert torch.equal(later, data.to_float(digits.images(torch.arange(80, 120))))
    # A batch that runs on into the next epoch.
    across, _ = questions.batch(torch.tensor([38, 39, 0, 1]), position=78)
    expected = digits.images(torch.tensor([78, 79, 80, 81]))
    assert torch.equal(across, data.to_float(expected))
    assert torch.equal(questions.to("cpu").batch(torch.arange(3))[0], first[:3])


def test_a_classifier_of_scenes_learns_from_its_labels():
    recipe = dataclasses.replace(RECIPES["captions"], epochs=1, batch_size=32)
    losses = []
    net = train_classifier.train(
        Questions(length=32 * 20), recipe, lambda epoch, loss, seconds: losses.append(loss)
    )
    assert isinstance(net, SceneNet)
    test = Questions("test", length=200)
    predicted, features = metrics.features(net, test.images)
    assert predicted.shape == test.labels.shape == (200, len(QUESTIONS))
    assert features.shape == (200, 96)
    column = QUESTIONS.index("background")
    assert metrics.accuracy(predicted[:, column], test.labels[:, column]) > 0.25  # chance: 0.1
    assert losses[0] < 2.3  # ln 10


def test_the_classifier_reaches_its_stated_accuracy_on_real_images(evaluator):
    stated = metrics.read_metadata(metrics.WEIGHTS / "captions.safetensors")
    test = Questions("test", length=3000)
    answers, _ = evaluator.read(test.images)
    scores = compare(answers, test.labels)
    for name in QUESTIONS:
        assert scores.right[name] == pytest.approx(
            float(stated[f"test_accuracy of {name}"]), abs=0.006
        )
    for name in SIMPLE:
        assert scores.right[name] >= 0.98


@pytest.mark.parametrize("pairs", ["seen", "held out"])
def test_real_images_are_right_and_images_of_other_prompts_are_wrong(evaluator, pairs):
    assert evaluator.ceiling(200, pairs).together > 0.97
    chosen = task(200, pairs)
    others = CaptionedDigits("test", pairs).images(chosen.index.roll(1))
    assert evaluator.score(others, chosen.wanted).together < 0.06  # by chance one in eighty


def test_images_of_another_shape_are_refused(evaluator):
    with pytest.raises(InvalidArgument, match=r"images must be uint8 \(N, 3, 32, 32\)"):
        evaluator.read(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))
    with pytest.raises(InvalidArgument, match="captions are for SceneEvaluator"):
        metrics.Evaluator("captions")
