"""The command line: demo, train, sample, evaluate. `minidiff --help` shows where to begin.

Bad input ends in one line: exit code 2 for a wrong call, 1 for what failed later; `--debug` shows
the traceback.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

import torch

from minidiff import __version__, checkpoint, run
from minidiff.data import load
from minidiff.device import DEVICES, DTYPES, describe, pick_device, pick_dtype
from minidiff.errors import InvalidArgument, MinidiffError, whole_number
from minidiff.noise import MAX_SEED
from minidiff.pictures import MODES, read_picture
from minidiff.pipeline import Pipeline
from minidiff.prediction import PREDICTION_TYPES
from minidiff.samplers import SAMPLERS, sampler
from minidiff.schedule import BETA_SCHEDULES
from minidiff.train import TrainConfig

DEFAULTS = {field.name: field.default for field in fields(TrainConfig)}


class Parser(argparse.ArgumentParser):
    """argparse with one line an error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that has no "‰" shows "?", not a traceback
            stream.reconfigure(errors="replace")
    options = parser().parse_args(arguments)
    try:
        options.command(options)
    except KeyboardInterrupt:
        print("\nminidiff: interrupted", file=sys.stderr)
        return 130
    except (MinidiffError, OSError) as error:
        if options.debug:
            raise
        print(f"minidiff: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, InvalidArgument) else 1
    except (MemoryError, RuntimeError) as error:
        if options.debug or not _is_out_of_memory(error):
            raise
        print("minidiff: out of memory; take a smaller --batch-size or model", file=sys.stderr)
        return 1
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    """torch has one type for this on GPUs, and on the CPU only a message."""
    words = ("out of memory", "allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def parser() -> Parser:
    """The grammar of the command line."""
    root = Parser(
        prog="minidiff",
        description="Diffusion models from scratch. Begin with: minidiff demo",
    )
    root.add_argument("--version", action="version", version=f"minidiff {__version__}")
    commands = root.add_subparsers(metavar="COMMAND", required=True)
    _demo_parser(commands)
    _train_parser(commands)
    _sample_parser(commands)
    _evaluate_parser(commands)
    return root


def _command(commands: Any, name: str, function: Any, help: str, description: str) -> Parser:
    command = commands.add_parser(
        name,
        help=help,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.set_defaults(command=function)
    command.add_argument("--seed", type=int, default=0, help=f"0 to {MAX_SEED}")
    command.add_argument(
        "--device", default="auto", help=f"{', '.join(DEVICES)}; auto takes a GPU if there is one"
    )
    command.add_argument(
        "--dtype",
        default="auto",
        help=f"of the network: auto, {', '.join(DTYPES)}; auto is bfloat16 where the hardware has "
        "it (sample: float32)",
    )
    command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return command


def _demo_parser(commands: Any) -> None:
    command = _command(
        commands,
        "demo",
        demo,
        "train a small model on digits in a minute and look at it",
        "Trains a class-conditional diffusion model on the embedded digits, samples it with DDPM, "
        "DDIM and DPM-Solver++, prints a table, and writes pictures and the model.",
    )
    command.add_argument("--out", default="minidiff-demo", help="folder for pictures and model")
    command.add_argument("--minutes", type=float, default=1.25, help="minutes of training")


def _train_parser(commands: Any) -> None:
    command = _command(
        commands,
        "train",
        train,
        "train a model on digits, MNIST or a folder of images",
        "Trains a model within a budget of minutes or steps, which decides the whole "
        "learning-rate schedule, and writes a run folder that sample and evaluate read.",
    )
    add = command.add_argument
    add("--data", required=True, help="digits, mnist, or a folder of images (sub-folders: classes)")
    add("--data-dir", help="where MNIST's four IDX files are (or set MINIDIFF_DATA)")
    add("--image-size", type=int, help="crop and resize the images of a folder to this side")
    add("--out", required=True, help="folder of the run; must be new or empty")
    add("--minutes", type=float, help="budget in minutes of wall-clock time")
    add("--steps", type=int, help="budget in optimizer steps, instead of minutes")
    add("--batch-size", type=int, help="images a step")
    add("--learning-rate", type=float, help="of AdamW, at its peak")
    add("--label-dropout", type=float, help="share of images whose class is hidden")
    add("--prediction-type", help=", ".join(PREDICTION_TYPES))
    add("--beta-schedule", help=", ".join(BETA_SCHEDULES))
    add("--block", type=int, help="side of the pixel blocks that become channels; 1 for none")
    add("--channels", type=_channels, help="channels of each level, such as 48,96")
    add("--layers", type=int, help="residual blocks a level")
    add("--guidance", type=float, dest="guidance_scale", help="stored with the model")
    add("--sampling-steps", type=int, dest="num_inference_steps", help="stored with the model")
    add("--pictures", type=int, help="how many grids of samples to save along the way")
    for action in command._actions:
        if action.dest in DEFAULTS and action.dest not in ("minutes", "steps", "seed", "dtype"):
            action.default = DEFAULTS[action.dest]


def _sample_parser(commands: Any) -> None:
    command = _command(
        commands,
        "sample",
        sample,
        "make pictures with a trained model",
        "Makes pictures with a run or a model folder, or changes one with --image and --mask. "
        "Without --sampler, --steps and --guidance the model's own setting is used, fixed when it "
        "was trained. Image i of a seed is the same picture whatever the batch size.",
    )
    add = command.add_argument
    add("run", help="a run folder, or the model folder in it")
    add("text", nargs="?", help="what to draw, for a model of texts; the same as --prompt")
    add("--prompt", help="what to draw, for a model of texts")
    add("--negative", help="a text to lead away from")
    add("--num", type=int, default=100, help="how many pictures")
    add("--class", type=int, dest="label", help="only this class; otherwise equal shares of all")
    add("--image", help="a picture to start from, of the size to be made; read in the model's "
        "colours")  # fmt: skip
    add("--strength", type=float, help="how far to go from --image, 0 to 1; default: 0.8, or 1 "
        "with --mask")  # fmt: skip
    add("--mask", help="a picture, white where --image is to be replaced, grey where blended")
    add("--guidance-rescale", type=float, default=0.0, help="0 to 1: keep the spread of what is "
        "guided")  # fmt: skip
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guide between "
        "these two σ/α alone")  # fmt: skip
    add("--png", help="write a grid of the pictures to this file")
    add("--npz", help="write images (uint8, N×H×W×C) and labels to this file")
    _add_sampling(command)


def _evaluate_parser(commands: Any) -> None:
    command = _command(
        commands,
        "evaluate",
        evaluate,
        "measure how good a trained model is",
        "Samples the model, classes in equal shares, and prints accuracy, Fréchet distance (‰ of "
        "the real spread, on minidiff's own features; not FID) and coverage, with what real "
        "images score beside them.",
    )
    add = command.add_argument
    add("run", help="a run folder, or the model folder in it")
    add("--num", type=int, help="how many samples; default: as many as there are test images")
    add("--data", help="digits or mnist; default: what the run was trained on")
    add("--data-dir", help="where MNIST's four IDX files are (or set MINIDIFF_DATA)")
    add("--png", help="write a grid of the first hundred samples to this file")
    _add_sampling(command)


def _add_sampling(command: Parser) -> None:
    add = command.add_argument
    add("--sampler", help=f"{', '.join(SAMPLERS)}; default: the model's own")
    add("--steps", type=int, help="steps of the sampler; default: the model's own")
    add("--guidance", type=float, help="scale of guidance, 1 for none; default: the model's own")
    add("--eta", type=float, help="randomness of ddim, 0 to 1")
    add("--batch-size", type=int, default=250, help="pictures in memory at once")


def _channels(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers with commas, such as 48,96; got {text!r}"
        ) from None


# --- commands --------------------------------------------------------------------------------


def demo(options: argparse.Namespace) -> None:
    """minidiff demo"""
    from minidiff.demo import demo as run_demo

    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    config = TrainConfig(
        minutes=options.minutes,
        seed=options.seed,
        dtype=str(dtype).removeprefix("torch."),
        channels=(32, 64),  # a small network learns sooner; a minute is short
        guidance_scale=2.0,
        pictures=0,
    )
    run_demo(options.out, config, device)
    out = options.out
    print(
        f"\nLook at {out}/samples.png, {out}/forward.png and {out}/denoise.gif. Try next:\n"
        f"  minidiff sample {out} --class 7 --num 64 --png sevens.png\n"
        f"  minidiff sample {out} --sampler ddim --steps 5 --guidance 4 --png few-steps.png\n"
        f"  minidiff evaluate {out} --guidance 1\n"
        f"  minidiff train --data mnist --data-dir DIR --minutes 10 --out runs/mnist"
    )


def train(options: argparse.Namespace) -> None:
    """minidiff train"""
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    chosen = {name: value for name, value in vars(options).items() if name in DEFAULTS}
    config = TrainConfig(**chosen | {"dtype": str(dtype).removeprefix("torch.")})
    data = load(options.data, data_dir=options.data_dir, image_size=options.image_size)
    print(f"device: {describe(device, dtype)}; data: {len(data)} images of {data.name}")
    run.train_into(options.out, config, data, device)
    print(f"wrote {options.out}. Next: minidiff sample {options.out} --png samples.png")


def sample(options: argparse.Namespace) -> None:
    """minidiff sample"""
    from minidiff import plot

    if not options.png and not options.npz:
        raise InvalidArgument("give --png FILE, --npz FILE or both")
    if options.png == options.npz:
        raise InvalidArgument(f"--png and --npz must be two files, got {options.png} twice")
    for path in filter(None, (options.png, options.npz)):
        checkpoint.ensure_writable(path)
    if None not in (options.text, options.prompt):
        raise InvalidArgument(f"give one text, got {options.text!r} and {options.prompt!r}")
    pipe = _pipeline(options)
    mode = MODES.get(pipe.space.image_channels, ("RGB",))[0]
    images, labels = _draw(
        pipe, options, options.num,
        prompt=options.text if options.prompt is None else options.prompt,
        negative_prompt=options.negative,
        class_labels=options.label,
        image=None if options.image is None else read_picture(options.image, mode),
        mask_image=None if options.mask is None else read_picture(options.mask, "L"),
        strength=options.strength,
        guidance_rescale=options.guidance_rescale,
        guidance_interval=options.guidance_interval,
    )  # fmt: skip
    if options.png:
        columns = len(pipe.class_names) if pipe.class_names and options.label is None else 10
        plot.save(plot.grid(images, min(columns, len(images))), options.png)
        print(f"wrote {options.png}")
    if options.npz:
        checkpoint.write_npz(options.npz, images=images, labels=labels)
        print(f"wrote {options.npz}")


def evaluate(options: argparse.Namespace) -> None:
    """minidiff evaluate"""
    from minidiff import plot
    from minidiff.metrics import Evaluator

    if options.png:
        checkpoint.ensure_writable(options.png)
    pipe = _pipeline(options)
    name = options.data or run.data_of(options.run)
    evaluator = Evaluator(name, options.data_dir, pick_device(options.device))
    n = options.num if options.num is not None else evaluator.test_images
    whole_number("num", n, evaluator.least)
    if pipe.image_shape != evaluator.image_shape:
        raise InvalidArgument(
            f"data {name} has images of shape {evaluator.image_shape}, the model makes "
            f"{pipe.image_shape}"
        )
    images, labels = _draw(pipe, options, n)
    if options.png:
        plot.save(plot.grid(images[:100], 10), options.png)
    scores = evaluator.score(torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(labels))
    print(f"{n} samples, seed {options.seed}, {_setting(pipe, options)}")
    print(f"model            {scores}")
    print(f"real, held out   {evaluator.ceiling(min(n, evaluator.test_images))}")
    print(f"real, training   {evaluator.floor(n)}")


def _pipeline(options: argparse.Namespace) -> Pipeline:
    device = pick_device(options.device)
    pipe = run.open_pipeline(options.run, device)
    if device.type == "cpu":
        pipe.unet.to(memory_format=torch.channels_last)
    exact = options.command is sample and options.dtype == "auto"
    pipe.to(dtype=torch.float32 if exact else pick_dtype(options.dtype, device))
    if options.sampler is not None:
        pipe.scheduler = sampler(options.sampler, pipe.scheduler)
    return pipe


def _draw(pipe: Pipeline, options: argparse.Namespace, n: int, **more: Any) -> tuple:
    result = pipe(
        **more,
        num_images=n,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        eta=options.eta,
        seed=options.seed,
        batch_size=options.batch_size,
        output_type="np",
        progress=True,
    )
    labels = result.labels if result.labels is not None else torch.full((n,), -1)
    return result.images, labels.numpy()


def _setting(pipe: Pipeline, options: argparse.Namespace) -> str:
    steps = pipe.num_inference_steps if options.steps is None else options.steps
    scale = pipe.guidance_scale if options.guidance is None else options.guidance
    name = options.sampler or f"{type(pipe.scheduler).__name__} (the model's own)"
    return f"{name}, {steps} steps, guidance {scale:g}"
