"""Shapes that broadcast."""

import torch

from minidiff.runtime.shapes import append_dims


def test_appended_axes_multiply_each_image_by_its_own_number() -> None:
    x = torch.ones(2, 3, 4, 5)
    scaled = append_dims(torch.tensor([2.0, 3.0]), x.ndim) * x
    assert (scaled[0] == 2).all()
    assert (scaled[1] == 3).all()


def test_appended_axes_multiply_each_channel_by_its_own_number() -> None:
    factors = torch.arange(6.0).view(2, 3)
    product = append_dims(factors, 4) * torch.ones(2, 3, 4, 5)
    assert torch.equal(product.mean(dim=(2, 3)), factors)
