"""Control images in a call: equal to diffusers' ControlNet pipelines, bad ones refused by name."""

import math

import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image

from minidiff import DDIMScheduler, Pipeline, UNet
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.nn import ControlNet

diffusers = pytest.importorskip("diffusers")
PROMPT = "a photo of a cat"
HINT = {"conditioning_embedding_out_channels": (4, 6)}


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((32, 32), Image.Resampling.BILINEAR).convert(mode)


def filled(net: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Return a ControlNet whose zero convolutions hold random numbers."""
    torch.manual_seed(seed)
    for name, parameter in net.named_parameters():
        if name.startswith(("controlnet_down", "controlnet_mid", "controlnet_cond_embedding.co")):
            torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Write diffusers' pipelines with one ControlNet, with two, and SDXL's; return the folder."""
    root = tmp_path_factory.mktemp("controlled")
    plain = tiny_pipelines.stable_diffusion(root)
    nets = [
        filled(diffusers.ControlNetModel.from_unet(plain.unet, **HINT), seed) for seed in (0, 1)
    ]
    parts = {k: v for k, v in plain.components.items() if k != "image_encoder"}
    for name, controlnet in (("one", nets[0]), ("two", nets)):
        diffusers.StableDiffusionControlNetPipeline(
            **parts, controlnet=controlnet, requires_safety_checker=False
        ).save_pretrained(root / name)
    plain = tiny_pipelines.stable_diffusion_xl(root)
    net = filled(diffusers.ControlNetModel.from_unet(plain.unet, **HINT), 2)
    parts = {k: v for k, v in plain.components.items() if k != "image_encoder"}
    diffusers.StableDiffusionXLControlNetPipeline(
        **parts, controlnet=net, add_watermarker=False
    ).save_pretrained(root / "xl")
    return root


def both(folder, kind: str = "StableDiffusionControlNetPipeline"):
    """Return the pipelines of minidiff and of diffusers."""
    theirs = getattr(diffusers, kind).from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return Pipeline.from_pretrained(folder), theirs


def assert_same(ours, theirs, control, common: dict, mine: dict, other: dict) -> None:
    """Assert that both draw the same picture from the same noise."""
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    call = {"num_inference_steps": 4, "guidance_scale": 4.0} | common
    a = ours(PROMPT, latents=noise, control_image=control, output_type="pt", **call, **mine).images
    b = theirs(PROMPT, latents=noise, output_type="pt", **call, **other).images
    assert (a / 2 + 0.5).clamp(0, 1).sub(b).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("mine", "other"),
    [
        ({}, {}),
        ({"control_scale": 0.4}, {"controlnet_conditioning_scale": 0.4}),
        (
            {"control_interval": (0.2, 0.7)},
            {"control_guidance_start": 0.2, "control_guidance_end": 0.7},
        ),
        ({"guess_mode": True}, {"guess_mode": True}),
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_one_net_draws_the_picture_of_diffusers(folders, mine: dict, other: dict) -> None:
    image = picture(0)
    assert_same(*both(folders / "one"), image, {}, mine, other | {"image": image})


def test_two_nets_with_their_own_scales_and_intervals_draw_the_picture_of_diffusers(folders):
    images = [picture(0), picture(1)]
    mine = {"control_scale": [0.9, 0.5], "control_interval": [(0.0, 0.5), (0.3, 1.0)]}
    other = {
        "image": images, "controlnet_conditioning_scale": [0.9, 0.5],
        "control_guidance_start": [0.0, 0.3], "control_guidance_end": [0.5, 1.0],
    }  # fmt: skip
    assert_same(*both(folders / "two"), images, {}, mine, other)


def test_sdxl_draws_the_picture_of_diffusers(folders) -> None:
    image = picture(0)
    ours, theirs = both(folders / "xl", "StableDiffusionXLControlNetPipeline")
    mine, other = {"control_scale": 0.7}, {"controlnet_conditioning_scale": 0.7, "image": image}
    assert_same(ours, theirs, image, {}, mine, other)


def test_an_interval_counts_the_steps_of_image_to_image_alone_as_diffusers_does(folders):
    control, start = picture(0), picture(1)
    ours, theirs = both(folders / "one", "StableDiffusionControlNetImg2ImgPipeline")
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    ours.scheduler = DDIMScheduler.from_config(dict(theirs.scheduler.config))
    call = {"num_inference_steps": 8, "guidance_scale": 3.0, "strength": 0.6}
    a = ours(
        PROMPT, image=start, control_image=control, control_interval=(0.0, 0.5), output_type="pt",
        generator=torch.Generator().manual_seed(0), **call,
    ).images  # fmt: skip
    b = theirs(
        PROMPT, image=start, control_image=control, control_guidance_end=0.5, output_type="pt",
        controlnet_conditioning_scale=1.0, generator=torch.Generator().manual_seed(0), **call,
    ).images  # fmt: skip
    assert (a / 2 + 0.5).clamp(0, 1).sub(b).abs().max() < 1e-4


def test_a_copy_with_zero_convolutions_and_a_scale_of_zero_leave_pictures_bit_equal(folders):
    base = Pipeline.from_pretrained(folders / "one").with_controls([])
    assert base.controlnets == ()
    call = {"seed": 4, "num_inference_steps": 3, "output_type": "pt"}
    expected = base(PROMPT, **call).images
    fresh = base.with_controls([ControlNet.from_unet(base.unet, 1, (4, 6))])
    assert torch.equal(fresh(PROMPT, control_image=picture(0, "L"), **call).images, expected)
    trained = Pipeline.from_pretrained(folders / "one")
    zero = trained(PROMPT, control_image=picture(0), control_scale=0, **call).images
    assert torch.equal(zero, expected)
    assert not torch.equal(trained(PROMPT, control_image=picture(0), **call).images, expected)


def test_images_with_a_control_each_do_not_depend_on_the_batch(folders) -> None:
    pipe = Pipeline.from_pretrained(folders / "one")
    controls = [picture(seed) for seed in range(3)]
    call = {"seed": 1, "num_inference_steps": 3, "output_type": "pt", "control_image": controls}
    together = pipe([PROMPT] * 3, **call).images
    assert (pipe([PROMPT] * 3, batch_size=2, **call).images - together).abs().max() < 1e-5
    call["control_image"] = controls[2]
    assert (pipe(PROMPT, first_index=2, **call).images - together[2:]).abs().max() < 1e-5


def test_inpainting_and_repaint_compose_with_a_control(folders) -> None:
    pipe = Pipeline.from_pretrained(folders / "one")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    mask = np.zeros((32, 32), dtype=bool)
    mask[:, 16:] = True
    call = {
        "image": picture(1), "mask_image": mask, "num_inference_steps": 4, "seed": 0,
        "output_type": "np",
    }  # fmt: skip
    for more in ({}, {"resamples": 2}):
        steered = pipe(PROMPT, control_image=picture(0), **call, **more).images
        plain = pipe(PROMPT, control_image=picture(0), control_scale=0, **call, **more).images
        assert (steered[:, :, :16] == np.asarray(picture(1))[:, :16]).all()
        assert (steered[:, :, 16:] != plain[:, :, 16:]).any()


@pytest.mark.parametrize("name", ["two", "xl"])
def test_folders_are_written_as_diffusers_writes_them(folders, tmp_path, name: str) -> None:
    pipe = Pipeline.from_pretrained(folders / name)
    pipe.save_pretrained(tmp_path / "again")
    kind = f"StableDiffusion{'XL' if name == 'xl' else ''}ControlNetPipeline"
    ours, theirs = both(tmp_path / "again", kind)
    images = [picture(0), picture(1)] if name == "two" else picture(0)
    assert_same(ours, theirs, images, {"num_inference_steps": 2}, {}, {"image": images})
    pipe.save_pretrained(tmp_path / "again")  # its own files may be replaced


def test_a_folder_without_its_controlnet_is_refused(folders, tmp_path) -> None:
    Pipeline.from_pretrained(folders / "one").save_pretrained(tmp_path / "one")
    for file in (tmp_path / "one" / "controlnet").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match="controlnet"):
        Pipeline.from_pretrained(tmp_path / "one")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"control_image": None}, "control_image must be given"),
        ({"control_image": picture(0).resize((16, 16))}, r"must have the size of the images, \(32"),
        ({"control_image": picture(0, "L")}, "control_image must be a PIL image of mode RGB"),
        ({"control_image": torch.zeros(1, 32, 32)}, "control_image must have 3 channels"),
        ({"control_image": torch.full((3, 32, 32), 1.5)}, r"control_image of floats must lie in"),
        ({"control_image": torch.full((3, 32, 32), -0.5)}, r"must lie in \[0, 1\]"),
        ({"control_image": torch.full((3, 32, 32), math.nan)}, "control_image of floats"),
        ({"control_image": [picture(0)] * 2}, "one image, or one for each of the 1"),
        ({"control_scale": math.nan}, "control_scale must be finite"),
        ({"control_scale": [1.0, 2.0]}, "control_scale must have 1 entries"),
        ({"control_interval": (0.5, 0.5)}, "control_interval must rise"),
        ({"control_interval": (0, 1.5)}, r"control_interval must be in \[0, 1\]"),
        ({"control_interval": 0.5}, "control_interval must be a list"),
        ({"guess_mode": 1}, "guess_mode must be True or False"),
    ],
)
def test_bad_controls_are_refused_before_a_network_runs(
    folders, call, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = Pipeline.from_pretrained(folders / "one")
    for network in (UNet, ControlNet):
        monkeypatch.setattr(network, "forward", None)
    with pytest.raises(InvalidArgument, match=message):
        pipe(PROMPT, **({"control_image": picture(0)} | call))


@pytest.mark.parametrize(
    "given",
    [{"control_image": picture(0)}, {"control_scale": 0.5}, {"control_interval": (0, 0.5)},
     {"guess_mode": True}],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_a_control_without_a_controlnet_is_refused(given: dict) -> None:
    (name,) = given
    with pytest.raises(InvalidArgument, match=f"{name} needs a ControlNet"):
        tiny_pipelines.digits()(7, **given)


def test_a_net_of_another_network_is_refused_by_the_option_that_differs(folders) -> None:
    pipe = Pipeline.from_pretrained(folders / "one").with_controls([])
    config = dict(ControlNet.from_unet(pipe.unet, 3, (4, 6)).config)
    for change, message in (
        ({"block_out_channels": (8, 8)}, r"block_out_channels=\[8, 16\], got \[8, 8\]"),
        ({"cross_attention_dim": 12}, "cross_attention_dim=16, got 12"),
        ({"in_channels": 3}, "in_channels=4, got 3"),
        ({"conditioning_embedding_out_channels": (4,)}, "stride of the hint=2, got 1"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            pipe.with_controls([ControlNet(**config | change)])
    with pytest.raises(InvalidArgument, match="controlnets must be of type ControlNet"):
        pipe.with_controls([pipe.unet])
