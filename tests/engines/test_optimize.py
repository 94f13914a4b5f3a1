"""Engines draw torch's images, say what they are, and fall back where they cannot work."""

import copy
import sys

import pytest
import torch
from tiny_pipelines import DDIM, stable_diffusion, stable_diffusion_xl

from minidiff.engines import backends, cache, optimize
from minidiff.engines.backends import is_installed
from minidiff.engines.graph import EngineError, Role, flatten, rebuild
from minidiff.engines.network import Engine
from minidiff.engines.optimize import choose
from minidiff.engines.stored import read_graph, write_graph
from minidiff.errors import InvalidArgument
from minidiff.pipeline import Pipeline

CPU = torch.device("cpu")
LIBRARIES = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
CALL = {"class_labels": [0, 2, 1], "num_inference_steps": 3, "seed": 0}


def engine(name):
    """A parameter of a test that needs the libraries of an engine."""
    missing = not is_installed(*LIBRARIES[name])
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{name} is not installed"))


ENGINES = [engine("onnxruntime"), engine("openvino")]


def draw(pipe, **more):
    return pipe(**{**CALL, **more}, output_type="pt").images


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", ENGINES)
def test_a_call_and_the_images_are_those_of_torch(tiny, name):
    x, labels = torch.randn(5, 2, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    plain, drawn = tiny.denoiser(labels, 3.0)(x, 500), draw(tiny)
    pixels = tiny(**CALL, output_type="np").images
    tiny.optimize(name, "float32")
    assert relative(tiny.denoiser(labels, 3.0)(x, 500), plain) < 1e-5
    assert relative(draw(tiny), drawn) < 1e-5
    ours = tiny(**CALL, output_type="np").images
    assert abs(ours.astype(int) - pixels.astype(int)).max() <= 1


@pytest.mark.parametrize("name", ENGINES)
def test_an_image_depends_on_no_other_of_its_batch(tiny, name):
    tiny.optimize(name, "float32")
    whole = draw(tiny)
    parts = [draw(tiny, class_labels=[c], first_index=i) for i, c in enumerate([0, 2, 1])]
    assert (whole - torch.cat(parts)).abs().max() < 1 / 127.5


@pytest.mark.parametrize("name", [engine("openvino")])
def test_bfloat16_errs_no_more_than_one_and_a_half_times_torchs(tiny, name):
    x, labels = torch.randn(32, 2, 8, 8), torch.arange(32) % 3

    def outputs():
        return torch.stack([tiny.denoiser(labels)(x, t) for t in (900, 500, 100)])

    exact = outputs()
    tiny.to(dtype=torch.bfloat16)
    torchs = relative(outputs(), exact)
    tiny.optimize(name, "bfloat16")
    assert 0 < relative(outputs(), exact) < 1.5 * torchs


@pytest.mark.parametrize("name", ENGINES)
def test_a_second_start_reads_the_cache(tiny, name, capsys):
    tiny.optimize(name, "float32")
    capsys.readouterr()
    copy.deepcopy(tiny).optimize(name, "float32")
    assert "exporting" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind", [stable_diffusion, stable_diffusion_xl])
@pytest.mark.parametrize("name", ENGINES)
def test_text_decoder_and_added_conditioning_are_those_of_torch(tmp_path, kind, name):
    arguments = (DDIM,) if kind is stable_diffusion else ()
    kind(tmp_path, *arguments).save_pretrained(tmp_path / "sd")
    pipe = Pipeline.from_pretrained(tmp_path / "sd")
    call = {"prompt": ["a", "b"], "num_inference_steps": 3, "seed": 0, "output_type": "pt"}
    plain = pipe(**call).images
    assert relative(pipe.optimize(name, "float32")(**call).images, plain) < 1e-5


class Residuals(torch.nn.Module):
    """A network with the inputs of one that a ControlNet steers."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, sample, timestep, down, mid=None):
        x = self.conv(sample) + down[0] + 2 * down[1]
        return x * timestep[:, None, None, None] + (0 if mid is None else mid)


CONTROL = Role(
    "control",
    lambda x, t, **more: {"sample": x, "timestep": t, **more},
    lambda network, **given: network(**given),
    lambda outputs: outputs[0],
)


def test_residuals_in_a_list_are_inputs_and_other_inputs_have_another_graph(tmp_path):
    network, made = Residuals(), []

    def make(network, role, arguments):
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(write_graph(folder, network, role, arguments, "pt2"))
        return read_graph(folder, made[-1], torch.float32)

    evaluate = Engine(network, CONTROL, make, pytest.fail)(network)
    for n in (1, 3):
        x, t = torch.randn(n, 2, 4, 4), torch.rand(n)
        more = {"down": [torch.randn(n, 2, 4, 4) for _ in range(2)]}
        for given in (more, more | {"mid": torch.ones(n, 2, 1, 1)}):
            with torch.no_grad():
                assert relative(evaluate(x, t, **given), network(x, t, **given)) < 1e-6
    assert len(made) == 2
    assert [each["name"] for each in made[1]["inputs"]] == [
        "sample", "timestep", "down.0", "down.1", "mid",
    ]  # fmt: skip


def test_flat_inputs_are_rebuilt():
    x, y, z = torch.rand(3, 1)
    nested = {"a": x, "b": {"c": y, "d": [z, None]}}
    assert [name for name, _ in flatten(nested)] == ["a", "b.c", "b.d.0"]
    assert rebuild(nested, iter([x, y, z])) == nested


class Odd(torch.nn.Module):
    """A network with an operator that no format has."""

    def forward(self, sample, timestep):
        return torch.linalg.eigvals(sample).real + timestep[:, None, None]


ODD = CONTROL._replace(name="odd")


@pytest.mark.parametrize(
    "format", [pytest.param("onnx", marks=engine("onnxruntime").marks),
               pytest.param("openvino", marks=engine("openvino").marks)]
)  # fmt: skip
def test_an_operator_that_cannot_be_expressed_is_named(tmp_path, format):
    arguments = {"sample": torch.randn(2, 3, 3), "timestep": torch.zeros(2)}
    with pytest.raises(EngineError, match=r"odd cannot be written: the operator aten\S+ cannot"):
        write_graph(tmp_path, Odd(), ODD, arguments, format)


def test_torch_evaluates_what_cannot_be_exported_and_auto_says_so(tiny, monkeypatch, capsys):
    def fails(*arguments, **options):
        raise EngineError("unet cannot be exported: the operator aten.odd cannot be expressed")

    monkeypatch.setattr(optimize, "_make", fails)
    monkeypatch.setattr(optimize, "is_installed", lambda *names: True)
    plain = draw(tiny)
    assert torch.equal(draw(tiny.optimize("auto", "float32")), plain)
    assert "aten.odd cannot be expressed: engine torch instead" in capsys.readouterr().out
    monkeypatch.setattr(backends, "is_installed", lambda *names: True)
    with pytest.raises(EngineError, match=r"aten\.odd"):
        tiny.optimize("openvino")


def test_auto_chooses_by_device_dtype_and_installed_libraries(monkeypatch):
    there = {"openvino", "onnx", "onnxscript", "onnxruntime"}
    monkeypatch.setattr(optimize, "is_installed", lambda *names: set(names) <= there)
    assert choose("auto", "bfloat16", CPU)[:2] == ("openvino", torch.bfloat16)
    assert choose("auto", "float32", CPU)[:2] == ("onnxruntime", torch.float32)
    assert choose("auto", "float32", torch.device("cuda"))[0] == "cuda-graph"
    there -= {"onnxruntime"}
    assert choose("auto", "float32", CPU)[0] == "openvino"
    there -= {"openvino"}
    assert choose("auto", "float32", CPU)[0] == "torch"
    assert "minidiff[onnx]" in choose("auto", "float32", CPU).reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tensorrt",), "engine must be one of auto, torch, .*got 'tensorrt'"),
        (("auto", "float64"), "dtype must be one of"),
        (("cuda-graph",), "engine cuda-graph needs an NVIDIA GPU, but the device is cpu"),
        (("auto", "auto", 1), "cache must be True or False, got 1"),
        pytest.param(("onnxruntime", "bfloat16"), "dtype must be float32 for engine onnxruntime",
                     marks=engine("onnxruntime").marks),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(tiny, arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        tiny.optimize(*arguments)


def test_a_missing_engine_names_its_extra(tiny, monkeypatch):
    monkeypatch.setattr(backends, "is_installed", lambda *names: False)
    for name, extra in (("openvino", "openvino"), ("onnxruntime", "onnx")):
        with pytest.raises(InvalidArgument, match=rf'pip install "minidiff\[{extra}\]"'):
            tiny.optimize(name)


def test_changed_weights_are_refused(tiny):
    optimize.attach(tiny, lambda *arguments: optimize.Graph([], None), print)
    draw(tiny)
    with torch.no_grad():
        tiny.unet.conv_in.weight += 1
    with pytest.raises(InvalidArgument, match=r"weights of unet must be those .* call it again"):
        draw(tiny)


def test_weights_of_another_dtype_are_refused(tiny):
    tiny.unet.half()
    with pytest.raises(InvalidArgument, match=r"needs weights in float32, got torch.float16"):
        tiny.optimize("torch")


@pytest.mark.parametrize("name", [engine("openvino")])
def test_derivatives_are_those_of_torch(tiny, name):
    def gradient():
        x = torch.ones(1, 2, 8, 8, requires_grad=True)
        return torch.autograd.grad(tiny.denoiser(torch.tensor([1]))(x, 500).square().sum(), x)[0]

    plain = gradient()
    tiny.optimize(name, "float32")
    assert torch.equal(gradient(), plain)


@pytest.mark.parametrize("name", [engine("openvino")])
def test_openvino_reports_nothing(tiny, name):
    tiny.optimize(name, "float32")
    from openvino.tools.ovc import telemetry_stub, telemetry_utils

    assert sys.modules["openvino_telemetry"] is None
    assert telemetry_utils.tm is telemetry_stub


@pytest.mark.slow
def test_no_cache_leaves_no_entry(tiny, tmp_path, monkeypatch):
    if not is_installed("openvino"):
        pytest.skip("openvino is not installed")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "none"))
    plain = draw(tiny)
    assert relative(draw(tiny.optimize("openvino", "float32", cache=False)), plain) < 1e-5
    assert not (tmp_path / "none").exists()
