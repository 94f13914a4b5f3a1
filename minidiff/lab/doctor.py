"""The doctor: why are my samples noise?

    minidiff check RUN

Looks at everything between the data and a sample, one thing after the other, and says of each what
it found; where that is wrong, what is likely the cause and what helps. Nothing here is a measure of
quality: a run that passes everything can still be young.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.data import Data, Stream
from minidiff.errors import CheckpointError
from minidiff.nn import SpaceToDepth
from minidiff.pipeline import Pipeline
from minidiff.prediction import edm_row, row, solve
from minidiff.runs import diffusion, snapshot
from minidiff.runs.folder import open_pipeline, read_settings
from minidiff.sample import trajectory
from minidiff.schedule import Level, add_noise
from minidiff.schedulers import FlowMatchEulerDiscreteScheduler, Scheduler
from minidiff.schedulers.base import split_variance
from minidiff.schedulers.edm import EDMSigmas
from minidiff.training.build import check, scheduler_of
from minidiff.training.config import TrainConfig
from minidiff.training.diffusion import DiffusionTraining
from minidiff.training.learner import Learner

IMAGES = 256  # that are looked at
KNOWN = 2000  # among which the floor of the loss looks for the image
GRID = 50  # steps of the sampler, from which levels are taken
RATIOS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)  # σ/α of the levels that are looked at
OVERFIT_STEPS = 60
CLEARLY = 0.8  # of the error as what is read: a network that says something else errs less as that
CAUSES = ("scheduler", "prediction type")  # while one of these is wrong,
FOLLOWING = ("average", "loss by level", "samples")  # these say little of themselves


class Finding(NamedTuple):
    """What one check found.

    Attributes:
        name: of the check.
        good: None where it could not be looked at.
        text: what was found.
        advice: the likely cause and the remedy, where it is not good.
    """

    name: str
    good: bool | None
    text: str
    advice: str = ""

    def __str__(self) -> str:
        mark = {True: "ok  ", False: "FAIL", None: "?   "}[self.good]
        told = f"{mark} {self.name}: {self.text}"
        return told if not self.advice else f"{told}\n     {self.advice}"


class Patient(NamedTuple):
    """A run, ready to be looked at.

    Attributes:
        config, data: of the run.
        pipe: the model, with the averaged weights.
        average, raw: its networks, and those with the raw weights where a snapshot has them.
        z, told: some of the data, in the network's space, and what they tell.
    """

    config: TrainConfig
    data: Data
    pipe: Pipeline
    average: Learner
    raw: Learner | None
    z: Tensor
    told: Tensor | None


def examine(path: str | Path, data: Data, device: torch.device | str = "cpu") -> Iterator[Finding]:
    """Check a run; yields the findings one after the other, as far as the data fit the model.

    Args:
        path: the run's folder; a model, a snapshot or both must be in it.
        data: what it was trained on.
    Raises:
        CheckpointError: the folder holds no run, or nothing of it that could be looked at.
        InvalidArgument: the data are not such as the run's network takes.
    """
    patient = _patient(Path(path), data, torch.device(device))
    cause = None
    for look in CHECKS:
        with torch.random.fork_rng(devices=[]):
            finding = look(patient)
        wrong = finding.good is False
        if wrong and cause and finding.name in FOLLOWING:
            finding = finding._replace(
                advice=f"This may follow from the {cause} above: mend that first."
            )
        yield finding
        if wrong and finding.name == "shape":
            return  # nothing below can be asked of the network
        if wrong and finding.name in CAUSES:
            cause = cause or finding.name


def _patient(path: Path, data: Data, device: torch.device) -> Patient:
    config = read_settings(path, diffusion.COMMAND).config
    check(config, data)
    data = data.to(device)
    raw, pipe = None, None
    folder = snapshot.newest(path, lambda text: None)
    if folder is not None:
        training = DiffusionTraining(config, data, device)
        snapshot.restore(folder, training)
        raw, pipe = training.learner.eval(), training.result
    if (path / diffusion.MODEL).is_dir():
        pipe = open_pipeline(path, device)
    if pipe is None:
        raise CheckpointError(f"{path}: holds neither a model nor a snapshot yet; train on")
    index = torch.linspace(0, len(data) - 1, min(len(data), IMAGES)).long()
    z, told = data.batch(index)
    z = SpaceToDepth(config.block).to_latents(z)
    return Patient(config, data, pipe, Learner.of(pipe).eval(), raw, z, told)


# --- the data --------------------------------------------------------------------------------


def data_range(p: Patient) -> Finding:
    """Images are in [−1, 1] and use it."""
    low, high, std = (float(v) for v in (p.z.min(), p.z.max(), p.z.std()))
    latent = p.data.decoder is not None
    text = f"{len(p.data)} {'latents' if latent else 'images'} of {tuple(p.data.shape)}, "
    text += f"{low:.2f} to {high:.2f}, standard deviation {std:.3f}"
    if not math.isfinite(low + high + std):
        advice = "Some are not finite: look for images that were damaged or divided by 0."
    elif latent:
        if 0.4 < std < 2.5:
            return Finding("data", True, text)
        advice = "Far from 1: train the autoencoder anew, whose scaling_factor makes it so."
    elif low < -1.001 or high > 1.001:
        advice = "Outside [−1, 1]: divide bytes by 127.5 and subtract 1."
    elif low >= 0:
        advice = "Nothing is below 0, as in [0, 1]: the network expects [−1, 1], x = 2·x − 1."
    elif std < 0.05:
        advice = "Hardly any contrast: were the images scaled twice, or are they of one grey?"
    else:
        return Finding("data", True, text)
    return Finding("data", False, text, advice)


def shape(p: Patient) -> Finding:
    """The model's network takes what the data are, in its space."""
    config = p.pipe.unet.config
    sides = config.sample_size
    takes = (config.in_channels, *(sides if isinstance(sides, list | tuple) else (sides, sides)))
    given = tuple(p.z.shape[1:])
    text = f"the model's network takes {takes}, the data give {given}"
    if takes == given:
        return Finding("shape", True, text)
    return Finding("shape", False, text,
                   "The model is of other data: train it anew on these.")  # fmt: skip


# --- the network and the scheduler -----------------------------------------------------------


class Answer(NamedTuple):
    """What a network said of the images at a level, as the sampler asks it."""

    level: Level
    x: Tensor
    eps: Tensor
    out: Tensor


@torch.no_grad()
def _ask(p: Patient, learner: Learner, ratio: float) -> Answer:
    """Ask at the level of the sampler's grid whose σ/α is nearest."""
    scheduler = p.pipe.scheduler
    i = _nearest(scheduler, ratio)
    t, level = scheduler.grid[i], scheduler.levels[i]
    eps = torch.randn(p.z.shape, generator=torch.Generator().manual_seed(0)).to(p.z)
    x = add_noise(p.z, eps, level)
    times = torch.full((len(x),), float(t), device=x.device)
    out = learner(scheduler.scale_model_input(x, t), times, p.told).float()
    if out.shape != x.shape:
        out, _ = split_variance(out, x)
    return Answer(level, x, eps, out)


def _nearest(scheduler: Scheduler, ratio: float) -> int:
    scheduler.set_timesteps(GRID)  # and forget the entry that was asked for last
    wanted = -math.log(ratio)
    return min(range(GRID), key=lambda i: abs(scheduler.levels[i].lam - wanted))


def _rows(scheduler: Scheduler) -> dict[str, Callable[[Level], tuple]]:
    """What the network might say, by the name of its prediction type; the scheduler's is first."""
    mine = scheduler.config.get("prediction_type", "flow_prediction")
    if isinstance(scheduler, EDMSigmas):
        data = scheduler.config.sigma_data

        def minus(level: Level) -> tuple:
            p, q = edm_row(level, data)
            return -p, -q

        rows = {"epsilon": lambda level: edm_row(level, data), "v_prediction": minus}
    elif scheduler.config.get("use_flow_sigmas") or isinstance(
        scheduler, FlowMatchEulerDiscreteScheduler
    ):
        mine = "flow_prediction"
        rows = {mine: lambda level: (-1.0, 1.0), "its negative, x0 − ε": lambda level: (1.0, -1.0)}
    else:
        names = ("epsilon", "sample", "v_prediction")
        rows = {name: lambda level, name=name: row(name, level) for name in names}
    return {mine: rows[mine], **rows}


def prediction_type(p: Patient) -> Finding:
    """What the network says is what the scheduler reads."""
    rows = _rows(p.pipe.scheduler)
    misses = dict.fromkeys(rows, 0.0)
    for ratio in (0.3, 0.6, 1.5, 3.0):
        answer = _ask(p, p.average, ratio)
        for name, of_level in rows.items():
            a, b = of_level(answer.level)
            target = a * p.z + b * answer.eps
            gap = (answer.out - target).square().mean() / target.square().mean()
            misses[name] += float(gap) / 4
    read, said = next(iter(rows)), min(misses, key=misses.get)
    told = ", ".join(f"{name} {miss:.2f}" for name, miss in misses.items())
    text = f"the scheduler reads {read}; relative error of the output as {told}"
    if misses[said] > 0.9:
        return Finding("prediction type", None, text,
                       "The network says nothing yet: see the loss below.")  # fmt: skip
    if said == read:
        return Finding("prediction type", True, text)
    if misses[said] > CLEARLY * misses[read]:
        return Finding("prediction type", None, text,
                       f"Perhaps {said}; too little is learnt to tell: train on.")  # fmt: skip
    return Finding("prediction type", False, text,
                   f"The network says {said}: set prediction_type in the scheduler_config.json of "
                   "the model to that, or train with the one that is read.")  # fmt: skip


def same_as_trained(p: Patient) -> Finding:
    """The model's scheduler walks the levels that were trained on."""
    wanted, found = scheduler_of(p.config).config, p.pipe.scheduler.config
    names = ("_class_name", "prediction_type", "beta_schedule", "num_train_timesteps", "sigma_data",
             "use_flow_sigmas", "rescale_betas_zero_snr", "trained_betas")  # fmt: skip
    other = [name for name in names if wanted.get(name) != found.get(name)]
    if not other:
        return Finding("scheduler", True, f"{found['_class_name']}, as it was trained for")
    text = ", ".join(f"{name} is {found.get(name)}, trained {wanted.get(name)}" for name in other)
    if other == ["_class_name"]:
        return Finding("scheduler", None, text, "Another sampler was chosen; that can be right.")
    return Finding("scheduler", False, text,
                   "The model's scheduler_config.json was changed since: sample with the one that "
                   "training wrote.")  # fmt: skip


def start(p: Patient) -> Finding:
    """Sampling begins where no signal is left, as the noise that it begins with has none."""
    scheduler = p.pipe.scheduler
    scheduler.set_timesteps(p.pipe.num_inference_steps)
    level, spread = scheduler.levels[0], float(p.z.std())
    left = level.alpha * spread / level.sigma
    text = f"sampling begins at α {level.alpha:.4g}, σ {level.sigma:.4g}: "
    text += f"signal to noise {left:.2g}"
    if left < 0.05:
        return Finding("start", True, text)
    return Finding("start", False, text,
                   "The network never saw pure noise, so samples lack contrast or are of middle "
                   "grey: train with beta_schedule squaredcos_cap_v2, flow or edm.")  # fmt: skip


# --- what was learnt -------------------------------------------------------------------------


def average(p: Patient) -> Finding:
    """The averaged weights are no worse than the raw ones."""
    if p.raw is None:
        return Finding("average", None, "no snapshot with raw weights to compare with")
    raw, averaged = (
        float(np.mean([_x0_error(p, _ask(p, learner, ratio)) for ratio in (0.3, 1.0, 3.0)]))
        for learner in (p.raw, p.average)
    )
    text = f"error of x0 with averaged weights {averaged:.4f}, with raw ones {raw:.4f}"
    if averaged < 1.2 * raw:
        return Finding("average", True, text)
    return Finding("average", False, text,
                   f"The average (half of it over the last {p.config.ema_half_life:.0%} of the "
                   "run) lags behind: the run was stopped early, is short, or learns too fast at "
                   "its end; let it end, or lower ema_half_life.")  # fmt: skip


def _x0_error(p: Patient, answer: Answer) -> float:
    """Mean squared error of the x̂0 that the scheduler reads from an answer."""
    read = next(iter(_rows(p.pipe.scheduler).values()))
    x0, _ = solve(answer.out, answer.x, answer.level, read(answer.level))
    return float((x0 - p.z).square().mean())


def loss_by_level(p: Patient) -> Finding:
    """At every level the network is better than one that knows every pixel's mean and variance."""
    index = torch.linspace(0, len(p.data) - 1, min(len(p.data), KNOWN)).long()
    known, told = p.data.batch(index)
    known = SpaceToDepth(p.config.block).to_latents(known)
    variance, known = known.var(0), torch.cat([p.z, known])
    alike = None if told is None else _alike(p.told, torch.cat([p.told, told]))
    lines, worse = [], []
    for ratio in RATIOS:
        answer = _ask(p, p.average, ratio)
        alpha, sigma = answer.level
        simple = variance * sigma**2 / (alpha**2 * variance + sigma**2)
        network, pixels = _x0_error(p, answer), float(simple.mean())
        floor = float((_remembered(answer, known, alike) - p.z).square().mean())
        lines.append(f"{sigma / alpha:>9.3g}{network:>11.5f}{pixels:>11.5f}{floor:>11.5f}")
        middle = 0.15 < ratio < 10  # where pictures take their shape
        if network > (1 if middle else 1.25) * pixels:
            worse.append(f"{sigma / alpha:.2g}")
    head = f"{'σ/α':>9}{'network':>11}{'by pixel':>11}{'floor':>11}"
    text = "error of x0 (by pixel: mean and variance of each; floor: the images by heart)\n     "
    text += "\n     ".join([head, *lines])
    if not worse:
        return Finding("loss by level", True, text)
    return Finding("loss by level", False, text,
                   f"Worse than pixel by pixel at σ/α {', '.join(worse)}: the run is too short, "
                   "its learning rate too high or too low, or those levels are seldom drawn "
                   "(noise_levels, level_mean, level_std, loss_weight).")  # fmt: skip


def _alike(these: Tensor, those: Tensor) -> Tensor:
    """Which of those items the network is told the same of, (B, K)."""
    one, other = (told.view(len(told), -1) for told in (these, those))
    return (one[:, None] == other).all(2)


def _remembered(answer: Answer, known: Tensor, alike: Tensor | None) -> Tensor:
    """E[x0 | x, told] for data that are these images, each as likely: the least error possible."""
    alpha, sigma = answer.level
    x, images = answer.x.double().flatten(1), known.double().flatten(1)
    nearness = -torch.cdist(x, alpha * images).square() / (2 * sigma**2)
    if alike is not None:
        nearness = nearness.masked_fill(~alike, -math.inf)
    return (nearness.softmax(1) @ images).view_as(answer.x).to(answer.x)


class _Still(NamedTuple):
    """Data whose items are the same wherever in the stream they come."""

    data: Data

    def batch(self, index: Tensor, position: int = 0) -> tuple[Tensor, Tensor | None]:
        return self.data.batch(index)


def overfit(p: Patient) -> Finding:
    """A fresh network learns one batch by heart: gradients arrive, and the rate is not absurd."""
    config = replace(
        p.config, steps=OVERFIT_STEPS, minutes=None, batch_size=8, final_batch_size=None,
        accumulate=1, compile=False, dropout=0.0, shift=0, flip=False, label_dropout=0.0,
        warmup=0.1, dtype="float32",
    )  # fmt: skip
    training = DiffusionTraining(config, p.data, p.z.device)
    training.batches.stream = Stream(min(8, len(p.data)), seed=0)
    training.batches.data = _Still(p.data)
    losses = []
    for _ in range(OVERFIT_STEPS):
        before = float(training.meter.sum)
        training.step()
        losses.append(float(training.meter.sum) - before)
    first, last = np.mean(losses[:5]), np.mean(losses[-10:])
    text = f"the loss of a fresh network on one batch: {first:.3f}, after {OVERFIT_STEPS} steps "
    text += f"{last:.3f}"
    if last < 0.75 * first:
        return Finding("overfit", True, text)
    return Finding("overfit", False, text,
                   f"It does not learn even eight images: raise the learning rate (now "
                   f"{config.learning_rate:g}) if the loss crawls, lower it if it jumps; look at "
                   "loss_weight and at clip.")  # fmt: skip


# --- sampling --------------------------------------------------------------------------------


def sampler(p: Patient) -> Finding:
    """The sampler alone, with a perfect network for Gaussian data, keeps their spread."""
    scheduler, steps = p.pipe.scheduler, p.pipe.num_inference_steps
    mean, std = float(p.z.mean()), float(p.z.std())
    scheduler.set_timesteps(steps)
    levels = dict(zip(scheduler.grid, scheduler.levels, strict=False))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 1, 2, 2, generator=generator) * scheduler.init_noise_sigma
    doubled = scheduler.config.get("variance_type") == "learned_range"

    def exact(shown: Tensor, t: float) -> Tensor:
        level = levels[t]
        x = shown / scheduler.scale_model_input(torch.ones(1, 1, 1, 1), t)
        gain = level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2)
        x0 = mean + gain * (x - level.alpha * mean)
        out = scheduler.target(x0, (x - level.alpha * x0) / level.sigma, level)
        return torch.cat([out, torch.zeros_like(out)], 1) if doubled else out

    for step in trajectory(exact, scheduler, x, generator):
        x = step.next_x
    text = (
        f"{type(scheduler).__name__}, {steps} steps, a perfect network: mean {float(x.mean()):.3f} "
    )
    text += f"of {mean:.3f}, standard deviation {float(x.std()):.3f} of {std:.3f}"
    if abs(float(x.std()) / std - 1) < 0.15 and abs(float(x.mean()) - mean) < 0.1 * std:
        return Finding("sampler", True, text)
    return Finding("sampler", False, text,
                   "Even a perfect network would not give the data: take more steps "
                   "(num_inference_steps), another sampler, or no clipping.")  # fmt: skip


def samples(p: Patient) -> Finding:
    """Samples are finite, in range, and of the spread of the data."""
    count = max(16, len(p.pipe.class_names))
    told = [""] * count if p.pipe.prompts is not None else None
    drawn = p.pipe(told, num_images=count, seed=0, output_type="pt").images
    with torch.no_grad():
        std, wanted = float(drawn.std()), float(p.pipe.decode(p.z[:64]).std())
    outside = float((drawn.abs() > 1.25).double().mean())
    text = f"{count} samples: standard deviation {std:.3f} (data {wanted:.3f}), "
    text += f"{outside:.1%} of the pixels far outside [−1, 1]"
    if not math.isfinite(std):
        advice = "Not finite: look at the checks above; try dtype float32."
    elif outside > 0.05:
        advice = "Guidance that is too strong, or a network that is told levels it never saw."
    elif not 0.6 < std / wanted < 1.5:
        advice = "Too much or too little contrast: look at prediction type, scheduler and start."
    else:
        return Finding("samples", True, text)
    return Finding("samples", False, text, advice)


CHECKS = (
    data_range, shape, same_as_trained, start, prediction_type, average, loss_by_level, overfit,
    sampler, samples,
)  # fmt: skip
