"""A walk through latent space: images between prompts and between noises.

Between two stops the prompts' conditioning is mixed linearly and the noise spherically. A sum
a·z₁ + b·z₂ of two noises has variance a² + b², so on the straight line between them it is too small
for the network, down to half. On the arc

    slerp(z₁, z₂, u) = (sin((1 − u)·θ)·z₁ + sin(u·θ)·z₂) / sin θ,   cos θ = ⟨z₁, z₂⟩/(‖z₁‖·‖z₂‖)

the length goes from that of one to that of the other (Shoemake 1985, "Animating Rotation with
Quaternion Curves", section 3.3; for latents White 2016, arXiv:1609.04468).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minidiff.errors import InvalidArgument, real_number, whole_number
from minidiff.lab import plot
from minidiff.noise import image_generators, randn
from minidiff.pipeline import Pipeline
from minidiff.text.phrase import mixed

MAX_FRAMES = 1000  # per pair of stops; they are held in memory


def slerp(first: Tensor, second: Tensor, u: float) -> Tensor:
    """Return the point at fraction u of the arc between two tensors of one shape, see this module.

    Parallel tensors, which have no arc, are mixed linearly.

    Raises:
        InvalidArgument: other shapes, or u outside [0, 1].
    """
    u = real_number("u", u, 0, 1)
    if first.shape != second.shape:
        raise InvalidArgument(f"second must have the shape of first, {tuple(first.shape)}, got "
                              f"{tuple(second.shape)}")  # fmt: skip
    a, b = first.double().flatten(), second.double().flatten()
    angle = torch.atan2(
        (a / a.norm() - b / b.norm()).norm(), (a / a.norm() + b / b.norm()).norm()
    ).mul(2)  # arccos loses half of the digits near 0
    if not torch.sin(angle) > 1e-7:
        return torch.lerp(first, second, u)
    one, two = (torch.sin(part * angle) / torch.sin(angle) for part in (1 - u, u))
    return (one * a + two * b).view(first.shape).to(first.dtype)


def walk(
    pipe: Pipeline,
    stops: Sequence[str | int],
    seeds: Sequence[int] | int = 0,
    frames: int = 12,
    **call: Any,
) -> list[Image.Image]:
    """Draw images along a walk through stops, the same noise of later steps for all.

        images = walk(pipe, ["a red 3", "a blue 8"], seeds=[0, 1])
        write(images, "walk.gif")

    Args:
        pipe: pipeline of prompts; or of classes, where all stops are one class.
        stops: prompts, at least two; the walk goes from each to the next.
        seeds: seed of the noise at each stop; one number keeps the noise.
        frames: images from a stop to the next, this one not included.
        call: further arguments of the pipeline's call.
    Returns:
        (stops − 1)·frames + 1 images, the first and last of them at the ends of the walk.
    Raises:
        InvalidArgument: fewer than two stops, another number of seeds, classes that differ, or as
            the pipeline's call.
    """
    if isinstance(stops, str) or not isinstance(stops, Sequence) or len(stops) < 2:
        raise InvalidArgument(f"stops must be a list of at least two prompts, got {stops!r}")
    whole_number("frames", frames, 1, MAX_FRAMES)
    seeds = [seeds] * len(stops) if isinstance(seeds, int) else list(seeds)
    if len(seeds) != len(stops):
        raise InvalidArgument(
            f"seeds must be a number, or {len(stops)} of them, one for each stop; got {len(seeds)}"
        )
    for name in call.keys() & {"prompt", "class_labels", "latents", "seed", "generator"}:
        raise InvalidArgument(f"{name} must be left out: stops and seeds decide it")
    if pipe.prompts is None and len(set(stops)) > 1:
        raise InvalidArgument(f"stops must be one class where there are no prompts, got {stops}")
    shape = (1, *pipe.space.shape(call.get("height"), call.get("width")))
    noise = [randn(shape, image_generators(seed, [0])) for seed in seeds]
    places = [(i, n / frames) for i in range(len(stops) - 1) for n in range(frames)]
    places.append((len(stops) - 2, 1.0))
    latents = torch.cat([slerp(noise[i], noise[i + 1], u) for i, u in places])
    same = image_generators(seeds[0], [0] * len(places))
    for generator in same:
        randn(shape, generator)  # what comes after it is the noise of later steps
    prompts = [
        mixed(stops[i : i + 2], [1 - u, u]) if 0 < u < 1 and stops[i] != stops[i + 1] else
        stops[i + 1] if u else stops[i]
        for i, u in places
    ]  # fmt: skip
    return pipe(prompts, latents=latents, generator=same, output_type="pil", **call).images


def write(images: Sequence[Image.Image], path: str | Path, scale: int = 4, seconds: float = 3.0):
    """Write the images of a walk as a GIF. Raises InvalidArgument, or CheckpointError."""
    whole_number("scale", scale, 1, 64)
    frames = [i.resize((i.width * scale, i.height * scale), Image.Resampling.NEAREST)
              for i in images]  # fmt: skip
    plot.save_gif([frame.convert("RGB") for frame in frames], path, seconds)
