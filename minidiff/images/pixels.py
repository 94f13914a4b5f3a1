"""Conversion between the images of a caller (PIL, bytes, floats) and those of a pipeline.

A pipeline accepts every form that it returns: a list of PIL images, a uint8 array (N, H, W, C), a
float tensor (N, C, H, W). Inside, images are float32 (N, C, H, W) in [−1, 1], and bytes survive the
round trip exactly. Nothing is resized or clipped and no mode is converted: another size, another
number of channels or another range is refused.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import DataError, InvalidArgument, one_of
from minidiff.runtime.files import user_path

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MODES = {1: ("L",), 3: ("RGB",), 4: ("RGBA",)}  # PIL's modes by the number of channels
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # read without running other programs
GREY_MODES = {"1", "L", "LA", "La"}  # PIL's modes of at most 8 bits per channel
COLOUR_MODES = {"P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr"}
ORIENTED = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}  # where a PNG has its orientation
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # exact in float32


class Original(NamedTuple):
    """The images that a call starts from.

    Attributes:
        pixels: (N, C, H, W) in [−1, 1].
        mask: (N, 1, H, W) in [0, 1], 1 where an image is replaced; None for everywhere.
    """

    pixels: Tensor
    mask: Tensor | None = None

    def part(self, part: slice, device: torch.device) -> "Original":
        """Return some of the images, on a device."""
        mask = None if self.mask is None else self.mask[part].to(device)
        return Original(self.pixels[part].to(device), mask)

    def put_back(self, generated: Tensor) -> Tensor:
        """Return generated images with the original, bit for bit, where the mask is 0."""
        return blend(self.pixels, generated, self.mask)

    def repeat(self, n: int) -> "Original":
        """Return one original for each of n images, each repeated n/N times in a row.

        Raises:
            InvalidArgument: N does not divide n.
        """
        if n % len(self.pixels):
            raise InvalidArgument(
                f"image must be one image, or one for each of the {n} to generate; "
                f"got {len(self.pixels)}"
            )
        repeats = n // len(self.pixels)
        mask = None if self.mask is None else self.mask.repeat_interleave(repeats, 0)
        return Original(self.pixels.repeat_interleave(repeats, 0), mask)


def as_original(
    image: Any, mask: Any, channels: int, *, needs_mask: bool = False
) -> Original | None:
    """Return images and masks in any form that the pipeline accepts; None without an image.

    Args:
        image: images in a form of `as_pixels`, or None.
        mask: masks in a form of `as_mask`, one for all images or one each, or None.
        channels: channels of an image.
        needs_mask: True for an inpainting network, which takes a mask as input.
    Raises:
        InvalidArgument: names `image` or `mask_image` and what is wrong with it.
    """
    if needs_mask and (image is None or mask is None):
        raise InvalidArgument("image and mask_image must be given: this network is for inpainting")
    if image is None:
        if mask is not None:
            raise InvalidArgument("mask_image needs an image to keep a part of, got image=None")
        return None
    pixels = as_pixels(image, channels)
    if mask is None:
        return Original(pixels)
    masks = as_mask(mask, pixels.shape[-2:])
    if len(masks) not in (1, len(pixels)):
        raise InvalidArgument(
            f"mask_image must be one mask, or one for each of {len(pixels)} images; "
            f"got {len(masks)}"
        )
    return Original(pixels, masks.expand(len(pixels), -1, -1, -1))


def as_pixels(image: Any, channels: int, name: str = "image", low: float = -1) -> Tensor:
    """Return images as float32 (N, C, H, W) in [−1, 1].

    Args:
        image: a PIL image of mode L (one channel) or RGB (three); a uint8 array (H, W, C) or
            (N, H, W, C), or (H, W) for one channel; a uint8 tensor (C, H, W) or (N, C, H, W); a
            float tensor of that shape in [−1, 1]; or a list of these, of one size.
        channels: channels C.
        name: argument to name in errors.
        low: value of black: −1, or 0 for images in [0, 1], which may be bool as well.
    Raises:
        InvalidArgument: anything else.
    """
    if isinstance(image, list | tuple):
        return _joined(name, [as_pixels(one, channels, name, low) for one in image])
    raw = _tensor(name, image, MODES.get(channels, ()))
    if raw.ndim == 2 and channels == 1:
        raw = raw[None]
    if raw.ndim == 3:
        raw = raw[None]
    if raw.ndim != 4 or raw.shape[1] != channels or 0 in raw.shape:
        raise InvalidArgument(
            f"{name} must have {channels} channels: a tensor (N, {channels}, H, W) or an array "
            f"(N, H, W, {channels}), N may be left out; got shape {_shape(image)}"
        )
    if raw.dtype == torch.uint8:
        return raw.float() / 255 if low == 0 else to_float(raw)
    if low == 0 and raw.dtype == torch.bool:
        return raw.float()
    if raw.dtype not in FLOATS or not isinstance(image, Tensor):
        raise InvalidArgument(
            f"{name} must be uint8, or a tensor of float32 (or 16-bit floats) in "
            f"[{'−1' if low else '0'}, 1]; got {type(image).__name__} of {image.dtype}"
        )
    return _within(name, raw.float(), low)


def as_mask(mask: Any, size: Sequence[int]) -> Tensor:
    """Return masks as float32 (N, 1, H, W) in [0, 1]: 1 is replaced, 0 kept, between blended.

    Args:
        mask: a PIL image of mode 1 or L; a uint8 (0 to 255), bool or float array or tensor (H, W),
            (N, H, W), an array (N, H, W, 1) or a tensor (N, 1, H, W); or a list of these.
        size: height and width of the images.
    Raises:
        InvalidArgument: anything else.
    """
    if isinstance(mask, list | tuple):
        return _joined("mask_image", [as_mask(one, size) for one in mask])
    raw = _tensor("mask_image", mask, ("L", "1"))
    if raw.ndim == 3 and raw.shape[0] != 1 and not isinstance(mask, Tensor):
        raw = raw.movedim(0, -1)  # an array (N, H, W) has no channels to move to the front
    if raw.ndim == 4 and raw.shape[1] == 1:
        raw = raw[:, 0]
    raw = raw[None] if raw.ndim == 2 else raw
    if raw.ndim != 3 or raw.shape[1:] != tuple(size) or len(raw) == 0:
        raise InvalidArgument(
            f"mask_image must have the size of image, {tuple(size)}, and one channel; "
            f"got shape {_shape(mask)}"
        )
    if raw.dtype == torch.uint8:
        if raw.max() == 1:
            raise InvalidArgument(
                "mask_image of uint8 counts from 0 (kept) to 255 (replaced), and this one holds "
                "nothing above 1: give it as bool"
            )
        return raw[:, None].float() / 255
    if raw.dtype != torch.bool and not raw.is_floating_point():
        raise InvalidArgument(f"mask_image must be uint8, bool or float, got {mask.dtype}")
    return _within("mask_image", raw[:, None].float(), 0)


def _tensor(name: str, given: Any, modes: Sequence[str]) -> Tensor:
    """Return an image, or an array of images, as a tensor with its channels, if any, first."""
    if isinstance(given, Tensor):
        return given.detach()
    if not isinstance(given, np.ndarray):
        from PIL import Image

        if not isinstance(given, Image.Image):
            raise InvalidArgument(
                f"{name} must be a PIL image, an array or a tensor, or a list of them; "
                f"got {type(given).__name__}"
            )
        if given.mode not in modes:
            raise InvalidArgument(
                f"{name} must be a PIL image of mode {' or '.join(modes) or '(none fits)'}, got "
                f"{given.mode!r}: convert it"
            )
        given = np.asarray(given)
    if given.dtype.kind not in "buif":
        raise InvalidArgument(f"{name} must hold numbers, got an array of {given.dtype}")
    # A copy in the byte order of this machine: PIL's memory is read-only.
    raw = torch.from_numpy(np.array(given, given.dtype.newbyteorder("=")))
    return raw.movedim(-1, -3) if raw.ndim > 2 else raw


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    if not parts:
        raise InvalidArgument(f"{name} must hold at least one image, got an empty list")
    sizes = {tuple(part.shape[-2:]) for part in parts}
    if len(sizes) > 1:
        raise InvalidArgument(f"{name} must hold images of one size, got {sorted(sizes)}")
    return torch.cat(parts)


def _within(name: str, x: Tensor, low: float) -> Tensor:
    least, most = (bound.item() for bound in x.aminmax())
    if not low <= least <= most <= 1:  # False for NaN
        raise InvalidArgument(
            f"{name} of floats must lie in [{low:g}, 1], got {least:g} to {most:g}"
        )
    return x


def _shape(given: Any) -> tuple[int, ...]:
    return tuple(given.shape) if hasattr(given, "shape") else (given.height, given.width)


def read_image(path: str | Path, mode: str | None = None) -> Any:
    """Read an image file as an upright PIL image; transparency is put on black.

    Args:
        path: the file.
        mode: PIL's mode of the image; None for L where the file is grey, else RGB.
    Raises:
        DataError: the file is missing, damaged, not an image, or has more than 8 bits per channel.
    """
    image = _decoded(path)
    mode = mode or ("L" if image.mode in GREY_MODES else "RGB")
    return on_black(image).convert(mode) if mode != "RGBA" else image.convert(mode)


def read_mask(path: str | Path) -> Any:
    """Read an image file as a mask, white where an image is replaced.

    Raises:
        DataError: as `read_image`; or the file has transparency, or holds 0 and 1 only.
    """
    image = _decoded(path)
    if image.has_transparency_data:
        raise DataError(
            f"{path}: has transparency; a mask is opaque, white where the image is replaced"
        )
    mask = image.convert("L")
    if image.mode != "1" and mask.getextrema()[1] == 1:
        raise DataError(f"{path}: its largest value is 1; a mask is white (255) where it replaces")
    return mask


def _decoded(path: str | Path) -> Any:
    path = user_path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with opened(path) as image:
            problem = unreadable(image)
            decoded = upright(image)
    except Exception as error:  # Pillow's decoders raise any exception for damaged files
        raise DataError(f"{path}: not a readable image ({error})") from error
    if problem:
        raise DataError(f"{path}: {problem}")
    return decoded


@contextmanager
def opened(path: Path, formats: Sequence[str] = FORMATS) -> Iterator[Any]:
    """Open an image file as a PIL image, whose pixels are not decoded yet.

    Pillow maps a path into memory, which misreads turned TIFFs without compression; a file object
    is read instead.
    """
    from PIL import Image

    with path.open("rb") as file, Image.open(file, formats=formats) as image:
        yield image


def unreadable(image: Any) -> str:
    """Return why grey or RGB of 8 bits cannot hold the pixels of an opened image, or "".

    Pillow would clip 16-bit grey and floats, and drop half of the bits of 16-bit colours.
    """
    depth = str(image.tile)
    deep = re.search(r";16[BLN]", depth) or (
        image.format == "PPM" and re.search(r"\b\d{4,}\)", depth)
    )
    if deep or image.mode not in GREY_MODES | COLOUR_MODES:
        mode = repr(image.mode) + ", 16 bits" * bool(deep)
        return f"pixels of mode {mode}, expected 8 bits per channel of grey or RGB"
    return ""


def orientation(image: Any) -> int:
    """Return the EXIF orientation of an opened image, 1 to 8; 1 where it cannot be read.

    Metadata must not decide whether pixels are read. Pillow reports the size of a TIFF after the
    turn, and turns it when it is decoded. Reading EXIF behind the pixels of a PNG would decode it.
    """
    if image.format == "TIFF" and 0x0112 in image.tag_v2:
        return 1
    if image.format == "PNG" and not ORIENTED & image.info.keys():
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF raises nearly anything
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(image: Any) -> Any:
    """Decode an opened image, and turn it as its EXIF orientation says, if that can be read."""
    from PIL import ImageOps

    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as in `orientation`
        return image.copy()


def on_black(image: Any) -> Any:
    """Return an image without transparency, put on black."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)


def blend(kept: Tensor, generated: Tensor, mask: Tensor) -> Tensor:
    """Return (1 − m)·kept + m·generated, and exactly `kept` where m is 0."""
    return torch.where(mask == 0, kept, (1 - mask) * kept + mask * generated)


def check_output(output_type: str, channels: int) -> None:
    """Check an output type; PIL has no images of some channels. Raises InvalidArgument."""
    one_of("output_type", output_type, OUTPUT_TYPES)
    if output_type == "pil" and channels not in MODES:
        raise InvalidArgument(f"output_type must be np or pt for images of {channels} channels")


def as_output(images: Tensor, output_type: str) -> Any:
    """Return images (N, C, H, W) in [−1, 1] as "pil", "np" (uint8 NHWC) or "pt" (unchanged)."""
    if output_type == "pt":
        return images
    array = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    from PIL import Image

    return [Image.fromarray(a.squeeze(-1) if a.shape[-1] == 1 else a) for a in array]


def to_float(u: Tensor) -> Tensor:
    """Return bytes 0..255 as float32 in [−1, 1]: x = u / 127.5 − 1."""
    return u.float().div_(127.5).sub_(1)


def to_uint8(x: Tensor) -> Tensor:
    """Return floats in [−1, 1] as bytes, rounded: the inverse of `to_float`.

    Values outside [−1, 1] are clamped. bfloat16 and float16 are widened first: neither has 256
    levels after the scaling.
    """
    return x.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
