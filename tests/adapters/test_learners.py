"""What of a model is learned: only that changes, and only that is kept."""

import pytest
import torch
from small_text_model import small_text_model

from minidiff import shipped
from minidiff.adapters import CustomDiffusion, DreamBooth, LoRA, TextualInversion, examples
from minidiff.adapters.learners import flags, kinds, make, options_of
from minidiff.adapters.texts import CaptionedImages
from minidiff.data import load
from minidiff.errors import InvalidArgument
from minidiff.pipeline import Pipeline
from minidiff.runtime.tensors import digest
from minidiff.training.config import TrainConfig
from minidiff.training.diffusion import DiffusionTraining, train
from minidiff.training.start import prepared

CONFIG = TrainConfig(steps=2, batch_size=4, pictures=0)
EVERY = [LoRA(rank=4, prior=2), TextualInversion(), DreamBooth(prior=2), CustomDiffusion(prior=2)]


@pytest.fixture(scope="module")
def base() -> Pipeline:
    return small_text_model()


@pytest.fixture(scope="module")
def hearts() -> CaptionedImages:
    return examples.load("hearts", 4)


def training(learner, data, start) -> DiffusionTraining:
    learner, data = prepared(learner, data, start)
    return DiffusionTraining(CONFIG, data, torch.device("cpu"), start=start, learner=learner)


@pytest.mark.parametrize("learner", EVERY, ids=lambda own: own.name)
def test_a_learner_changes_its_result_and_leaves_the_start_as_it_is(learner, base, hearts):
    before = [digest(base.unet), digest(base.prompts.text_encoder)]
    pipe = train(CONFIG, hearts, start=base, learner=learner, progress=False)
    assert [digest(base.unet), digest(base.prompts.text_encoder)] == before
    assert pipe.adapters == {learner.name: 1.0}
    assert not base.adapters
    assert "heart" in pipe.prompts.tokenizer.numbers
    assert "heart" not in base.prompts.tokenizer.numbers
    vector = pipe.stack.adapters[learner.name][0].words["heart"]
    assert not torch.equal(vector[0], base.prompts.text_encoder.text_model.embeddings
                           .token_embedding.weight.mean(dim=0))  # fmt: skip


def test_a_new_word_changes_no_other_weight(base, hearts):
    pipe = train(CONFIG, hearts, start=base, learner=TextualInversion(), progress=False)
    assert pipe.unet is not base.unet or digest(pipe.unet) == digest(base.unet)
    mine, theirs = (p.prompts.text_encoder.state_dict() for p in (pipe, base))
    table = "text_model.embeddings.token_embedding.weight"
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs if name != table)
    assert torch.equal(mine[table][:-1], theirs[table])


@pytest.mark.parametrize("learner", EVERY, ids=lambda own: own.name)
def test_what_is_kept_is_what_is_trained(learner, base, hearts):
    state = training(learner, hearts, base)
    kept = sum(value.numel() for value in state.learner.state_dict().values())
    assert kept == sum(p.numel() for p in state.learner.trained())


def test_the_usual_lora_has_few_parameters():
    pipe = shipped.load("digits-text")
    trained = sum(p.numel() for p in LoRA(rank=8).change_of(pipe).parameters())
    assert trained <= 0.05 * sum(p.numel() for p in pipe.unet.parameters())


def test_every_option_is_a_flag_and_every_learner_has_a_title():
    for kind in kinds().values():
        assert kind.title
        assert {field.name for field in options_of(kind)} <= flags().keys()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"what": "magic"}, "learn must be one of lora, "),
        ({"what": "word", "rank": 8}, "rank is an option of --learn lora, not of word"),
        ({"what": "lora", "rank": 0}, "rank must be in 1"),
        ({"what": "lora", "alpha": 0.0}, "alpha must be above 0"),
        ({"what": "dreambooth", "vectors": 0}, "vectors must be in 1"),
    ],
)
def test_a_bad_option_is_refused(options, text):
    with pytest.raises(InvalidArgument, match=text):
        make(**options)


@pytest.mark.parametrize(
    ("learner", "text"),
    [
        (LoRA(rank=9), "rank for unet.down_blocks.1.+attn1.to_q.weight must be in 1..8, got 9"),
        (LoRA(targets=("to_nothing",)), "no layer is 'to_nothing'"),
        (LoRA(word=("red",)), "word must be new to the model, which knows 'red'"),
        (LoRA(word=("two words",)), "word must be one word"),
        (LoRA(word=("star",)), "word must be in a caption of hearts, got 'star'"),
        (LoRA(word=("heart", "heart")), "word must name different words"),
        (DreamBooth(init_word="cat"), "init_word must be a word of the model, got 'cat'"),
    ],
)
def test_what_the_start_cannot_learn_is_refused_before_work_starts(learner, text, base, hearts):
    with pytest.raises(InvalidArgument, match=text):
        train(CONFIG, hearts, start=base, learner=learner)


def test_a_learner_needs_a_start_and_captions(base):
    with pytest.raises(InvalidArgument, match="start must be given for learner LoRA"):
        train(CONFIG, load("digits"), learner=LoRA())
    with pytest.raises(InvalidArgument, match="data must have captions, digits have none"):
        train(CONFIG, load("digits"), start=base, learner=LoRA())
