"""minidiff distill"""

import argparse
from shlex import quote
from typing import Any

from minidiff import shipped
from minidiff.adapters.consistency.config import DISTILL_OPTIONS, DistillConfig
from minidiff.cli.arguments import add_command, add_data_files, add_options, add_run_folder

FLAGS = (
    "minutes", "steps", "batch_size", "final_batch_size", "learning_rate", "warmup", "weight_decay",
    "clip", "ema_half_life", "optimizer", "method", "teacher_guidance", "intervals",
    "target_average", "num_inference_steps", "pictures",
)  # fmt: skip
OPTIONS = {name: DISTILL_OPTIONS[name] for name in FLAGS}


def add_to(commands: Any) -> None:
    """Add the grammar of minidiff distill."""
    command = add_command(
        commands,
        distill,
        "distill a trained model to one to eight steps",
        "Distills a trained diffusion model to a consistency model within a budget of minutes or "
        "steps, with the teacher's guidance inside, and writes a run folder that sample and "
        "evaluate read.",
        seed=argparse.SUPPRESS,
        dtype=argparse.SUPPRESS,
    )
    command.add_argument(
        "init",
        metavar="model",
        nargs="?",
        help="the teacher: a run, a model's folder, or a shipped model: "
        f"{', '.join(shipped.MODELS)}",
    )
    command.adder("data")(
        "--data", help="images that the teacher was trained on (default: the name it gives)"
    )
    add_data_files(command)
    add_run_folder(command)
    command.adder("run")("--config", metavar="FILE", help=".json or .toml file of options by the "
        "names of DistillConfig, or a run's config.json")  # fmt: skip
    add_options(command, OPTIONS)


def distill(options: argparse.Namespace) -> None:
    """Run minidiff distill."""
    from minidiff.adapters.consistency import distill as distilling
    from minidiff.cli import run_options
    from minidiff.errors import InvalidArgument
    from minidiff.runs.folder import data_of
    from minidiff.runtime.device import pick_device

    if options.resume is not None:
        return _resume(options)
    if options.init is None:
        raise InvalidArgument("give a model to distill (or --resume RUN)")
    budget = vars(options).keys() & {"minutes", "steps"} or options.config
    name = options.data or shipped.MODELS.get(options.init) or data_of(options.init)
    run_options.require(options, name, *([] if budget else ["--minutes or --steps"]))
    device, options.vae = pick_device(options.device), None
    places, teacher, fixed = run_options.start_of(options)
    distilling.check_teacher(teacher)
    config = run_options.config_of(DistillConfig, options, device, fixed)
    config = distilling.checked(config, teacher)
    source = run_options.data_source(name, options) | places
    data = run_options.load_source(source, device, config.seed, options.download)
    print(run_options.start_line(device, config, data))
    distilling.distill_into(
        options.out, config, data, teacher, device,
        saving=run_options.saving_of(options), load=source,
    )  # fmt: skip
    print(f"wrote {options.out}. Next: {_next(options.out)}")


def _resume(options: argparse.Namespace) -> None:
    """Run minidiff distill --resume."""
    from minidiff.adapters.consistency import distill as distilling
    from minidiff.cli import run_options

    settings, device, changes = run_options.resumed_settings(
        options, distilling.COMMAND, DISTILL_OPTIONS, "minidiff.adapters.consistency.distill.resume"
    )
    data = run_options.load_source(settings.data, device, settings.config.seed)
    teacher = run_options.open_start(settings.data.get("init"))
    distilling.resume(options.resume, data, teacher, device, **changes)
    print(f"{options.resume} is complete. Next: {_next(options.resume)}")


def _next(run: str) -> str:
    return f"minidiff sample {quote(run)} --png samples.png"
