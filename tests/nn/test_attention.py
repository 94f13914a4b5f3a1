"""The choice of torch's attention kernels."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidiff.nn.blocks.attention import attend, without_cudnn

ENABLED = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
}


def allowed() -> set[SDPBackend]:
    return {kernel for kernel, enabled in ENABLED.items() if enabled()}


@pytest.mark.parametrize(
    ("chosen", "within"),
    [
        (set(ENABLED), set(ENABLED) - {SDPBackend.CUDNN_ATTENTION}),
        ({SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION}, {SDPBackend.MATH}),
        ({SDPBackend.MATH}, {SDPBackend.MATH}),
        ({SDPBackend.CUDNN_ATTENTION}, {SDPBackend.CUDNN_ATTENTION}),  # there is no other
    ],
)
def test_only_cudnns_kernel_is_disabled_and_the_callers_choice_is_restored(chosen, within):
    with sdpa_kernel(list(chosen)):
        with without_cudnn():
            assert allowed() == within
        assert allowed() == chosen


def test_the_choice_of_kernels_does_not_break_a_compiled_graph():
    def attention(q: torch.Tensor) -> torch.Tensor:
        with without_cudnn():
            return attend(q, q, q, heads=2)

    q = torch.randn(3, 5, 8)
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q), attention(q), rtol=0, atol=0)
