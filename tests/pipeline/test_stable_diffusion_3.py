"""Folders of Stable Diffusion 3: the pictures of diffusers, in both directions."""

import json

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import digits, stable_diffusion_3, stable_diffusion_xl

from minidiff import Pipeline
from minidiff.engines.optimize import parts
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.text.phrase import mixed, weighted
from minidiff.training.start import fixed_options

PROMPTS, NEGATIVE = ["a cat on a dog", "dog"], ["cat", ""]
STEPS = 4


@pytest.fixture(scope="module", params=[True, False], ids=["T5", "no T5"])
def pair(request, tmp_path_factory):
    """diffusers' pipeline and its folder read by minidiff."""
    folder = tmp_path_factory.mktemp("sd3")
    theirs = stable_diffusion_3(folder, request.param)
    theirs.save_pretrained(folder / "sd3")
    theirs.set_progress_bar_config(disable=True)
    return theirs, Pipeline.from_pretrained(folder / "sd3")


def given(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(seed))


def assert_same_pictures(theirs, ours, *, atol=1e-4, **options) -> None:
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0} | options
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(PROMPTS, output_type="np", **options).images
    found = ours(PROMPTS, output_type="pt", **options).images
    found = (found / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert expected.std() > 0.01
    np.testing.assert_allclose(found, expected, atol=atol)


@pytest.mark.parametrize(("negative", "scale"), [(None, 7.0), (NEGATIVE, 3.0), (None, 1.0)])
def test_a_folder_of_diffusers_gives_the_same_pictures(pair, negative, scale):
    assert_same_pictures(*pair, latents=given(), negative_prompt=negative, guidance_scale=scale)


def test_the_texts_of_the_encoders_and_skipped_layers_are_those_of_diffusers(pair):
    """A negative prompt skips no layer, in diffusers and here."""
    texts = {"prompt_2": ["dog", "cat"], "negative_prompt": NEGATIVE, "negative_prompt_2": NEGATIVE}
    assert_same_pictures(*pair, latents=given(), clip_skip=1, **texts)
    if pair[0].text_encoder_3 is not None:
        third = {"prompt_3": ["cat", "a dog"], "negative_prompt_3": ["dog", "a cat"]}
        assert_same_pictures(*pair, latents=given(), **texts, **third)


def test_sizes_other_than_those_of_training_give_the_same_pictures(pair):
    latents = torch.randn(2, 16, 12, 20)
    assert_same_pictures(*pair, latents=latents, height=24, width=40)


@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
def test_image_to_image_takes_the_steps_of_diffusers(pair, strength):
    """Stable Diffusion 3 takes ⌈strength · steps⌉ of them."""
    theirs = diffusers.StableDiffusion3Img2ImgPipeline(**pair[0].components)
    theirs.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    steps, count = 7, []
    expected = theirs(
        PROMPTS[0], image=image, strength=strength, num_inference_steps=steps, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5), output_type="np",
        callback_on_step_end=lambda pipe, i, t, tensors: count.append(t) or tensors,
    ).images  # fmt: skip
    taken = []
    found = pair[1](
        PROMPTS[0], image=2 * image - 1, strength=strength, num_inference_steps=steps,
        guidance_scale=3.0, generator=torch.Generator().manual_seed(5), output_type="pt",
        callback=taken.append,
    ).images  # fmt: skip
    assert len(taken) == len(count)
    found = (found / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("strength", [0.7, 1.0])
def test_inpainting_gives_the_pictures_of_diffusers(pair, strength):
    """Where the mask is white: minidiff puts the kept pixels back, diffusers does not.

    diffusers' pipeline leaves out the autoencoder's shift when it decodes (0.42.1), so its latents
    are decoded here.
    """
    theirs = diffusers.StableDiffusion3InpaintPipeline(**pair[0].components)
    theirs.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:24, 4:20] = 1
    options = {"strength": strength, "num_inference_steps": STEPS, "guidance_scale": 3.0}
    expected = theirs(
        PROMPTS[0], image=image, mask_image=mask, height=32, width=32, output_type="latent",
        generator=torch.Generator().manual_seed(5), **options,
    ).images  # fmt: skip
    vae = theirs.vae
    with torch.no_grad():
        expected = vae.decode(expected / vae.config.scaling_factor + vae.config.shift_factor).sample
    expected = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    found = pair[1](
        PROMPTS[0], image=2 * image - 1, mask_image=mask[0, 0], output_type="pt",
        generator=torch.Generator().manual_seed(5), **options,
    ).images  # fmt: skip
    found = (found / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    white = mask[0, 0].bool().numpy()
    np.testing.assert_allclose(found[:, white], expected[:, white], atol=1e-4)
    np.testing.assert_allclose(
        found[:, ~white], image.permute(0, 2, 3, 1).numpy()[:, ~white], atol=1e-6
    )


def test_diffusers_draws_the_same_pictures_from_a_folder_of_minidiff(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "b")
    # Without these diffusers refuses any folder that lacks them, even one that it wrote.
    absent = {} if theirs.text_encoder_3 else {"text_encoder_3": None, "tokenizer_3": None}
    again = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "b", **absent)
    again.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "latents": given(), "output_type": "np"}
    expected = theirs(PROMPTS, **options).images
    np.testing.assert_allclose(again(PROMPTS, **options).images, expected, atol=1e-6)
    assert_same_pictures(again, Pipeline.from_pretrained(tmp_path / "b"), latents=given())
    index = json.loads((tmp_path / "b" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "SD3Transformer2DModel"]
    assert "unet" not in index


def test_the_defaults_of_a_call_are_those_of_diffusers(pair):
    assert (pair[1].guidance_scale, pair[1].num_inference_steps) == (7.0, 28)


def test_a_callback_replaces_both_texts(pair):
    names = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    shapes = []

    def zeros(pipe, step, t, tensors):
        shapes.append({name: tuple(x.shape) for name, x in tensors.items()})
        return {name: torch.zeros_like(tensors[name]) for name in names[1:]}

    options = {"num_inference_steps": 2, "latents": given(), "output_type": "np"}
    options |= {
        "callback_on_step_end": zeros, "callback_on_step_end_tensor_inputs": names,
    }  # fmt: skip
    expected = pair[0](PROMPTS, guidance_scale=1.0, **options).images
    options["output_type"] = "pt"
    found = pair[1](PROMPTS, guidance_scale=1.0, **options).images
    found = (found / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert shapes[0] == shapes[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 34}, "height must be a multiple of 4, got 34"),
        ({"width": 52}, r"width must be in 1\.\.48, got 52"),
        ({"clip_skip": 2}, r"clip_skip must be in 0\.\.1, got 2"),
        ({"clip_skip": -1}, "clip_skip must be"),
        ({"prompt_2": ["a", "b", "c"]}, "prompt_2 must be one text, or 2 of them"),
        ({"prompt_2": 3}, "prompt_2 must be"),
        ({"class_labels": 3}, "class_labels must be None"),
    ],
)
def test_bad_calls_are_refused(pair, options, message):
    with pytest.raises(InvalidArgument, match=message):
        pair[1](PROMPTS, num_inference_steps=1, **options)


@pytest.mark.parametrize("name", ["prompt_3", "negative_prompt_3"])
def test_without_t5_its_texts_are_refused(pair, name):
    if pair[0].text_encoder_3 is None:
        with pytest.raises(InvalidArgument, match=f"{name} must be None: this model has no third"):
            pair[1](PROMPTS, num_inference_steps=1, negative_prompt="a", **{name: "a"})


def test_other_models_refuse_the_third_text(tmp_path):
    with pytest.raises(InvalidArgument, match="prompt_3 must be None: this model has no third"):
        digits()(num_images=1, prompt_3="a")
    stable_diffusion_xl(tmp_path).save_pretrained(tmp_path / "xl")
    with pytest.raises(InvalidArgument, match="prompt_3 must be None: this model has no third"):
        Pipeline.from_pretrained(tmp_path / "xl")("a cat", prompt_3="a dog", num_inference_steps=1)


def test_weights_and_mixtures_act_on_the_tokens_of_every_encoder(pair):
    """A weight of 1 changes nothing; one of 0 for all words leaves the empty text."""
    prompts, size = pair[1].prompts, (32, 32)

    def tokens(text):
        return prompts.condition([text], size)["encoder_hidden_states"]

    plain, empty = tokens("a cat"), tokens("")
    assert torch.equal(tokens(weighted("(a cat:1)")), plain)
    half = tokens(weighted("(a cat:0.5)"))
    moved = (half != plain).any(-1)[0]
    torch.testing.assert_close(half[:, moved], ((plain + empty) / 2)[:, moved])
    rows = prompts.tokenizer.model_max_length  # of CLIP; those of T5 are below
    assert moved[:rows].any()
    assert moved[rows:].any() == (pair[0].text_encoder_3 is not None)
    both = tokens(mixed(["a cat", "dog"], [0.25, 0.75]))
    torch.testing.assert_close(both, 0.25 * plain + 0.75 * tokens("dog"))


def test_engines_and_training_name_the_network_that_they_cannot_have(pair):
    with pytest.raises(InvalidArgument, match="engines and export need a UNet, got MMDiT"):
        parts(pair[1])
    with pytest.raises(InvalidArgument, match="must have a UNet or an MLP to train, got MMDiT"):
        fixed_options(pair[1])


def broken(tmp_path, change) -> None:
    stable_diffusion_3(tmp_path).save_pretrained(tmp_path / "sd3")
    change(tmp_path / "sd3")
    Pipeline.from_pretrained(tmp_path / "sd3")


def edited(path, **options):
    content = json.loads(path.read_text()) | options
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: edited(f / "model_index.json", text_encoder_3=[None, None]), "or neither"),
        (lambda f: edited(f / "model_index.json", text_encoder=[None, None]), "must be a library"),
        (lambda f: edited(f / "model_index.json", transformer=["diffusers", "UNet2DModel"]),
         "transformer must be one of"),
        (lambda f: edited(f / "model_index.json", tokenizer_3=["transformers", "CLIPTokenizer"]),
         "tokenizer_3 must be one of"),
        (lambda f: edited(f / "transformer" / "config.json", joint_attention_dim=41), "context_em"),
        (lambda f: edited(f / "transformer" / "config.json", qk_norm="layer_norm"), "qk_norm must"),
        (lambda f: edited(f / "transformer" / "config.json", patch_size=3), "multiple of patch"),
        (lambda f: edited(f / "text_encoder_3" / "config.json", feed_forward_proj="relu"),
         "feed_forward_proj must be"),
        (lambda f: (f / "tokenizer_3" / "tokenizer.json").unlink(), "neither tokenizer.json nor"),
        (lambda f: (f / "text_encoder_3" / "model.safetensors").unlink(), "text_encoder_3"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        broken(tmp_path, change)
