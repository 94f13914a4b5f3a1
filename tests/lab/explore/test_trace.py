"""A network as a list of operators: the list gives the network's numbers."""

import base64
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minidiff.lab.explore import trace as module
from minidiff.lab.explore.trace import (
    OPERATORS,
    Untraceable,
    dequantized,
    packed,
    quantized,
    replay,
    round_weights,
    trace,
)
from minidiff.nn import UNet

OPTIONS = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "num_class_embeds": 4,
}


class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unet = UNet(**OPTIONS).eval()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.unet(x, t, class_labels=y)


@pytest.fixture(scope="module")
def traced():
    network = Labelled()
    inputs = (torch.zeros(1, 2, 8, 8), torch.tensor([1.0]), torch.tensor([0]))
    return network, trace(network, inputs)


@torch.no_grad()
def test_the_list_gives_the_networks_numbers_for_inputs_it_was_not_traced_with(traced) -> None:
    network, graph = traced
    for t, y in ((17.0, 3), (999.0, 1)):
        inputs = (torch.randn(1, 2, 8, 8), torch.tensor([t]), torch.tensor([y]))
        expected = network(*inputs)
        assert (replay(graph, inputs) - expected).norm() <= 1e-6 * expected.norm()


@torch.no_grad()
def test_rounded_weights_are_those_of_the_rounded_network(traced) -> None:
    network, graph = traced
    inputs = (torch.randn(1, 2, 8, 8), torch.tensor([250.0]), torch.tensor([2]))
    rounded = replay(graph, inputs, rounded=True)
    same = round_weights(Labelled())(*inputs)
    assert (rounded - same).norm() <= 1e-6 * same.norm()
    exact = network(*inputs)
    assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()


def test_rounding_is_to_half_a_step_of_each_output_channel() -> None:
    weight = torch.randn(5, 3, 3, 3) * torch.tensor([1e-3, 1.0, 10.0, 1e3, 0.0]).view(5, 1, 1, 1)
    values, scale = quantized(weight)
    assert values.abs().amax() <= 127
    half = scale.view(5, 1, 1, 1) / 2
    assert ((dequantized(weight) - weight).abs() <= half * 1.0001).all()
    assert (dequantized(weight)[4] == 0).all()


def test_the_packed_weights_are_those_of_the_graph(traced) -> None:
    _, graph = traced
    data = packed(graph)
    blob = base64.b64decode(data["weights"])
    assert {node[0] for node in data["nodes"]} <= OPERATORS | {"q", "f", "input"}
    places = [node for node in data["nodes"] if node[0] in ("q", "f")]
    for (kind, shape, *at), weight in zip(places, graph.weights, strict=True):
        assert shape == list(weight.shape)
        if kind == "f":
            values = np.frombuffer(blob, "<f4", weight.numel(), at[0])
            assert torch.equal(torch.from_numpy(values.copy()).view(shape), weight)
        else:
            values = np.frombuffer(blob, "i1", weight.numel(), at[0]).reshape(shape)
            scale = np.frombuffer(blob, "<f4", shape[0], at[1]).reshape(-1, *[1] * (len(shape) - 1))
            assert np.array_equal(values.astype("f4") * scale, dequantized(weight).numpy())


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def masked(x: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: torch.cumsum(x, 0), "the page has no operator aten.cumsum"),
        (lambda x: torch.fft.fft(x).real, "the page has no operator aten"),
        (masked, "no attention with a mask"),
        (lambda x: x + 1 if x.sum() > 0 else x, "torch.export failed: "),
    ],
)
def test_what_the_page_cannot_run_is_refused_by_name(function, message: str) -> None:
    with pytest.raises(Untraceable, match=message) as error:
        trace(Function(function), (torch.zeros(1, 2, 3, 4),))
    assert "\n" not in str(error.value)


def test_too_many_weights_are_refused_with_their_number(traced, monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_WEIGHTS", 1000)
    with pytest.raises(Untraceable, match=r"weights are more than the page's 1,000"):
        packed(traced[1])
