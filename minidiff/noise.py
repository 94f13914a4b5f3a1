"""Standard normal noise, and seeds that belong to an image instead of a batch.

Image i of seed s draws all its noise, from the first x_T to the last stochastic step, from a
generator of its own that is seeded by (s, i) alone. So the batch size, the device and the images
beside it never change a picture: image 37 of a run of 10,000 can be made again by itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, whole_number

MAX_SEED = 2**32 - 1
Generators = torch.Generator | Sequence[torch.Generator] | None


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for each image index of a seed.

    Args:
        seed: 0 … 2³²−1.
        indices: image numbers from 0; `range(start, stop)` for a part of a larger run.
    Raises:
        InvalidArgument: a seed or an index outside 0 … 2³²−1.
    """
    seed = whole_number("seed", seed, 0, MAX_SEED)
    numbers = [whole_number("image index", index, 0, MAX_SEED) for index in indices]
    return [torch.Generator().manual_seed(_mix(seed, number)) for number in numbers]


def stream_seed(seed: int, stream: int, step: int) -> int:
    """The seed of one of several streams of random numbers at a training step.

    A step's numbers then depend on (seed, stream, step) alone: there is no state to keep between
    steps, and none to lose. Steps of one stream never share a seed.
    """
    return _mix(_mix(seed, stream), step)


def _mix(seed: int, index: int) -> int:
    """A 32-bit seed from (seed, index), different for all indices of one seed.

    torch's CPU generator reads 32 bits of its seed. Each line is a bijection of 32 bits (the
    finaliser of MurmurHash3), so no two images of one seed can collide.
    """
    h = (seed * 0x9E3779B1 + index) & MAX_SEED
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & MAX_SEED
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & MAX_SEED
    return h ^ (h >> 16)


def randn(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise of `shape` (B, …).

    Args:
        generator: None for torch's global state; one generator for the whole batch; or a list of
            B, one an image, as `image_generators` makes them. Noise is drawn on the generator's
            device and then moved, so a CPU generator gives the same noise for every device.
    Raises:
        InvalidArgument: a list whose length is not B.
    """
    if generator is None or isinstance(generator, torch.Generator):
        source = generator.device if generator is not None else device
        return torch.randn(*shape, generator=generator, device=source, dtype=dtype).to(device)
    if len(generator) != shape[0]:
        raise InvalidArgument(f"generator must list {shape[0]} generators, got {len(generator)}")
    images = [torch.randn(*shape[1:], generator=g, device=g.device, dtype=dtype) for g in generator]
    return torch.stack(images).to(device, non_blocking=True)
