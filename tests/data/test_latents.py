"""Latents instead of images: caching, sampling, and a model trained on them."""

import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.cli import main
from minidiff.data import ImageData, load
from minidiff.data.latents import LatentData, normals
from minidiff.errors import InvalidArgument
from minidiff.nn import AutoencoderKL
from minidiff.pipeline import Pipeline
from minidiff.runs import diffusion, snapshot
from minidiff.runs.folder import open_pipeline
from minidiff.runtime.tensors import read_headers, read_tensor
from minidiff.training.build import check
from minidiff.training.config import TrainConfig
from minidiff.training.diffusion import train

CPU = torch.device("cpu")
TINY = {"channels": (8, 8), "batch_size": 8, "block": 1, "pictures": 1}
LEVELS = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
}


def untrained(channels: int = 1, **others) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(in_channels=channels, out_channels=channels, **{**LEVELS, **others})


def pictures(n: int, channels: int = 1, side: int = 8, seed: int = 0) -> ImageData:
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, channels, side, side), generator=g).to(torch.uint8)
    return ImageData("noise", images, torch.arange(n) % 3, ("a", "b", "c"))


# --- the numbers ------------------------------------------------------------------------------


def test_the_numbers_are_standard_normal_and_independent():
    x = normals(7, 0, (4000, 50), CPU).double()
    assert float(x.mean()) == pytest.approx(0, abs=4 / x.numel() ** 0.5)
    assert float(x.var()) == pytest.approx(1, abs=4 * (2 / x.numel()) ** 0.5)
    assert float((x**4).mean()) == pytest.approx(3, abs=4 * (96 / x.numel()) ** 0.5)
    # Kolmogorov–Smirnov distance to the normal distribution, 1.95/√n at the level of 0.1 %.
    order = x.flatten().sort().values
    normal = 0.5 * (1 + torch.erf(order / math.sqrt(2)))
    steps = torch.arange(1, len(order) + 1) / len(order)
    assert float((normal - steps).abs().max()) < 1.95 / len(order) ** 0.5
    off_diagonal = torch.corrcoef(x.T) - torch.eye(50)
    assert float(off_diagonal.abs().max()) < 5 / 4000**0.5


def test_a_number_depends_on_the_seed_and_the_position_alone():
    whole = normals(3, 10, (6, 4, 3, 3), CPU)
    assert torch.equal(whole[2:5], normals(3, 12, (3, 4, 3, 3), CPU))
    assert not torch.equal(whole, normals(4, 10, (6, 4, 3, 3), CPU))
    assert whole.unique().numel() == whole.numel()
    far = normals(3, 10**12, (1, 1, 1, 1), CPU)  # an odd number of them, late in a run
    assert torch.isfinite(far).all()


# --- the data ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [
    {"scaling_factor": 0.5, "shift_factor": 0.3},
    {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]},
])  # fmt: skip
def test_an_item_is_a_scaled_sample_of_the_encoders_distribution(scales):
    vae, images = untrained(**scales), pictures(300)
    data = LatentData(vae, images, seed=5)
    index = torch.tensor([299, 3, 3])
    z, labels = data.batch(index, position=1000)
    x, expected_labels = images.batch(index)
    expected = vae.scaled(vae.encode(x).at(normals(5, 1000, (3, 4, 4, 4), CPU)))
    assert torch.allclose(z, expected, atol=1e-6)
    assert torch.equal(labels, expected_labels)
    assert not torch.equal(z[1], z[2])  # the same image at two positions
    assert (data.shape, len(data), data.num_classes, data.name) == ((4, 4, 4), 300, 3, "noise")
    assert z.shape[1:] == data.shape
    assert not z.requires_grad


def test_images_are_encoded_once(monkeypatch):
    seen = []
    encode = AutoencoderKL.encode
    monkeypatch.setattr(
        AutoencoderKL, "encode", lambda self, x: seen.append(len(x)) or encode(self, x)
    )
    data = LatentData(untrained(), pictures(300))
    check(TrainConfig(steps=1, **TINY), data)
    assert seen == []  # what cannot be trained is refused before
    moved = data.to("cpu")
    assert seen == [256, 44]  # before a training's clock runs
    first, _ = moved.batch(torch.arange(5), position=2)
    again, _ = moved.to("cpu").batch(torch.arange(5), position=2)
    assert torch.equal(first, again)
    assert sum(seen) == 300


def test_data_without_labels_have_none():
    images = ImageData("noise", pictures(4).images, None, ())
    z, labels = LatentData(untrained(), images).batch(torch.arange(4))
    assert labels is None
    assert z.shape == (4, 4, 4, 4)


@pytest.mark.parametrize(
    ("images", "vae", "message"),
    [
        (pictures(4, channels=3), {}, "images with 3 channels like noise, got 1 in and 1 out"),
        (pictures(4, side=9), {}, "vae must divide images of 9×9 like noise evenly, .* by 2"),
        (ImageData("none", pictures(4).images[:0], None, ()), {}, "at least one image, got none"),
    ],
)
def test_images_that_the_autoencoder_cannot_take_are_refused(images, vae, message):
    with pytest.raises(InvalidArgument, match=message):
        LatentData(untrained(**vae), images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "block must be 1 for latents of a vae, got 2"),
        ({"block": 1, "shift": 1}, "shift must be 0 for latents of a vae, got 1"),
        ({"block": 1, "flip": True}, "flip must be False for latents of a vae, got True"),
    ],
)
def test_augmentations_are_refused_for_latents(options, message):
    data = LatentData(untrained(), pictures(4))
    with pytest.raises(InvalidArgument, match=message):
        check(TrainConfig(steps=1, **options), data)


@pytest.mark.parametrize(
    ("vae", "images", "message"),
    [
        (5, pictures(4), "vae must be of type AutoencoderKL, got 5"),
        (None, pictures(4), "vae must be of type AutoencoderKL, got None"),
        (untrained(), 5, "data must be a data set, .* got int"),
        (untrained(), "digits", "data must be a data set, .* got 'digits'"),
    ],
)
def test_an_argument_of_another_type_is_refused(vae, images, message):
    with pytest.raises(InvalidArgument, match=message):
        LatentData(vae, images)


def test_images_that_are_not_stored_are_refused():
    with pytest.raises(InvalidArgument, match="data must be stored images to be encoded, captions"):
        LatentData(untrained(3), load("captions"))


# --- training on them -------------------------------------------------------------------------


def test_the_network_works_on_latents_alone_and_the_pipeline_decodes(monkeypatch):
    """A step costs as much as on a smaller image, and the decoder runs once per image."""
    from minidiff.nn import UNet

    shapes, decoded = set(), []
    forward, decode = UNet.forward, AutoencoderKL.decode

    def watched(self, x, *args, **options):
        shapes.add(tuple(x.shape[1:]))
        return forward(self, x, *args, **options)

    monkeypatch.setattr(UNet, "forward", watched)
    monkeypatch.setattr(
        AutoencoderKL, "decode", lambda self, z: decoded.append(len(z)) or decode(self, z)
    )
    data = LatentData(untrained(), pictures(20))
    pipe = train(TrainConfig(steps=3, **TINY), data)
    assert decoded == []
    images = pipe(num_images=6, num_inference_steps=4, output_type="pt", batch_size=4).images
    assert shapes == {(4, 4, 4)}
    assert decoded == [4, 2]
    assert images.shape == (6, 1, 8, 8)
    assert pipe.image_shape == (1, 8, 8)


def test_edms_sigma_data_is_measured_on_the_latents():
    from minidiff.training.build import resolve

    data = LatentData(untrained(scaling_factor=2.0), pictures(50))
    z, _ = data.batch(torch.arange(50))
    config = resolve(TrainConfig(steps=1, prediction_type="edm", **TINY), data)
    assert config.sigma_data == pytest.approx(float(z.std()), rel=1e-3)


def test_each_step_samples_other_latents_of_an_image(monkeypatch):
    seen = []
    batch = LatentData.batch
    monkeypatch.setattr(
        LatentData, "batch",
        lambda self, index, position=0: seen.append(position) or batch(self, index, position),
    )  # fmt: skip
    train(TrainConfig(steps=3, **TINY), LatentData(untrained(), pictures(20)))
    assert seen[1:] == [0, 8, 16]  # the first is a look at the data before training


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Write forty images in two classes; four are held out."""
    folder, bytes_ = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for i in range(40):
        path = folder / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(bytes_.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def latent_run(photos, tmp_path_factory):
    """Train an autoencoder of photos and a model of its latents on the command line."""
    folder = tmp_path_factory.mktemp("runs")
    shared = ["--data", str(photos), "--batch-size", "8", "--dtype", "float32", "--channels", "8,8"]
    vae = [*shared, "--discriminator-channels", "8", "--steps", "4", "--out", str(folder / "vae")]
    model = [*shared, "--vae", str(folder / "vae"), "--steps", "8", "--save-every", "2",
             "--keep-last", "9", "--pictures", "1", "--out", str(folder / "model")]  # fmt: skip
    assert main(["train-vae", *vae]) == 0
    assert main(["train", *model]) == 0
    return folder / "model"


def test_a_folder_of_photos_becomes_a_pipeline_with_a_vae(latent_run, tmp_path):
    pipe = open_pipeline(latent_run)
    assert isinstance(pipe.vae, AutoencoderKL)
    kept = AutoencoderKL.from_pretrained(latent_run.with_name("vae") / "vae")
    assert pipe.vae.config == kept.config
    weights = pipe.vae.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in kept.state_dict().items())
    assert (latent_run / "samples.png").is_file()
    npz = tmp_path / "x.npz"
    assert main(["sample", str(latent_run), "--num", "4", "--steps", "2", "--npz", str(npz)]) == 0
    with np.load(npz, allow_pickle=False) as file:
        assert file["images"].shape == (4, 8, 8, 3)
        assert file["labels"].tolist() == [0, 1, 0, 1]
    again = Pipeline.from_pretrained(latent_run / "model")
    first, second = (p(num_images=2, seed=3, output_type="np").images for p in (pipe, again))
    assert np.array_equal(first, second)


def test_a_resumed_run_on_latents_equals_an_uninterrupted_one(latent_run, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(latent_run, cut)
    shutil.rmtree(cut / diffusion.MODEL)
    for step in (6, 8):
        shutil.rmtree(next((cut / snapshot.FOLDER).glob(f"step-*{step}")))
    assert main(["train", "--resume", str(cut)]) == 0
    for name in (snapshot.WEIGHTS, snapshot.AVERAGE, snapshot.OPTIMIZER):
        one, other = (
            read_headers([snapshot.snapshots(out)[-1] / name]) for out in (latent_run, cut)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(read_tensor(one[key]), read_tensor(other[key])) for key in one)


@pytest.mark.slow
def test_evaluate_accepts_a_latent_model(tmp_path, capsys):
    data = LatentData(untrained(scaling_factor=1.0), load("digits"))
    diffusion.train_into(tmp_path / "run", TrainConfig(steps=1, **{**TINY, "pictures": 0}), data)
    assert main(["evaluate", str(tmp_path / "run"), "--num", "192", "--steps", "1", "--seeds", "1",
                 "--parts", "samples"]) == 0  # fmt: skip
    assert "real, held out" in capsys.readouterr().out
