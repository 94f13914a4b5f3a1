"""Checks of what a scheduler is given at run time: timesteps and tensors."""

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, true_or_false
from minidiff.noise import Generators, check_generators
from minidiff.runtime.shapes import check_finite, warn_unless_finite

NUMBERS = (int, float, Real)  # the first two are found sooner than by their abstract class


def host_number(timestep: int | float | Tensor) -> int | float:
    """Return a timestep as a Python number; this syncs for a tensor on another device.

    Raises:
        InvalidArgument: it is neither a number nor a tensor with one element.
    """
    if isinstance(timestep, Tensor) and timestep.numel() == 1:
        timestep = timestep.item()
    if isinstance(timestep, bool) or not isinstance(timestep, NUMBERS):
        raise InvalidArgument(f"timestep must be one number, got {timestep!r}")
    return timestep


def on_device(
    timesteps: Sequence[float], dtype: torch.dtype, device: torch.device | str | None
) -> Tensor:
    """Return timesteps as a tensor. Raises InvalidArgument for a device that is not there."""
    try:
        return torch.tensor(timesteps, dtype=dtype, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InvalidArgument(
            f"device must be one that torch has here, such as 'cpu', got {device!r} "
            f"({str(error).splitlines()[0][:80]})"
        ) from error


def model_input(sample: Tensor, timestep: float | Tensor | None) -> Tensor:
    """Return a sample x_t that may be scaled for the network. Raises InvalidArgument."""
    if not isinstance(sample, Tensor) or not sample.is_floating_point():
        got = sample.dtype if isinstance(sample, Tensor) else type(sample).__name__
        raise InvalidArgument(f"sample must be a tensor of floating point, got {got}")
    if timestep is not None and not isinstance(timestep, Tensor):
        host_number(timestep)
    return sample


def check_step(
    output: Tensor,
    sample: Tensor,
    variance_noise: Tensor | None,
    generator: Generators,
    return_dict: bool,
) -> None:
    """Refuse arguments that do not fit each other in a step, see `Scheduler.step`."""
    true_or_false("return_dict", return_dict)
    _check_tensors(model_output=output, sample=sample)
    if output.shape != sample.shape:
        raise InvalidArgument(
            f"model_output must have the shape of sample, {tuple(sample.shape)}, "
            f"got {tuple(output.shape)}"
        )
    if not (output.is_floating_point() and output.dtype == sample.dtype):
        raise InvalidArgument(
            "model_output and sample must be floating point of one dtype, "
            f"got {output.dtype} and {sample.dtype}"
        )
    if variance_noise is not None:
        if generator is not None:
            raise InvalidArgument("give either variance_noise or generator, not both")
        _check_tensors(variance_noise=variance_noise)
        if variance_noise.shape != sample.shape or not variance_noise.is_floating_point():
            raise InvalidArgument(
                f"variance_noise must be floating point of the shape of sample, "
                f"{tuple(sample.shape)}, got {variance_noise.dtype} {tuple(variance_noise.shape)}"
            )
        check_finite("variance_noise", variance_noise)
    check_generators(generator, len(sample) if sample.ndim else 1)
    check_finite("model_output", output)  # on a GPU only the finished images are checked
    check_finite("sample", sample)


def _check_tensors(**given: object) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise InvalidArgument(f"{name} must be a tensor, got {type(value).__name__}")


def check_pair(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Refuse tensors that would silently be broadcast or promoted; warn of NaN and infinity."""
    _check_tensors(**{name: tensor, like_name: like})
    if tensor.shape != like.shape:
        raise InvalidArgument(
            f"{name} must have the shape of {like_name}, {tuple(like.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    if not (tensor.is_floating_point() and tensor.dtype == like.dtype):
        raise InvalidArgument(
            f"{name} and {like_name} must be floating point of one dtype, "
            f"got {tensor.dtype} and {like.dtype}"
        )
    warn_unless_finite(name, tensor)
    warn_unless_finite(like_name, like)
