"""Files and functions of minidiff that one call of a pipeline enters, in order of first entry.

    python benchmarks/reading_path.py [CALL] [--functions] [--all]

A reader who wants to follow the call has to read these. The totals stand once for all of minidiff,
and once without the networks (`nn/`) and without the checks of arguments (`errors.py`,
`runtime/checks.py`), which the reader of a sampling call can take for granted. Loading the model is
not part of the call. Lambdas and comprehensions belong to the function that holds them.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

import numpy as np

import minidiff
from minidiff import Pipeline, shipped

PACKAGE = Path(minidiff.__file__).parent
CHECKS = ("errors.py", "runtime/checks.py")


def text_to_image() -> Callable[[], object]:
    """Prepare an image of a prompt."""
    pipe = Pipeline.from_pretrained(shipped.folder("digits-text"))
    return lambda: pipe("a green 5 on a white background", seed=0, num_inference_steps=4)


def class_conditional() -> Callable[[], object]:
    """Prepare images of two classes."""
    pipe = Pipeline.from_pretrained(shipped.folder("mnist"))
    return lambda: pipe(class_labels=[7, 3], seed=0, num_inference_steps=4)


def inpainting() -> Callable[[], object]:
    """Prepare an image of a prompt that replaces the right half of another image."""
    pipe = Pipeline.from_pretrained(shipped.folder("digits-text"))
    _, height, width = pipe.image_shape
    image = np.full((height, width, 3), 255, dtype=np.uint8)
    mask = np.zeros((height, width), dtype=np.float32)
    mask[:, width // 2 :] = 1
    return lambda: pipe("a red 7", image=image, mask_image=mask, seed=0, num_inference_steps=4)


CALLS = {
    "text-to-image": text_to_image,
    "class-conditional": class_conditional,
    "inpainting": inpainting,
}


def functions_entered(call: Callable[[], object]) -> dict[str, list[str]]:
    """Return the functions of minidiff that a call enters, by file, in order of first entry."""
    entered: dict[CodeType, None] = {}  # a dict keeps the order

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            entered.setdefault(frame.f_code)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    files: dict[str, list[str]] = {}
    for code in entered:
        path = Path(code.co_filename)
        if path.is_relative_to(PACKAGE) and not code.co_name.startswith("<"):
            names = files.setdefault(path.relative_to(PACKAGE).as_posix(), [])
            if code.co_qualname not in names:
                names.append(code.co_qualname)
    return files


def counted(file: str) -> bool:
    """Return True for a file that belongs to the reading path proper."""
    return not file.startswith("nn/") and file not in CHECKS


def totals(files: dict[str, list[str]]) -> str:
    """Return the number of files and functions as text."""
    return f"{len(files)} files, {sum(map(len, files.values()))} functions"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("call", nargs="?", choices=list(CALLS), default="text-to-image", help="call to follow")
    add("--functions", action="store_true", help="list the functions of every file")
    add("--all", action="store_true", help="list the files of nn/ and of the checks as well")
    options = parser.parse_args()
    files = functions_entered(CALLS[options.call]())
    path = {file: names for file, names in files.items() if counted(file)}
    print(f"{options.call}: files in order of first entry, and functions entered in each")
    for file, names in (files if options.all else path).items():
        print(f"{len(names):5}  {file}")
        if options.functions:
            print("".join(f"         {name}\n" for name in names), end="")
    print(f"in total: {totals(files)}")
    print(f"without nn/ and checks: {totals(path)}")


if __name__ == "__main__":
    main()
