"""minidiff watermark"""

import argparse
from typing import Any

from minidiff.cli.arguments import add_command
from minidiff.errors import DataError, InvalidArgument


def add_to(commands: Any) -> None:
    """Add the grammar of minidiff watermark."""
    command = add_command(
        commands,
        watermark,
        "write or read an invisible watermark of 32 bits",
        "write: hides a message in a picture; it cannot be seen, and survives JPEG. read: prints "
        "the message of each picture, or with --message whether it is there; the exit code is 1 "
        "if it is missing. A picture must have the same size when it is read as when it was "
        "marked. Transparent parts are read on black.",
    )
    command.add_argument("what", choices=("write", "read"), help="write or read")
    command.add_argument("pictures", nargs="+", metavar="PICTURE", help="write: the picture, and "
        "the PNG file to write; read: pictures")  # fmt: skip
    add = command.adder("output")
    add("--message", metavar="HEX", help="message of 32 bits: 1 to 8 hexadecimal digits")
    add("--key", type=int, default=0, help="whole number; the message is read with the same one")


def watermark(options: argparse.Namespace) -> None:
    """Run minidiff watermark."""
    from minidiff.images.watermark import Watermark, message_of

    wanted = None if options.message is None else message_of(options.message)
    if options.what == "write":
        if wanted is None:
            raise InvalidArgument("--message must be given to write a watermark")
        if len(options.pictures) != 2:
            raise InvalidArgument(
                "write takes two pictures, the one to mark and the PNG file to write; got "
                f"{len(options.pictures)}"
            )
        return _write(Watermark(wanted, options.key), *options.pictures)
    mark, missing = Watermark(wanted or 0, options.key), []
    for path in options.pictures:
        (reading,) = mark.read(_pixels(path))
        if wanted is None:
            print(f"{path}: {reading.message:08x}")
            continue
        word = "found" if reading.found else "not found"
        print(f"{path}: {word}, {reading.matches} of 32 bits agree")
        missing += [] if reading.found else [path]
    if missing:
        raise DataError(f"no watermark {wanted:08x} in {', '.join(missing)}")


def _write(mark: Any, source: str, target: str) -> None:
    """Write the marked picture."""
    from pathlib import Path

    from minidiff.images import plot
    from minidiff.images.pixels import as_output
    from minidiff.runtime import files

    if Path(target).suffix.lower() != ".png":
        raise InvalidArgument(f"the picture to write must be a .png file, got {target}")
    if Path(target).exists() and Path(source).exists() and Path(target).samefile(source):
        raise InvalidArgument(f"the two pictures must be two files, got {source} twice")
    pixels = _pixels(source)
    files.ensure_writable(target)
    (picture,) = as_output(mark(pixels), "pil")
    with files.announced(target):
        plot.save(picture, target)


def _pixels(path: str) -> Any:
    """Return a picture as a tensor (1, C, H, W) in [−1, 1]."""
    from minidiff.images.pixels import as_pixels, read_image

    image = read_image(path)
    return as_pixels(image, len(image.getbands()))
