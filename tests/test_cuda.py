"""On a GPU: the numbers of the CPU, and a host that never waits inside a loop.

pytest -m cuda
"""

from dataclasses import replace

import pytest
import torch
from networks import distance

from minidiff import Pipeline
from minidiff.data import load
from minidiff.data.latents import LatentData, normals
from minidiff.errors import TrainingError
from minidiff.nn import AutoencoderKL, TextEncoder, UNet
from minidiff.nn.blocks.attention import attend
from minidiff.noise import image_generators, randn
from minidiff.runs import snapshot
from minidiff.runtime.distributed import Processes, Shards
from minidiff.sample import trajectory
from minidiff.schedulers import SCHEDULERS, DDIMScheduler
from minidiff.training.autoencoder import AutoencoderTraining
from minidiff.training.autoencoder import build as build_vae
from minidiff.training.build import resolve
from minidiff.training.config import TrainConfig, VAEConfig
from minidiff.training.diffusion import DiffusionTraining, train

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

TEXT = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "sample_size": 16,
}


@pytest.fixture(autouse=True)
def no_tf32():
    """Disable TF32, because results are compared with the CPU's float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def never_waiting():
    """Return a function after which it is an error to make the host wait for the device."""

    def start() -> None:
        torch.cuda.set_sync_debug_mode("error")

    yield start
    torch.cuda.set_sync_debug_mode("default")


def options_of(name: str) -> dict:
    """Return the options under which a scheduler samples without clipping."""
    return {"clip_sample": False} if SCHEDULERS[name].has_option("clip_sample") else {}


@pytest.mark.parametrize("compat", ["exact", "diffusers"])
@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - {"DDIMInverseScheduler"}))
def test_a_sampling_loop_never_waits_and_gives_the_numbers_of_the_cpu(name, compat, never_waiting):
    scheduler = SCHEDULERS[name](**options_of(name), compat=compat)
    results = []
    for device in ("cpu", "cuda"):
        generators = image_generators(0, range(2))
        scheduler.set_timesteps(8, device=device)
        x = randn((2, 3, 8, 8), generators) * scheduler.init_noise_sigma
        x, weight = x.to(device), torch.tensor(0.1, device=device)
        noise = torch.Generator(device).manual_seed(1)
        if device == "cuda":
            torch.tanh(x * weight)
            never_waiting()
        *_, last = trajectory(lambda x, t, w=weight: torch.tanh(x * w), scheduler, x, noise)
        torch.cuda.set_sync_debug_mode("default")
        results.append(last.next_x.cpu())
    assert torch.isfinite(results[1]).all()
    if not draws_noise(name):
        assert distance(results[1], results[0]) < 1e-4


def draws_noise(name: str) -> bool:
    """Return whether a scheduler draws noise, which differs between a GPU and the CPU."""
    return name in ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler")


def test_a_sampling_loop_with_clipping_never_waits(never_waiting):
    scheduler = DDIMScheduler(clip_sample=True)
    scheduler.set_timesteps(8, device="cuda")
    x = torch.randn(2, 3, 8, 8, device="cuda")
    never_waiting()
    for _ in trajectory(lambda x, t: torch.tanh(x), scheduler, x):
        pass


def test_the_noise_of_an_image_is_equal_to_the_bit_on_every_device():
    on_cpu, on_gpu = (
        randn((3, 4, 8, 8), image_generators(7, range(3)), device) for device in ("cpu", "cuda")
    )
    assert torch.equal(on_cpu, on_gpu.cpu())


def unet_inputs(device: str, dtype: torch.dtype = torch.float32) -> tuple:
    """Return x, t, text tokens and their mask, equal on every device."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 4, 16, 16, generator=generator)
    tokens = torch.randn(4, 7, 24, generator=generator)
    mask = torch.ones(4, 7, dtype=torch.bool)
    mask[1, 4:] = False
    return x.to(device, dtype), 500, tokens.to(device, dtype), mask.to(device)


def output_of(unet: UNet, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the output for `unet_inputs`, in float32 on the CPU."""
    x, t, tokens, mask = unet_inputs(device, dtype)
    with torch.no_grad():
        return unet(x, t, tokens, encoder_attention_mask=mask).float().cpu()


def test_networks_give_the_numbers_of_the_cpu():
    unet = UNet(**TEXT).eval()
    expected = output_of(unet, "cpu")
    assert distance(output_of(unet.cuda(), "cuda"), expected) < 1e-5
    assert distance(output_of(unet.to(memory_format=torch.channels_last), "cuda"), expected) < 1e-5
    for dtype in (torch.float16, torch.bfloat16):
        narrow = UNet(**TEXT).eval().to("cuda", dtype, memory_format=torch.channels_last)
        narrow.load_state_dict(unet.state_dict())
        wide = UNet(**TEXT).eval()
        wide.load_state_dict({k: v.float() for k, v in narrow.state_dict().items()})
        assert distance(output_of(narrow, "cuda", dtype), output_of(wide, "cpu")) < 1.5e-2

    vae = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4,
                        down_block_types=2 * ("DownEncoderBlock2D",),
                        up_block_types=2 * ("UpDecoderBlock2D",)).eval()  # fmt: skip
    z = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = vae.from_latents(z)
        assert distance(vae.cuda().from_latents(z.cuda()).cpu(), expected) < 1e-5

    text = TextEncoder(vocab_size=50, hidden_size=32, num_attention_heads=4, num_hidden_layers=2,
                       intermediate_size=64, eos_token_id=49).eval()  # fmt: skip
    ids = torch.randint(0, 50, (3, 9))
    with torch.no_grad():
        expected = text(ids)
        on_gpu = text.cuda()(ids.cuda())
    assert distance(on_gpu.last_hidden_state.cpu(), expected.last_hidden_state) < 1e-5
    assert distance(on_gpu.pooled.cpu(), expected.pooled) < 1e-5


def test_16_bit_networks_stay_finite_with_large_activations_on_every_attention_kernel():
    for dtype in (torch.float16, torch.bfloat16):
        unet = UNet(**TEXT).eval().to("cuda", dtype)
        x, t, tokens, mask = unet_inputs("cuda", dtype)
        with torch.no_grad():
            for parameter in unet.conv_in.parameters():
                parameter *= 3e3
            assert torch.isfinite(unet(x, t, tokens)).all()
            assert torch.isfinite(unet(x, t, tokens, encoder_attention_mask=mask)).all()


@pytest.mark.parametrize("positions", [49, 64, 192, 256])
def test_gradients_are_finite_where_every_logit_of_a_position_is_far_below_zero(positions):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, positions, 64, device="cuda", dtype=torch.bfloat16) / 10
    q[..., ::32], k[..., ::32] = 1.0, -120 * 32**0.5  # two heads of 32: every logit is about -120
    for x in (q, k, v):
        x.requires_grad_()
    attend(q, k, v, heads=2).float().square().sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


def test_gradients_equal_those_of_the_cpu():
    gradients = []
    unet = UNet(**TEXT)
    for device in ("cpu", "cuda"):
        unet.to(device).zero_grad()
        x, t, tokens, _ = unet_inputs(device)
        unet(x, t, tokens).square().mean().backward()
        gradients.append({n: p.grad.cpu().clone() for n, p in unet.named_parameters()})
    largest = max(g.norm().item() for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() < 1e-4 * largest, name


def test_a_network_never_waits_for_the_device(never_waiting):
    unet = UNet(**TEXT, num_class_embeds=10).cuda()
    x, _, tokens, mask = unet_inputs("cuda")
    labels = torch.zeros(4, dtype=torch.int64, device="cuda")
    unet(x, 500, tokens, class_labels=labels)
    never_waiting()
    unet(x, 500, tokens, class_labels=labels, encoder_attention_mask=mask)


def test_a_pipeline_draws_the_pictures_of_the_cpu_within_one_grey_level():
    config = TrainConfig(steps=60, channels=(16, 24), batch_size=32, pictures=1)
    pipe = train(config, load("digits"), device="cpu")
    options = {"num_images": 10, "seed": 0, "num_inference_steps": 10, "output_type": "np"}
    expected = pipe(**options).images.astype(int)
    on_gpu = pipe.to("cuda")(**options).images.astype(int)
    assert abs(on_gpu - expected).max() <= 1
    in_bfloat16 = pipe.to(dtype=torch.bfloat16)(**options).images.astype(int)
    assert abs(in_bfloat16 - expected).mean() < 8


def test_training_learns_on_a_gpu(tmp_path):
    data, losses = load("digits"), []
    config = TrainConfig(steps=400, channels=(32, 48), batch_size=64, pictures=1)
    pipe = train(
        config, data, device="cuda", on_log_row=lambda progress: losses.append(progress.loss)
    )
    assert losses[-1] < losses[0] / 2
    pipe.save_pretrained(tmp_path / "model")
    again = Pipeline.from_pretrained(tmp_path / "model")
    assert next(again.unet.parameters()).device.type == "cpu"


TRAIN = {"channels": (32, 48), "batch_size": 64, "pictures": 0}
OBJECTIVES = [
    {},
    {"prediction_type": "edm", "dropout": 0.1, "accumulate": 2, "shift": 1},
    {"prediction_type": "flow", "loss_weight": "min_snr", "dtype": "bfloat16"},
    {"prediction_type": "epsilon", "learn_variance": True},
    {"stable_target": 64},
    {"data": "captions", "optimizer": "muon", "cuda_graph": True},
]


def training(
    device: str = "cuda", world=None, data: str = "digits", **options
) -> DiffusionTraining:
    data, config = load(data), TrainConfig(steps=1000, **TRAIN | options)
    return DiffusionTraining(resolve(config, data), data, torch.device(device), world=world)


@pytest.mark.parametrize("options", OBJECTIVES, ids=str)
def test_a_training_step_never_waits_for_the_device(options, never_waiting):
    run = training(**options)
    for _ in range(3):
        run.step()  # selects kernels, creates the optimizer's moments
    never_waiting()
    for _ in range(3):
        run.step()


CAPTURED = [
    {"optimizer": "muon", "stable_target": 64},
    {"prediction_type": "edm", "dropout": 0.1, "shift": 1, "dtype": "bfloat16"},
    {"prediction_type": "epsilon", "learn_variance": True},
    {"data": "captions", "optimizer": "muon", "dtype": "bfloat16"},
]


@pytest.mark.parametrize("options", CAPTURED, ids=str)
def test_a_captured_graph_takes_the_same_steps(options):
    """The batch size changes on the way, and dropout draws random numbers."""
    plain, replayed = (training(cuda_graph=choice, **options) for choice in (False, True))
    for run in (plain, replayed):
        for size in (64, 64, 48, 64, 48, 48):
            run.config = replace(run.config, batch_size=size)
            run.step()
    assert float(plain.meter.sum) == pytest.approx(float(replayed.meter.sum), rel=1e-5)
    for ours, theirs in zip(plain.learner.parameters(), replayed.learner.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_compiled_network_takes_the_same_steps_on_a_gpu():
    losses = []
    for choice in (False, True):
        run = training(compile=choice)
        for _ in range(20):
            run.step()
        losses.append(float(run.meter.sum))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("options", OBJECTIVES, ids=str)
def test_training_takes_the_same_first_steps_on_both_devices(options):
    """Levels and labels are drawn on the CPU but noise on the device, so losses differ a little."""
    losses = []
    for device in ("cpu", "cuda"):
        on_device = {"dtype": "float32", "cuda_graph": "cuda_graph" in options and device == "cuda"}
        run = training(device, **options | on_device)
        for _ in range(20):
            run.step()
        losses.append(float(run.meter.sum) / run.meter.count)
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("captured", [False, True])
def test_a_run_resumes_from_a_snapshot_made_on_a_gpu(captured, optimizer, tmp_path):
    options = {"dropout": 0.1, "optimizer": optimizer}
    first, second = (training(**options, cuda_graph=captured) for _ in range(2))
    for _ in range(5):
        first.step()
    snapshot.restore(snapshot.write(tmp_path, snapshot.content(first), 0), second)
    for run in (first, second):
        for _ in range(3):
            run.step()
    for ours, theirs in zip(first.learner.parameters(), second.learner.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    on_cpu = training("cpu", **options)
    snapshot.restore(snapshot.snapshots(tmp_path)[-1], on_cpu)
    assert on_cpu.budget.step == 5


@pytest.mark.parametrize("kind", [Processes, Shards])
def test_processes_on_gpus_wait_for_each_other_but_not_for_the_device(
    kind, never_waiting, monkeypatch, tmp_path
):
    """A single process runs the code of several: NCCL, the hosts' group, sharded weights."""
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0),
                        ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", 29617)):  # fmt: skip
        monkeypatch.setenv(name, str(value))
    world = kind(torch.device("cuda", 0))
    try:
        run, alone = training("cuda:0", world), training("cuda:0")
        for _ in range(3):
            run.step()
            alone.step()
        if kind is Processes:
            never_waiting()
        run.step()
        torch.cuda.set_sync_debug_mode("default")
        alone.step()
        snapshot.write(tmp_path, snapshot.content(run), 0)
        assert float(run.meter.sum) == pytest.approx(float(alone.meter.sum), rel=1e-4)
        assert run.result(
            num_images=2, seed=0, num_inference_steps=2, output_type="np"
        ).images.any()
    finally:
        torch.distributed.destroy_process_group()


def test_the_step_of_a_loss_that_is_not_finite_is_named_although_no_step_waits():
    run = training()
    run.step()
    with torch.no_grad():
        next(iter(run.learner.parameters())).fill_(float("nan"))
    for _ in range(3):
        run.step()
    with pytest.raises(TrainingError, match="not finite at step 1"):
        snapshot.content(run)


def test_a_compiled_network_gives_the_same_numbers():
    unet = UNet(**TEXT).eval().cuda()
    expected = output_of(unet, "cuda")
    assert distance(output_of(torch.compile(unet, fullgraph=True), "cuda"), expected) < 1e-4


def test_a_training_step_of_an_autoencoder_never_waits(never_waiting):
    config = VAEConfig(steps=9, channels=(16, 16), adversarial_start=0)
    training = AutoencoderTraining(config, load("digits"), torch.device("cuda"))
    training.step()
    never_waiting()
    training.step()


def test_latents_are_drawn_as_on_the_cpu_without_waiting(never_waiting):
    shape, far = (64, 4, 7, 7), 10**9
    on_cpu = normals(3, far, shape, torch.device("cpu"))
    assert (normals(3, far, shape, torch.device("cuda")).cpu() - on_cpu).abs().max() < 1e-5
    vae, _ = build_vae(VAEConfig(steps=1, channels=(16, 16)), load("digits"))
    data, index = LatentData(vae, load("digits")).to("cuda"), torch.arange(64).cuda()
    data.batch(index)
    never_waiting()
    data.batch(index, position=64)
