"""Checks of what a scheduler is given at run time: timesteps and tensors."""

from numbers import Real

from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.noise import Generators
from minidiff.runtime.shapes import check_finite


def host_number(timestep: int | float | Tensor) -> int | float:
    """Return a timestep as a Python number; this syncs for a tensor on another device.

    Raises:
        InvalidArgument: it is neither a number nor a tensor with one element.
    """
    if isinstance(timestep, Tensor) and timestep.numel() == 1:
        timestep = timestep.item()
    if isinstance(timestep, bool) or not isinstance(timestep, Real):
        raise InvalidArgument(f"timestep must be one number, got {timestep!r}")
    return timestep


def check_step(
    output: Tensor, sample: Tensor, variance_noise: Tensor | None, generator: Generators
) -> None:
    """Refuse tensors that do not fit each other in a step, see `Scheduler.step`."""
    if not (isinstance(output, Tensor) and isinstance(sample, Tensor)):
        raise InvalidArgument(
            "model_output and sample must be tensors, "
            f"got {type(output).__name__} and {type(sample).__name__}"
        )
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
        if variance_noise.shape != sample.shape:
            raise InvalidArgument(
                f"variance_noise must have the shape of sample, {tuple(sample.shape)}, "
                f"got {tuple(variance_noise.shape)}"
            )
    check_finite("model_output", output)  # on a GPU only the finished images are checked


def check_pair(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Refuse tensors that would silently be broadcast or promoted."""
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
