"""The demo: train on the embedded digits, draw with three samplers, and measure the samples."""

import signal
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff import shipped
from minidiff.data import ImageData, load
from minidiff.engines.optimize import choose
from minidiff.errors import CheckpointError, Stopped, whole_number
from minidiff.images.pixels import to_float
from minidiff.lab import explore, plot
from minidiff.metrics import Evaluator, Scores
from minidiff.names import DEMO_SAMPLES
from minidiff.noise import randn
from minidiff.pipeline import Pipeline
from minidiff.pipeline.folder import check_replaceable
from minidiff.runs import diffusion
from minidiff.runs.autosave import Signals
from minidiff.runs.folder import Settings, about, card_facts
from minidiff.runtime import files
from minidiff.runtime.device import DTYPES, describe
from minidiff.sample import Step
from minidiff.schedule import NoiseSchedule, add_noise
from minidiff.schedulers.core.names import SAMPLERS, sampler
from minidiff.training.config import TrainConfig
from minidiff.training.diffusion import DiffusionTraining, train

TRAINING_STEPS = 1400  # 75 seconds on two quiet cores, with the preset of digits
CAP, TRIAL = 600.0, 60.0  # seconds of a budget in steps, and before its speed is judged
STEPS = {"ddpm": 50, "ddim": 20, "dpm++": 10}  # near the best of each

USUAL_SAMPLES, FEWER_SAMPLES = 500, 200
SLOW = 180.0  # seconds of training, from which on fewer samples are scored
MEANING = (
    "accuracy: samples that a classifier reads as the digit that was requested; higher is better",
    "FD ‰:     distance of samples to real images, in thousandths of their spread; lower is better",
    "coverage: fraction of real images with a sample nearby; higher is better",
)


class Row(NamedTuple):
    """A row of the demo's table."""

    sampler: str
    steps: int
    seconds: float
    scores: Scores


def demo(
    out: str | Path,
    config: TrainConfig,
    device: torch.device,
    samples: int | None = None,
    engine: str | None = None,
) -> list[Row]:
    """Train, sample and measure; print a table; write pictures and the model into `out`.

    Args:
        out: folder for mnist.png, samples.png, forward.png, denoise.gif, explore.html and model/;
            an earlier demo is replaced.
        config: budget, seed and guidance of the run; a budget in steps is cut short where it
            would take longer than ten minutes.
        device: device to train on.
        samples: number of samples of each sampler for the table, from 192 to 10,000; None for
            500, or 200 where the training took over three minutes.
        engine: engine that draws the samples, see `Pipeline.optimize`; None for torch.
    Returns:
        A row per sampler.
    Raises:
        InvalidArgument: `engine` is not installed, or not for this device.
        CheckpointError: `out` cannot be written, or holds something other than an earlier demo.
    """
    out = files.user_path(out)
    if samples is not None:
        whole_number("samples", samples, *DEMO_SAMPLES)
    if engine is not None:
        choose(engine, "auto", device)  # fails now where it is not installed
    _refuse_foreign(out)
    data = load("digits")
    settings = Settings("demo", config, {"name": "digits"}, about(data), device.type)
    settings.write(out)  # fails now if `out` cannot be written
    print(f"device: {describe(device, DTYPES[config.dtype])}")
    show_shipped(out)
    evaluator, signals = Evaluator("digits", device=device), Signals()

    def listen(training: DiffusionTraining) -> None:
        """Let the training know of Ctrl-C."""
        training.stop_requested = lambda: signals.caught or 0

    started = time.monotonic()
    with signals.watch():
        pipe = train(config, data, device, resume=listen, after_step=cut_short, progress=True)
    pipe.save_pretrained(out / diffusion.MODEL)

    own, seconds = pipe.scheduler, time.monotonic() - started
    if engine is not None:
        pipe.optimize(engine)
    draw(pipe, data, out)
    samples = fitting_samples(seconds) if samples is None else samples
    rows = [measure(pipe, name, steps, evaluator, samples) for name, steps in STEPS.items()]
    scores = table(rows, evaluator, samples)
    print(scores)
    pipe.scheduler = own
    pipe.engines.clear()
    facts = card_facts(settings, out / "samples.png", scores)
    pipe.save_pretrained(out / diffusion.MODEL, facts=facts)
    explore.page(pipe, "demo").write(out / "explore.html")
    return rows


def fitting_samples(seconds: float) -> int:
    """Return how many samples to score after a training of this many seconds."""
    if seconds < SLOW:
        return USUAL_SAMPLES
    print(
        f"{FEWER_SAMPLES} samples of each sampler are scored instead of {USUAL_SAMPLES}, because "
        f"this machine is slow or busy: the figures vary more. All: --samples {USUAL_SAMPLES}"
    )
    return FEWER_SAMPLES


def show_shipped(out: Path) -> None:
    """Write mnist.png, what the shipped model of MNIST draws: a picture before any training."""
    pipe = Pipeline.from_pretrained(shipped.folder("mnist"))
    pipe.scheduler = sampler("dpm++", pipe.scheduler)
    options = {"num_images": 20, "num_inference_steps": 8, "seed": 0, "output_type": "np"}
    plot.save(plot.grid(pipe(**options, progress=False).images, 10, scale=2), out / "mnist.png")
    print(f"wrote {out / 'mnist.png'}: digits by the model that ships with minidiff", flush=True)


def cut_short(training: DiffusionTraining) -> None:
    """Lower the number of steps to those that CAP seconds allow; the learning rate falls with them.

    The end of the training prints how many steps are missing. After Ctrl-C it ends at once.

    Raises:
        Stopped: by SIGTERM.
    """
    budget, wanted = training.budget, training.config.steps
    if training.agreed_stop == signal.SIGTERM:
        raise Stopped("the demo was stopped", signal.SIGTERM)
    if training.agreed_stop:
        budget.steps, budget.seconds = wanted and budget.step, budget.elapsed
        print(f"\nstopped at step {budget.step}; the pictures show what is learnt by now")
        return
    if wanted and budget.elapsed > TRIAL:
        budget.steps = min(wanted, max(budget.step, int(CAP * budget.step / budget.elapsed)))
    if wanted and budget.fraction_done >= 1 and budget.step < wanted:
        print(
            f"\ntrained {budget.step} of {wanted} steps, because this machine is slow or busy and "
            f"{CAP / 60:.0f} minutes are the limit: the samples are worse. Longer: --minutes 30"
        )


def _refuse_foreign(out: Path) -> None:
    """Refuse a folder that is neither empty nor of an earlier demo. Raises CheckpointError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        command = files.read_json(out / diffusion.CONFIG).get("command")
    except CheckpointError:
        command = None
    check_replaceable(out / diffusion.MODEL)
    if command != "demo":
        raise CheckpointError(
            f"{out}: not empty and not of an earlier demo, which would be replaced; choose "
            "another --out"
        )


def measure(pipe: Pipeline, name: str, steps: int, evaluator: Evaluator, n: int) -> Row:
    """Return a row for n samples of a sampler, every class equally often."""
    print(f"drawing and scoring {n} samples: {SAMPLERS[name].title}, {steps} steps", flush=True)
    pipe.scheduler = sampler(name, pipe.scheduler)
    started = time.monotonic()
    result = pipe(num_images=n, num_inference_steps=steps, seed=1, output_type="np", progress=True)
    seconds = time.monotonic() - started
    images = torch.from_numpy(result.images).permute(0, 3, 1, 2)
    return Row(name, steps, seconds, evaluator.score(images, result.labels))


def table(rows: list[Row], evaluator: Evaluator, n: int) -> str:
    """Return the rows as text, with the scores of real images below."""
    lines = [
        f"{'sampler':<22}{'steps':>6}{'seconds':>9}{'accuracy':>10}{'FD ‰':>8}{'coverage':>10}"
    ]
    for name, steps, seconds, scores in rows:
        lines.append(f"{SAMPLERS[name].title:<22}{steps:>6}{seconds:>9.1f}{_figures(scores)}")
    for name, scores in (
        ("real, held out", evaluator.ceiling(n)),
        ("real, training", evaluator.floor(n)),
    ):
        lines.append(f"{name:<22}{'':>15}{_figures(scores)}")
    return "\n".join([*lines, "", *MEANING])


def _figures(scores: Scores) -> str:
    """Return accuracy, FD and coverage as cells of the table."""
    accuracy = "–" if scores.accuracy is None else f"{scores.accuracy:.1%}"
    return f"{accuracy:>10}{scores.fd:>8.1f}{scores.coverage:>10.3f}"


def draw(pipe: Pipeline, data: ImageData, out: Path) -> None:
    """Write samples.png, forward.png and denoise.gif."""
    pipe.scheduler = sampler("ddim", pipe.scheduler)
    frames: list[np.ndarray] = []

    def keep_frame(step: Step) -> None:
        """Decode the state before the first step and after every step."""
        if not frames:
            frames.append(plot.as_array(pipe.decode(step.x)))
        frames.append(plot.as_array(pipe.decode(step.next_x)))

    print("drawing the pictures", flush=True)
    pipe(num_images=100, num_inference_steps=30, seed=0, callback=keep_frame, progress=True)
    plot.save(plot.grid(frames[-1], 10, scale=3), out / "samples.png")
    plot.save_gif([plot.grid(frame[:50], 10, scale=3) for frame in frames], out / "denoise.gif")
    first = [int((data.labels == c).nonzero()[0]) for c in range(0, 10, 3)]
    clean = to_float(data.images[first])
    _forward_figure(clean, pipe.scheduler.schedule, out / "forward.png")


def _forward_figure(
    x0: Tensor, schedule: NoiseSchedule, path: str | Path, columns: int = 9, seed: int = 0
) -> None:
    """Draw the forward process: each image from clean to noise, with α and σ above.

    Args:
        x0: clean images (N, C, H, W) in [−1, 1], one row each.
        schedule: noise schedule.
        path: PNG file to write.
        columns: number of training steps drawn after the clean image, evenly spaced.
        seed: seed of the noise.
    """
    from matplotlib.figure import Figure

    steps = torch.linspace(0, len(schedule) - 1, columns, dtype=torch.float32).round().long()
    eps = randn(x0.shape, torch.Generator().manual_seed(seed))
    figure = Figure(figsize=(1.1 * (columns + 1), 1.15 * len(x0) + 0.7), layout="constrained")
    axes = figure.subplots(len(x0), columns + 1, squeeze=False)
    for column in range(columns + 1):
        if column == 0:
            title, x = "clean\nx₀", x0
        else:
            t = int(steps[column - 1])
            level = schedule[t]
            title = f"t = {t}\nα {level.alpha:.2f}  σ {level.sigma:.2f}"
            x = add_noise(x0, eps, level)
        axes[0, column].set_title(title, fontsize=7)
        for row, picture in enumerate(plot.as_array(x)):
            axes[row, column].imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255)
            axes[row, column].axis("off")
    figure.suptitle("Forward process: x_t = α·x₀ + σ·ε", fontsize=10)
    with files.atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
