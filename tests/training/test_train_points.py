"""A model of points is trained, saved, resumed and refused like one of images."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from minidiff.data import PointData, load, toys
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.lab.points import score
from minidiff.nn import MLP, SpaceToDepth, UNet
from minidiff.pipeline import Pipeline
from minidiff.runs import diffusion
from minidiff.runs.autosave import Saving
from minidiff.runtime import files
from minidiff.training.build import build
from minidiff.training.config import TrainConfig
from minidiff.training.diffusion import train
from minidiff.training.presets import PRESETS, fitting, preset_for

POINTS = PRESETS["points"].train
SHORT = replace(POINTS, minutes=None, steps=60, batch_size=256, pictures=0)


@pytest.fixture(scope="module")
def ring() -> Pipeline:
    return train(SHORT, load("ring"), progress=False)


def test_sixty_steps_draw_each_class_near_its_gaussian(ring):
    points, labels, _ = ring(num_images=400, seed=0, output_type="np")
    assert points.dtype == np.float32
    nearest = torch.cdist(torch.from_numpy(points).double(), toys.mixture("ring").means).min(1)
    assert (nearest.indices == labels).double().mean() > 0.9
    assert (nearest.values < 0.5).double().mean() > 0.8


@pytest.mark.slow
def test_the_preset_reaches_93_percent_near_a_mode_in_20_cpu_seconds():
    """A thousand steps take about 15 seconds of one core."""
    pipe = train(replace(POINTS, minutes=None, steps=1000, pictures=0), load("ring"))
    points = pipe(num_images=10_000, seed=1, output_type="pt", progress=False).images
    found = score(points, "ring")
    assert found.near > 0.93
    assert found.modes == 8
    assert found.distance < 0.05


def test_a_pipeline_of_points_survives_its_folder(ring, tmp_path):
    ring.save_pretrained(tmp_path / "model")
    again = Pipeline.from_pretrained(tmp_path / "model")
    assert isinstance(again.unet, MLP)
    assert again.image_shape == (2,)
    assert again.class_names == ring.class_names
    ours, theirs = (p(num_images=9, seed=3, output_type="pt").images for p in (ring, again))
    assert torch.equal(ours, theirs)
    index = files.read_json(tmp_path / "model" / "model_index.json")
    assert index["_class_name"] == "MinidiffPipeline"
    assert index["unet"] == ["minidiff", "MLP"]


def test_an_mlp_is_refused_by_name_where_a_unet_is_required(ring, tmp_path):
    ring.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="'MLP'"):
        UNet.from_pretrained(tmp_path / "model" / "unet")
    path = tmp_path / "model" / "model_index.json"
    files.write_json(path, {**files.read_json(path), "_class_name": "DDPMPipeline"})
    with pytest.raises(CheckpointError, match=r"unet must be one of .* got 'MLP'"):
        Pipeline.from_pretrained(tmp_path / "model")
    with pytest.raises(InvalidArgument, match="vae must be None for points, got SpaceToDepth"):
        Pipeline(ring.unet, ring.scheduler, SpaceToDepth(2), ring.class_names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "output_type of points must be one of np, pt, latent; got 'pil'"),
        ({"output_type": "np", "image": np.zeros((4, 4, 1))}, "image must be None: this model"),
        ({"output_type": "np", "mask_image": np.zeros((4, 4))}, "mask_image must be None"),
        ({"output_type": "np", "height": 8}, "height must be None: this model draws points, got 8"),
        ({"output_type": "np", "latents": torch.zeros(1, 3)}, r"latents must be .* \(1, 2\)"),
        ({"output_type": "np", "class_labels": "north"}, "class_labels must be one of"),
    ],
)
def test_arguments_of_images_are_refused_for_points(ring, arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        ring(**arguments)


def test_points_do_not_depend_on_the_batch_and_walk_as_they_are_called(ring):
    whole = ring(num_images=7, seed=5, output_type="pt").images
    parts = ring(num_images=7, seed=5, output_type="pt", batch_size=3).images
    assert (whole - parts).abs().max() < 1e-5
    last = list(ring.walk(num_images=7, seed=5, output_type="pt"))[-1]
    assert torch.equal(last.next_images, whole)


def test_a_resumed_run_of_points_ends_in_the_same_bits(tmp_path):
    config, data = replace(SHORT, steps=6, batch_size=16), load("ring")
    saving = Saving(save_every=2, keep_last=5)
    pipe = diffusion.train_into(tmp_path / "run", config, data, saving=saving)
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000006")
    again = diffusion.resume(tmp_path / "run", data, print_line=lambda line: None)
    for one, other in zip(pipe.unet.parameters(), again.unet.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(CheckpointError, match="was trained on"):
        diffusion.resume(tmp_path / "run", load("moons"))
    moved = PointData("ring", data.points + 1, data.labels, data.class_names)
    with pytest.raises(CheckpointError, match="points of its data have changed"):
        diffusion.resume(tmp_path / "run", moved)


def test_a_training_continues_from_a_model_of_points(ring):
    before = [weight.clone() for weight in ring.unet.parameters()]
    config = TrainConfig(steps=2, batch_size=16, pictures=0)
    pipe = train(config, load("ring"), start=ring, progress=False)
    assert pipe.unet.config == ring.unet.config
    pairs = zip(before, ring.unet.parameters(), pipe.unet.parameters(), strict=True)
    assert all(torch.equal(old, same) and not torch.equal(old, new) for old, same, new in pairs)
    with pytest.raises(InvalidArgument, match=r"data must be of shape \(2,\).* digits are"):
        train(replace(config, block=1), load("digits"), start=ring, progress=False)
    with pytest.raises(InvalidArgument, match="data must have 8 classes"):
        train(config, load("moons"), start=ring, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 4}, "block must be 1 for ring, got 4"),
        ({"shift": 1}, "shift must be 0 for ring, got 1"),
        ({"flip": True}, "flip must be False for ring, got True"),
        ({"dropout": 0.1}, "dropout must be 0.0 for ring, got 0.1"),
        ({"learn_variance": True}, "learn_variance must be False for ring, got True"),
    ],
)
def test_options_of_images_are_refused_for_points(options, message, tmp_path):
    config = TrainConfig(steps=1, **options)
    with pytest.raises(InvalidArgument, match=message):
        train(config, load("ring"))
    with pytest.raises(InvalidArgument, match=message):
        diffusion.train_into(tmp_path / "run", config, load("ring"))
    assert not (tmp_path / "run").exists()


def test_points_of_other_dimensions_without_labels_are_trained_on():
    points = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    data = PointData("cloud", points, None, ())
    pipe = train(replace(SHORT, steps=3), data, progress=False)
    assert pipe(num_images=5, seed=0, output_type="pt").images.shape == (5, 3)
    assert pipe.unet.config.num_class_embeds is None


def test_a_network_of_points_begins_as_zero():
    pipe = build(SHORT, load("ring"))
    assert not pipe.unet(torch.randn(4, 2), 500, torch.zeros(4, dtype=torch.long)).any()


def test_the_preset_follows_from_the_data():
    for name in toys.NAMES:
        assert fitting(name, gpu=False) == fitting(name, gpu=True) == "points"
    assert preset_for("anything", (3,), gpu=False) == POINTS
    assert preset_for("anything", (1, 28, 28), gpu=False).channels != POINTS.channels
