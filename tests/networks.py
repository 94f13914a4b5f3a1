"""Comparison of a network with that of another library: weights, outputs and gradients."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the distance relative to the larger of the two; 0 for two zeros."""
    scale = max(ours.norm().item(), theirs.norm().item(), 1e-30)
    return (ours - theirs).norm().item() / scale


def same_weights(ours: type, theirs: type, config: dict, seed: int) -> tuple[Any, nn.Module]:
    """Return a network of each library with the same random weights, loaded strictly both ways."""
    torch.manual_seed(seed)
    theirs, ours = with_random_norms(theirs(**config)), ours(**config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def with_random_norms(network: nn.Module) -> nn.Module:
    """Return the network with random norms: those of 1 and 0 would hide a swap."""
    for name, parameter in network.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    return network


def assert_same_network(
    ours: nn.Module, theirs: nn.Module, call: Callable[[nn.Module, Tensor], Any], x: Tensor
) -> None:
    """Assert equal outputs, and equal gradients of the input and of every weight.

    Args:
        ours, theirs: networks with the same weights.
        call: (network, x) → output, a tensor or diffusers' output with `.sample`.
        x: input; its dtype, float32 or float64, sets the tolerance, ten times as large for
            gradients.
    """
    tolerance = TOLERANCES[x.dtype]
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [call(net, x) for net, x in zip((ours, theirs), inputs, strict=True)]
    outputs = [getattr(out, "sample", out) for out in outputs]
    assert distance(*outputs) < tolerance
    weight = torch.randn_like(outputs[0])
    for out in outputs:
        (out * weight).sum().backward()
    assert distance(*(x.grad for x in inputs)) < 10 * tolerance
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    # Some gradients are zero up to rounding (a bias before a norm), so errors are relative to the
    # largest one.
    largest = max(gradient.norm().item() for gradient in expected.values())
    for name, parameter in ours.named_parameters():
        if name in expected:
            error = (parameter.grad - expected.pop(name)).norm().item()
            assert error < 10 * tolerance * largest, name
        else:
            assert parameter.grad is None or not parameter.grad.any(), name
    assert not expected
    ours.zero_grad(), theirs.zero_grad()


def with_old_attention(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint, or its index, with the names that picture attention had in 2022."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    today = re.compile(r"(attentions\.\d+)\.(to_q|to_k|to_v|to_out\.0)\.")
    return {today.sub(lambda m: f"{m[1]}.{old[m[2]]}.", n): v for n, v in tensors.items()}
