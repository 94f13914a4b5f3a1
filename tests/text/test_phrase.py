"""Prompts that say more than a text: weights, a second text, skipped layers, mixtures."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_pipelines import stable_diffusion, stable_diffusion_xl

from minidiff import Pipeline, shipped
from minidiff.cli import main
from minidiff.errors import InvalidArgument
from minidiff.text.phrase import Phrase, mixed, weighted

SIZE = (32, 32)


@pytest.fixture(scope="module")
def words() -> Pipeline:
    return shipped.load("digits-text")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple]:
    """Tiny random pipelines of diffusers, and ours that read their folders."""
    found = {}
    for name, make in (("SD", stable_diffusion), ("XL", stable_diffusion_xl)):
        path = tmp_path_factory.mktemp(name)
        theirs = make(path)
        theirs.set_progress_bar_config(disable=True)
        theirs.save_pretrained(path / "sd")
        # transformers 5 took away the attribute that diffusers reads for clip_skip.
        vars(theirs.text_encoder).setdefault("text_model", theirs.text_encoder)
        found[name] = theirs, Pipeline.from_pretrained(path / "sd")
    return found


def tokens(pipe: Pipeline, *texts: str) -> torch.Tensor:
    with torch.no_grad():
        return pipe.prompts.condition(list(texts), SIZE)["encoder_hidden_states"]


# --- the notation -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "segments"),
    [
        ("a (seven)", [("a ", 1), ("seven", 1.1)]),
        ("a [blue] 7", [("a ", 1), ("blue", 1 / 1.1), (" 7", 1)]),
        ("((red)) 7", [("red", 1.1 * 1.1), (" 7", 1)]),
        ("a (big (red:1.5):2) 7", [("a ", 1), ("big ", 2), ("red", 3), (" 7", 1)]),
        ("(red: 0.5)", [("red", 0.5)]),
        (r"(a \(red\) \[7\] \\:1.2)", [("a ", 1.2), ("(", 1.2), ("red", 1.2), (")", 1.2),
         (" ", 1.2), ("[", 1.2), ("7", 1.2), ("]", 1.2), (" ", 1.2), ("\\", 1.2)]),
        ("[(red)] at 3:30", [("red", 1), (" at 3", 1), (":", 1), ("30", 1)]),
        ("a red 7", []),
        ("", []),
    ],
)  # fmt: skip
def test_brackets_are_read_as_the_web_interfaces_read_them(prompt, segments):
    phrase = weighted(prompt)
    found = phrase.segments or [(s, 1) for s in [str(phrase)] if s and segments]
    if not phrase.segments:  # all weights are 1
        assert "".join(text for text, _ in segments) in (str(phrase), "")
        return
    assert [text for text, _ in found] == [text for text, _ in segments]
    np.testing.assert_allclose([w for _, w in found], [w for _, w in segments])


@given(st.text(alphabet="ab ()[]:.1\\", max_size=20))
def test_every_text_is_read_or_refused_and_escaped_text_stays(text):
    escaped = "".join(f"\\{c}" if c in "()[]\\" else c for c in text)
    assert weighted(escaped) == text
    assert not weighted(escaped).segments
    try:
        phrase = weighted(text)
    except InvalidArgument:
        return
    assert len(phrase) <= len(text)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (red", "bracket without its other half: 'a \\(red'"),
        ("a red)", "bracket without its other half"),
        ("(red]", "bracket without its other half"),
        ("(red:big)", "a weight must be a number in 0..10, got 'big'"),
        ("(red:)", "got ''"),
        ("(red:11)", "got '11'"),
        ("(red:-1)", "got '-1'"),
        ("(red:nan)", "got 'nan'"),
        (7, "prompt must be a text, got 7"),
    ],
)
def test_a_wrong_notation_is_refused(prompt, message):
    with pytest.raises(InvalidArgument, match=message):
        weighted(prompt)


def test_a_plain_prompt_with_brackets_keeps_its_meaning(words, folders):
    assert torch.equal(tokens(words, "a (red) [7]"), tokens(words, "a red 7"))
    theirs, ours = folders["SD"]
    expected, _ = theirs.encode_prompt("a (cat:1.3)", "cpu", 1, False)
    torch.testing.assert_close(tokens(ours, "a (cat:1.3)"), expected, rtol=1e-5, atol=1e-5)


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["words", "SD", "XL"])
def test_a_weight_moves_a_token_along_its_line_from_the_empty_text(name, words, folders):
    pipe, text, plain, place = words, "a big ({}:{}) 7", "red", 3
    if name != "words":
        pipe, text, plain, place = folders[name][1], "cat ({}:{}) cat", "dog", 2
    base = tokens(pipe, text.format(plain, 1).replace("(", "").replace(":1)", ""))
    empty = tokens(pipe, "")
    assert torch.equal(tokens(pipe, weighted(text.format(plain, 1))), base)
    for w in (0.0, 0.5, 1.7):
        found = tokens(pipe, weighted(text.format(plain, w)))
        wanted = base.clone()
        wanted[:, place] = empty[:, place] + w * (base[:, place] - empty[:, place])
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(base[:, place], empty[:, place])


def test_weights_of_one_prompt_change_no_other_and_pooled_text_has_none(words):
    prompts = ["a big red 7", weighted("a big (red:1.8) 7")]
    with torch.no_grad():
        found = words.prompts.condition(prompts, SIZE)
        alone = words.prompts.condition([prompts[0]], SIZE)
    torch.testing.assert_close(found["encoder_hidden_states"][:1], alone["encoder_hidden_states"])
    torch.testing.assert_close(*found["class_labels"].split(1))


def test_weights_inside_of_a_word_are_refused(folders):
    with pytest.raises(InvalidArgument, match="weights must begin and end between words"):
        tokens(folders["SD"][1], weighted("c(at)"))


# --- diffusers' clip_skip and prompt_2 ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SD", {"clip_skip": 0}),
        ("SD", {"clip_skip": 1}),
        ("SD", {"clip_skip": 2}),
        ("XL", {"clip_skip": 0}),
        ("XL", {"clip_skip": 1}),
        ("XL", {"prompt_2": "dog cat"}),
        ("XL", {"prompt_2": ["dog cat", "oil"], "negative_prompt_2": "grey"}),
        ("XL", {"negative_prompt_2": ["grey", "cat"]}),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_options_of_prompts_are_those_of_diffusers(name, options, scale, folders):
    if scale == 1.0 and "negative_prompt_2" in options:
        options = {k: v for k, v in options.items() if k == "prompt_2"}
    theirs, ours = folders[name]
    latents = torch.randn(2, 4, 16, 16)
    call = {"guidance_scale": scale, "latents": latents, "num_inference_steps": 3}
    if scale != 1.0:
        call["negative_prompt"] = "dog"
    call |= options
    wanted_options = {
        k: [v] * 2 if isinstance(v, str) and k != "guidance_scale" else v for k, v in call.items()
    }
    expected = theirs(["a cat", "a dog on a cat"], output_type="np", **wanted_options).images
    made = ours(["a cat", "a dog on a cat"], output_type="pt", **call).images
    made = (made / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(made, expected, atol=1e-4)
    plain = ours(["a cat", "a dog on a cat"], output_type="pt", guidance_scale=scale,
                 latents=latents, num_inference_steps=3).images  # fmt: skip
    if options not in ({"clip_skip": 0}, {}) or scale != 1.0:
        assert not np.allclose(made, (plain / 2 + 0.5).permute(0, 2, 3, 1).numpy(), atol=1e-5)


def test_several_images_of_a_prompt_share_its_second_text(folders):
    _, ours = folders["XL"]
    call = {"num_inference_steps": 2, "seed": 0, "output_type": "pt"}
    two = ours(["a", "b"], prompt_2=["c", "d"], num_images_per_prompt=2, **call).images
    one = ours("b", prompt_2="d", first_index=3, **call).images
    torch.testing.assert_close(two[3:], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("SD", {"prompt_2": "x"}, "prompt_2 must be None: this model has no second text encoder"),
        ("SD", {"clip_skip": 3}, "clip_skip must be in 0..2, got 3"),
        ("SD", {"clip_skip": -1}, "clip_skip must be in"),
        ("XL", {"clip_skip": 2}, "clip_skip must be in 0..1, got 2"),
        ("XL", {"prompt_2": ["a", "b", "c"]}, "prompt_2 must be one text, or 1 of them; got 3"),
        ("XL", {"prompt_2": 7}, "prompt_2 must be a text"),
        (
            "XL",
            {"negative_prompt_2": "x"},
            "negative_prompt_2 must be None without negative_prompt",
        ),
    ],
)
def test_an_option_that_a_model_has_no_use_for_is_refused(name, options, message, folders):
    with pytest.raises(InvalidArgument, match=message):
        folders[name][1]("a cat", num_inference_steps=2, **options)


def test_a_model_of_classes_takes_none_of_them():
    pipe = shipped.load("mnist")
    for options in ({"clip_skip": 1}, {"prompt_2": "x"}):
        with pytest.raises(InvalidArgument, match=r"must be None: this model has no"):
            pipe(7, **options)


# --- mixtures -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:words outside the vocabulary are left out")
def test_a_mixture_is_the_weighted_sum_of_all_that_the_network_reads(words, folders):
    for pipe in (words, folders["XL"][1]):
        texts = ["a red cat", "a blue dog 7"]
        with torch.no_grad():
            one, two = (pipe.prompts.condition([text], SIZE) for text in texts)
            both = pipe.prompts.condition([mixed(texts, [0.25, 0.75])], SIZE)
        flat = lambda c: {  # noqa: E731
            **{k: v for k, v in c.items() if isinstance(v, torch.Tensor)},
            **c.get("added_cond_kwargs", {}),
        }
        for name, value in flat(both).items():
            torch.testing.assert_close(value, 0.25 * flat(one)[name] + 0.75 * flat(two)[name])


def test_a_mixture_of_one_prompt_is_that_prompt(words):
    torch.testing.assert_close(
        tokens(words, mixed(["a red 7", "a red 7"], [0.5, 0.5])), tokens(words, "a red 7")
    )
    heavy = weighted("a (red:1.5) 7")
    assert torch.equal(tokens(words, mixed([heavy], [1])), tokens(words, heavy))


@pytest.mark.parametrize(
    ("prompts", "shares", "message"),
    [
        ("a red 7", [1], "prompts must be a list"),
        ([], [], "prompts must be a list"),
        (["a", 7], [0.5, 0.5], "prompts must be a list"),
        (["a", "b"], [1], "shares must be 2 numbers with sum 1"),
        (["a", "b"], [0.5, 0.6], "shares must be 2 numbers with sum 1"),
        (["a", "b"], [0.5, "x"], "shares"),
    ],
)
def test_a_wrong_mixture_is_refused(prompts, shares, message):
    with pytest.raises(InvalidArgument, match=message):
        mixed(prompts, shares)


def test_a_mixture_has_no_second_text():
    with pytest.raises(InvalidArgument, match="must be None for a mixture"):
        mixed(["a", "b"], [0.5, 0.5]).with_options("x", None, None)
    assert isinstance(weighted("a (b)").with_options(None, None, 1), Phrase)


def test_sample_reads_weights_only_with_its_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["sample", "digits-text", "a big (red:1.0) 7", "--num", "1", "--steps", "2"]
    assert main([*line, "--png", "a.png"]) == 0
    assert main([*line, "--weights", "--png", "b.png"]) == 0
    line[2] = "a big (red:1.9) 7"
    assert main([*line, "--weights", "--png", "c.png"]) == 0
    line[2] = "a big (red 7"
    capsys.readouterr()
    assert main([*line, "--weights", "--png", "d.png"]) == 2
    assert "bracket without its other half" in capsys.readouterr().err
    assert not (tmp_path / "d.png").exists()
