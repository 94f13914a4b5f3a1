"""Less memory changes no image: layers in parts, and weights that visit a device."""

import copy

import pytest
import torch
from tiny_pipelines import DDIM, stable_diffusion, stable_diffusion_xl
from torch import nn

from minidiff.engines import memory
from minidiff.engines.memory import IMAGES, POSITIONS, InParts, in_parts
from minidiff.errors import InvalidArgument
from minidiff.pipeline import Pipeline

CALL = {"prompt": ["a", "b"], "num_inference_steps": 2, "seed": 0, "output_type": "pt"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Stable Diffusion, on disk."""
    folder = tmp_path_factory.mktemp("sd")
    stable_diffusion(folder, DDIM).save_pretrained(folder / "sd")
    return folder / "sd"


@pytest.fixture
def pipe(saved):
    return Pipeline.from_pretrained(saved)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_low_memory_draws_the_same_images(pipe, capsys):
    x = torch.randn(3, 4, 16, 16)
    words = ["a", "b c", "d"]
    plain, images = pipe.denoiser(words)(x, 500), pipe(**CALL).images
    pipe.optimize(memory="low", dtype="float32")
    assert "engine torch, float32, low memory" in capsys.readouterr().out
    assert relative(pipe.denoiser(words)(x, 500), plain) < 1e-6
    assert (pipe(**CALL).images - images).abs().max() < 1 / 127.5  # a grey level


@torch.no_grad()
def test_layers_in_parts_differ_by_rounding_alone(pipe):
    x, words = torch.randn(3, 4, 16, 16), torch.randn(3, 77, 16)
    network = copy.deepcopy(pipe.unet).double()
    inputs = x.double(), 500, words.double()
    assert relative(in_parts(network)(*inputs), network(*inputs)) < 1e-14


def test_layers_in_parts_share_the_weights_and_split_images_and_positions(pipe):
    parts = in_parts(pipe.unet)
    mine = {id(x) for x in pipe.unet.parameters()}
    assert {id(x) for x in parts.parameters()} == mine
    axes = [module.axis for module in parts.modules() if isinstance(module, InParts)]
    assert IMAGES in axes
    assert POSITIONS in axes
    assert not any(isinstance(module, InParts) for module in pipe.unet.modules())


class Largest(nn.Module):
    """A position-wise layer that notes the largest input it was given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, *others):
        self.seen.append((tuple(x.shape), [len(y) for y in others if isinstance(y, torch.Tensor)]))
        return 2 * x


def test_parts_are_one_image_and_an_eighth_of_the_positions():
    x = torch.randn(3, 20, 4)
    layer = Largest()
    assert torch.equal(InParts(layer, POSITIONS)(x), 2 * x)
    assert layer.seen == [((3, 3, 4), [])] * 6 + [((3, 2, 4), [])]
    layer = Largest()
    assert torch.equal(InParts(layer, IMAGES)(x, torch.zeros(3, 5), torch.zeros(1), None), 2 * x)
    assert layer.seen == [((1, 20, 4), [1, 1])] * 3


@pytest.mark.parametrize("dims", [2, 3])
def test_parts_keep_the_memory_format(dims):
    last = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
    x = torch.randn(2, 3, *[4] * dims).to(memory_format=last)
    assert InParts(Largest(), IMAGES)(x).is_contiguous(memory_format=last)


def test_offloading_draws_the_same_images_and_puts_every_weight_back(pipe):
    plain = pipe(**CALL).images
    before = [x.data_ptr() for x in pipe.unet.parameters()]
    assert torch.equal(pipe.offload("cpu")(**CALL).images, plain)
    assert [x.data_ptr() for x in pipe.unet.parameters()] == before
    assert torch.equal(copy.deepcopy(pipe).offload("cpu")(**CALL).images, plain)


def test_of_a_unet_one_group_of_layers_is_on_the_device_at_a_time(pipe):
    unet, sizes = pipe.unet, []
    home = {id(x): x.data_ptr() for x in unet.parameters()}

    def count(module, arguments):
        away = [x for x in unet.parameters() if x.data_ptr() != home[id(x)]]
        sizes.append(sum(x.numel() for x in away))

    pipe.offload("cpu")
    for module in unet.modules():
        if not list(module.children()):
            module.register_forward_pre_hook(count)
    pipe(**CALL)
    groups = [sum(x.numel() for x in group.parameters()) for group in memory._groups(unet)]
    assert max(sizes) == max(groups) < sum(groups) == sum(x.numel() for x in unet.parameters())
    assert set(sizes) <= set(groups)


def test_text_encoders_and_both_halves_of_the_autoencoder_visit_the_device(tmp_path):
    stable_diffusion_xl(tmp_path).save_pretrained(tmp_path / "sd")
    pipe = Pipeline.from_pretrained(tmp_path / "sd").offload("cpu")
    visits = []
    for part in (*pipe.prompts.encoders, pipe.vae.encoder, pipe.vae.decoder):
        home = next(part.parameters()).data_ptr()

        def note(module, arguments, output, home=home):
            visits.append(next(module.parameters()).data_ptr() != home)

        part.register_forward_hook(note, prepend=True)
    image = torch.zeros(1, 3, 32, 32)
    pipe("a", image=image, strength=0.5, num_inference_steps=2, seed=0)
    assert len(visits) == 2 * 2 + 2  # the text and the empty text in both encoders
    assert all(visits)


def test_a_failed_evaluation_leaves_no_weight_on_the_device(pipe):
    before = [x.data_ptr() for x in pipe.unet.parameters()]
    pipe.offload("cpu")
    pipe.unet.mid_block.resnets[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe(**CALL)
    assert [x.data_ptr() for x in pipe.unet.parameters()] == before


def test_offloading_and_low_memory_work_together(pipe):
    plain = pipe(**CALL).images
    pipe.offload("cpu").offload("cpu").optimize(memory="low", dtype="float32")
    for _ in range(2):
        assert (pipe(**CALL).images - plain).abs().max() < 1 / 127.5


def test_bad_arguments_are_refused(pipe):
    with pytest.raises(InvalidArgument, match=r"memory must be one of normal, low; got 'lower'"):
        pipe.optimize(memory="lower")
    with pytest.raises(InvalidArgument, match=r"engine must be 'torch' with memory='low'"):
        pipe.optimize("onnxruntime", memory="low")
    with pytest.raises(InvalidArgument, match="device"):
        pipe.offload("gpu")
    with pytest.raises(InvalidArgument, match=r"engine must be 'torch' with offload\(\)"):
        copy.deepcopy(pipe).offload("cpu").optimize("openvino")
    pipe.optimize(memory="low")
    with pytest.raises(InvalidArgument, match="offload must be called before optimize"):
        pipe.offload("cpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("low", [False, True])
def test_on_a_gpu_offloaded_weights_are_released_and_images_are_those_of_the_cpu(pipe, low):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    plain = pipe(**CALL).images
    pipe.offload("cuda")
    if low:
        pipe.optimize(memory="low", dtype="float32")
    free = torch.cuda.memory_allocated()
    images = pipe(**CALL).images
    assert relative(images, plain) < 1e-4
    assert images.device.type == "cpu"
    assert torch.cuda.memory_allocated() == free
    assert next(pipe.unet.parameters()).device.type == "cpu"
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
