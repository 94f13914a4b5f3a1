"""Arguments of a pipeline's call: guidance, callbacks, number types and random combinations."""

import math
from contextlib import nullcontext

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_pipelines import digits
from torch import Tensor

from minidiff import Pipeline
from minidiff.errors import InvalidArgument
from minidiff.guidance import autoguidance, extrapolated, projected, thresholded
from minidiff.sample import Step, meaning_of
from minidiff.schedulers.core.names import SAMPLERS, sampler

PROMPTS, NEGATIVE = ["a cat on a dog", "dog"], ["cat", ""]


OPTIONS = {"num_inference_steps": 4, "guidance_scale": 4.0}


def ours(pipe: Pipeline, **options) -> np.ndarray:
    images = pipe(PROMPTS, output_type="pt", **OPTIONS, **options).images
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def theirs(folder, **options) -> np.ndarray:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPTS, output_type="np", **OPTIONS, **options).images


@pytest.mark.parametrize("rescale", [0.7, 1.0])
def test_guidance_rescale_gives_the_pictures_of_diffusers(latent_folder, latent_pipe, rescale):
    options = {"guidance_rescale": rescale, "negative_prompt": NEGATIVE}
    options["latents"] = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(
        ours(latent_pipe, **options), theirs(latent_folder, **options), atol=1e-4
    )


def test_a_callback_receives_and_changes_the_latents_as_in_diffusers(latent_folder, latent_pipe):
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    calls: dict[str, list] = {"ours": [], "theirs": []}

    def halving(kind: str):
        def on_step_end(pipe: object, step: int, t: object, kwargs: dict) -> dict[str, Tensor]:
            calls[kind].append((step, int(t), kwargs["latents"]))
            return {"latents": kwargs["latents"] * 0.5} if step == 1 else {}

        return on_step_end

    steps: list[Step] = []
    mine = ours(
        latent_pipe, latents=latents, callback_on_step_end=halving("ours"), callback=steps.append
    )
    expected = theirs(latent_folder, latents=latents, callback_on_step_end=halving("theirs"))
    np.testing.assert_allclose(mine, expected, atol=1e-4)
    for (step, t, x), (step_, t_, x_) in zip(*calls.values(), strict=True):
        assert (step, t) == (step_, t_)
        torch.testing.assert_close(x, x_, rtol=1e-3, atol=1e-4)
    assert torch.equal(steps[1].next_x, calls["ours"][1][2] * 0.5)
    assert torch.equal(steps[2].x, steps[1].next_x)


@pytest.mark.parametrize("answer", [{"prompt_embeds": torch.zeros(1)}, {"latents": torch.zeros(3)}])
def test_a_callback_that_returns_anything_but_latents_is_refused(latent_pipe, answer):
    with pytest.raises(
        InvalidArgument, match=r"callback_on_step_end may return None, or any of \{'latents'"
    ):
        latent_pipe("a cat", callback_on_step_end=lambda *args: answer, num_inference_steps=2)


def test_guidance_does_not_change_the_pictures_of_an_empty_prompt(latent_pipe):
    """Both outputs are equal there, c = u."""
    options = {"num_inference_steps": 3, "seed": 0, "output_type": "pt"}
    alone = latent_pipe("", guidance_scale=1, **options).images
    guided = latent_pipe("", guidance_scale=9, **options).images
    torch.testing.assert_close(guided, alone, rtol=1e-3, atol=1e-3)
    assert (latent_pipe("a cat", guidance_scale=9, **options).images - alone).abs().max() > 1e-2
    unconditional = latent_pipe(
        "a cat", guidance_scale=9, guide=lambda pair, w: extrapolated(pair, 0), **options
    ).images
    torch.testing.assert_close(unconditional, alone, rtol=1e-3, atol=1e-3)


def test_an_interval_of_all_levels_guides_every_step_and_an_interval_of_none_no_step(latent_pipe):
    options = {"num_inference_steps": 4, "seed": 0, "output_type": "pt"}
    guided = latent_pipe("a cat", guidance_scale=5, **options).images
    plain = latent_pipe("a cat", guidance_scale=1, **options).images

    def in_interval(low: float, high: float) -> Tensor:
        sizes.clear()
        return latent_pipe(
            "a cat", guidance_scale=5, guidance_interval=(low, high), **options
        ).images

    sizes: list[int] = []
    latent_pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    assert torch.equal(in_interval(0, math.inf), guided)
    assert torch.equal(in_interval(1e5, 1e6), plain)
    assert sizes == [1, 1, 1, 1]
    part = in_interval(0.5, 3)
    assert set(sizes) == {1, 2}
    assert not torch.equal(part, guided)
    assert not torch.equal(part, plain)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++"])
def test_guidance_methods_compose_from_outside(name):
    """By `guide=`, from a pair of outputs; and by `wraps`, from whole denoisers."""
    pipe, weak = digits(), digits()
    pipe.scheduler = sampler(name, pipe.scheduler)
    torch.nn.init.normal_(weak.unet.conv_out.weight, std=0.1)
    options = {"num_inference_steps": 4, "seed": 0, "output_type": "pt", "guidance_scale": 4.0}
    plain = pipe([1, 2], **options).images

    def guided(guide) -> Tensor:
        return pipe([1, 2], guide=guide, **options).images

    assert torch.equal(guided(extrapolated), plain)
    meaning = meaning_of(pipe.scheduler)
    unprojected = guided(lambda pair, w: projected(pair, w, meaning, parallel=1, momentum=0))
    torch.testing.assert_close(unprojected, plain, rtol=1e-3, atol=1e-3)
    predicted: list[Tensor] = []
    clipped = pipe(
        [1, 2],
        guide=lambda pair, w: thresholded(extrapolated(pair, w), meaning, ratio=1.0),
        callback=lambda step: predicted.append(step.x0),
        **options,
    ).images
    assert max(x0.abs().max() for x0 in predicted) < 1 + 1e-3
    assert not torch.equal(clipped, plain)

    bad = weak.denoiser(torch.tensor([1, 2]))
    pipe.wraps.append(lambda denoise: autoguidance(denoise, bad, options["guidance_scale"]))
    unguided = options | {"guidance_scale": 1}
    autoguided = pipe([1, 2], **unguided).images
    assert not torch.equal(autoguided, plain)
    weak.unet.load_state_dict(pipe.unet.state_dict())
    by_itself = pipe([1, 2], **unguided).images
    pipe.wraps.clear()
    torch.testing.assert_close(
        by_itself, pipe([1, 2], **options | {"guidance_scale": 1}).images, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_network_runs_in_16_bits(latent_pipe, dtype):
    """Guidance, the sampler's arithmetic and samples stay in float32."""
    options = {"num_inference_steps": 4, "seed": 0, "output_type": "pt", "guidance_scale": 5}
    expected = latent_pipe("a cat", **options).images
    dtypes: list[torch.dtype] = []
    latent_pipe.unet.conv_out.register_forward_hook(
        lambda module, args, out: dtypes.append(out.dtype)
    )

    def in_float32(pair, scale: float):
        def denoise(x: Tensor, t: float) -> Tensor:
            c, u = pair(x, t)
            assert c.dtype == u.dtype == x.dtype == torch.float32
            return u + scale * (c - u)

        return denoise

    result = latent_pipe.to(dtype=dtype)("a cat", guide=in_float32, **options).images
    assert set(dtypes) == {dtype}
    assert next(latent_pipe.unet.parameters()).dtype == torch.float32
    assert result.dtype == torch.float32
    assert 0 < (result - expected).abs().max() < 0.15
    assert torch.equal(latent_pipe.to(dtype=torch.float32)("a cat", **options).images, expected)


def test_images_of_one_prompt_follow_each_other(latent_pipe):
    options = {"num_inference_steps": 2, "seed": 0, "output_type": "pt"}
    repeated = latent_pipe(
        PROMPTS, negative_prompt=NEGATIVE, num_images_per_prompt=2, **options
    ).images
    listed = latent_pipe(
        [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2,
        negative_prompt=[NEGATIVE[0]] * 2 + [NEGATIVE[1]] * 2,
        **options,
    ).images
    assert torch.equal(repeated, listed)
    labels = digits()([3, 5], num_images_per_prompt=3, num_inference_steps=1).labels
    assert labels.tolist() == [3, 3, 3, 5, 5, 5]


def test_a_progress_bar_counts_steps(latent_pipe, capsys):
    latent_pipe(PROMPTS, num_inference_steps=3, batch_size=1, progress=True)
    assert "6/6" in capsys.readouterr().err


def test_a_prompt_that_is_too_long_warns_with_the_words_that_are_cut(latent_pipe):
    with pytest.warns(UserWarning, match="is cut off: '.*dog'"):
        latent_pipe("cat " * 12 + "dog", num_inference_steps=1, guidance_scale=1)


PIPE, BROKEN = digits(), digits()


@settings(max_examples=10, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
@given(st.data())
def test_a_picture_does_not_depend_on_its_batch_under_any_options(data):
    """One picture of a batch equals the same picture drawn alone."""
    pipe = PIPE
    draw = data.draw
    pipe.scheduler = sampler(draw(st.sampled_from(sorted(SAMPLERS))), pipe.scheduler)
    n, i = draw(st.integers(2, 5)), draw(st.integers(0, 1))
    source = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    options = {
        "num_inference_steps": draw(st.integers(2, 4)),
        "guidance_scale": draw(st.sampled_from([0.0, 1.0, 3.0])),
        "guidance_rescale": draw(st.sampled_from([0.0, 0.5])),
        "guidance_interval": draw(st.sampled_from([None, (0.2, 2.0)])),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "output_type": "np",
    }
    images = {}
    if draw(st.booleans()):
        images["image"] = torch.rand(n, 1, 16, 16, generator=source) * 2 - 1
        options["strength"] = draw(st.sampled_from([0, 0.5, 1]))
        if draw(st.booleans()):
            images["mask_image"] = torch.rand(n, 1, 16, 16, generator=source).round()
            if len(pipe.scheduler.timesteps) and type(pipe.scheduler).__name__[:4] != "Heun":
                options["resamples"] = draw(st.integers(1, 2))
    labels = draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    batch_size = draw(st.integers(1, n))
    chosen = {name: value[i : i + 1] for name, value in images.items()}
    unguided = pytest.warns(UserWarning, match="guidance_scale 0 samples the unconditional network")
    with nullcontext() if options["guidance_scale"] else unguided:
        together = pipe(labels, batch_size=batch_size, **images, **options).images
        alone = pipe(labels[i : i + 1], first_index=i, **chosen, **options).images
    assert np.abs(together[i].astype(int) - alone[0].astype(int)).max() <= 1


INVALID = {
    "class_labels": st.sampled_from([11, -1, "seven", [], [1.5]]),
    "num_inference_steps": st.sampled_from([0, -1, 2.5, "ten", 10**9, math.nan]),
    "guidance_scale": st.sampled_from([math.nan, math.inf, "big", [1]]),
    "guidance_rescale": st.sampled_from([-0.1, 1.1, math.nan, "half"]),
    "guidance_interval": st.sampled_from([(1, 0), 5, (math.nan, 1), ("a", "b"), (1, 2, 3)]),
    "strength": st.sampled_from([0.5, 2, math.nan, "half"]),
    "eta": st.sampled_from([-1, 2, math.nan, "some"]),
    "seed": st.sampled_from([-1, 2**32, 1.5, "seed"]),
    "output_type": st.sampled_from(["jpeg", None, 3]),
    "batch_size": st.sampled_from([0, -4, 1.5]),
    "height": st.sampled_from([0, 15, -16, "tall", 10**9]),
    "latents": st.sampled_from([torch.zeros(1), "noise", torch.zeros(1, 4, 8, 8).int()]),
    "image": st.sampled_from(["cat.png", 3, torch.ones(1, 3, 16, 16), torch.full((16, 16), 2.0)]),
    "mask_image": st.sampled_from([torch.zeros(16, 16), "mask"]),
    "resamples": st.sampled_from([0, 2, "many"]),
    "num_images_per_prompt": st.sampled_from([0, -1, "two"]),
    "negative_prompt": st.sampled_from(["four", 4]),
    "callback_on_step_end": st.sampled_from([3, "print"]),
    "callback": st.sampled_from([3, "print"]),
    "progress": st.sampled_from([1, "yes"]),
    "guide": st.sampled_from([3, "projected"]),
    "generator": st.sampled_from([5, "random", [torch.Generator()] * 3, [1]]),
}  # fmt: skip


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(INVALID)).flatmap(lambda name: st.tuples(st.just(name), INVALID[name]))
)
def test_invalid_input_never_reaches_the_network(invalid):
    name, value = invalid
    BROKEN.unet.forward = None  # fails when it is called
    with pytest.raises(InvalidArgument, match=name.split("_")[0]):
        BROKEN(**{"num_inference_steps": 2, name: value})
