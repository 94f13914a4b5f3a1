"""Flags of ControlNets and of their control images."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidiff.errors import InvalidArgument

if TYPE_CHECKING:
    from minidiff.pipeline import Pipeline


def add_control(command: Any) -> None:
    """Add the flags of ControlNets to a command."""
    add = command.adder("image")
    add("--controlnet", action="append", metavar="RUN", help="ControlNet: a run of train --learn "
        "controlnet, or a folder; several add up")  # fmt: skip
    add("--control", action="append", metavar="FILE", help="image that steers the ControlNet, of "
        "the size of the samples, such as white edges on black; one for each")  # fmt: skip
    add("--control-scale", action="append", type=float, metavar="S", help="weight of the "
        "ControlNet (default: 1); one for all, or one for each")  # fmt: skip
    add("--control-interval", type=float, nargs=2, metavar=("BEGIN", "END"), help="fractions of "
        "the steps between which the ControlNet acts (default: 0 1)")  # fmt: skip


def with_controlnets(pipe: "Pipeline", options: argparse.Namespace) -> "Pipeline":
    """Return the pipeline with the ControlNets of --controlnet on its device.

    Raises:
        CheckpointError: a folder cannot be read.
        InvalidArgument: a ControlNet does not fit the model.
    """
    folders = getattr(options, "controlnet", None)
    if not folders:
        return pipe
    from minidiff.nn import ControlNet
    from minidiff.runs.folder import ADAPTER

    places = [inside if (inside := Path(f) / ADAPTER).is_dir() else Path(f) for f in folders]
    return pipe.with_controls([ControlNet.from_pretrained(p).to(pipe.device) for p in places])


def control_of(pipe: "Pipeline", options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of a call that the flags give.

    Raises:
        InvalidArgument: a control image without --controlnet, or another number of them.
        DataError: an image cannot be read.
    """
    from minidiff.images.pixels import MODES, read_image

    files, nets = getattr(options, "control", None) or [], pipe.controlnets
    if len(files) != len(nets):
        raise InvalidArgument(
            f"--control must be given once for each --controlnet, got {len(files)} and {len(nets)}"
        )
    if not nets:
        return {}
    modes = [MODES.get(net.config.conditioning_channels, ("RGB",))[0] for net in nets]
    images = [read_image(file, mode) for file, mode in zip(files, modes, strict=True)]
    scales = options.control_scale or [1.0]
    return {
        "control_image": images[0] if len(images) == 1 else images,
        "control_scale": scales[0] if len(scales) == 1 else scales,
        "control_interval": options.control_interval or (0.0, 1.0),
    }
