"""minidiff sample"""

import argparse
import math
from typing import Any

from minidiff import shipped
from minidiff.cli.arguments import add_command, add_sampling
from minidiff.cli.model_options import draw, open_model
from minidiff.errors import InvalidArgument
from minidiff.images import plot
from minidiff.images.pixels import MODES, read_picture
from minidiff.runtime import files


def add_to(commands: Any) -> None:
    """The grammar of minidiff sample."""
    command = add_command(
        commands,
        "sample",
        sample,
        "make pictures with a trained model",
        "Makes pictures with a run or a model folder, or changes one with --image and --mask. "
        "Without --sampler, --steps and --guidance the model's own setting is used, fixed when it "
        "was trained. Image i of a seed is the same picture whatever the batch size.",
    )
    add = command.add_argument
    add("run", nargs="?", help="a run folder, or the model folder in it; absent with --model")
    add("text", nargs="?", help="what to draw, for a model that was trained on captions")
    add("--model", choices=list(shipped.MODELS), help="a model that comes with minidiff")
    add("--negative", metavar="TEXT", help="what not to draw")
    add("--num", type=int, help="how many pictures; default: 100, and 16 of one class or text")
    add("--class", type=int, dest="label", help="only this class; otherwise equal shares of all")
    add("--image", help="a picture to start from, of the size to be made; read in the model's "
        "colours")  # fmt: skip
    add("--strength", type=float, help="how far to go from --image, 0 to 1; default: 0.8, or 1 "
        "with --mask")  # fmt: skip
    add("--mask", help="a picture, white where --image is to be replaced, grey where blended")
    add("--reconstruction-guidance", type=float, default=0.0, metavar="W", help="with --mask: how "
        "much what is kept leads what is made; 5 closes seams")  # fmt: skip
    add("--guidance-rescale", type=float, default=0.0, help="0 to 1: keep the spread of what is "
        "guided")  # fmt: skip
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guide between "
        "these two σ/α alone")  # fmt: skip
    add("--png", help="write a grid of the pictures to this file; default: samples.png, unless "
        "there is --npz")  # fmt: skip
    add("--npz", help="write images (uint8, N×H×W×C) and labels to this file")
    add_sampling(command)


def sample(options: argparse.Namespace) -> None:
    """minidiff sample"""
    if options.png is None and options.npz is None:
        options.png = "samples.png"
    if options.png == options.npz:
        raise InvalidArgument(f"--png and --npz must be two files, got {options.png} twice")
    for path in filter(None, (options.png, options.npz)):
        files.ensure_writable(path)
    if options.model is not None and options.text is None:
        options.run, options.text = None, options.run  # the one word beside --model is the text
    pipe = open_model(options, "float32" if options.dtype == "auto" else options.dtype)
    if options.num is None:
        options.num = 100 if options.text is None and options.label is None else 16
    mode = MODES.get(pipe.space.image_channels, ("RGB",))[0]
    text = "" if options.text is None and pipe.prompts is not None else options.text
    images, labels = draw(
        pipe, options, options.num,
        prompt=text,
        negative_prompt=options.negative,
        class_labels=options.label,
        image=None if options.image is None else read_picture(options.image, mode),
        mask_image=None if options.mask is None else read_picture(options.mask, "L"),
        strength=options.strength,
        reconstruction_guidance=options.reconstruction_guidance,
        guidance_rescale=options.guidance_rescale,
        guidance_interval=options.guidance_interval,
    )  # fmt: skip
    if options.png:
        alike = options.label is not None or pipe.prompts is not None
        columns = min(10, 1 + math.isqrt(len(images) - 1)) if alike else len(pipe.class_names) or 10
        plot.save(plot.grid(images, min(columns, len(images))), options.png)
        print(f"wrote {options.png}")
    if options.npz:
        files.write_npz(options.npz, images=images, labels=labels)
        print(f"wrote {options.npz}")
