"""The checks of arguments: one line of error for any value."""

import numpy as np
import pytest
import torch

from minidiff.errors import InvalidArgument, real_number, whole_number


@pytest.mark.parametrize("value", [7, np.int64(7), torch.tensor(7)])
def test_whole_numbers_of_any_library_pass(value):
    assert whole_number("n", value, 1, 10) == 7


@pytest.mark.parametrize(
    "value",
    [None, True, 3.0, "3", [3], {}, np.array([1, 2]), torch.tensor([1, 2]), torch.tensor(2.0)],
)
def test_anything_but_a_whole_number_is_refused_by_name(value):
    with pytest.raises(InvalidArgument, match=r"^n must be a whole number"):
        whole_number("n", value, 1, 10)


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), torch.tensor(1.0)])
def test_numbers_of_any_library_pass(value):
    assert real_number("x", value, 0) == 1


@pytest.mark.parametrize("value", [None, True, "1", b"1", [1], {}, np.ones(2), torch.ones(2), 1j])
def test_anything_but_a_number_is_refused_by_name(value):
    with pytest.raises(InvalidArgument, match=r"^x must be a number"):
        real_number("x", value, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 10**400])
def test_numbers_that_are_not_finite_or_out_of_range_are_refused(value):
    with pytest.raises(InvalidArgument, match=r"^x must be"):
        real_number("x", value, 0)
