"""The autoencoder's training: each term of its loss, what it writes, and what it refuses."""

import json
import math
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from minidiff.cli import main
from minidiff.data import ImageData, load
from minidiff.data.latents import LatentData, encode_moments, with_unit_latents
from minidiff.errors import CheckpointError, InvalidArgument, TrainingError
from minidiff.nn import AutoencoderKL
from minidiff.nn.blocks.gaussian import DiagonalGaussian
from minidiff.nn.discriminator import PatchDiscriminator
from minidiff.runs.autoencoder import measure, open_vae, reconstructed, side_by_side
from minidiff.training.autoencoder import balance, bound, build, check, hinge, train_vae, verdict
from minidiff.training.config import VAE_OPTIONS, TrainConfig, VAEConfig

TINY = {"channels": (8, 8), "discriminator_channels": (8, 8), "batch_size": 16}
STEPS = 24  # the last half of them before a discriminator


@pytest.fixture(scope="module")
def digits() -> ImageData:
    """A tenth of the digits, which takes a tenth of the time to measure."""
    all_ = load("digits")
    return ImageData(all_.name, all_.images[:1000], all_.labels[:1000], all_.class_names)


@pytest.fixture(scope="module")
def trained(digits) -> tuple[AutoencoderKL, list]:
    """A short run and the rows of its log."""
    rows = []
    return train_vae(VAEConfig(steps=STEPS, **TINY), digits, on_log_row=rows.append), rows


def test_the_loss_falls(trained):
    _, rows = trained
    assert len(rows) == STEPS
    assert rows[-1].images == STEPS * 16
    assert rows[-1].learning_rate == 0
    assert rows[-1].loss < 0.7 * rows[0].loss


def test_the_latents_of_held_out_images_have_zero_mean_and_unit_variance(trained):
    held_out = LatentData(trained[0], load("digits", "test"), seed=3)
    std, mean = torch.std_mean(held_out.batch(torch.arange(len(held_out)))[0])
    assert float(std) == pytest.approx(1, abs=0.05)
    assert float(mean) == pytest.approx(0, abs=0.05)


def test_shift_and_scale_are_those_of_samples_of_the_latents(trained, digits):
    vae, _ = trained
    posterior = DiagonalGaussian(encode_moments(vae, digits))
    draws = posterior.sample(torch.Generator().manual_seed(0)).double()
    assert vae.config.shift_factor == pytest.approx(float(draws.mean()), abs=0.01)
    assert 1 / vae.config.scaling_factor == pytest.approx(float(draws.std()), rel=0.01)


def test_latents_that_do_not_vary_cannot_be_scaled(trained, digits):
    vae = AutoencoderKL(**{**trained[0].config})
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.fill_(math.nan)
    with pytest.raises(
        TrainingError, match="the latents of digits have a standard deviation of na"
    ):
        with_unit_latents(vae, digits)


@pytest.mark.parametrize(("name", "power"), [("l1", 1), ("l2", 2)])
def test_the_bound_is_the_error_of_a_pixel_and_the_weighted_divergence(name, power):
    g = torch.Generator().manual_seed(0)
    x, made = torch.randn(2, 3, 1, 8, 8, generator=g)
    posterior = DiagonalGaussian(torch.randn(3, 4, 4, 4, generator=g))
    q = torch.distributions.Normal(posterior.mean, posterior.std)
    p = torch.distributions.Normal(0.0, 1.0)
    divergence = torch.distributions.kl_divergence(q, p).sum() / 3
    expected = (x - made).abs().pow(power).mean() + 0.3 * divergence / 64
    config = VAEConfig(steps=1, reconstruction=name, kl_weight=0.3)
    assert float(bound(x, made, posterior, config)) == pytest.approx(float(expected), rel=1e-6)


def test_the_adversarial_loss_reaches_the_decoder_through_the_image_alone(digits):
    """The gradient is that of the image times the discriminator's gradient, and nothing else."""
    vae, judge = build(VAEConfig(steps=1, **TINY), digits)
    x, _ = digits.batch(torch.arange(4))
    made = vae(x)
    verdict(judge.requires_grad_(False), made).backward(retain_graph=True)
    direct = [p.grad.clone() for p in vae.decoder.parameters()]
    assert all(p.grad is None for p in judge.parameters())
    image = made.detach().requires_grad_()
    (pull,) = torch.autograd.grad(verdict(judge, image), image)
    through = torch.autograd.grad(made, list(vae.decoder.parameters()), pull)
    assert any(float(g.abs().max()) > 0 for g in direct)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(direct, through, strict=True))


def test_the_discriminators_loss_does_not_reach_the_decoder(digits):
    vae, judge = build(VAEConfig(steps=1, **TINY), digits)
    x, _ = digits.batch(torch.arange(4))
    hinge(judge, x, vae(x)).backward()
    assert all(p.grad is None for p in vae.parameters())
    assert all(p.grad is not None for p in judge.parameters())


def test_the_hinge_loss_ignores_confident_right_verdicts():
    def judge(image):
        return image

    real, made = torch.tensor([3.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    # ½·mean(0, ½, 2) + ½·mean(0, 1, 2)
    assert float(hinge(judge, real, made)) == pytest.approx(0.5 * 2.5 / 3 + 0.5 * 1)
    assert float(verdict(judge, made)) == pytest.approx(1 / 3)


def test_balanced_terms_have_equal_gradient_norms_at_the_last_layer():
    last = nn.Parameter(torch.tensor([1.0, 2.0]))
    error, judged = (last * torch.tensor([3.0, 4.0])).sum(), (last * torch.tensor([0, 0.1])).sum()
    scale = balance(error, judged, last)
    assert float(scale) == pytest.approx(5 / 0.1, rel=1e-4)
    assert not scale.requires_grad
    assert float(balance(error, 0 * judged, last)) == 1e4  # an indifferent judge


def test_a_patch_has_the_documented_width():
    """Without the norms, which depend on the whole image, one output depends on a patch."""
    for levels in (1, 2, 3):
        judge = PatchDiscriminator(1, (8,) * levels)
        plain = nn.Sequential(*(m for m in judge if isinstance(m, nn.Conv2d)))
        x = torch.randn(1, 1, 64, 64, requires_grad=True)
        answer = plain(x)
        assert answer.shape == (1, 1, 64 >> levels, 64 >> levels)
        middle = answer.shape[-1] // 2
        answer[0, 0, middle, middle].backward()
        seen = x.grad[0, 0].abs().sum(0).nonzero()
        assert int(seen.max() - seen.min()) + 1 == 5 * 2**levels - 2


def test_the_discriminator_is_used_from_adversarial_start_on(digits, trained):
    """Until then a run without a discriminator is the same, and afterwards it is not."""
    rows = []
    train_vae(VAEConfig(steps=STEPS, adversarial_weight=0, **TINY), digits, on_log_row=rows.append)
    same = [one.loss == other.loss for one, other in zip(rows, trained[1], strict=True)]
    first = STEPS // 2 + 1  # the step after the first with a verdict shows what it did
    assert same == [True] * first + [False] * (STEPS - first)


def test_a_run_repeats_bit_for_bit_and_leaves_the_callers_random_state(digits, trained):
    torch.manual_seed(1234)
    state = torch.random.get_rng_state()
    again = train_vae(VAEConfig(steps=STEPS, **TINY), digits)
    assert torch.equal(state, torch.random.get_rng_state())
    weights = trained[0].state_dict()
    assert all(torch.equal(weights[name], value) for name, value in again.state_dict().items())
    assert again.config == trained[0].config


def test_a_loss_that_is_not_finite_stops_the_run(digits):
    with (
        pytest.warns(UserWarning, match="z must be finite, got NaN"),
        pytest.raises(TrainingError, match=r"is not finite at step \d+\. Likely: a learning rate"),
    ):
        train_vae(VAEConfig(steps=50, learning_rate=1e30, **TINY), digits)


def test_attention_colour_oblong_sides_and_other_losses_train():
    images = torch.randint(0, 256, (12, 3, 8, 12), dtype=torch.uint8)
    data = ImageData("stripes", images, None, ())
    config = VAEConfig(
        steps=3, attention=True, reconstruction="l2", final_batch_size=32, adversarial_start=0,
        latent_channels=2, layers=2, **{**TINY, "discriminator_channels": (8,)},
    )  # fmt: skip
    vae = train_vae(config, data)
    assert vae.config.sample_size == (8, 12)
    assert vae.encode(torch.zeros(1, 3, 8, 12)).mean.shape == (1, 2, 4, 6)
    made = reconstructed(vae, data)
    assert made.shape == images.shape
    assert made.dtype == torch.uint8


# --- the folder -------------------------------------------------------------------------------


def call(out: Path, data: Path | str, *others: str) -> list[str]:
    return ["train-vae", "--data", str(data), "--out", str(out), "--dtype", "float32",
            "--steps", "20", "--channels", "8,8", "--discriminator-channels", "8",
            "--batch-size", "16", *others]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Three hundred images; thirty are held out."""
    folder, numbers = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(300):
        pixels = np.full((8, 8), i % 200, np.uint8)
        pixels[i % 8] = numbers.integers(0, 256, 8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return folder


@pytest.fixture(scope="module")
def vae_run(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "vae"
    assert main(call(out, photos)) == 0
    return out


def test_a_run_writes_its_config_log_and_results(photos, vae_run, tmp_path, capsys):
    config = json.loads((vae_run / "config.json").read_text())
    assert config["data"]["images"] == 270
    assert config["train"]["channels"] == [8, 8]
    assert config["train"]["kl_weight"] == VAEConfig(steps=1).kl_weight
    rows = [json.loads(line) for line in (vae_run / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 20
    with Image.open(vae_run / "reconstructions.png") as picture:
        assert picture.size == (10 * 2 * 9 - 2, 6 * 2 * 9 - 2)
    again = ["train-vae", "--data", str(photos), "--config", str(vae_run / "config.json")]
    assert main([*again, "--steps", "20", "--out", str(tmp_path / "again")]) == 0
    printed = capsys.readouterr().out
    assert "30 held-out images" in printed
    assert re.search(r"error of a pixel  \d+\.\d\d of 255, PSNR \d+\.\d dB", printed)
    assert re.search(r"standard deviation (0\.9[5-9]|1\.0[0-4])", printed)
    assert "FD" not in printed  # no classifier knows these
    weights = Path("vae") / "diffusion_pytorch_model.safetensors"
    assert (vae_run / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()


@pytest.mark.slow
def test_reconstructions_of_digits_are_scored_with_the_images_themselves(tmp_path, capsys):
    assert main(call(tmp_path / "run", "digits")) == 0
    printed = capsys.readouterr().out
    assert re.search(r"reconstructed     accuracy .*, FD \d+\.\d\d ‰", printed)
    assert re.search(r"real, held out    accuracy 100\.00%, FD 0\.18 ‰", printed)


def test_diffusers_reads_the_folder(vae_run):
    ours = open_vae(vae_run)
    theirs = diffusers.AutoencoderKL.from_pretrained(vae_run / "vae")
    assert theirs.config.scaling_factor == ours.config.scaling_factor
    assert theirs.config.shift_factor == ours.config.shift_factor
    x = torch.rand(8, 1, 8, 8) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(x).latent_dist
        assert torch.allclose(ours.encode(x).mean, posterior.mean, atol=1e-5)
        assert torch.allclose(ours.encode(x).std, posterior.std, atol=1e-5)
        assert torch.allclose(
            ours.decode(posterior.mean), theirs.decode(posterior.mean).sample, atol=1e-5
        )


def test_the_measures_agree_with_their_definitions():
    data = ImageData("noise", torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8), None, ())
    vae, _ = build(VAEConfig(steps=1, **TINY), data)
    perfect = measure(vae, data.images, data, data)
    assert (perfect.l1, perfect.psnr, perfect.made) == (0, math.inf, None)
    made = data.images.clone()
    made[::2] = torch.where(made[::2] < 128, made[::2] + 10, made[::2] - 10)
    half = measure(vae, made, data, data)
    assert half.l1 == pytest.approx(5)
    assert half.psnr == pytest.approx(10 * math.log10(255**2 / 50))


def test_below_each_row_of_images_are_its_reconstructions():
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 1, 2, 2)
    picture = np.asarray(side_by_side(images, images + 100))
    assert picture[::6, ::6].tolist() == [
        [*range(10)], [*range(100, 110)], [*range(10, 20)], [*range(110, 120)],
    ]  # fmt: skip


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": None}, "either minutes or steps"),
        ({"reconstruction": "l3"}, "reconstruction must be one of l1, l2; got 'l3'"),
        ({"kl_weight": -1}, "kl_weight must be finite and at least 0"),
        ({"kl_weight": math.nan}, "kl_weight"),
        ({"adversarial_weight": -0.1}, "adversarial_weight"),
        ({"adversarial_start": 1.1}, r"adversarial_start must be in \[0, 1\], got 1.1"),
        ({"discriminator_channels": ()}, "discriminator_channels must list at least 1"),
        ({"latent_channels": 0}, "latent_channels must be at least 1, got 0"),
        ({"channels": (8, 0)}, "channels must be at least 1, got 0"),
        ({"layers": 0}, "layers"),
        ({"attention": 1}, "attention must be True or False"),
        ({"batch_size": 0}, "batch_size"),
        ({"dtype": "half"}, "dtype"),
    ],
)
def test_a_bad_option_is_refused_when_the_config_is_built(options, message):
    with pytest.raises(InvalidArgument, match=message):
        VAEConfig(**{"steps": 1, **options})


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((10, 10), {"channels": (8, 8, 8)}, "channels must have few enough levels .* 10×10"),
        ((8, 8), {"discriminator_channels": (8,) * 4}, "discriminator_channels must have"),
        ((8, 8), {"layers": 99}, "layers_per_block must be in 1..16, got 99"),
        ((8, 8), {"channels": (8,) * 9}, "number of block_out_channels"),
    ],
)
def test_networks_that_do_not_fit_the_images_are_refused(size, options, message):
    data = ImageData("grey", torch.zeros(4, 1, *size, dtype=torch.uint8), None, ())
    with pytest.raises(InvalidArgument, match=message):
        check(VAEConfig(**{"steps": 1, **TINY, **options}), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": {}}, "config must be of type VAEConfig, got dict"),
        ({"config": None}, "config must be of type VAEConfig, got None"),
        ({"config": TrainConfig(steps=1)}, "config must be of type VAEConfig, got TrainConfig"),
        ({"on_log_row": 5}, "on_log_row must be a function, got 5"),
        ({"after_step": "x"}, "after_step must be a function, got 'x'"),
    ],
)
def test_an_argument_of_another_type_is_refused(options, message):
    with pytest.raises(InvalidArgument, match=message):
        train_vae(**{"config": VAEConfig(steps=1, **TINY), "data": load("digits"), **options})


def test_data_without_images_are_refused():
    data = ImageData("empty", torch.zeros(0, 1, 8, 8, dtype=torch.uint8), None, ())
    with pytest.raises(InvalidArgument, match="data empty must hold at least one image"):
        check(VAEConfig(steps=1, **TINY), data)


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        ("train-vae --data digits", 2, "--out"),
        ("train-vae --out OUT --steps 1", 2, "--data"),
        ("train-vae --data digits --out OUT", 2, "give --minutes or --steps"),
        ("train-vae --data digits --out OUT --steps 1 --reconstruction l3", 2, "l1, l2"),
        ("train-vae --data digits --out OUT --steps 1 --kl-weight x", 2, "--kl-weight"),
        ("train-vae --data digits --out OUT --steps 1 --channels 8,8,8,8,8,8", 2, "16×16"),
        ("train-vae --data nosuch --out OUT --steps 1", 2, "digits, mnist"),
        ("train-vae --data captions --out OUT --steps 1", 2, "must be stored images"),
        ("train-vae --data moons --out OUT --steps 1", 2, "must be stored images"),
        ("train --data captions --vae RUN --out OUT --steps 1", 2, "must be stored images"),
        ("train-vae --data digits --out FULL --steps 1", 1, "not an empty folder"),
        ("train-vae --data digits --out OUT --steps 1 --config FULL", 2, ".json or .toml"),
        ("train --data digits --vae NONE --out OUT --steps 1", 1, "neither a run"),
        ("train --data digits --vae FULL --out OUT --steps 1", 1, "neither a run"),
        ("train --data digits --vae RUN --out OUT --steps 1 --block 2", 2, "block must be 1"),
        ("train --data digits --vae RUN --out FULL --steps 1", 1, "not an empty folder"),
    ],
)
def test_bad_input_ends_in_one_line(vae_run, tmp_path, capsys, call, code, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    places = {"RUN": vae_run, "OUT": tmp_path / "out", "NONE": tmp_path / "none",
              "FULL": tmp_path / "full"}  # fmt: skip
    try:
        returned = main([str(places.get(word, word)) for word in call.split()])
    except SystemExit as exit_:  # argparse
        returned = exit_.code
    error = capsys.readouterr().err
    assert returned == code
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_no_vae_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(CheckpointError, match="safetensors"):
        open_vae(tmp_path)


def test_help_shows_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["train-vae", "--help"])
    text = capsys.readouterr().out
    for name, option in VAE_OPTIONS.items():
        assert f"--{option.metadata['flag'] or name.replace('_', '-')} " in text
