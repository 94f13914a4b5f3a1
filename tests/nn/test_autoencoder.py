"""The VAE: equal to diffusers' AutoencoderKL, also in slices and tiles, with strict arguments."""

import json
import math
import resource

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import distance, same_weights, with_old_attention, with_random_norms
from safetensors.torch import load_file, save_file

from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.nn import AutoencoderKL
from minidiff.nn.blocks.gaussian import DiagonalGaussian
from minidiff.nn.blocks.tiling import sliced, tiled

diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()  # it warns at every `.to(float64)`

pytestmark = pytest.mark.filterwarnings("ignore:x (reaches|has sides)")

SMALL = {
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "norm_num_groups": 2,
    "sample_size": 8,
}
DOWN = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")

# The configurations of published checkpoints, without options at their default.
FOUR_LEVELS = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": 4 * ["DownEncoderBlock2D"],
    "up_block_types": 4 * ["UpDecoderBlock2D"],
    "layers_per_block": 2,
}
PUBLISHED = {
    "Stable Diffusion 1 and 2": ({**FOUR_LEVELS, "sample_size": 512}, 83_653_863),
    "SDXL": ({**FOUR_LEVELS, "sample_size": 1024, "scaling_factor": 0.13025}, 83_653_863),
    "Flux": (
        {
            **FOUR_LEVELS,
            "latent_channels": 16,
            "sample_size": 1024,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        83_819_683,
    ),
}


def pair(config: dict, seed: int = 0) -> tuple[AutoencoderKL, torch.nn.Module]:
    return same_weights(AutoencoderKL, diffusers.AutoencoderKL, config, seed)


@st.composite
def configs(draw) -> dict:
    groups = draw(st.integers(1, 3))
    levels = draw(st.integers(1, 3))
    return {
        "in_channels": draw(st.integers(1, 4)),
        "out_channels": draw(st.integers(1, 4)),
        "latent_channels": draw(st.integers(1, 5)),
        "block_out_channels": [4 * groups * draw(st.integers(1, 2)) for _ in range(levels)],
        "down_block_types": [draw(st.sampled_from(DOWN)) for _ in range(levels)],
        "up_block_types": [draw(st.sampled_from(UP)) for _ in range(levels)],
        "layers_per_block": draw(st.integers(1, 2)),
        "act_fn": draw(st.sampled_from(["silu", "swish", "mish", "gelu", "relu"])),
        "norm_num_groups": groups,
        "sample_size": 2 ** (levels - 1) * draw(st.sampled_from([4, 8])),
        "use_quant_conv": draw(st.booleans()),
        "use_post_quant_conv": draw(st.booleans()),
        "mid_block_add_attention": draw(st.booleans()),
    }


def examples(n: int) -> settings:
    return settings(
        max_examples=n, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
    )


# ---------------------------------------------------------------------------------- parity

any_vae = given(
    config=configs(), height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 99)
)


def check_outputs_and_gradients(config: dict, height: int, width: int, seed: int) -> None:
    ours, theirs = pair(config, seed)
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    assert ours.config.items() <= dict(theirs.config).items()
    sides = (max(height, ours.divisor), max(width, ours.divisor))  # odd ones too
    # If the inputs of a norm are almost equal, float32 gradients through it have errors of 1e-5 in
    # both libraries, so gradients are compared in float64.
    for dtype, tolerance, of_gradients in (
        (torch.float32, 1e-5, 1e-4),
        (torch.float64, 1e-10, 1e-10),
    ):
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        x = torch.randn(2, config["in_channels"], *sides, dtype=dtype)
        images, rounds = [x.clone().requires_grad_() for _ in range(2)], []
        posteriors = [ours.encode(images[0]), theirs.encode(images[1]).latent_dist]
        for what in ("mean", "logvar", "std", "var"):
            assert distance(*(getattr(p, what) for p in posteriors)) < tolerance, what
        assert distance(*(p.mode() for p in posteriors)) < tolerance
        # Near the standard normal, diffusers' var − 1 − logvar is all rounding in float32.
        exact = type(posteriors[1])(posteriors[1].parameters.double())
        assert distance(posteriors[0].kl(), exact.kl()) < tolerance
        z = torch.randn_like(posteriors[0].mean)
        assert distance(*(p.nll(z) for p in posteriors)) < tolerance
        moments = torch.randn_like(posteriors[0].mean).repeat(1, 2, 1, 1)
        assert distance(*(p.kl(type(p)(moments)) for p in posteriors)) < tolerance
        assert distance(ours.decode(z), theirs.decode(z).sample) < tolerance
        for vae, image in zip((ours, theirs), images, strict=True):
            generator = torch.Generator().manual_seed(seed)
            out = vae(image, sample_posterior=bool(seed % 2), generator=generator)
            rounds.append(out if vae is ours else out.sample)
        assert distance(*rounds) < tolerance
        weight = torch.randn_like(rounds[0])
        for out in rounds:
            (out * weight).sum().backward()
        assert distance(*(image.grad for image in images)) < of_gradients
        expected = {name: value.grad for name, value in theirs.named_parameters()}
        # Some gradients are zero up to rounding (a bias before a norm), so errors are relative
        # to the largest one.
        largest = max(gradient.norm().item() for gradient in expected.values())
        for name, value in ours.named_parameters():
            assert (value.grad - expected[name]).norm().item() < of_gradients * largest, name
        ours.zero_grad(), theirs.zero_grad()


@examples(40)
@any_vae
def test_outputs_and_gradients_equal_diffusers(config, height, width, seed):
    check_outputs_and_gradients(config, height, width, seed)


@pytest.mark.slow
@examples(300)
@any_vae
def test_outputs_and_gradients_equal_diffusers_in_300_networks(config, height, width, seed):
    check_outputs_and_gradients(config, height, width, seed)


# ------------------------------------------------------------------------- slices and tiles

any_tiling = given(
    config=configs(),
    height=st.integers(1, 10),
    width=st.integers(1, 10),
    slicing=st.booleans(),
    seed=st.integers(0, 99),
)


def check_parts(config: dict, height: int, width: int, slicing: bool, seed: int) -> None:
    ours, theirs = pair(config, seed)
    assert ours.tile_sample_min_size == theirs.tile_sample_min_size
    assert ours.tile_latent_min_size == theirs.tile_latent_min_size
    # Multiples of the divisor: diffusers fails if the last tile is too small to be halved.
    sides = (height * ours.divisor, width * ours.divisor)
    x = torch.randn(2, config["in_channels"], *sides, dtype=torch.float64, requires_grad=True)
    for vae in (ours.double(), theirs.double()):
        vae.enable_tiling()
        if slicing:
            vae.enable_slicing()
    mean, expected = ours.encode(x).mean, theirs.encode(x).latent_dist.mean
    assert distance(mean, expected) < 1e-10
    z = torch.randn_like(mean)
    assert distance(ours.decode(z), theirs.decode(z).sample) < 1e-10
    weight = torch.randn_like(mean)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (mean, expected)]
    assert distance(*gradients) < 1e-10
    for vae in (ours, theirs):
        vae.disable_tiling(), vae.disable_slicing()
    assert distance(ours.encode(x).mean, theirs.encode(x).latent_dist.mean) < 1e-10


@examples(15)
@any_tiling
def test_slices_and_tiles_equal_diffusers(config, height, width, slicing, seed):
    check_parts(config, height, width, slicing, seed)


@pytest.mark.slow
@examples(300)
@any_tiling
def test_slices_and_tiles_equal_diffusers_in_300_networks(config, height, width, slicing, seed):
    check_parts(config, height, width, slicing, seed)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
def test_tiles_do_not_change_a_pointwise_map(overlap):
    x = torch.randn(2, 3, 37, 23, dtype=torch.float64)
    enlarge = torch.nn.Upsample(scale_factor=2)
    assert distance(tiled(enlarge, 8, 16, overlap)(x), enlarge(x)) < 1e-15
    shrink = torch.nn.AvgPool2d(2)  # drops the last row and column, like an encoder
    assert distance(tiled(shrink, 8, 4, overlap)(x), shrink(x)) < 1e-15


def test_slices_are_single_images_and_do_not_change_the_result():
    seen = []

    def double(x):
        seen.append(len(x))
        return 2 * x

    x = torch.randn(3, 1, 2, 2)
    assert torch.equal(sliced(double)(x), 2 * x)
    assert seen == [1, 1, 1]


@pytest.mark.parametrize("size", [(29, 17), (33, 16), (25, 40)])
def test_tiled_and_whole_results_have_one_shape_for_any_size(size):
    vae = AutoencoderKL(**{**SMALL, "sample_size": 16})
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        whole = vae.encode(x).mean
        vae.enable_tiling()
        z = vae.encode(x).mean
        assert z.shape == whole.shape == (1, 4, size[0] // 2, size[1] // 2)
        assert vae.decode(z).shape == (1, 3, size[0] // 2 * 2, size[1] // 2 * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_sample_min_size": 6}, "tile_sample_min_size must be 2 times"),
        ({"tile_sample_min_size": 6, "tile_latent_min_size": 3}, "tiles must line up"),
        ({"tile_sample_min_size": 0, "tile_latent_min_size": 0}, "tile size must be at least 1"),
        ({"tile_overlap_factor": 1.0}, "tiles must line up"),
        ({"tile_overlap_factor": -0.1}, "tile overlap must be in"),
    ],
)
def test_tiles_that_do_not_line_up_are_refused(change, message):
    # diffusers returns images of another size for most of them.
    vae = AutoencoderKL(**SMALL)
    vae.enable_tiling()
    for name, value in change.items():
        setattr(vae, name, value)
    with pytest.raises(InvalidArgument, match=message):
        vae.encode(torch.zeros(1, 3, 20, 20))


# ------------------------------------------------------------------------- the latent space


def test_latents_are_scaled_as_in_diffusers_pipelines():
    x = torch.randn(2, 3, 8, 6)
    numbers = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    statistics = {
        "scaling_factor": 0.5,
        "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
        "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    }
    for options in ({}, numbers, statistics):
        vae = AutoencoderKL(**SMALL, **options)
        c = vae.config
        with torch.no_grad():
            z = vae.encode(x).sample(torch.Generator().manual_seed(3))
            latents = vae.to_latents(x, torch.Generator().manual_seed(3))
            if options is statistics:  # the pipeline of SDXL
                mean, std = (
                    torch.tensor(c[f"latents_{s}"]).view(1, 4, 1, 1) for s in ("mean", "std")
                )
                assert distance(latents, (z - mean) * c.scaling_factor / std) < 1e-6
                raw = latents * std / c.scaling_factor + mean
            else:  # of Flux; of Stable Diffusion where there is no shift
                assert distance(latents, (z - (c.shift_factor or 0)) * c.scaling_factor) < 1e-6
                raw = latents / c.scaling_factor + (c.shift_factor or 0)
            assert torch.equal(vae.unscaled(latents), raw)
            assert torch.equal(vae.from_latents(latents), vae.decode(raw))
            assert distance(vae.unscaled(vae.scaled(z)), z) < 1e-6


def test_forward_decodes_the_mode_or_a_sample():
    vae, x = AutoencoderKL(**SMALL), torch.randn(2, 3, 8, 6)
    with torch.no_grad():
        posterior = vae.encode(x)
        assert posterior.latent_dist is posterior
        assert torch.equal(vae(x), vae.decode(posterior.mode()))
        drawn = posterior.sample(torch.Generator().manual_seed(5))
        again = vae(x, sample_posterior=True, generator=torch.Generator().manual_seed(5))
        assert torch.equal(again, vae.decode(drawn))
        assert not torch.equal(drawn, posterior.mode())


def test_one_image_of_a_batch_equals_the_image_alone():
    vae, x = AutoencoderKL(**SMALL).double(), torch.randn(4, 3, 6, 10).double()
    with torch.no_grad():
        batch = vae(x)
        for i in range(4):
            assert distance(vae(x[i : i + 1])[0], batch[i]) < 1e-13


# --------------------------------------------------------------------------- the distribution

random_moments = st.integers(0, 10**6).map(
    lambda seed: torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(seed)).double() * 4
)


@examples(60)
@given(a=random_moments, b=random_moments)
def test_divergence_and_likelihood_equal_torch_distributions(a, b):
    p, q = DiagonalGaussian(a), DiagonalGaussian(b)
    normal = [torch.distributions.Normal(d.mean, d.std) for d in (p, q)]
    standard = torch.distributions.Normal(torch.zeros_like(p.mean), torch.ones_like(p.mean))
    divergence = torch.distributions.kl_divergence
    assert distance(p.kl(), divergence(normal[0], standard).sum((1, 2, 3))) < 1e-12
    assert distance(p.kl(q), divergence(*normal).sum((1, 2, 3))) < 1e-12
    assert distance(p.nll(q.mean), -normal[0].log_prob(q.mean).sum((1, 2, 3))) < 1e-12
    assert (p.kl() >= 0).all()
    assert (p.kl(q) >= 0).all()
    assert torch.equal(p.kl(p), torch.zeros(3).double())


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e-4, 1e4])
def test_the_divergence_is_never_negative(size):
    # diffusers' is, by rounding, for variances near one.
    p = DiagonalGaussian(size * torch.randn(100, 8, 4, 4))
    assert (p.kl() >= 0).all()
    assert torch.isfinite(p.kl()).all()


def test_samples_have_the_mean_and_the_variance_of_the_distribution():
    mean, logvar = torch.tensor([3.0, -1.0]), torch.tensor([2.0, -2.0])
    n = 200_000
    p = DiagonalGaussian(torch.cat([mean, logvar])[None, :, None].expand(1, 4, n))
    drawn = p.sample(torch.Generator().manual_seed(0))[0]
    standard_error = logvar.exp().sqrt() / math.sqrt(n)
    assert ((drawn.mean(1) - mean).abs() < 5 * standard_error).all()
    assert ((drawn.var(1) / logvar.exp() - 1).abs() < 5 * math.sqrt(2 / n)).all()


def test_a_sample_is_the_mean_plus_scaled_noise():
    p = DiagonalGaussian(torch.randn(2, 6, 3, 3))
    noise = torch.randn(p.mean.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(p.sample(torch.Generator().manual_seed(1)), p.mean + p.std * noise)
    assert torch.equal(p.at(noise), p.mean + p.std * noise)
    assert torch.equal(p.at(torch.zeros_like(noise)), p.mode())


def test_the_log_variance_stays_within_its_bounds():
    p = DiagonalGaussian(torch.tensor([0.0, 0.0, -1e9, 1e9]).view(1, 4, 1, 1))
    assert p.logvar.flatten().tolist() == [-30, 20]


def test_sums_over_an_image_do_not_overflow_in_float16():
    p = DiagonalGaussian(torch.full((1, 8, 64, 64), 9.0, dtype=torch.float16))
    for value in (p.kl(), p.nll(torch.zeros_like(p.mean))):
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: DiagonalGaussian(torch.zeros(1, 3, 2, 2)), "moments must be"),
        (lambda p: DiagonalGaussian(torch.zeros(1, 4).long()), "moments must be"),
        (lambda p: DiagonalGaussian([0.0]), "moments must be"),
        (lambda p: p.sample([torch.Generator()]), "generator must be a torch.Generator or None"),
        (lambda p: p.at(torch.zeros(1, 1, 2, 2)), r"noise must have shape \(1, 2, 2, 2\)"),
    ],
)
def test_a_bad_distribution_is_refused_by_name(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call(DiagonalGaussian(torch.zeros(1, 4, 2, 2)))


# ------------------------------------------------------------------------------- number types

any_large = given(config=configs(), seed=st.integers(0, 10**6))


def check_16_bit(config: dict, seed: int) -> None:
    """Compare with float32 arithmetic on the same rounded weights and inputs."""
    torch.manual_seed(seed)
    weights = with_random_norms(AutoencoderKL(**config)).state_dict()
    x = torch.randn(2, config["in_channels"], 12, 8)
    z = torch.randn(2, config["latent_channels"], 5, 3)
    for dtype in (torch.bfloat16, torch.float16):
        half, wide = AutoencoderKL(**config).to(dtype), AutoencoderKL(**config)
        half.load_state_dict(weights)
        wide.load_state_dict(half.state_dict())
        peaks = []
        for first in (wide.encoder.conv_in, wide.decoder.conv_in):
            first.register_forward_hook(lambda _, i, out, to=peaks: to.append(out.abs().max()))
        large_x, large_z = (x * 3000).to(dtype), (z * 3000).to(dtype)
        with torch.no_grad():
            compared = (
                (half.encode(large_x).mean, wide.encode(large_x.float()).mean),
                (half.decode(large_z), wide.decode(large_z.float())),
            )
        assert len(peaks) == 2
        assert 1e3 < max(peaks) < 3e4
        for out, exact in compared:
            assert out.dtype == dtype
            assert torch.isfinite(out).all()
            assert distance(out.float(), exact) < 1e-2


@settings(examples(10), derandomize=True)
@any_large
def test_16_bit_stays_near_float32_with_large_activations(config, seed):
    check_16_bit(config, seed)


@pytest.mark.slow
@settings(examples(100), derandomize=True)
@any_large
def test_16_bit_stays_near_float32_in_100_networks(config, seed):
    check_16_bit(config, seed)


def test_force_upcast_replaces_only_float16_by_float32():
    careful, sure = AutoencoderKL(**SMALL), AutoencoderKL(**SMALL, force_upcast=False)
    assert careful.working_dtype(torch.float16) == torch.float32
    assert careful.working_dtype(torch.bfloat16) == torch.bfloat16
    assert sure.working_dtype(torch.float16) == torch.float16


def test_channels_last_changes_rounding_only():
    vae, x = AutoencoderKL(**SMALL).double(), torch.randn(2, 3, 6, 8).double()
    with torch.no_grad():
        expected = vae(x)
        vae.to(memory_format=torch.channels_last)
        out = vae(x.to(memory_format=torch.channels_last))
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert distance(out, expected) < 1e-13


# ----------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_diffusers_keys_and_shapes(name):
    config, parameters = PUBLISHED[name]
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(**config), diffusers.AutoencoderKL(**config)
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    assert sum(value.numel() for value in ours.parameters()) == parameters
    for attribute in ("tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)


def test_the_defaults_are_those_of_diffusers():
    with torch.device("meta"):
        ours, theirs = AutoencoderKL().config, dict(diffusers.AutoencoderKL().config)
    assert ours == {name: value for name, value in theirs.items() if not name.startswith("_")}


def test_folders_round_trip_between_the_libraries_bit_for_bit(tmp_path):
    config = {**SMALL, "sample_size": [8, 12], "scaling_factor": 0.13025, "shift_factor": 0.0609}
    _, theirs = pair(config)
    theirs.save_pretrained(tmp_path / "a")
    ours = AutoencoderKL.from_pretrained(tmp_path / "a")
    ours.save_pretrained(tmp_path / "b")
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "b")
    assert theirs.state_dict().keys() == again.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])
        assert torch.equal(value, again.state_dict()[name])
    read, written = (json.loads((tmp_path / f / "config.json").read_text()) for f in "ab")
    assert {name: read[name] for name in written} == written
    assert read.keys() - written.keys() == {"_diffusers_version"}
    assert not ours.training
    x = torch.randn(2, 3, 8, 12)
    with torch.no_grad():
        assert distance(ours(x), again(x).sample) < 1e-5


@pytest.mark.parametrize("convolutions", [False, True])
def test_the_old_names_of_attention_are_read(tmp_path, convolutions):
    _, theirs = pair(SMALL)
    theirs.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = with_old_attention(theirs.state_dict())
    renamed = tensors.keys() - theirs.state_dict().keys()
    assert len(renamed) == 5 * 8  # five attentions
    if convolutions:
        for name in renamed:
            if name.endswith("weight"):
                tensors[name] = tensors[name][..., None, None]
    save_file(tensors, weights)
    ours = AutoencoderKL.from_pretrained(tmp_path)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])
    if not convolutions:
        again = diffusers.AutoencoderKL.from_pretrained(tmp_path)
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in again.state_dict().items())


def test_an_old_name_of_attention_beside_the_new_one_is_refused(tmp_path):
    AutoencoderKL(**SMALL).save_pretrained(tmp_path / "v")
    weights = tmp_path / "v" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.mid_block.attentions.0.query.bias"] = torch.zeros(8)
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"query\.bias is a name of 2022, but .*today"):
        AutoencoderKL.from_pretrained(tmp_path / "v")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_out_channels": [4, 16]}, "has shape"),
        ({"layers_per_block": 2}, "missing"),
        ({"layers_per_block": 1_000_000_000}, "layers_per_block must be in 1..16"),
        ({"block_out_channels": [16384, 16384]}, "unexpected"),  # refused before memory is taken
        ({"latent_channels": 10**12}, "latent_channels must be in"),
        ({"use_quant_conv": False}, "unexpected"),
        ({"cross_attention_dim": 8}, "cross_attention_dim"),
        ({"_class_name": "AsymmetricAutoencoderKL"}, "AsymmetricAutoencoderKL"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(tmp_path, change, message):
    AutoencoderKL(**SMALL).save_pretrained(tmp_path / "v")
    config = tmp_path / "v" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=message):
        AutoencoderKL.from_pretrained(tmp_path / "v")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB


# ---------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chanels": 3}, "'chanels' is not an option of AutoencoderKL, which has in_channels, out"),
        ({"in_channels": 0}, "in_channels must be"),
        ({"out_channels": 2.5}, "out_channels must be a whole number"),
        ({"latent_channels": True}, "latent_channels must be a whole number"),
        ({"down_block_types": ("DownEncoderBlock2D",)}, "down_block_types must have 2 entries"),
        ({"up_block_types": 3 * ("UpDecoderBlock2D",)}, "up_block_types must have 2 entries"),
        ({"up_block_types": "UpDecoderBlock2D"}, "up_block_types must be a list"),
        ({"down_block_types": 2 * ("DownBlock2D",)}, "down_block_types must be one of Down"),
        ({"up_block_types": 2 * ("UpBlock2D",)}, "up_block_types must be one of UpDecoder"),
        ({"block_out_channels": ()}, "block_out_channels must be in 1..8"),
        ({"block_out_channels": 8}, "block_out_channels must be a list"),
        ({"block_out_channels": (4, 9)}, r"multiples of norm_num_groups \(2\), got 9"),
        ({"layers_per_block": 0}, "layers_per_block must be in 1..16"),
        ({"act_fn": "tanh"}, "act_fn must be one of silu"),
        ({"norm_num_groups": None}, "norm_num_groups must be"),
        ({"sample_size": None}, "sample_size must be a whole number"),
        ({"sample_size": (8, 8, 8)}, "sample_size must have 2 entries"),
        ({"scaling_factor": 0}, "scaling_factor must be"),
        ({"scaling_factor": float("nan")}, "scaling_factor must be"),
        ({"shift_factor": "0.1"}, "shift_factor must be a number"),
        ({"latents_mean": 4 * [0.0]}, "latents_mean and latents_std must be given together"),
        ({"latents_std": 4 * [1.0]}, "latents_mean and latents_std must be given together"),
        ({"latents_mean": 3 * [0.0], "latents_std": 4 * [1.0]}, "latents_mean must have 4 entries"),
        ({"latents_mean": 4 * [0.0], "latents_std": 4 * [0]}, "latents_std must be"),
        (
            {"latents_mean": 4 * [0.0], "latents_std": 4 * [1.0], "shift_factor": 0.1},
            "shift_factor must be None",
        ),
        ({"force_upcast": 1}, "force_upcast must be True or False"),
        ({"use_quant_conv": None}, "use_quant_conv must be True or False"),
        ({"use_post_quant_conv": "yes"}, "use_post_quant_conv must be True or False"),
        ({"mid_block_add_attention": 0}, "mid_block_add_attention must be True or False"),
    ],
)
def test_a_bad_argument_is_refused_by_name(change, message):
    with pytest.raises(InvalidArgument, match=message):
        AutoencoderKL(**{**SMALL, **change})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae.encode(torch.zeros(2, 3, 4)), r"x must have shape \(B, 3, height, width"),
        (lambda vae: vae.encode(torch.zeros(2, 4, 4, 4)), r"x must have shape .*\(2, 4, 4, 4\)"),
        (lambda vae: vae.encode(torch.zeros(0, 3, 4, 4)), "x must have shape"),
        (lambda vae: vae.encode(torch.zeros(1, 3, 4, 1)), r"x must have sides >= 2, got \(4, 1\)"),
        (lambda vae: vae.encode(torch.zeros(1, 3, 4, 4).long()), "x must be floating point"),
        (lambda vae: vae.encode("x"), "x must be a tensor"),
        (lambda vae: vae.decode(torch.zeros(2, 3, 4, 4)), r"z must have shape \(B, 4, height"),
        (lambda vae: vae.decode(torch.zeros(2, 4, 0, 4)), "z must have sides >= 1"),
        (lambda vae: vae(torch.zeros(1, 3, 4, 4), True, 7), "generator must be a torch.Generator"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call(AutoencoderKL(**SMALL))
