"""The command line: demo, train, train-vae, sample, evaluate; `minidiff --help` begins it.

Bad input ends in one line: exit code 2 for a wrong call, 1 for what failed later; `--debug` shows
the traceback.
"""

import argparse
import os
import sys
import textwrap
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from minidiff import __version__, checkpoint, evaluation, metrics, run, run_vae, shipped
from minidiff.data import DATA_VARIABLE, NAMES, PUBLISHED, SPLITS, TOYS, ImageData, load
from minidiff.data.protocol import Data
from minidiff.device import (
    DEVICES,
    DTYPES,
    describe,
    keep_freed_memory,
    pick_device,
    pick_dtype,
)
from minidiff.distributed import own_device, rank
from minidiff.errors import (
    CheckpointError,
    InvalidArgument,
    MinidiffError,
    Stopped,
    TrainingError,
    whole_number,
)
from minidiff.keeper import Saving
from minidiff.latents import LatentData
from minidiff.nn.classifier import Classifier
from minidiff.noise import MAX_SEED
from minidiff.pictures import MODES, read_picture
from minidiff.pipeline import Pipeline
from minidiff.presets import PRESETS, Preset
from minidiff.run_folder import Settings, data_of, read_settings
from minidiff.run_vae import open_vae
from minidiff.samplers import SAMPLERS, sampler
from minidiff.train_config import (
    OPTIONS,
    VAE_OPTIONS,
    Kind,
    LoopConfig,
    TrainConfig,
    VAEConfig,
    merged,
    options_of,
    read_options,
)


class Parser(argparse.ArgumentParser):
    """argparse with one line an error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that has no "‰" shows "?", not a traceback
            stream.reconfigure(errors="replace")
    keep_freed_memory()
    options = parser().parse_args(arguments)
    try:
        options.command(options)
    except Stopped as stopped:
        if not rank():
            print(f"minidiff: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("\nminidiff: interrupted", file=sys.stderr)
        return 130
    except (MinidiffError, OSError) as error:
        if options.debug:
            raise
        if rank() and not isinstance(error, TrainingError):
            return 1  # the process of rank 0 says it
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
    _train_vae_parser(commands)
    _sample_parser(commands)
    _evaluate_parser(commands)
    _check_parser(commands)
    return root


class _Verbatim(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the table of presets."""


def _command(
    commands: Any,
    name: str,
    function: Any,
    help: str,
    description: str,
    seed: Any = 0,
    dtype: Any = "auto",
) -> Parser:
    command = commands.add_parser(
        name,
        help=help,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.set_defaults(command=function)
    command.add_argument("--seed", type=int, default=seed, help=f"0 to {MAX_SEED}")
    command.add_argument(
        "--device", default="auto", help=f"{', '.join(DEVICES)}; auto takes a GPU if there is one"
    )
    command.add_argument(
        "--dtype",
        default=dtype,
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
        "learning-rate schedule, and writes a run folder that sample and evaluate read. A file "
        "given with --config overrides the preset, flags override both.",
        seed=argparse.SUPPRESS,
        dtype=argparse.SUPPRESS,
    )
    command.formatter_class = _Verbatim
    command.description = textwrap.fill(command.description, 92)
    command.epilog = "presets:\n" + "\n".join(map(_described, PRESETS.items()))
    add = command.add_argument
    add("--data", help="digits, mnist, cifar10, captions, or a folder of images (sub-folders: "
        "classes); default: the preset's")  # fmt: skip
    _add_files(command)
    add("--vae", metavar="RUN", help="train on the latents of this autoencoder, a run of train-vae "
        "or a vae folder; --block is 1 then")  # fmt: skip
    _add_keeping(command)
    add("--shard", action="store_true", help="under torchrun: the processes share the weights "
        "(FSDP2), for a model that outgrows one GPU")  # fmt: skip
    add("--preset", choices=list(PRESETS), help="a recipe, see below")
    add("--config", metavar="FILE", help=".json or .toml with options as below, by the names of "
        "TrainConfig; or a run's config.json")  # fmt: skip
    _add_options(command, OPTIONS)


def _train_vae_parser(commands: Any) -> None:
    command = _command(
        commands,
        "train-vae",
        train_vae,
        "train an autoencoder, for a model that works on its latents",
        "Trains an autoencoder within a budget of minutes or steps, and measures it on held-out "
        "images. What it writes is for train --vae.",
        seed=argparse.SUPPRESS,
        dtype=argparse.SUPPRESS,
    )
    add = command.add_argument
    add("--data", help="digits, mnist, cifar10, or a folder of images")
    _add_files(command)
    _add_keeping(command)
    add("--config", metavar="FILE", help=".json or .toml with options as below, by the names of "
        "VAEConfig; or a run's config.json")  # fmt: skip
    _add_options(command, VAE_OPTIONS)


def _add_files(command: Parser) -> None:
    """Where data are that are no folder of images, and what is made of those that are."""
    add = command.add_argument
    add("--data-dir", help="where the files of MNIST or CIFAR-10 are (or set MINIDIFF_DATA)")
    add("--download", action="store_true", help="fetch MNIST or CIFAR-10 into --data-dir first, "
        "where its files are not there; checked by size and SHA-256")  # fmt: skip
    add("--image-size", type=int, help="crop and resize the images of a folder to this side")


def _add_keeping(command: Parser) -> None:
    """Where a run is kept, how often it is saved, and how it goes on."""
    add = command.add_argument
    add("--out", help="folder of the run; must be new or empty")
    add("--resume", metavar="RUN", help="go on with a run that was stopped or killed, from its "
        "newest snapshot that is whole; everything else is in its config.json")  # fmt: skip
    add("--save-every", type=int, metavar="N", help="steps between snapshots; default: every five "
        "minutes. The end, and where a signal stops the run, are saved in any case")  # fmt: skip
    add("--keep-last", type=int, metavar="N", help="how many of the last snapshots are kept, "
        "beside the one of the lowest running loss; default: 2")  # fmt: skip


def _add_options(command: Parser, options: Mapping[str, Field]) -> None:
    """Flags for the fields of a config, but for those that every command has."""
    for name, option in options.items():
        if option.metadata["flag"] != "":
            _add_option(command, name, option)


def _add_option(command: Parser, name: str, option: Field) -> None:
    """A flag for a field of a config; absent from the result unless given."""
    kind, default = option.metadata["type"], option.default
    help = option.metadata["help"]
    if default is not None and kind is not bool:
        shown = ",".join(map(str, default)) if kind is tuple else default
        help += f" (default: {shown})"
    how = (
        {"action": "store_true"} if kind is bool else {"type": _channels if kind is tuple else kind}
    )
    if values := option.metadata["values"]:
        how |= {"nargs": len(values), "metavar": values}
    command.add_argument(
        _flag(name, option),
        dest=name,
        default=argparse.SUPPRESS,
        help=help.replace("%", "%%"),
        **how,
    )


def _flag(name: str, option: Field | None = None) -> str:
    """The flag of an argument, or of a field of a config."""
    return "--" + ((option and option.metadata["flag"]) or name.replace("_", "-"))


def _described(preset: tuple[str, Preset]) -> str:
    """A preset as lines of --help."""
    name, recipe = preset
    options = ", ".join(f"{k} {v}" for k, v in options_of(recipe.train).items())
    text = f"{recipe.why}. Data {recipe.data}; {options}"
    return textwrap.fill(text, 92, initial_indent=f"  {name:<9} ", subsequent_indent=" " * 12)


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
    add("run", nargs="?", help="a run folder, or the model folder in it; absent with --model")
    add("text", nargs="?", help="what to draw, for a model that was trained on captions")
    add("--model", choices=list(shipped.MODELS), help="a model that comes with minidiff")
    add("--negative", metavar="TEXT", help="what not to draw")
    add("--num", type=int, help="how many pictures; default: 100, and 16 of a text")
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
    add("--png", help="write a grid of the pictures to this file; default: samples.png, unless "
        "there is --npz")  # fmt: skip
    add("--npz", help="write images (uint8, N×H×W×C) and labels to this file")
    _add_sampling(command)


def _evaluate_parser(commands: Any) -> None:
    command = _command(
        commands,
        "evaluate",
        evaluate,
        "measure how good a trained model is",
        "Prints one table by the protocol of minidiff/EVALUATION.md: accuracy, Fréchet distance "
        "(‰ of the real spread, on minidiff's own features; not FID), kernel distance, density, "
        "coverage, what a classifier learns from samples, how near they are to training images, "
        "and bits per dimension, each with its spread over seeds and beside what real images "
        "score.",
    )
    add = command.add_argument
    add("run", nargs="?", help="a run folder, or the model folder in it; absent with --model")
    add("--model", choices=list(shipped.MODELS), help="a model that comes with minidiff")
    add("--quick", action="store_true", help="10,000 samples a seed, and less of the rest")
    add("--num", type=int, help="samples a seed; default: 50,000, or as many as there are images")
    add("--seeds", type=int, help="how many seeds, from --seed on; default: 3; captions: one")
    add("--parts", type=_words, help=f"some of {','.join(evaluation.PARTS)}; default: all")
    add("--data", help="a name or a folder; default: what the run was trained on")
    add("--data-dir", help=f"where the published files of the data are (or set {DATA_VARIABLE})")
    add("--classifier", help="a file of minidiff.train_classifier, for data without a shipped one")
    add("--json", help="write every figure, seed and setting to this file")
    add("--png", help="write a grid of the first hundred samples to this file")
    _add_sampling(command)


def _check_parser(commands: Any) -> None:
    command = _command(
        commands,
        "check",
        check,
        "find out why samples of a run are noise",
        "Looks at everything between the data and a sample: the range of the data, what the "
        "network predicts and the scheduler reads, where sampling starts, the average, the loss "
        "at every noise level, one batch learnt by heart, the sampler with a perfect network. "
        "What is wrong comes with its likely cause and a remedy, and exit code 1.",
    )
    command.add_argument("run", help="a run folder")


def _add_sampling(command: Parser) -> None:
    add = command.add_argument
    add("--sampler", help=f"{', '.join(SAMPLERS)}; default: the model's own")
    add("--steps", type=int, help="steps of the sampler; default: the model's own")
    add("--guidance", type=float, help="scale of guidance, 1 for none; default: the model's own")
    add("--eta", type=float, help="randomness of ddim, 0 to 1")
    add("--batch-size", type=int, default=250, help="pictures in memory at once")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


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
    config = replace(
        PRESETS["digits"].train,
        minutes=options.minutes,
        seed=options.seed,
        dtype=_dtype_name(options.dtype, device),
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
    if options.resume is not None:
        return _resume(options)
    _want_a_folder(options)
    device = pick_device(options.device)
    preset = PRESETS.get(options.preset)
    config = _config(
        TrainConfig,
        options,
        device,
        {} if options.vae is None else {"block": 1},
        {} if preset is None else options_of(preset.train),
    )
    saving = _saving(options)
    name = options.data or (preset and preset.data)
    if name is None:
        raise InvalidArgument("give --data or --preset")
    source = _source(name, options)
    if options.vae is not None:
        source["vae"] = str(Path(options.vae).absolute())
    data = _data(source, device, config.seed, options.download)
    say = _nothing if rank() else print
    say(_under_way(device, config, data))
    run.train_into(
        options.out, config, data, device, saving=saving, load=source, shard=options.shard
    )
    say(f"wrote {options.out}. Next: minidiff sample {options.out} --png samples.png")


def _want_a_folder(options: argparse.Namespace) -> None:
    if options.out is None:
        raise InvalidArgument("give --out FOLDER, or --resume RUN")


def _config(
    kind: type[Kind],
    options: argparse.Namespace,
    device: torch.device,
    *layers: Mapping[str, Any],
) -> Kind:
    """The config that flags, --config and the layers below these make."""
    file = read_options(options.config) if options.config else {}
    names = {option.name for option in fields(kind)}
    flags = {name: value for name, value in vars(options).items() if name in names}
    layers = [*layers, file, flags]
    dtype = ChainMap(*layers[::-1]).get("dtype", "auto")
    return merged(*layers, {"dtype": _dtype_name(dtype, device)}, kind=kind)


def _saving(options: argparse.Namespace) -> Saving:
    return Saving(options.save_every, 2 if options.keep_last is None else options.keep_last)


def _under_way(device: torch.device, config: LoopConfig, data: Data) -> str:
    where = describe(device, DTYPES[config.dtype])
    return f"device: {where}; data: {len(data)} images of {data.name}"


def _resume(options: argparse.Namespace) -> None:
    """minidiff train --resume"""
    settings, device = _to_go_on(options, run.COMMAND, OPTIONS, "minidiff.run.resume")
    data = _data(settings.data, device, settings.config.seed)
    run.resume(options.resume, data, device)
    say = _nothing if rank() else print
    say(f"wrote {options.resume}. Next: minidiff sample {options.resume} --png samples.png")


def _to_go_on(
    options: argparse.Namespace, command: str, known: Mapping[str, Field], otherwise: str
) -> tuple[Settings, torch.device]:
    """What the run of --resume was told, and where it goes on; nothing else may be given."""
    beside = ("command", "resume", "device", "debug")
    for name, value in vars(options).items():
        if name not in beside and value is not None and value is not False:
            raise InvalidArgument(
                f"--resume goes on with what {options.resume}/{run.CONFIG} says; leave out "
                f"{_flag(name, known.get(name))}"
            )
    settings = _told_all(options.resume, command, otherwise)
    return settings, pick_device(settings.device if options.device == "auto" else options.device)


def _told_all(folder: str, command: str, otherwise: str) -> Settings:
    """What a run was told, its data included. Raises CheckpointError."""
    settings = read_settings(folder, command)
    if not settings.data:
        raise CheckpointError(
            f"{folder}: was trained from Python on data that only its program knows; use "
            f"{otherwise}"
        )
    return settings


def _nothing(text: str) -> None:
    """What a process that does not lead prints."""


def _source(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `load`, the same whatever the working directory and the environment."""
    folder = options.data_dir
    if name in PUBLISHED:
        folder = folder or os.environ.get(DATA_VARIABLE)
    elif Path(name).is_dir():
        name = str(Path(name).absolute())
    place = folder and str(Path(folder).absolute())
    return {"name": name, "data_dir": place, "image_size": options.image_size}


def _data(
    source: Mapping[str, Any], device: torch.device, seed: int, download: bool = False
) -> Data:
    """What `load` gives, or the latents that an autoencoder makes of it on the device."""
    others = dict(source)
    vae = others.pop("vae", None)
    data = load(**others, download=download)
    if vae is None:
        return data
    device = own_device(device)
    return LatentData(open_vae(vae).to(device), data.to(device), seed)


def train_vae(options: argparse.Namespace) -> None:
    """minidiff train-vae"""
    if options.resume is not None:
        return _resume_vae(options)
    _want_a_folder(options)
    if options.data is None:
        raise InvalidArgument("give --data")
    device = pick_device(options.device)
    config, saving = _config(VAEConfig, options, device), _saving(options)
    source = _source(options.data, options)
    data, held_out = (load(**source, split=split, download=options.download) for split in SPLITS)
    print(_under_way(device, config, data))
    _, quality = run_vae.train_vae_into(
        options.out, config, data, held_out, device, saving=saving, load=source
    )
    _measured(options.out, options.data, held_out, quality)


def _resume_vae(options: argparse.Namespace) -> None:
    """minidiff train-vae --resume"""
    settings, device = _to_go_on(options, run_vae.COMMAND, VAE_OPTIONS, "minidiff.run_vae.resume")
    data, held_out = (load(**settings.data | {"split": split}) for split in SPLITS)
    _, quality = run_vae.resume(options.resume, data, held_out, device)
    _measured(options.resume, settings.data["name"], held_out, quality)


def _measured(out: str, name: str, held_out: ImageData, quality: run_vae.Quality) -> None:
    print(f"{len(held_out)} held-out images\n{quality}")
    print(
        f"wrote {out}, look at {out}/{run_vae.PICTURE}. Next: minidiff train --vae {out} "
        f"--data {name} --minutes 5 --out RUN"
    )


def _dtype_name(name: str, device: torch.device) -> str:
    return str(pick_dtype(name, device)).removeprefix("torch.")


def sample(options: argparse.Namespace) -> None:
    """minidiff sample"""
    from minidiff import plot

    if options.png is None and options.npz is None:
        options.png = "samples.png"
    if options.png == options.npz:
        raise InvalidArgument(f"--png and --npz must be two files, got {options.png} twice")
    for path in filter(None, (options.png, options.npz)):
        checkpoint.ensure_writable(path)
    pipe = _pipeline(options)
    if options.num is None:
        options.num = 100 if options.text is None else 16
    mode = MODES.get(pipe.space.image_channels, ("RGB",))[0]
    text = "" if options.text is None and pipe.prompts is not None else options.text
    images, labels = _draw(
        pipe, options, options.num,
        prompt=text,
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

    if options.png is not None and options.png == options.json:
        raise InvalidArgument(f"--png and --json must be two files, got {options.png} twice")
    for path in filter(None, (options.png, options.json)):
        checkpoint.ensure_writable(path)
    pipe = _pipeline(options)
    name = options.data or data_of(options.run)
    if name == "captions":
        return _evaluate_captions(pipe, options)
    train_images, test_images = _splits(name, options, pipe)
    plan = evaluation.plan_for(
        train_images, options.num, quick=options.quick, seed=options.seed,
        seeds=3 if options.seeds is None else options.seeds,
    )  # fmt: skip
    plan = replace(
        plan,
        parts=options.parts or evaluation.PARTS,
        **{name: getattr(options, name) for name in ("steps", "guidance", "eta", "batch_size")},
    )
    samples: list[torch.Tensor] = []
    report = evaluation.evaluate(
        pipe, train_images, test_images, _classifier(options, train_images, pipe.device), plan,
        first_samples=samples, progress=True,
    )  # fmt: skip
    if options.png and samples:
        plot.save(plot.grid(samples[0].permute(0, 2, 3, 1).numpy(), 10), options.png)
    if options.json:
        checkpoint.write_json(options.json, report.as_json())
    seeds = ", ".join(map(str, plan.seeds))
    print(f"{plan.samples} samples a seed, seeds {seeds}, {_setting(pipe, options)}")
    print(report)


def check(options: argparse.Namespace) -> None:
    """minidiff check"""
    from minidiff.check import examine

    settings = _told_all(options.run, run.COMMAND, "minidiff.check.examine")
    device, bad = pick_device(options.device), []
    data = _data(settings.data, device, settings.config.seed)
    for finding in examine(options.run, data, device):
        print(finding, flush=True)
        if finding.good is False:
            bad.append(finding.name)
    if bad:
        raise TrainingError(f"{options.run}: {', '.join(bad)} not as it should be, see above")


def _splits(name: str, options: argparse.Namespace, pipe: Pipeline) -> tuple[ImageData, ImageData]:
    """Training and held-out images of what the model was trained on, in its size."""
    if options.data is None and name not in (*NAMES, *TOYS) and not Path(name).is_dir():
        raise InvalidArgument(f"the model was trained on {name}: say where it is, --data FOLDER")
    _, height, width = pipe.image_shape
    size = height if name not in (*NAMES, *TOYS) and height == width else None
    splits = tuple(load(name, split, options.data_dir, size) for split in SPLITS)
    if not all(isinstance(split, ImageData) for split in splits):
        raise InvalidArgument(f"data must be images to be measured by, {name} has none")
    return splits


def _classifier(
    options: argparse.Namespace, data: ImageData, device: torch.device
) -> Classifier | None:
    """The classifier that was named, the shipped one, or None where there is none."""
    if options.classifier:
        return metrics.read_classifier(options.classifier).to(device)
    if data.name in metrics.shipped():
        return metrics.load_classifier(data.name).to(device)
    return None


def _pipeline(options: argparse.Namespace) -> Pipeline:
    device = pick_device(options.device)
    _find_model(options)
    pipe = run.open_pipeline(options.run, device)
    if device.type == "cpu":
        pipe.unet.to(memory_format=torch.channels_last)
    exact = options.command is sample and options.dtype == "auto"
    pipe.to(dtype=torch.float32 if exact else pick_dtype(options.dtype, device))
    if options.sampler is not None:
        pipe.scheduler = sampler(options.sampler, pipe.scheduler)
    return pipe


def _find_model(options: argparse.Namespace) -> None:
    """Put the folder of --model in the place of RUN; what stood there was the text."""
    if options.model is None:
        if options.run is None:
            raise InvalidArgument("give a run or --model")
        return
    words = [options.run, getattr(options, "text", None)]
    options.run = shipped.folder(options.model)
    if options.command is sample and words[1] is None:
        options.text = words[0]
    elif words != [None, None]:
        raise InvalidArgument(f"with --model there is no run: got {words[0]!r} in its place")
    elif options.command is evaluate and options.data is None:
        options.data = shipped.MODELS[options.model]


def _evaluate_captions(pipe: Pipeline, options: argparse.Namespace) -> None:
    """minidiff evaluate, for a model that draws what a text says"""
    from minidiff import plot
    from minidiff.metrics import SceneEvaluator

    for name in ("quick", "parts", "classifier", "json", "seeds"):
        if getattr(options, name) not in (None, False):
            raise InvalidArgument(
                f"--{name} is for pictures of classes or of nothing, not of texts"
            )
    evaluator = SceneEvaluator(pick_device(options.device))
    n = 1000 if options.num is None else whole_number("num", options.num, 1)
    shown = []

    def draw(prompts: list[str]) -> torch.Tensor:
        images, _ = _draw(pipe, options, len(prompts), prompt=prompts)
        shown.append(images)
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    print(f"seed {options.seed}, {_setting(pipe, options)}")
    for line in evaluator.table(draw, n):
        print(line, flush=True)
    if options.png:
        plot.save(plot.grid(shown[0][:100], 10), options.png)


def _draw(pipe: Pipeline, options: argparse.Namespace, n: int, **more: Any) -> tuple:
    """n pictures and their labels; `more` are further arguments of the pipeline."""
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
