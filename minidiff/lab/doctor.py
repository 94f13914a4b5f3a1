"""Diagnosis of a run whose samples are noise.

    minidiff check RUN

Each check covers one step between the data and a sample, and yields a finding. A failed check names
the likely cause and a remedy. The checks do not measure quality: a run that passes them all may
still need more training.
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
from minidiff.pipeline import Pipeline
from minidiff.prediction import edm_row, row
from minidiff.runs import diffusion, snapshot
from minidiff.runs.folder import open_pipeline, read_settings
from minidiff.runtime.device import float32_by_default
from minidiff.sample import trajectory
from minidiff.schedule import Level, add_noise
from minidiff.schedulers import FlowMatchEulerDiscreteScheduler, Scheduler
from minidiff.schedulers.base import split_variance
from minidiff.schedulers.edm import EDMSigmas
from minidiff.training.build import check, encoder, scheduler_of
from minidiff.training.config import TrainConfig
from minidiff.training.diffusion import DiffusionTraining
from minidiff.training.learner import Learner

IMAGES = 256  # that the network is evaluated on
FLOOR_IMAGES = 2000  # whose posterior mean gives the smallest possible loss
GRID = 50  # steps of the sampler whose levels are used
RATIOS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)  # σ/α of the levels for the loss
OVERFIT_STEPS = 60
MAX_ERROR_RATIO = 0.8  # error under another prediction type over that under the scheduler's
CAUSES = ("scheduler", "prediction type")  # if one of these failed,
FOLLOWING = ("average", "loss by level", "samples")  # these may fail for that reason alone
FIELD_GUIDE = "docs/field-guide.md"  # from a picture to its causes


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        name: name of the check.
        good: True if it passed; None if it could not be decided.
        text: measured values.
        advice: likely cause and remedy; empty if it passed.
    """

    name: str
    good: bool | None
    text: str
    advice: str = ""

    def __str__(self) -> str:
        mark = {True: "ok  ", False: "FAIL", None: "?   "}[self.good]
        line = f"{mark} {self.name}: {self.text}"
        return line if not self.advice else f"{line}\n     {self.advice}"


def _decided(name: str, good: bool, text: str, advice: str) -> Finding:
    """Return a finding, with the advice only if the check failed."""
    return Finding(name, good, text, "" if good else advice)


class OpenedRun(NamedTuple):
    """A run, opened for the checks.

    Attributes:
        config, data: config and training data of the run.
        pipe: model with the averaged weights.
        average: networks with the averaged weights.
        raw: networks with the raw weights; None without a snapshot.
        z: images of the training data in the network's space.
        conditioning: labels or tokens of these images; None for unconditional data.
    """

    config: TrainConfig
    data: Data
    pipe: Pipeline
    average: Learner
    raw: Learner | None
    z: Tensor
    conditioning: Tensor | None


def examine(path: str | Path, data: Data, device: torch.device | str = "cpu") -> Iterator[Finding]:
    """Yield the findings of all checks of a run, up to the shape if the data do not fit.

    Args:
        path: folder of the run, with a model, a snapshot or both.
        data: training data of the run.
        device: device of the networks.
    Raises:
        CheckpointError: the folder holds no run, or neither a model nor a snapshot.
        InvalidArgument: the data do not fit the config of the run.
    """
    run = _open(Path(path), data, torch.device(device))
    cause = None
    for check_run in CHECKS:
        with torch.random.fork_rng(devices=[]), float32_by_default():
            finding = check_run(run)
        failed = finding.good is False
        if failed and cause and finding.name in FOLLOWING:
            finding = finding._replace(
                advice=f"This may follow from the {cause} above: correct that first."
            )
        yield finding
        if failed and finding.name == "shape":
            return  # the network cannot be evaluated
        if failed and finding.name in CAUSES:
            cause = cause or finding.name


@float32_by_default()
def _open(path: Path, data: Data, device: torch.device) -> OpenedRun:
    """Return a run with its networks and some of its data."""
    config = read_settings(path, diffusion.COMMAND, "demo").config
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
    z, conditioning = data.batch(index)
    z = encoder(config)(z)
    return OpenedRun(config, data, pipe, Learner.of(pipe).eval(), raw, z, conditioning)


# --- the data --------------------------------------------------------------------------------


def data_range(run: OpenedRun) -> Finding:
    """Check that images are in [−1, 1] with some contrast, and others near unit variance."""
    low, high, std = (float(v) for v in (run.z.min(), run.z.max(), run.z.std()))
    kind = "points" if run.z.ndim == 2 else "images" if run.data.decoder is None else "latents"
    text = f"{len(run.data)} {kind} of {tuple(run.data.shape)}, "
    text += f"{low:.2f} to {high:.2f}, standard deviation {std:.3f}"
    if not math.isfinite(low + high + std):
        advice = "Some values are not finite: look for damaged images or a division by 0."
    elif kind != "images":
        if 0.4 < std < 2.5:
            return Finding("data", True, text)
        advice = "Far from 1: train the autoencoder again, which sets its scaling_factor."
        if kind == "points":
            advice = "Far from 1: divide the points by their standard deviation."
    elif low < -1.001 or high > 1.001:
        advice = "Outside [−1, 1]: divide bytes by 127.5 and subtract 1."
    elif low >= 0:
        advice = "No value is below 0, as in [0, 1]: the network expects [−1, 1], x = 2·x − 1."
    elif std < 0.05:
        advice = "Very low contrast: the images may be scaled twice, or be of a single grey."
    else:
        return Finding("data", True, text)
    return Finding("data", False, text, advice)


def shape(run: OpenedRun) -> Finding:
    """Check that the network's input has the shape of the data."""
    wanted = (run.pipe.unet.config.in_channels, *run.pipe.space.shape()[1:])
    given = tuple(run.z.shape[1:])
    text = f"the network takes {wanted}, the data have {given}"
    advice = "The model was trained on other data: train a new one on these."
    return _decided("shape", wanted == given, text, advice)


# --- the network and the scheduler -----------------------------------------------------------


class Evaluation(NamedTuple):
    """A level, noisy images x, their noise, and the network's output."""

    level: Level
    x: Tensor
    eps: Tensor
    out: Tensor


@torch.no_grad()
def _evaluate(run: OpenedRun, learner: Learner, ratio: float) -> Evaluation:
    """Evaluate networks at the level of the sampler's grid with the nearest σ/α."""
    scheduler = run.pipe.scheduler
    i = _nearest(scheduler, ratio)
    t, level = scheduler.grid[i], scheduler.levels[i]
    eps = torch.randn(run.z.shape, generator=torch.Generator().manual_seed(0)).to(run.z)
    x = add_noise(run.z, eps, level)
    times = torch.full((len(x),), float(t), device=x.device)
    out = learner(scheduler.scale_model_input(x, t), times, run.conditioning).float()
    if out.shape != x.shape:
        out, _ = split_variance(out, x)
    return Evaluation(level, x, eps, out)


def _nearest(scheduler: Scheduler, ratio: float) -> int:
    """Return the entry of the sampler's grid with the nearest σ/α."""
    scheduler.set_timesteps(GRID)  # which also resets the current step
    wanted = -math.log(ratio)
    return min(range(GRID), key=lambda i: abs(scheduler.levels[i].lam - wanted))


def _rows(scheduler: Scheduler) -> dict[str, Callable[[Level], tuple]]:
    """Return rows (p, q) of prediction types by name, that of the scheduler first."""
    own = scheduler.config.get("prediction_type", "flow_prediction")
    if isinstance(scheduler, EDMSigmas):
        data = scheduler.config.sigma_data

        def minus(level: Level) -> tuple:
            """Return the row of the negative output."""
            p, q = edm_row(level, data)
            return -p, -q

        rows = {"epsilon": lambda level: edm_row(level, data), "v_prediction": minus}
    elif scheduler.config.get("use_flow_sigmas") or isinstance(
        scheduler, FlowMatchEulerDiscreteScheduler
    ):
        own = "flow_prediction"
        rows = {own: lambda level: (-1.0, 1.0), "its negative, x0 − ε": lambda level: (1.0, -1.0)}
    else:
        names = ("epsilon", "sample", "v_prediction")
        rows = {name: lambda level, name=name: row(name, level) for name in names}
    return {own: rows[own], **rows}


def prediction_type(run: OpenedRun) -> Finding:
    """Check that the network's output is of the scheduler's prediction type."""
    rows = _rows(run.pipe.scheduler)
    errors = dict.fromkeys(rows, 0.0)
    for ratio in (0.3, 0.6, 1.5, 3.0):
        found = _evaluate(run, run.average, ratio)
        for name, of_level in rows.items():
            a, b = of_level(found.level)
            target = a * run.z + b * found.eps
            error = (found.out - target).square().mean() / target.square().mean()
            errors[name] += float(error) / 4
    expected, best = next(iter(rows)), min(errors, key=errors.get)
    listed = ", ".join(f"{name} {error:.2f}" for name, error in errors.items())
    text = f"the scheduler expects {expected}; relative error of the output as {listed}"
    if errors[best] > 0.9:
        advice = "The network predicts nothing yet: see the loss below."
        return Finding("prediction type", None, text, advice)
    if best != expected and errors[best] > MAX_ERROR_RATIO * errors[expected]:
        advice = f"Perhaps {best}, but too little is learnt to decide: train longer."
        return Finding("prediction type", None, text, advice)
    advice = f"The network predicts {best}: set prediction_type to that in the model's "
    advice += f"scheduler_config.json, or train with {expected}."
    return _decided("prediction type", best == expected, text, advice)


def same_as_trained(run: OpenedRun) -> Finding:
    """Check that the model's scheduler has the levels of the training."""
    wanted, found = scheduler_of(run.config).config, run.pipe.scheduler.config
    names = ("_class_name", "prediction_type", "beta_schedule", "num_train_timesteps", "sigma_data",
             "use_flow_sigmas", "rescale_betas_zero_snr", "trained_betas")  # fmt: skip
    other = [name for name in names if wanted.get(name) != found.get(name)]
    if not other:
        return Finding("scheduler", True, f"{found['_class_name']}, as in training")
    text = ", ".join(f"{name} is {found.get(name)}, trained {wanted.get(name)}" for name in other)
    if other == ["_class_name"]:
        return Finding(
            "scheduler", None, text, "Another sampler than in training; that may be intended."
        )
    advice = "The model's scheduler_config.json was changed after training: restore it."
    return Finding("scheduler", False, text, advice)


def start(run: OpenedRun) -> Finding:
    """Check that sampling starts at a level with almost no signal, as pure noise has none."""
    scheduler = run.pipe.scheduler
    scheduler.set_timesteps(run.pipe.num_inference_steps)
    level, spread = scheduler.levels[0], float(run.z.std())
    left = level.alpha * spread / level.sigma
    text = f"sampling starts at α {level.alpha:.4g}, σ {level.sigma:.4g}: "
    text += f"signal to noise {left:.2g}"
    advice = "The network was not trained on pure noise, so samples lack contrast or are grey: "
    advice += "train with beta_schedule squaredcos_cap_v2, or prediction_type flow or edm."
    return _decided("start", left < 0.05, text, advice)


# --- the trained weights -----------------------------------------------------------------------


def average(run: OpenedRun) -> Finding:
    """Check that the averaged weights are no worse than the raw ones."""
    if run.raw is None:
        return Finding("average", None, "no snapshot with raw weights to compare with")
    raw, averaged = (
        float(np.mean([_x0_error(run, _evaluate(run, networks, r)) for r in (0.3, 1.0, 3.0)]))
        for networks in (run.raw, run.average)
    )
    text = f"error of x0 with averaged weights {averaged:.4f}, with raw ones {raw:.4f}"
    advice = f"The average (half of it from the last {run.config.ema_half_life:.0%} of the run) "
    advice += "lags behind: the run was stopped early, is short, or changes fast at its end; let "
    advice += "it finish, or lower ema_half_life."
    return _decided("average", averaged < 1.2 * raw, text, advice)


def _x0_error(run: OpenedRun, found: Evaluation) -> float:
    """Return the mean squared error of x̂0 under the scheduler's prediction type."""
    x0, _ = run.pipe.scheduler.split(found.out, found.x, found.level)
    return float((x0 - run.z).square().mean())


def loss_by_level(run: OpenedRun) -> Finding:
    """Check that the network is better at every level than an optimal one for each pixel alone."""
    index = torch.linspace(0, len(run.data) - 1, min(len(run.data), FLOOR_IMAGES)).long()
    known, conditioning = run.data.batch(index)
    known = encoder(run.config)(known)
    variance, known = known.var(0), torch.cat([run.z, known])
    same = None
    if conditioning is not None:
        same = _same(run.conditioning, torch.cat([run.conditioning, conditioning]))
    lines, worse = [], []
    for ratio in RATIOS:
        found = _evaluate(run, run.average, ratio)
        alpha, sigma = found.level
        simple = variance * sigma**2 / (alpha**2 * variance + sigma**2)
        network, pixels = _x0_error(run, found), float(simple.mean())
        floor = float((_posterior_mean(found, known, same) - run.z).square().mean())
        lines.append(f"{sigma / alpha:>9.3g}{network:>11.5f}{pixels:>11.5f}{floor:>11.5f}")
        middle = 0.15 < ratio < 10  # where images take their shape
        if network > (1 if middle else 1.25) * pixels:
            worse.append(f"{sigma / alpha:.2g}")
    head = f"{'σ/α':>9}{'network':>11}{'by pixel':>11}{'floor':>11}"
    text = "error of x0 (by pixel: optimum of each pixel alone; floor: of whole images)\n     "
    text += "\n     ".join([head, *lines])
    advice = f"Worse than pixel by pixel at σ/α {', '.join(worse)}: the run is too short, its "
    advice += "learning rate is too high or too low, or these levels are rarely drawn "
    advice += "(noise_levels, level_mean, level_std, loss_weight)."
    return _decided("loss by level", not worse, text, advice)


def _same(these: Tensor, those: Tensor) -> Tensor:
    """Return a mask (B, K) of pairs of items with equal conditioning."""
    one, other = (each.view(len(each), -1) for each in (these, those))
    return (one[:, None] == other).all(2)


def _posterior_mean(found: Evaluation, known: Tensor, same: Tensor | None) -> Tensor:
    """Return E[x0 | x, conditioning] for equally likely known images, the optimal output."""
    alpha, sigma = found.level
    x, images = found.x.double().flatten(1), known.double().flatten(1)
    logits = -torch.cdist(x, alpha * images).square() / (2 * sigma**2)
    if same is not None:
        logits = logits.masked_fill(~same, -math.inf)
    return (logits.softmax(1) @ images).view_as(found.x).to(found.x)


class _WithoutPosition(NamedTuple):
    """Data whose random augmentation does not change along the stream."""

    data: Data

    def batch(self, index: Tensor, position: int = 0) -> tuple[Tensor, Tensor | None]:
        """Return the items at an index as at position 0."""
        return self.data.batch(index)


def overfit(run: OpenedRun) -> Finding:
    """Check that a fresh network overfits one batch at the learning rate of the run."""
    config = replace(
        run.config, steps=OVERFIT_STEPS, minutes=None, batch_size=8, final_batch_size=None,
        accumulate=1, compile=False, dropout=0.0, shift=0, flip=False, label_dropout=0.0,
        warmup=0.1, dtype="float32",
    )  # fmt: skip
    training = DiffusionTraining(config, run.data, run.z.device)
    training.batches.stream = Stream(min(8, len(run.data)), seed=0)
    training.batches.data = _WithoutPosition(run.data)
    losses = []
    for _ in range(OVERFIT_STEPS):
        before = float(training.meter.sum)
        training.step()
        losses.append(float(training.meter.sum) - before)
    first, last = float(np.mean(losses[:5])), float(np.mean(losses[-10:]))
    text = f"the loss of a fresh network on one batch: {first:.3f}, after {OVERFIT_STEPS} steps "
    text += f"{last:.3f}"
    advice = f"It cannot learn eight images: raise the learning rate ({config.learning_rate:g}) "
    advice += "if the loss falls slowly, lower it if the loss jumps; check loss_weight and clip."
    return _decided("overfit", last < 0.75 * first, text, advice)


# --- sampling --------------------------------------------------------------------------------


def sampler(run: OpenedRun) -> Finding:
    """Check that the sampler reproduces Gaussian data with a perfect network."""
    scheduler, steps = run.pipe.scheduler, run.pipe.num_inference_steps
    mean, std = float(run.z.mean()), float(run.z.std())
    scheduler.set_timesteps(steps)
    levels = dict(zip(scheduler.grid, scheduler.levels, strict=False))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 1, 2, 2, generator=generator) * scheduler.init_noise_sigma
    doubled = scheduler.config.get("variance_type") == "learned_range"

    def exact(model_input: Tensor, t: float) -> Tensor:
        """Return the output of a perfect network."""
        level = levels[t]
        x = model_input / scheduler.scale_model_input(torch.ones(1, 1, 1, 1), t)
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
    good = abs(float(x.std()) / std - 1) < 0.15 and abs(float(x.mean()) - mean) < 0.1 * std
    advice = "A perfect network would not reproduce the data either: use more steps "
    advice += "(num_inference_steps), another sampler, or no clipping."
    return _decided("sampler", good, text, advice)


def samples(run: OpenedRun) -> Finding:
    """Check that samples are finite, in range, and have the standard deviation of the data."""
    count = run.pipe.space.sheet or max(16, len(run.pipe.class_names))
    prompts = [""] * count if run.pipe.prompts is not None else None
    drawn = run.pipe(prompts, num_images=count, seed=0, output_type="pt").images
    with torch.no_grad():
        real = run.pipe.decode(run.z[:64])
    std, wanted = float(drawn.std()), float(real.std())
    limit = 1.0 if real.ndim > 2 else float(run.z.abs().max())
    outside = float((drawn.abs() > 1.25 * limit).double().mean())
    text = f"{count} samples: standard deviation {std:.3f} (data {wanted:.3f}), "
    text += f"{outside:.1%} of the values far outside [−{limit:.3g}, {limit:.3g}]"
    if not math.isfinite(std):
        advice = "Not finite: see the checks above; try dtype float32."
    elif outside > 0.05:
        advice = (
            "Training was too short, guidance is too strong, or the network is evaluated at noise "
            "levels that it was not trained on."
        )
    elif not 0.6 < std / wanted < 1.5:
        advice = "Too much or too little contrast: see prediction type, scheduler and start."
    else:
        return Finding("samples", True, text)
    return Finding("samples", False, text, advice)


CHECKS = (
    data_range, shape, same_as_trained, start, prediction_type, average, loss_by_level, overfit,
    sampler, samples,
)  # fmt: skip
