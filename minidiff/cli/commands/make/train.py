"""minidiff train"""

import argparse
import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from minidiff import shipped
from minidiff.adapters import learners
from minidiff.cli.arguments import (
    Verbatim,
    add_command,
    add_data_files,
    add_options,
    add_run_folder,
)
from minidiff.names import EXAMPLES, TOYS
from minidiff.training.config import OPTIONS, TrainConfig, options_of
from minidiff.training.presets import PRESETS, Preset, fitting, preset_for

FEW_STEPS = 100  # after fewer, the samples of a fresh network are noise


def add_to(commands: Any) -> None:
    """Add the grammar of minidiff train."""
    command = add_command(
        commands,
        train,
        "train a model on digits, MNIST, CIFAR-10, captions, a folder of images or points",
        "Trains a model within a budget of minutes or steps, which decides the whole "
        "learning-rate schedule, and writes a run folder that sample and evaluate read. The file "
        "of --config overrides the preset, and flags override both.",
        seed=argparse.SUPPRESS,
        dtype=argparse.SUPPRESS,
    )
    command.formatter_class = Verbatim
    command.description = textwrap.fill(command.description, 92)
    command.epilog = "presets:\n" + "\n".join(map(_described, PRESETS.items()))
    add = command.adder("data")
    add("--data", help="digits, mnist, cifar10, captions, a folder of images with a sub-folder "
        "for each class or a metadata.jsonl of captions, examples for --learn: "
        f"{', '.join(EXAMPLES)}, or points: {', '.join(TOYS)} (default: the preset's)")  # fmt: skip
    add_data_files(command)
    add("--vae", metavar="RUN", help="autoencoder whose latents the model learns: a run of "
        "train-vae or a vae folder; --block is then 1")  # fmt: skip
    command.adder("model")(
        "--init",
        metavar="MODEL",
        help="model to continue from, whose network and objective stay: a run, a model's folder, "
        f"or a shipped model: {', '.join(shipped.MODELS)}",
    )
    add = command.adder("adapter")
    kinds = "; ".join(f"{name}: {kind.title}" for name, kind in learners.kinds().items())
    add("--learn", choices=list(learners.kinds()), metavar="WHAT", help="what of --init is learned "
        f"for sample --adapter RUN (default: everything, as a new model). {kinds}")  # fmt: skip
    add_options(command, learners.flags())
    command.adder("model")("--task", help="fresh network with an image beside x: inpaint, or "
                           "upscale:N to enlarge images N times")  # fmt: skip
    add_run_folder(command)
    add = command.adder("run")
    add("--preset", choices=list(PRESETS), help="set of options, listed below")
    add("--config", metavar="FILE", help=".json or .toml file of options by the names of "
        "TrainConfig, or a run's config.json")  # fmt: skip
    add("--shard", action="store_true", help="shard the weights over the processes of torchrun "
        "(FSDP2), for a model larger than one GPU")  # fmt: skip
    add_options(command, OPTIONS)


def _described(preset: tuple[str, Preset]) -> str:
    """Return a preset as lines of --help."""
    name, recipe = preset
    options = ", ".join(f"{k} {v}" for k, v in options_of(recipe.train).items())
    text = f"{recipe.why}. Data {recipe.data}; {options}"
    return textwrap.fill(text, 92, initial_indent=f"  {name:<9} ", subsequent_indent=" " * 12)


def train(options: argparse.Namespace) -> None:
    """Run minidiff train."""
    from minidiff.cli import run_options
    from minidiff.pipeline.space import require_images
    from minidiff.runs import diffusion
    from minidiff.runtime.device import pick_device

    if options.resume is not None:
        return _resume(options)
    name = options.data or (options.preset and PRESETS[options.preset].data)
    run_options.require(options, name)
    device = pick_device(options.device)
    gpu = device.type != "cpu"
    fits = None if options.preset else _fitting(options, name, gpu)
    preset = PRESETS.get(options.preset or fits)
    recipe = {} if preset is None else options_of(preset.train)
    if getattr(options, "batch_size", 0) > recipe.get("final_batch_size", math.inf):
        del recipe["final_batch_size"]
    places, start, fixed = run_options.start_of(options)
    learn, learner = run_options.learner_of(options)
    if learn and start is not None:
        require_images(start, "--learn is")
    recipe = {**recipe, **getattr(learner, "defaults", {})}
    config = run_options.config_of(
        TrainConfig,
        options,
        device,
        {"block": 1} if "vae" in places else {},
        recipe,
        fixed,
    )
    saving = run_options.saving_of(options)
    source = run_options.data_source(name, options) | places | learn
    data = run_options.load_source(source, device, config.seed, options.download)
    if fits:
        fit = preset_for(name, data.shape, gpu)
        free = {"block", "flip"} - vars(options).keys()
        config = replace(config, **{option: getattr(fit, option) for option in free})
        _print_once(_preset_line(fits, data.shape, "vae" in places))
    _print_once(run_options.start_line(device, config, data))
    diffusion.train_into(
        options.out, config, data, device,
        saving=saving, load=source, shard=options.shard, start=start, learner=learner,
    )  # fmt: skip
    if start is None:
        _print_once(caution(options.out, config))
    _print_once(f"wrote {options.out}. Next: {_next(options.out, source)}")


def _preset_line(preset: str, shape: tuple[int, ...], has_vae: bool) -> str:
    """Return the line that names the preset, and the size of images."""
    size = "" if has_vae or len(shape) != 3 else f" of {shape[2]}×{shape[1]} pixels"
    return f"preset: {preset}, which fits these data{size} (other flags override it; see --help)"


def caution(run: str, config: TrainConfig) -> str:
    """Return a line if a fresh network has learnt next to nothing, else ""."""
    from minidiff.runs.folder import LOG

    if not (log := Path(run) / LOG).is_file():  # a process other than that of rank 0
        return ""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    more = "--minutes +10" if config.minutes else "--steps +1000"
    if (steps := rows[-1]["step"]) < FEW_STEPS:
        return (
            f"trained {steps} {'step' if steps == 1 else 'steps'} only, so the samples are noise; "
            f"longer: minidiff train --resume {quote(run)} {more}"
        )
    later = [row["loss"] for row in rows[1:]][(len(rows) - 1) // 2 :]
    if later and min(later) >= rows[0]["loss"]:
        return f"the loss has not fallen; see minidiff check {quote(run)}"
    return ""


def _fitting(options: argparse.Namespace, data: str, gpu: bool) -> str | None:
    """Return the preset that fits the data; None where the options decide already."""
    given = vars(options)
    if options.config or options.init or options.shard or given.get("learn_variance"):
        return None
    return fitting(data, gpu)


def _resume(options: argparse.Namespace) -> None:
    """Run minidiff train --resume."""
    from minidiff.cli import run_options
    from minidiff.runs import diffusion

    settings, device, changes = run_options.resumed_settings(
        options, diffusion.COMMAND, OPTIONS, "minidiff.runs.diffusion.resume"
    )
    data = run_options.load_source(settings.data, device, settings.config.seed)
    start = run_options.open_start(settings.data.get("init"))
    learn = settings.data.get("learn")
    learner = {"learner": learners.make(**learn)} if learn else {}
    if task := settings.data.get("task"):
        learner = {"learner": run_options.TaskTraining(task)}
    diffusion.resume(options.resume, data, device, start=start, **learner, **changes)
    _print_once(f"{options.resume} is complete. Next: {_next(options.resume, settings.data)}")


def _next(run: str, source: Mapping[str, Any]) -> str:
    if source.get("learn"):
        use = (
            "--control FILE --controlnet"
            if source["learn"]["what"] == "controlnet"
            else "--adapter"
        )
        return f"minidiff sample {quote(source['init'])} {use} {quote(run)} …"
    images = {"inpaint": " --image FILE --mask FILE"}.get(source.get("task"), "")
    images = " --image SMALL" if source.get("task") and not images else images
    return f"minidiff sample {quote(run)}{images} --png samples.png"


def _print_once(text: str) -> None:
    """Print a text in the process of rank 0 only."""
    from minidiff.runtime.distributed import rank

    if text and not rank():
        print(text)
