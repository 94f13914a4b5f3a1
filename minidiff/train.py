"""Training: batch → level → target → loss → step → average.

What the network sees, is told and should say is the objective's business (`minidiff.objective`);
which images and how long, the config's. All that is trained is one module, and what it is told
beside image and time, a class or a text, is a part of that module: the loop knows neither. What is
sampled from later is a running average of the weights. The budget, minutes or steps, decides the
whole learning-rate schedule.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minidiff.average import EMA
from minidiff.data import ImageData, Stream
from minidiff.device import DTYPES, pick_device
from minidiff.errors import InvalidArgument, TrainingError
from minidiff.nn import SpaceToDepth, UNet
from minidiff.noise import stream_seed
from minidiff.objective import Levels, Network, Objective, quantiles
from minidiff.pipeline import Pipeline
from minidiff.train_config import TrainConfig

__all__ = ["EMA", "TrainConfig", "build", "check", "learning_rate", "resolve", "train"]

MEASURED_IMAGES = 10_000  # of which the standard deviation is taken
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


# --- the network -----------------------------------------------------------------------------


class ClassLabels(nn.Module):
    """What a network with classes is told: the label itself, or that of "no class".

    A text encoder in its place would turn token ids into tokens, and be trained with the network.

    Attributes:
        null: what stands for "told nothing", an entry of what the data tell.
    """

    def __init__(self, null: int) -> None:
        super().__init__()
        self.register_buffer("null", torch.tensor(null), persistent=False)

    def forward(self, told: Tensor | None) -> Mapping[str, Tensor]:
        return {} if told is None else {"class_labels": told}


class Learner(nn.Module):
    """All that is trained, as one module: the network, and what turns what it is told into inputs.

    Args:
        unet: (x, t, **condition) → output.
        condition: a module that maps what the data tell of a batch, (B, …) or None, to the
            condition; its `null` is the entry that means nothing.
    """

    def __init__(self, unet: UNet, condition: nn.Module) -> None:
        super().__init__()
        self.unet, self.condition = unet, condition

    def forward(self, x: Tensor, t: Tensor, told: Tensor | None) -> Tensor:
        return self.unet(x, t, **self.condition(told))

    def hide(self, told: Tensor | None, hidden: Tensor) -> Tensor | None:
        """What the data tell (B, …), with `null` where `hidden` (B,) says so."""
        if told is None:
            return None
        hidden = hidden.to(told.device, non_blocking=True)
        return torch.where(hidden.view(-1, *(1,) * (told.ndim - 1)), self.condition.null, told)


def build(config: TrainConfig, data: ImageData) -> Pipeline:
    """A fresh pipeline of the size that `config` and the data ask for, weights from the seed.

    torch's global random state is left as it was.

    Raises:
        InvalidArgument: as `check`.
    """
    config = resolve(config, data)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # weights are drawn on the CPU
        unet = _network(config, data)
    return Pipeline(
        unet.to(memory_format=torch.channels_last),
        config.objective().scheduler,
        SpaceToDepth(config.block) if config.block > 1 else None,
        data.class_names,
        config.guidance_scale if _hides_labels(config, data) else 1.0,
        config.num_inference_steps,
    )


def resolve(config: TrainConfig, data: ImageData) -> TrainConfig:
    """The config with what it leaves to the data: σ_data, where the objective asks for it.

    Raises:
        InvalidArgument: the images are all of one grey.
    """
    if not config.measures_data:
        return config
    n = len(data)
    chosen = torch.linspace(0, n - 1, min(n, MEASURED_IMAGES)).round().long()
    parts = [data.batch(index)[0].double() for index in chosen.split(512)]
    count = sum(part.numel() for part in parts)
    mean = sum(float(part.sum()) for part in parts) / count
    std = math.sqrt(sum(float((part - mean).square().sum()) for part in parts) / count)
    if not std:
        raise InvalidArgument(f"data {data.name} are of one grey: sigma_data cannot be measured")
    return replace(config, sigma_data=std)


def check(config: TrainConfig, data: ImageData) -> None:
    """Refuse what cannot be trained, without taking memory.

    Raises:
        InvalidArgument: there are no images, `block` does not divide their size, or the network
            refuses its sizes.
    """
    with torch.device("meta"):
        _network(config, data)


def _network(config: TrainConfig, data: ImageData) -> UNet:
    if not len(data):
        raise InvalidArgument(f"data {data.name} must hold at least one image, got none")
    _, channels, height, width = data.images.shape
    if height % config.block or width % config.block:
        raise InvalidArgument(
            f"block must divide the image size {height}×{width}, got {config.block}"
        )
    side = (height // config.block, width // config.block)
    depth = len(config.channels)
    return UNet(
        sample_size=side[0] if side[0] == side[1] else side,
        in_channels=channels * config.block**2,
        out_channels=channels * config.block**2 * (2 if config.learn_variance else 1),
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        dropout=config.dropout,
        # attention costs the square of the positions: at the smallest level only
        down_block_types=("DownBlock2D",) * (depth - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (depth - 1),
        attention_head_dim=math.gcd(config.channels[-1], 32),
        norm_num_groups=_groups(config.channels),
        num_class_embeds=data.num_classes + _hides_labels(config, data) or None,
    )


def _groups(channels: tuple[int, ...]) -> int:
    """Groups of 16 channels and multiples of it, which a CPU's vectors hold; else at most 8."""
    common = math.gcd(*channels)
    return common // 16 if common % 16 == 0 else math.gcd(common, 8)


def _hides_labels(config: TrainConfig, data: ImageData) -> bool:
    """Whether the network will know a label for "no class", so that guidance is possible."""
    return data.num_classes > 0 and config.label_dropout > 0


# --- the batches -----------------------------------------------------------------------------


class Batch(NamedTuple):
    """Everything random of one step; `parts` cuts it up for accumulation.

    Attributes:
        z: clean images in the network's space, (B, C, *space), channels last.
        told: what the data tell of them, (B, …), some of it hidden; or None.
        eps: standard normal noise like z.
        levels: on the host.
    """

    z: Tensor
    told: Tensor | None
    eps: Tensor
    levels: Levels

    def parts(self, n: int) -> Iterator["Batch"]:
        """n parts of nearly the same size."""
        ends = [len(self.z) * i // n for i in range(n + 1)]
        for start, end in pairwise(ends):
            images = slice(start, end)
            told = None if self.told is None else self.told[images]
            yield Batch(self.z[images], told, self.eps[images], self.levels.part(images))


class Batches:
    """The batch of every step: the images by (seed, epoch), all else by (seed, step) alone.

    Args:
        encode: from images (B, C, H, W) in [−1, 1] to the network's space.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: ImageData,
        learner: Learner,
        objective: Objective,
        encode: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        self.config, self.data, self.learner, self.objective = config, data, learner, objective
        self.encode = encode
        self.stream = Stream(len(data), config.seed)
        self.host, self.noise = torch.Generator(), torch.Generator(device)

    def take(self, step: int, size: int) -> Batch:
        """The next `size` images, with the levels and the noise of this step."""
        self.host.manual_seed(stream_seed(self.config.seed, 0, step))
        self.noise.manual_seed(stream_seed(self.config.seed, 1, step))
        images, told = self.data.batch(self.stream.take(size))
        z = self.encode(images).to(memory_format=torch.channels_last)
        hidden = torch.rand(size, generator=self.host) < self.config.label_dropout
        levels = self.objective.levels(quantiles(size, self.host))
        eps = torch.empty_like(z).normal_(generator=self.noise)
        return Batch(z, self.learner.hide(told, hidden), eps, levels)


# --- the budget ------------------------------------------------------------------------------


class Budget:
    """How far a run is: a share of its steps, or of its wall-clock minutes."""

    def __init__(self, config: TrainConfig) -> None:
        self.steps, self.seconds = config.steps, 60 * (config.minutes or 0)
        self.started = time.monotonic()
        self.step = 0

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.started

    @property
    def progress(self) -> float:
        """From 0 at the start to 1 and beyond at the end."""
        return self.step / self.steps if self.steps else self.elapsed / self.seconds


class Progress(NamedTuple):
    """What `train` reports along the way: a row of log.jsonl."""

    step: int
    seconds: float
    images: int
    loss: float
    learning_rate: float
    skipped: list[int]  # steps that were passed over since the last row


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Linear rise over the warm-up, then linear decay to zero at the end of the budget."""
    rise = progress / config.warmup if config.warmup else 1.0
    fall = (1 - progress) / (1 - config.warmup)
    return config.learning_rate * max(0.0, min(rise, fall, 1.0))


def batch_size(config: TrainConfig, progress: float) -> int:
    """Images in the batch at this share of the budget."""
    sizes = config.batch_sizes()
    return sizes[min(int(progress * len(sizes)), len(sizes) - 1)]


# --- the loop --------------------------------------------------------------------------------


def train(
    config: TrainConfig,
    data: ImageData,
    device: torch.device | str = "cpu",
    report: Callable[[Progress], None] = lambda row: None,
    picture: Callable[[Pipeline, int], None] = lambda pipe, step: None,
    optimizer: MakeOptimizer | None = None,
) -> Pipeline:
    """Train a pipeline until the budget is spent; returns it with the averaged weights.

    Args:
        config: the run.
        data: the images, moved to `device` whole.
        device: where to train.
        report: called about once a second with a row for the log.
        picture: called `config.pictures` times, evenly spaced, with a pipeline of the averaged
            weights so far.
        optimizer: makes one of the parameters, in place of AdamW; the learning rate of its groups
            then rises and falls as the config's would.
    Raises:
        InvalidArgument: config and data do not fit together, or the device is not there.
        TrainingError: the loss or the gradient is not finite.
    """
    device = pick_device(device)
    config = resolve(config, data)
    pipe = build(config, data)
    learner = Learner(pipe.unet, ClassLabels(data.num_classes)).to(device).train()
    data, objective = data.to(device), config.objective()
    average = EMA(learner, config.ema_half_life)
    shown = _with_unet(pipe, average.model.unet).to(dtype=DTYPES[config.dtype])
    optimizer = (optimizer or _adamw(config))(learner.parameters())
    peaks = [group["lr"] for group in optimizer.param_groups]
    encode = (lambda x0: x0) if pipe.vae is None else pipe.vae.to_latents
    batches = Batches(config, data, learner, objective, encode, device)
    budget, guard, meter = Budget(config), Guard(config, device), _Meter(config, report)

    with _own_random_state(device):
        while (progress := budget.progress) < 1:
            batch = batches.take(budget.step, batch_size(config, progress))
            _seed_dropout(config, budget.step, device)
            total = torch.zeros((), device=device)
            for z, told, eps, levels in batch.parts(config.accumulate):
                network = _network_told(learner, told, DTYPES[config.dtype])
                loss = objective.loss(network, z, eps, levels.on(z)).sum() / len(batch.z)
                loss.backward()
                total += loss.detach()
            norm = nn.utils.clip_grad_norm_(learner.parameters(), config.clip or math.inf)
            if guard.passes(budget.step, total, norm):
                share = learning_rate(config, progress) / (config.learning_rate or 1)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * share
                optimizer.step()
                average.update(learner)
                meter.add(total)
            optimizer.zero_grad(set_to_none=True)
            budget.step += 1
            meter.tick(budget, batches.stream.position, guard)
            if meter.picture_due(budget.progress):
                picture(shown, budget.step)
    meter.finish(budget, batches.stream.position, guard)
    return shown


def _network_told(learner: nn.Module, told: Tensor | None, dtype: torch.dtype) -> Network:
    """The network under what it is told, its matrix work in `dtype`."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return learner(x, t, told)

    return network


def _adamw(config: TrainConfig) -> MakeOptimizer:
    return lambda parameters: torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=config.weight_decay,
        fused=True,
    )


def _with_unet(pipe: Pipeline, unet: UNet) -> Pipeline:
    other = copy.copy(pipe)
    other.unet = unet
    return other


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """torch's global random state, which only dropout reads, is the run's; then the caller's."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _seed_dropout(config: TrainConfig, step: int, device: torch.device) -> None:
    if config.dropout:
        seed = stream_seed(config.seed, 2, step)
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)


class Guard:
    """Stops a run whose loss or gradient is not finite, or lets it pass over a few such steps.

    On the CPU, and where steps may be passed over, every step is looked at before its update. On
    a GPU that would make the host wait, so there the first bad step is only noted, on the device,
    and `check` reads the note: before every row of the log, and before anything is saved.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config = config
        self.looks = device.type == "cpu" or config.skip_nonfinite > 0
        self.first = torch.full((), -1, device=device)
        self.skipped: list[int] = []

    def passes(self, step: int, loss: Tensor, norm: Tensor) -> bool:
        """Whether the step may be taken. Raises TrainingError."""
        if not self.looks:
            bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
            self.first = torch.where(bad & (self.first < 0), step, self.first)
            return True
        if math.isfinite(float(loss)) and math.isfinite(float(norm)):
            return True
        what = f"the loss is {float(loss)}, the gradient's norm {float(norm)}"
        if len(self.skipped) >= self.config.skip_nonfinite:
            raise TrainingError(self._message(step, what))
        self.skipped.append(step)
        return False

    def check(self) -> None:
        """Raises TrainingError if a step since the last check was bad. Waits for the device."""
        if not self.looks and (step := int(self.first)) >= 0:
            raise TrainingError(self._message(step, "the loss or the gradient"))

    def _message(self, step: int, what: str) -> str:
        passed = f" after {len(self.skipped)} steps were passed over" if self.skipped else ""
        return (
            f"{what} is not finite at step {step}{passed}. Likely: a learning rate that is too "
            f"high (now {self.config.learning_rate:g}), bfloat16 (try float32), or images that "
            "are not finite"
        )


class _Meter:
    """Averages the loss between reports, so that reading it syncs once a second, not every step."""

    def __init__(self, config: TrainConfig, report: Callable[[Progress], None]) -> None:
        self.config, self.report = config, report
        self.sum, self.count, self.reported_at, self.pictures = 0.0, 0, 0.0, 0
        self.told_skips = 0

    def add(self, loss: Tensor) -> None:
        self.sum, self.count = self.sum + loss, self.count + 1

    def tick(self, budget: Budget, images: int, guard: Guard) -> None:
        if budget.elapsed - self.reported_at >= 1:
            self.finish(budget, images, guard)

    def finish(self, budget: Budget, images: int, guard: Guard) -> None:
        guard.check()
        if not self.count:
            return
        mean = float(self.sum) / self.count  # the one sync
        rate = learning_rate(self.config, budget.progress)
        skipped, self.told_skips = guard.skipped[self.told_skips :], len(guard.skipped)
        self.report(Progress(budget.step, budget.elapsed, images, mean, rate, skipped))
        self.sum, self.count, self.reported_at = 0.0, 0, budget.elapsed

    def picture_due(self, progress: float) -> bool:
        due = int(progress * self.config.pictures)
        if due <= self.pictures or progress >= 1:
            return False
        self.pictures = due
        return True
