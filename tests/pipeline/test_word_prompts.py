"""A pipeline with a vocabulary of whole words: its conditioning and its folder."""

import json

import pytest
import torch

from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.nn import SpaceToDepth, TextEncoder, UNet
from minidiff.pipeline import Pipeline
from minidiff.schedulers import DPMSolverMultistepScheduler
from minidiff.text.prompts import WordPrompts
from minidiff.text.words import WordTokenizer

WORDS = ("a", "blue", "red", "seven")
PROMPTS = ["a red seven", "blue"]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    """Return a small pipeline with random weights, whose output depends on the text."""
    torch.manual_seed(0)
    prompts = WordPrompts.fresh(WordTokenizer(WORDS, 8), 16, 2)
    unet = UNet(
        sample_size=4,
        in_channels=12,
        out_channels=12,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="v_prediction", compat="exact")
    return Pipeline(unet, scheduler, SpaceToDepth(2), (), 2.5, 3, prompts)


def draw(pipe, prompt=PROMPTS, **options):
    return pipe(prompt, seed=1, output_type="pt", **options).images


def test_pictures_depend_on_the_words_but_not_on_case_or_punctuation(pipe):
    images = draw(pipe)
    assert images.shape == (2, 3, 8, 8)
    assert torch.equal(images, draw(pipe, ["A RED, seven!", " blue "]))
    assert not torch.allclose(images[0], draw(pipe, ["a blue seven", "blue"])[0])


def test_pictures_are_guided_away_from_the_empty_or_the_negative_prompt(pipe):
    assert torch.equal(draw(pipe), draw(pipe, negative_prompt=""))
    assert not torch.allclose(draw(pipe), draw(pipe, negative_prompt="seven"))
    unguided = draw(pipe, ["", ""], guidance_scale=1)
    torch.testing.assert_close(unguided, draw(pipe, ["", ""], guidance_scale=7), atol=1e-4, rtol=0)


def test_unknown_words_are_left_out_with_a_warning_that_names_them(pipe):
    with pytest.warns(UserWarning, match="outside the vocabulary are left out: crimson"):
        images = draw(pipe, ["a crimson seven", "blue"])
    assert torch.equal(images, draw(pipe, ["a seven", "blue"]))
    with pytest.raises(InvalidArgument, match="prompt must be given"):
        draw(pipe, None)


def test_a_saved_pipeline_draws_the_same_pictures(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["_class_name"] == "MinidiffPipeline"
    assert index["tokenizer"] == ["minidiff", "WordTokenizer"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    again = Pipeline.from_pretrained(tmp_path / "model")
    assert (again.guidance_scale, again.num_inference_steps) == (2.5, 3)
    assert again.prompts.tokenizer.words == WORDS
    assert torch.equal(draw(again), draw(pipe))
    again.save_pretrained(tmp_path / "model")  # over itself
    assert torch.equal(draw(Pipeline.from_pretrained(tmp_path / "model")), draw(pipe))


def test_diffusers_and_transformers_compute_the_same_outputs_from_the_folder(pipe, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    pipe.save_pretrained(tmp_path)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    encoder = transformers.CLIPTextModel.from_pretrained(tmp_path / "text_encoder").eval()
    ids = pipe.prompts.tokens(PROMPTS)
    x = torch.randn(2, 12, 4, 4)
    with torch.no_grad():
        tokens = encoder(ids).last_hidden_state
        theirs = unet(x, 500, tokens, class_labels=encoder(ids).pooler_output).sample
        condition = pipe.prompts.condition(PROMPTS, (8, 8))
        ours = pipe.unet(x, 500, **condition)
    torch.testing.assert_close(condition["encoder_hidden_states"], tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_tokenizer_that_does_not_fit_the_encoder_is_refused(pipe):
    encoder = pipe.prompts.text_encoder
    with pytest.raises(
        InvalidArgument, match="model_max_length of the tokenizer must be at most 8"
    ):
        WordPrompts(WordTokenizer(WORDS, 9), encoder)
    with pytest.raises(InvalidArgument, match="at most 7 words, the text encoder's vocab_size"):
        WordPrompts(WordTokenizer([*WORDS, "one"], 8), encoder)


def _remove(name):
    return lambda index: index.pop(name)


def _change(name, value):
    return lambda index: index.__setitem__(name, value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("tokenizer"), "has no tokenizer"),
        (_remove("text_encoder"), "has no text_encoder"),
        (_remove("guidance_scale"), "has no guidance_scale"),
        (
            _change("tokenizer", ["transformers", "CLIPTokenizer"]),
            "must be one of .'WordTokenizer'",
        ),
        (_change("tokenizer", [None, None]), "tokenizer must be a library and a class"),
        (_change("_class_name", "StableDiffusionPipeline"), "tokenizer must be one of .'CLIPTok"),
        (_change("class_names", ["seven"]), "class_names must"),
    ],
)
def test_an_index_that_does_not_fit_its_folder_is_refused(pipe, tmp_path, damage, message):
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    index = json.loads(file.read_text())
    damage(index)
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        Pipeline.from_pretrained(tmp_path)


def test_a_vocabulary_larger_than_the_embedding_table_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    WordTokenizer([*WORDS, "one"], 8).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match="at most 7 words"):
        Pipeline.from_pretrained(tmp_path)
    (tmp_path / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: no such file"):
        Pipeline.from_pretrained(tmp_path)


def test_a_fresh_encoder_has_the_requested_width_and_number_of_layers():
    prompts = WordPrompts.fresh(WordTokenizer(WORDS, 8), 48, 3)
    assert isinstance(prompts.text_encoder, TextEncoder)
    assert (prompts.width, prompts.text_encoder.config.num_hidden_layers) == (48, 3)
    assert 48 % prompts.text_encoder.config.num_attention_heads == 0
