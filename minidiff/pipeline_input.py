"""What goes into a pipeline's call and what comes out: names, texts, noise, pictures."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minidiff.data import to_uint8
from minidiff.errors import InvalidArgument, whole_number
from minidiff.nn import UNet
from minidiff.noise import MAX_SEED, Generators, image_generators, randn


def class_names_of(names: Sequence[str], unet: UNet) -> Sequence[str]:
    """The names of a network's classes. Raises InvalidArgument: not as many as it has."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise InvalidArgument(f"class_names must be a list of strings, got {names!r}")
    embeds = unet.config.num_class_embeds or 0
    if embeds not in (len(names), len(names) + 1) or bool(embeds) != bool(names):
        raise InvalidArgument(
            f"class_names must name the network's {embeds} classes (all, or all but the last, "
            f"which then stands for no class); got {len(names)} names"
        )
    return names


def texts_of(name: str, given: str | Sequence[str], n: int | None) -> list[str]:
    """One text for all images, or one an image; n images, or as many as there are texts.

    Raises InvalidArgument: no texts, or another number of them.
    """
    texts = [given] * (n or 1) if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise InvalidArgument(f"{name} must be a text or a list of texts, got {given!r}")
    if not texts or n not in (None, len(texts)):
        raise InvalidArgument(
            f"{name} must be one text, or {n or 'at least 1'} of them; got {len(texts)}"
        )
    return list(texts)


def starts(
    latents: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> Callable[[slice, Generators], Tensor]:
    """A function from a part of the images, and its source of noise, to the standard normal noise
    that they start from.

    Args:
        latents: the noise itself, (N, C, h, w), or None to draw it.
        shape: (N, C, h, w).
    Raises:
        InvalidArgument: latents of another shape, or of whole numbers.
    """
    if latents is None:
        return lambda part, source: randn((part.stop - part.start, *shape[1:]), source, device)
    if not isinstance(latents, Tensor) or latents.shape != shape:
        got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise InvalidArgument(f"latents must be a tensor of shape {shape}, got {got}")
    if not latents.is_floating_point():
        raise InvalidArgument(f"latents must be floating point, got {latents.dtype}")
    return lambda part, source: latents[part].to(device)


def sources(
    n: int, seed: int | None, generator: Generators, first: int
) -> Callable[[slice], Generators]:
    """A function from a part of the n images to the source of its noise.

    Generators are made a batch at a time: torch's takes 5 kB, which 10,000 images would feel.

    Raises InvalidArgument: both are given, or a value is outside its range.
    """
    if seed is not None and generator is not None:
        raise InvalidArgument("give either seed or generator, not both")
    if generator is not None:
        if isinstance(generator, torch.Generator):
            return lambda part: generator
        listed = list(generator) if isinstance(generator, Sequence) else [generator]
        if not all(isinstance(one, torch.Generator) for one in listed):
            raise InvalidArgument(f"generator must be a torch.Generator or a list, got {generator}")
        if len(listed) != n:
            raise InvalidArgument(f"generator must list {n} generators, got {len(listed)}")
        return lambda part: listed[part]
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    # Plain ints, also where NumPy's were given: those overflow in the seed's mixing.
    seed = whole_number("seed", seed, 0, MAX_SEED)
    first = whole_number("first_index", first, 0, MAX_SEED + 1 - n)
    return lambda part: image_generators(seed, range(first + part.start, first + part.stop))


def as_output(images: Tensor, output_type: str) -> Any:
    """Pictures (N, C, H, W) in [−1, 1] as PIL images, as a uint8 array, or as they are."""
    if output_type == "pt":
        return images
    array = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    from PIL import Image

    return [Image.fromarray(a.squeeze(-1) if a.shape[-1] == 1 else a) for a in array]
