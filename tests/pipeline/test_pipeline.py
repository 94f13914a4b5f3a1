"""The pipeline: seeds, guidance, folders, invalid arguments."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler as TheirDDIM
from diffusers import UNet2DModel

from minidiff import DDIMScheduler, DDPMScheduler, Pipeline, UNet
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.nn import SpaceToDepth
from minidiff.noise import image_generators, randn
from minidiff.sample import trajectory
from minidiff.schedulers.core.names import SAMPLERS, sampler

STEPS = 4


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_depends_only_on_its_seed_and_index(pipe, name):
    pipe.scheduler = sampler(name, pipe.scheduler)
    options = {"num_inference_steps": STEPS, "seed": 3, "output_type": "np"}
    together = pipe(num_images=7, **options).images.astype(int)
    split = pipe(num_images=7, batch_size=2, **options).images.astype(int)
    alone = pipe(class_labels=5, first_index=5, **options).images.astype(int)
    assert np.abs(together - split).max() <= 1
    assert np.abs(together[5] - alone[0]).max() <= 1
    other = pipe(num_images=7, **{**options, "seed": 4}).images.astype(int)
    assert np.abs(together - other).mean() > 1


def test_a_list_of_generators_gives_what_the_seed_gives(pipe):
    options = {"num_inference_steps": STEPS, "output_type": "pt"}
    by_seed = pipe([0, 1, 2], seed=9, **options).images
    by_list = pipe(
        class_labels=[0, 1, 2], generator=image_generators(9, range(3)), **options
    ).images
    assert torch.equal(by_seed, by_list)
    by_numpy = pipe(
        class_labels=[0, 1, 2], seed=np.int64(9), first_index=np.int64(0), **options
    ).images
    assert torch.equal(by_seed, by_numpy)


def test_without_labels_every_class_is_drawn_equally_often(pipe):
    labels = pipe(num_images=30, num_inference_steps=1, seed=0).labels
    assert labels.bincount().tolist() == [3] * 10


def test_guidance_scale_1_is_the_conditional_network_alone(pipe):
    """Equal to the bit, at half the cost: the unconditional half is not evaluated."""
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    plain = pipe(
        class_labels=[1, 2], num_inference_steps=2, guidance_scale=1, seed=0, output_type="pt"
    ).images
    assert sizes == [2, 2]
    denoise, x = pipe.denoiser(torch.tensor([1, 2])), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = pipe.unet(x, 500, class_labels=torch.tensor([1, 2]))
        assert torch.equal(denoise(x, 500), expected)
    guided = pipe(
        class_labels=[1, 2], num_inference_steps=2, guidance_scale=2, seed=0, output_type="pt"
    ).images
    assert sizes[-1] == 4
    assert not torch.equal(plain, guided)


def test_initial_noise_and_every_step_draw_from_one_generator(pipe):
    """A generator restarted after the initial noise would add that noise again in step one."""
    pipe.scheduler = sampler("ddpm", pipe.scheduler)
    options = {"num_inference_steps": 4, "guidance_scale": 1, "output_type": "pt"}
    images = pipe([1, 2], seed=9, **options).images
    source = image_generators(9, range(2))
    pipe.scheduler.set_timesteps(4)
    x = randn((2, *pipe.space.shape()), source) * pipe.scheduler.init_noise_sigma
    with torch.no_grad():
        *_, last = trajectory(pipe.denoiser(torch.tensor([1, 2])), pipe.scheduler, x, source)
    assert torch.equal(pipe.decode(last.next_x), images)


def test_the_callback_receives_every_step_and_the_last_one_decodes_to_the_picture(pipe):
    steps = []
    images = pipe(
        class_labels=3, seed=0, num_inference_steps=5, output_type="pt", callback=steps.append
    ).images
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert all(torch.equal(a.next_x, b.x) for a, b in pairwise(steps))
    assert torch.equal(pipe.decode(steps[-1].next_x), images)
    # the exact solver ends at the clean sample that its last step predicted
    torch.testing.assert_close(steps[-1].next_x, steps[-1].x0)


def test_all_output_types_hold_the_same_pixels(pipe):
    options = {"seed": 1, "num_inference_steps": 2}
    array = pipe([4, 5], output_type="np", **options).images
    pil = pipe([4, 5], output_type="pil", **options).images
    floats = pipe([4, 5], output_type="pt", **options).images
    assert array.shape == (2, 16, 16, 1)
    assert array.dtype == np.uint8
    assert all(np.array_equal(np.asarray(p), a[..., 0]) for p, a in zip(pil, array, strict=True))
    expected = (floats.clamp(-1, 1) + 1) * 127.5
    assert np.abs(expected.permute(0, 2, 3, 1).numpy() - array).max() <= 0.5 + 1e-3


def test_saving_and_loading_gives_the_same_pictures(pipe, tmp_path):
    pipe.scheduler = sampler("ddim", pipe.scheduler)
    pipe.save_pretrained(tmp_path / "model")
    again = Pipeline.from_pretrained(tmp_path / "model")
    options = {"num_images": 3, "num_inference_steps": 3, "seed": 0, "output_type": "pt"}
    assert torch.equal(pipe(**options).images, again(**options).images)
    assert again.scheduler.config.compat == "exact"
    assert again.class_names == pipe.class_names
    pipe.save_pretrained(tmp_path / "model")  # over the first one
    assert not list(tmp_path.glob(".*"))  # no temporary folder is left


def test_diffusers_reads_the_parts_that_the_pipeline_wrote(pipe, tmp_path):
    pipe.scheduler = sampler("ddim", pipe.scheduler)
    pipe.save_pretrained(tmp_path / "model")
    theirs = UNet2DModel.from_pretrained(tmp_path / "model" / "unet").eval()
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 10])
    with torch.no_grad():
        ours = pipe.unet(x, 300, class_labels=labels)
        torch.testing.assert_close(
            theirs(x, 300, class_labels=labels).sample, ours, rtol=1e-4, atol=1e-4
        )
    scheduler = TheirDDIM.from_pretrained(tmp_path / "model" / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: (m / "model_index.json").unlink(), "model_index.json"),
        (lambda m: (m / "model_index.json").write_text("{"), "not valid JSON"),
        (
            lambda m: (m / "model_index.json").write_text('{"_class_name": "X"}'),
            "_class_name must be one of MinidiffPipeline, Pipeline",
        ),
        (lambda m: _edit(m / "model_index.json", scheduler=["x", "Nope"]), "DDIMScheduler"),
        (lambda m: _edit(m / "model_index.json", class_names=["a"]), "class_names"),
        (lambda m: _edit(m / "model_index.json", guidance_scale=float("nan")), "guidance_scale"),
        (lambda m: _edit(m / "unet" / "config.json", block_out_channels=[24, 33]), "unet"),
        (lambda m: _edit(m / "scheduler" / "scheduler_config.json", nonsense=1), "nonsense"),
        (lambda m: _truncate(m / "unet" / "diffusion_pytorch_model.safetensors"), "safetensors"),
        (lambda m: _edit(m / "model_index.json", scheduler="DDIMScheduler"), "model_index.json"),
        (lambda m: _edit(m / "model_index.json", class_names="0123456789"), "class_names"),
        (lambda m: _edit(m / "model_index.json", class_names=[[1]] * 10), "class_names"),
        (lambda m: _edit(m / "model_index.json", class_names=list("abcdefghijk")), "no class"),
        (lambda m: _edit(m / "model_index.json", guidance_scale=10**400), "guidance_scale"),
        (lambda m: _edit(m / "unet" / "config.json", norm_eps=10**400), "unet/config.json"),
        (lambda m: _edit(m / "unet" / "config.json", layers_per_block=10**9), "unet/config.json"),
        (lambda m: _edit(m / "unet" / "config.json", block_out_channels=[16384] * 2), "tensors"),
        (lambda m: _edit(m / "unet" / "config.json", sample_size=[10**6] * 2), "unet/config.json"),
        (
            lambda m: _edit(m / "scheduler" / "scheduler_config.json", beta_end=2),
            "scheduler/scheduler_config.json: beta_end",
        ),
        (lambda m: _edit(m / "vae" / "config.json", block="2"), "vae/config.json: block"),
        (lambda m: _edit(m / "vae" / "config.json", block=3), "block must divide"),
        (lambda m: _leave_out(m / "model_index.json", "vae"), "has no vae, but there is a folder"),
    ],
)
def test_a_damaged_folder_is_refused_by_the_name_of_its_fault(pipe, tmp_path, damage, message):
    pipe.save_pretrained(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(CheckpointError, match=message):
        Pipeline.from_pretrained(tmp_path / "model")


def _edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _leave_out(path, name):
    content = json.loads(path.read_text())
    del content[name]
    path.write_text(json.dumps(content))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_a_folder_with_foreign_files_is_not_replaced(pipe, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="will not replace"):
        pipe.save_pretrained(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be in 1..1000, got 0"),
        ({"num_inference_steps": -3}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "num_inference_steps must be in 1..1000, got 1001"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number"),
        ({"num_inference_steps": True}, "num_inference_steps"),
        ({"class_labels": 10}, "class_labels must be in 0..9, got 10"),
        ({"prompt": "seven"}, "class_labels"),
        ({"prompt": 7, "class_labels": 7}, "either prompt or class_labels"),
        ({"negative_prompt": "seven"}, "negative_prompt must be None: this model takes no"),
        ({"class_labels": -1}, "class_labels"),
        ({"class_labels": [1, 2.5]}, "class_labels"),
        ({"class_labels": "seven"}, "class_labels"),
        ({"class_labels": []}, "class_labels"),
        ({"class_labels": [1, 2], "num_images": 3}, "class_labels"),
        ({"num_images": 0}, "num_images"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be finite, got nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"guidance_scale": "2"}, "guidance_scale"),
        ({"eta": 0.5}, "eta must be None for"),
        ({"seed": -1}, "seed must be in 0..4294967295, got -1"),
        ({"seed": 1, "generator": torch.Generator()}, "either seed or generator"),
        ({"num_images": 2, "generator": [torch.Generator()]}, "generator must list 2"),
        ({"seed": 2**32 - 1, "first_index": 10**30}, "first_index"),
        ({"generator": 5}, "generator must be a torch.Generator"),
        ({"num_images": 10**12}, "num_images must be in 1..1000000"),
        ({"batch_size": 0}, "batch_size"),
        ({"output_type": "jpeg"}, "output_type must be one of pil, np, pt, latent"),
    ],
)
def test_invalid_arguments_are_refused_before_the_network_runs(pipe, options, message):
    def fail(*args):
        raise AssertionError("the network ran")

    pipe.unet.register_forward_pre_hook(fail)
    with pytest.raises(InvalidArgument, match=message):
        pipe(**options)


def test_a_name_of_several_classes_is_refused_with_their_numbers(pipe):
    pipe.class_names = ("crane", "heron", "crane", *"3456789")  # as in ImageNet
    with pytest.raises(InvalidArgument, match=r"'crane' names several classes: .* \[0, 2\]"):
        pipe(class_labels="crane")
    assert pipe(class_labels="heron", num_inference_steps=1).labels.tolist() == [1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_refused_by_name(pipe, value):
    latents = torch.full((1, *pipe.space.shape()), value)
    with pytest.raises(InvalidArgument, match="latents must be finite"):
        pipe(class_labels=1, latents=latents)


@pytest.mark.parametrize("part", ["unet", "scheduler", "vae", "prompts", "weaker"])
def test_a_part_of_another_kind_is_refused_by_name(pipe, part):
    parts = {"unet": pipe.unet, "scheduler": pipe.scheduler, "vae": pipe.vae}
    for bad in (5, "x", torch.nn.Linear(2, 2), DDIMScheduler):
        with pytest.raises(InvalidArgument, match=f"{part} must be of type .*, got"):
            Pipeline(**parts | {part: bad}, class_names=pipe.class_names)


@pytest.mark.parametrize("names", [5, "0123456789", list(range(10)), None])
def test_class_names_of_another_kind_are_refused_by_name(pipe, names):
    with pytest.raises(InvalidArgument, match="class_names must be a list"):
        Pipeline(pipe.unet, pipe.scheduler, pipe.vae, class_names=names)


@pytest.mark.parametrize("folder", [5, None, ["model"], b"model"])
def test_a_folder_other_than_a_path_is_refused(folder):
    with pytest.raises(InvalidArgument, match="path must be the path of a file or folder, got"):
        Pipeline.from_pretrained(folder)


def test_a_model_without_classes_refuses_labels_and_guidance():
    unet = UNet(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    pipe = Pipeline(unet, DDPMScheduler())
    result = pipe(num_images=2, num_inference_steps=2, seed=0, output_type="np")
    assert result.labels is None
    assert result.images.shape == (2, 8, 8, 1)
    with pytest.raises(InvalidArgument, match="class_labels must be None"):
        pipe(class_labels=1)
    with pytest.raises(InvalidArgument, match="guidance_scale must be 1"):
        pipe(guidance_scale=2)
    with pytest.raises(InvalidArgument, match="guidance_rescale needs guidance, which this model"):
        pipe(guidance_rescale=0.5)
    with pytest.raises(InvalidArgument, match="class_names"):
        Pipeline(unet, DDPMScheduler(), class_names=["a", "b"])


@pytest.mark.parametrize("device", ["banana", "cpu:x", "cuda:99", 5])
def test_a_device_that_does_not_exist_is_refused(pipe, device):
    with pytest.raises(InvalidArgument, match="device"):
        pipe.to(device)
    assert pipe.to(torch.device("cpu")) is pipe


def test_a_positive_eta_makes_ddim_stochastic_and_0_does_not(pipe):
    pipe.scheduler = sampler("ddim", pipe.scheduler)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    options = {"class_labels": 3, "num_inference_steps": 4, "seed": 0, "output_type": "pt"}
    assert torch.equal(pipe(eta=0.0, **options).images, pipe(**options).images)
    assert not torch.equal(pipe(eta=1.0, **options).images, pipe(**options).images)


def test_space_to_depth_is_a_permutation_of_the_pixels():
    x = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    patches = SpaceToDepth(2)
    z = patches.to_latents(x)
    assert z.shape == (2, 12, 4, 6)
    assert torch.equal(patches.from_latents(z), x)
    assert torch.equal(z.flatten(1).sort().values, x.flatten(1).sort().values)
    with pytest.raises(InvalidArgument, match="multiples of 2"):
        patches.to_latents(x[..., :7])
