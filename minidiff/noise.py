"""Standard normal noise, with one generator per image instead of one per batch.

Image i of seed s draws all its noise, from x_T to the last stochastic step, from a separate
generator seeded by (s, i) alone. So an image depends neither on the batch size, nor on the device,
nor on the other images: image 37 of 10,000 can be generated again by itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, whole_number
from minidiff.names import MAX_SEED

Generators = torch.Generator | Sequence[torch.Generator] | None


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """Return one CPU generator for each image index of a seed.

    Args:
        seed: seed of all images, 0 … 2³²−1.
        indices: image numbers, 0 … 2³²−1; `range(start, stop)` for a part of a larger run.
    Raises:
        InvalidArgument: a seed or an index outside 0 … 2³²−1.
    """
    seed = whole_number("seed", seed, 0, MAX_SEED)
    numbers = [whole_number("image index", index, 0, MAX_SEED) for index in indices]
    return [torch.Generator().manual_seed(_mix(seed, number)) for number in numbers]


def stream_seed(seed: int, stream: int, step: int) -> int:
    """Return the seed of one of several streams of random numbers at a training step.

    The numbers of a step depend on (seed, stream, step) alone, so there is no state to save between
    steps. Steps of one stream never share a seed.
    """
    return _mix(_mix(seed, stream), step)


def _mix(seed: int, index: int) -> int:
    """Return a 32-bit seed from (seed, index), different for all indices of one seed.

    torch's CPU generator reads 32 bits of its seed. Each line is a bijection of 32 bits (the
    finalizer of MurmurHash3), so no two images of one seed can collide.
    """
    h = (seed * 0x9E3779B1 + index) & MAX_SEED
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & MAX_SEED
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & MAX_SEED
    return h ^ (h >> 16)


def check_generators(generator: Generators, batch: int) -> None:
    """Refuse what is neither None, a generator, nor a list of one for each image of a batch.

    Raises:
        InvalidArgument: names the argument and what was given.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, Sequence) or not all(
        isinstance(one, torch.Generator) for one in generator
    ):
        raise InvalidArgument(
            f"generator must be a torch.Generator, a list of them, or None; got {generator!r}"
        )
    if len(generator) != batch:
        raise InvalidArgument(f"generator must list {batch} generators, got {len(generator)}")


def randn(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw standard normal noise of `shape` (B, …).

    Args:
        shape: shape of the noise.
        generator: None for torch's global state; one generator for the whole batch; or a list of
            B, one per image, from `image_generators`. Noise is drawn on the generator's device
            and then moved, so a CPU generator gives the same noise for every device.
        device: device of the result.
        dtype: floating-point type of the result.
    Raises:
        InvalidArgument: not generators, or a list whose length is not B.
    """
    check_generators(generator, shape[0])
    if generator is None or isinstance(generator, torch.Generator):
        source = generator.device if generator is not None else device
        return torch.randn(*shape, generator=generator, device=source, dtype=dtype).to(device)
    images = [torch.randn(*shape[1:], generator=g, device=g.device, dtype=dtype) for g in generator]
    return torch.stack(images).to(device, non_blocking=True)
