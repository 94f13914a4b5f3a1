"""Prompts to token numbers: those of diffusers' pipelines, or an error with the reason."""

import json
import sys
import warnings

import pytest
import torch
from tiny_text import END, END_ID, START_ID, VOCAB_SIZE, tiny_text_config, write_tokenizer

from minidiff.errors import CheckpointError, InvalidArgument, MinidiffError
from minidiff.nn import TextEncoder
from minidiff.text.clip import load_tokenizer, tokenize

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

CAT = VOCAB_SIZE - 5  # "ca", "cat", "do", "dog" and the two marks come last


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    return load_tokenizer(tmp_path / "tokenizer")


def test_a_prompt_becomes_its_tokens_between_two_marks_and_padding(tokenizer):
    ids = tokenize(tokenizer, ["Cat   DOG", "", "cats!"])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [
        [START_ID, CAT, CAT + 2, END_ID] + 8 * [END_ID],
        [START_ID, END_ID] + 10 * [END_ID],
        # "cats" is not in the vocabulary: "ca", "t", and "s" and "!" that end a word.
        [START_ID, CAT - 1, ord("t") - 33, ord("s") - 33 + 256, 256, END_ID] + 6 * [END_ID],
    ]


def test_padding_is_the_pad_token_of_the_files(tmp_path):
    write_tokenizer(tmp_path, max_length=5, pad_token="!")
    assert tokenize(load_tokenizer(tmp_path), ["cat"]).tolist() == [[START_ID, CAT, END_ID, 0, 0]]


def test_a_long_prompt_is_cut_with_a_warning_that_names_its_end(tokenizer):
    with pytest.warns(UserWarning, match=r"at most 12 tokens; the end of 1 of 2 is .*: 'dog cat'"):
        ids = tokenize(tokenizer, [10 * "cat " + "dog cat", "dog"])
    assert ids.tolist()[0] == [START_ID, *10 * [CAT], END_ID]


def test_a_prompt_of_the_maximum_length_does_not_warn(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenize(tokenizer, [10 * "cat "]).tolist() == [[START_ID, *10 * [CAT], END_ID]]


@pytest.mark.parametrize("prompt", ["日本 é ½ 🙂", "a\0b", f"cat {END} dog", "\n", "it's 'fine'"])
def test_any_unicode_text_has_tokens_of_the_vocabulary(tokenizer, prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are too long
        ids = tokenize(tokenizer, [prompt])
    expected = tokenizer(prompt, padding="max_length", truncation=True, max_length=12).input_ids
    assert ids.tolist() == [expected]
    assert set(ids.flatten().tolist()) <= set(range(VOCAB_SIZE))


def test_a_tokenizer_saved_by_transformers_gives_the_same_tokens(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "again")
    prompts = ["a cat", "dog-cat", "½"]
    again = tokenize(load_tokenizer(tmp_path / "again"), prompts)
    assert torch.equal(again, tokenize(tokenizer, prompts))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a cat", "prompts must be a list of at least one text, got 'a cat'"),
        ([], "prompts must be a list"),
        (None, "prompts must be a list"),
        (["cat", None], "prompts must hold texts, got None"),
        ([["cat", "dog"]], "prompts must hold texts"),
        (["\ud800"], "prompts must be Unicode text"),
    ],
)
def test_prompts_that_are_not_a_list_of_texts_are_refused(tokenizer, prompts, message):
    with pytest.raises(InvalidArgument, match=message):
        tokenize(tokenizer, prompts)


def test_the_error_without_transformers_names_what_to_install(tmp_path, monkeypatch):
    write_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MinidiffError, match=r"pip install minidiff\[text\]"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("tokenizer_config.json", r"tokenizer_config\.json: no such file"),
        ("vocab.json", r"holds neither tokenizer\.json nor vocab\.json, merges\.txt"),
        ("merges.txt", r"holds neither tokenizer\.json nor vocab\.json, merges\.txt"),
    ],
)
def test_missing_files_are_named(tmp_path, missing, message):
    write_tokenizer(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


def test_a_missing_folder_is_not_looked_up_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "none", "openai/clip-vit-base-patch32"):
        with pytest.raises(CheckpointError, match=r"no such (file|folder)"):
            load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", b'{"a"', "not a readable CLIP tokenizer"),
        ("vocab.json", b"\xff\xfe", "not a readable CLIP tokenizer"),
        ("vocab.json", POINTER, r"CLIP tokenizer \(vocab\.json: a Git LFS pointer"),
        ("merges.txt", POINTER, r"CLIP tokenizer \(merges\.txt: a Git LFS pointer"),
        ("merges.txt", b"zzz yyy\n", "not a readable CLIP tokenizer"),
        ("tokenizer_config.json", b"[1]", r"tokenizer_config\.json: expected a JSON object"),
        ("tokenizer_config.json", b"{}", "model_max_length must be in"),
        ("special_tokens_map.json", b"nope", "not a readable CLIP tokenizer"),
        ("tokenizer.json", b"{}", "not a readable CLIP tokenizer"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, name, content, message):
    write_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_class": "T5Tokenizer"}, "tokenizer_class must be CLIPTokenizer"),
        ({"tokenizer_class": ["CLIPTokenizer"]}, "tokenizer_class must be CLIPTokenizer"),
        ({"model_max_length": 1}, "model_max_length must be in"),
        ({"model_max_length": "77"}, "model_max_length must be a whole number"),
    ],
)
def test_invalid_options_are_refused_by_name(tmp_path, change, message):
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


def test_code_that_a_folder_names_is_not_run(tmp_path):
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    options = {**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    path.write_text(json.dumps(options))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nEvil = None\n")
    assert tokenize(load_tokenizer(tmp_path), ["cat"])[0, 1] == CAT
    assert not (tmp_path / "ran").exists()


def test_prompts_are_encoded_as_in_diffusers_pipeline(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    config, folder = tiny_text_config(hidden_act="gelu"), tmp_path / "pipeline"
    write_tokenizer(tmp_path / "tokenizer", pad_token="!")
    levels = {"block_out_channels": (4, 4), "norm_num_groups": 2, "layers_per_block": 1}
    diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            **levels,
            down_block_types=2 * ("DownEncoderBlock2D",),
            up_block_types=2 * ("UpDecoderBlock2D",),
        ),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"),
        unet=diffusers.UNet2DConditionModel(
            **levels,
            cross_attention_dim=config["hidden_size"],
            attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    for name in ("tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"):
        (tmp_path / "tokenizer" / name).replace(folder / "tokenizer" / name)
    (folder / "tokenizer" / "tokenizer.json").unlink()  # as in folders of older versions

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    encoder = TextEncoder.from_pretrained(folder / "text_encoder")
    prompts, negative = ["a cat", "dog " * 20], ["ugly", ""]
    with torch.no_grad():
        expected = pipeline.encode_prompt(prompts, "cpu", 1, True, negative)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = [encoder(tokenize(tokenizer, texts)) for texts in (prompts, negative)]
        for mine, theirs in zip(ours, expected, strict=True):
            assert torch.allclose(mine.last_hidden_state, theirs, rtol=0, atol=1e-6)
