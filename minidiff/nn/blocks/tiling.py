"""Maps of large images in parts: one image at a time, or in overlapping tiles.

`sliced(f)` and `tiled(f, …)` take a map of images and return one that needs less memory. Slices
change only the time. Tiles change the result: a tile does not depend on its surroundings, so
neighbours overlap, and over the overlap they are blended,

    (1 − i/n)·before + (i/n)·tile        at position i of the n that overlap.

The positions of tiles, and the blending with neighbours that are blended already, are those of
diffusers' `AutoencoderKL`, so the numbers are the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, real_number, whole_number
from minidiff.runtime.shapes import append_dims

ImageMap = Callable[[Tensor], Tensor]


def sliced(f: ImageMap) -> ImageMap:
    """Return f applied to one image of the batch at a time."""

    def by_slices(x: Tensor) -> Tensor:
        return torch.cat([f(image) for image in x.split(1)])

    return by_slices


def tiled(f: ImageMap, size: int, out_size: int, overlap: float = 0.25) -> ImageMap:
    """Return f applied to overlapping tiles of images that are larger than one tile.

    Args:
        f: map of images (B, C, H, W) to (B, C', H·s, W·s) with s = out_size / size.
        size: side of a tile.
        out_size: side of a tile after f.
        overlap: fraction of a tile that the next one covers too, in [0, 1).
    Returns:
        A map with the shapes of f, if size / out_size divides H and W or f rounds down.
    Raises:
        InvalidArgument: sizes out of range, or an overlap that differs before and after f, so
            that the results would not line up.
    """
    whole_number("tile size", size, 1)
    whole_number("tile out_size", out_size, 1)
    real_number("tile overlap", overlap, 0, 1)
    step, fade = int(size * (1 - overlap)), int(out_size * overlap)
    kept = out_size - fade
    if step < 1 or step * out_size != kept * size:
        raise InvalidArgument(
            f"tiles must line up: sides of {size} that overlap by {overlap:g} start every {step}, "
            f"and f maps {size} to {out_size}, but {kept} of that are kept"
        )
    smallest = max(size // out_size, 1)  # positions that f maps to one

    def by_tiles(x: Tensor) -> Tensor:
        if max(x.shape[-2:]) <= size:
            return f(x)
        tops, lefts = (range(0, side - smallest + 1, step) for side in x.shape[-2:])
        above, strips = [], []
        for top in tops:
            row = []
            for column, left in enumerate(lefts):
                tile = f(x[..., top : top + size, left : left + size])
                if above:
                    tile = _blended(above[column], tile, -2, fade)
                if row:
                    tile = _blended(row[-1], tile, -1, fade)
                row.append(tile)
            strips.append(torch.cat([tile[..., :kept, :kept] for tile in row], dim=-1))
            above = row
        return torch.cat(strips, dim=-2)

    return by_tiles


def _blended(before: Tensor, tile: Tensor, axis: int, fade: int) -> Tensor:
    """Return `tile` with its first `fade` positions along `axis` blended with `before`."""
    n = min(before.shape[axis], tile.shape[axis], fade)
    weight = torch.arange(n, device=tile.device, dtype=torch.float64) / max(n, 1)
    weight = append_dims(weight.to(tile.dtype), -axis)
    end, start = before.narrow(axis, before.shape[axis] - n, n), tile.narrow(axis, 0, n)
    rest = tile.narrow(axis, n, tile.shape[axis] - n)
    return torch.cat([end * (1 - weight) + start * weight, rest], dim=axis)
