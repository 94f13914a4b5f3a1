"""minidiff sample"""

import argparse
import math
from typing import Any

from minidiff.cli.arguments import add_command, add_model, add_sampling
from minidiff.cli.control_options import add_control
from minidiff.errors import whole_number
from minidiff.names import GUIDES

FILES = ("png", "npz", "gif", "strip")
IMAGE_FLAGS = ("image", "mask", "strength", "watermark", "gif", "strip", "scale")


def add_to(commands: Any) -> None:
    """Add the grammar of minidiff sample."""
    command = add_command(
        commands,
        sample,
        "generate images with a trained model",
        "Generates images with the model of a run or folder, or edits an image with --image and "
        "--mask. By default, sampler, steps and guidance are those stored with the model. For a "
        "given seed, image i is the same for every batch size.",
    )
    add_model(command)
    command.add_argument("text", nargs="?", help="prompt, for a model that was trained on captions")
    add = command.adder("sampling")
    add("--num", type=int, help="number of images (default: 16 of one class or text, else 100; "
        "2000 points)")  # fmt: skip
    add("--class", dest="label", metavar="CLASS", help="name or number of the class to draw "
        "(default: all of them, equally often)")  # fmt: skip
    add("--negative", metavar="TEXT", help="negative prompt")
    add("--weights", action="store_true", help="read brackets of the prompt as weights: (word), "
        "[word] and (word:1.3)")  # fmt: skip
    add_sampling(command)
    add("--guide", choices=GUIDES, help="guidance rule: plain extrapolation, rescaled, or "
        "adaptive projected (default: that of the model)")  # fmt: skip
    add("--guidance-rescale", type=float, default=0.0, help="weight of rescaling guided outputs to "
        "the standard deviation of unguided ones, 0 to 1")  # fmt: skip
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels "
        "σ/α between which guidance acts (default: all)")  # fmt: skip
    add = command.adder("image")
    add("--image", help="image to start from, of the size of the samples; converted to the "
        "model's colour channels")  # fmt: skip
    add("--strength", type=float, help="amount of change to --image, 0 to 1 (default: 0.8, with "
        "--mask 1)")  # fmt: skip
    add("--mask", help="image that is white where --image is replaced, grey where it is blended")
    add("--reconstruction-guidance", type=float, default=0.0, metavar="W", help="with --mask: "
        "weight of guidance by the kept pixels; with 5, seams disappear")  # fmt: skip
    add_control(command)
    add = command.adder("output")
    add("--png", help="file for a grid of the images, or a scatter plot of points (default: "
        "samples.png, with --npz none)")  # fmt: skip
    add("--scale", type=int, metavar="N", help="enlarge each pixel of --png to N×N (default: 2; 1 "
        "for one image)")  # fmt: skip
    add("--watermark", metavar="HEX", help="32-bit message to hide in every image; see minidiff "
        "watermark")  # fmt: skip
    add("--no-filter", action="store_true", help="switch off the model's concept filter, if it has "
        "one")  # fmt: skip
    add("--npz", help="file for images (uint8, N×H×W×C), or points (float32, N×D), and labels")
    add("--gif", help="file for an animation from noise to the images (of the first batch)")
    add("--strip", help="PNG file of the steps: samples above, predicted clean images below")


def sample(options: argparse.Namespace) -> None:
    """Run minidiff sample."""
    from minidiff.cli import model_options
    from minidiff.lab.film import Film
    from minidiff.pipeline.space import require_images

    if all(getattr(options, flag) is None for flag in FILES):
        options.png = "samples.png"
    model_options.check_files(options, *FILES)
    if options.scale is not None:
        whole_number("scale", options.scale, 1, 64)
    if options.model is not None and options.text is None:
        options.run, options.text = None, options.run  # with --model, the only word is the text
    number_type = "float32" if options.dtype == "auto" else options.dtype
    pipe = model_options.open_model(options, number_type)
    if given := [f"--{flag}" for flag in IMAGE_FLAGS if getattr(options, flag) is not None]:
        require_images(pipe, f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'}")
    if options.no_filter:
        pipe.finishers.clear()
    if options.watermark is not None:
        pipe.finishers.append(model_options.marking(options.watermark, pipe.image_shape))
    if options.num is None:
        many = options.text is None and options.label is None
        options.num = pipe.space.sheet or (100 if many else 16)
    film = Film(pipe.decode) if options.gif or options.strip else None
    given = asked(pipe, options)
    images, labels = model_options.draw(pipe, options, options.num, callback=film, **given)
    write(pipe, options, images, labels, film)


def asked(pipe: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags ask of a call of the pipeline."""
    from minidiff.cli.model_options import class_of, starting_image, text_of
    from minidiff.images.pixels import read_mask
    from minidiff.text.phrase import weighted

    text = text_of(pipe, options.text)
    return {
        "prompt": weighted(text) if options.weights and text is not None else text,
        "negative_prompt": options.negative,
        "class_labels": class_of(pipe, options.label),
        "image": None if options.image is None else starting_image(pipe, options.image),
        "mask_image": None if options.mask is None else read_mask(options.mask),
        "strength": options.strength,
        "reconstruction_guidance": options.reconstruction_guidance,
        "guide": options.guide,
        "guidance_rescale": options.guidance_rescale,
        "guidance_interval": options.guidance_interval,
    }


def write(pipe: Any, options: argparse.Namespace, images: Any, labels: Any, film: Any) -> None:
    """Write the samples to the files that the flags name."""
    from minidiff.images import plot
    from minidiff.runtime import files

    square = options.label is not None or pipe.prompts is not None
    side = min(10, 1 + math.isqrt(len(images) - 1))
    columns = side if square else len(pipe.class_names) or 10
    scale = options.scale or (1 if len(images) == 1 else 2)
    if options.png:
        picture = plot.picture(images, min(columns, len(images)), scale, labels)
        with files.announced(options.png):
            plot.save(picture, options.png)
    if film is not None:
        film.write(options.gif, options.strip, columns, scale)
    if options.npz:
        with files.announced(options.npz):
            files.write_npz(options.npz, images=images, labels=labels)
