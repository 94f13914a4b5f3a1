"""Training: batch → level → target → loss → step → average.

For an image x0, a random training step t and noise ε, the network sees x_t = α_t·x0 + σ_t·ε and is
asked for p·x0 + q·ε (`minidiff.prediction`). The loss is the mean squared error,

    L = E ‖ f(x_t, t, label) − (p·x0 + q·ε) ‖²

(Ho et al. 2020, arXiv:2006.11239, eq. 14). What is sampled from later is a running average of the
weights. The budget, minutes or steps, decides the whole learning-rate schedule.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.data import ImageData, batches
from minidiff.device import DTYPES, pick_device
from minidiff.errors import InvalidArgument, TrainingError, one_of, real_number, whole_number
from minidiff.nn import SpaceToDepth, UNet
from minidiff.noise import MAX_SEED
from minidiff.pipeline import Pipeline
from minidiff.prediction import PREDICTION_TYPES, target
from minidiff.schedule import BETA_SCHEDULES, NoiseSchedule, add_noise
from minidiff.schedulers import DPMSolverMultistepScheduler

MAX_BATCH = 65536  # a batch is held in memory; more than this is a typing error


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run, except the data. Checked when built.

    Attributes:
        minutes, steps: the budget: exactly one of wall-clock minutes and optimizer steps.
        seed: of the weights, the order of the data, the levels and the noise.
        batch_size: images a step.
        learning_rate: of AdamW, at its peak.
        warmup: share of the budget in which the learning rate rises from zero.
        weight_decay: of AdamW.
        ema_half_life: share of the run, counted back from its end, that holds half the weight
            of the averaged weights; 0 for the raw weights.
        label_dropout: share of images whose class is hidden, so that guidance is possible; with 0
            the network has no label for "no class", and no guidance is stored.
        prediction_type: what the network predicts, see `minidiff.prediction`.
        beta_schedule, num_train_timesteps: the noise schedule, see `minidiff.schedule`.
        block: side of the pixel blocks that become channels (SpaceToDepth); 1 for none.
        channels: channels of each level of the network; half the size at each level.
        layers: residual blocks a level.
        dtype: "float32", or "bfloat16" for mixed precision.
        guidance_scale, num_inference_steps: stored with the model, for sampling.
        pictures: how many times to save a grid of samples along the way, the end included.
    """

    minutes: float | None = None
    steps: int | None = None
    seed: int = 0
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup: float = 0.02
    weight_decay: float = 0.01
    ema_half_life: float = 0.05
    label_dropout: float = 0.1
    prediction_type: str = "v_prediction"
    beta_schedule: str = "squaredcos_cap_v2"
    num_train_timesteps: int = 1000
    block: int = 2
    channels: tuple[int, ...] = (48, 96)
    layers: int = 1
    dtype: str = "float32"
    guidance_scale: float = 1.5
    num_inference_steps: int = 10
    pictures: int = 4

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise InvalidArgument("give a budget: either minutes or steps")
        if self.minutes is not None and real_number("minutes", self.minutes, 0) == 0:
            raise InvalidArgument("minutes must be more than 0, got 0")
        if self.steps is not None:
            whole_number("steps", self.steps, 1)
        whole_number("seed", self.seed, 0, MAX_SEED)
        whole_number("batch_size", self.batch_size, 1, MAX_BATCH)
        for name in ("num_train_timesteps", "block", "layers"):
            whole_number(name, getattr(self, name), 1)
        whole_number("num_inference_steps", self.num_inference_steps, 1, self.num_train_timesteps)
        whole_number("pictures", self.pictures, 0)
        for name in ("warmup", "ema_half_life", "label_dropout"):
            real_number(name, getattr(self, name), 0, 0.99)
        if not isinstance(self.channels, tuple | list) or not self.channels:
            raise InvalidArgument(
                f"channels must list the channels of at least one level, got {self.channels!r}"
            )
        for width in self.channels:
            whole_number("channels", width, 1)
        real_number("learning_rate", self.learning_rate, 0)
        real_number("weight_decay", self.weight_decay, 0)
        real_number("guidance_scale", self.guidance_scale, -math.inf)
        one_of("prediction_type", self.prediction_type, PREDICTION_TYPES)
        one_of("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        one_of("dtype", self.dtype, DTYPES)


class EMA:
    """Average of the weights whose memory grows with the run, so it needs no warm-up of its own.

    After update n the average is θ̂ ← β_n·θ̂ + (1 − β_n)·θ with β_n = (1 − 1/n)^k (Karras et al.
    2024, arXiv:2312.02696, eq. 3, k = γ + 1). In closed form θ_s has the weight
    (s/N)^k − ((s−1)/N)^k after N updates: the first weights vanish, and the last share h of the
    run always holds 1 − (1 − h)^k.

    Args:
        model: what to average; copied.
        half_life: the share h of the run that holds half the weight, in (0, 1); 0 keeps only the
            latest weights.
    Attributes:
        model: the copy that holds the average; buffers are the latest.
    """

    def __init__(self, model: nn.Module, half_life: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.exponent = math.log(0.5) / math.log1p(-half_life) if half_life else math.inf
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the current weights of `model` into the average."""
        self.updates += 1
        new = 1 - (1 - 1 / self.updates) ** self.exponent
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), new)
        for averaged, latest in zip(self.model.buffers(), model.buffers(), strict=True):
            averaged.copy_(latest)


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


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Linear rise over the warm-up, then linear decay to zero at the end of the budget."""
    rise = progress / config.warmup if config.warmup else 1.0
    fall = (1 - progress) / (1 - config.warmup)
    return config.learning_rate * max(0.0, min(rise, fall, 1.0))


def levels(schedule: NoiseSchedule, n: int, generator: torch.Generator, device: object) -> Tensor:
    """Random training steps (n,), one from each n-th of 0 … T−1, in random order.

    Every batch then sees all noise levels evenly, which takes variance out of the loss (Kingma
    et al. 2021, arXiv:2107.00630, appendix I.1).
    """
    shares = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    return (
        (shares * len(schedule)).long().clamp_(max=len(schedule) - 1).to(device, non_blocking=True)
    )


def loss_of(
    unet: nn.Module,
    z: Tensor,
    labels: Tensor | None,
    t: Tensor,
    eps: Tensor,
    schedule: NoiseSchedule,
    prediction_type: str,
) -> Tensor:
    """Mean squared error of the network's prediction, a scalar.

    Args:
        z: clean images in the network's space, (B, C, *space).
        labels: (B,) or None.
        t: training steps (B,).
        eps: standard normal noise like z.
    """
    level = schedule.at(t, z)
    out = unet(add_noise(z, eps, level), t, class_labels=labels)
    return F.mse_loss(out.float(), target(z, eps, level, prediction_type))


def build(config: TrainConfig, data: ImageData) -> Pipeline:
    """A fresh pipeline of the size that `config` and the data ask for, weights from the seed.

    torch's global random state is left as it was.

    Raises:
        InvalidArgument: as `check`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # weights are drawn on the CPU
        unet = _network(config, data)
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        compat="exact",
    )
    return Pipeline(
        unet.to(memory_format=torch.channels_last),
        scheduler,
        SpaceToDepth(config.block) if config.block > 1 else None,
        data.class_names,
        config.guidance_scale if _hides_labels(config, data) else 1.0,
        config.num_inference_steps,
    )


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
        out_channels=channels * config.block**2,
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        # attention costs the square of the positions: at the smallest level only
        down_block_types=("DownBlock2D",) * (depth - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (depth - 1),
        attention_head_dim=math.gcd(config.channels[-1], 32),
        norm_num_groups=math.gcd(*config.channels, 8),
        num_class_embeds=data.num_classes + _hides_labels(config, data) or None,
    )


def _hides_labels(config: TrainConfig, data: ImageData) -> bool:
    """Whether the network will know a label for "no class", so that guidance is possible."""
    return data.num_classes > 0 and config.label_dropout > 0


def train(
    config: TrainConfig,
    data: ImageData,
    device: torch.device | str = "cpu",
    report: Callable[[Progress], None] = lambda row: None,
    picture: Callable[[Pipeline, int], None] = lambda pipe, step: None,
) -> Pipeline:
    """Train a pipeline until the budget is spent; returns it with the averaged weights.

    Args:
        config: the run.
        data: the images, moved to `device` whole.
        device: where to train.
        report: called about once a second with a row for the log.
        picture: called `config.pictures` times, evenly spaced, with a pipeline of the averaged
            weights so far.
    Raises:
        InvalidArgument: config and data do not fit together, or the device is not there.
        TrainingError: the loss is not finite.
    """
    device = pick_device(device)
    pipe = build(config, data)
    model = pipe.unet.to(device).train()
    data, schedule = data.to(device), pipe.scheduler.schedule
    average = EMA(model, config.ema_half_life)
    shown = _with_unet(pipe, average.model).to(dtype=DTYPES[config.dtype])
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
    )
    generator = torch.Generator().manual_seed(config.seed)
    noise = torch.Generator(device).manual_seed(config.seed + 1)
    budget = Budget(config)
    meter = _Meter(config, report)

    for index in batches(len(data), config.batch_size, config.seed):
        progress = budget.progress
        if progress >= 1:
            break
        x0, labels = data.batch(index)
        labels = _dropped(labels, config.label_dropout, data.num_classes, generator)
        z = x0 if pipe.vae is None else pipe.vae.to_latents(x0)
        z = z.to(memory_format=torch.channels_last)
        t = levels(schedule, len(z), generator, device)
        eps = torch.empty_like(z).normal_(generator=noise)
        with torch.autocast(z.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = loss_of(model, z, labels, t, eps, schedule, config.prediction_type)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, progress)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(model)
        budget.step += 1
        meter.tick(budget, loss.detach())
        if meter.picture_due(budget.progress):
            picture(shown, budget.step)
    meter.finish(budget)
    return shown


def _with_unet(pipe: Pipeline, unet: UNet) -> Pipeline:
    return Pipeline(
        unet,
        pipe.scheduler,
        pipe.vae,
        pipe.class_names,
        pipe.guidance_scale,
        pipe.num_inference_steps,
    )


def _dropped(
    labels: Tensor | None, share: float, null: int, generator: torch.Generator
) -> Tensor | None:
    """Labels of which a random share is replaced by the label for "no class"."""
    if labels is None:
        return None
    hidden = torch.rand(len(labels), generator=generator) < share
    return labels.masked_fill(hidden.to(labels.device, non_blocking=True), null)


class _Meter:
    """Averages the loss between reports, so that reading it syncs once a second, not every step."""

    def __init__(self, config: TrainConfig, report: Callable[[Progress], None]) -> None:
        self.config, self.report = config, report
        self.sum, self.count, self.reported_at, self.pictures = 0.0, 0, 0.0, 0

    def tick(self, budget: Budget, loss: Tensor) -> None:
        self.sum, self.count = self.sum + loss, self.count + 1
        if budget.elapsed - self.reported_at >= 1:
            self.finish(budget)

    def finish(self, budget: Budget) -> None:
        if not self.count:
            return
        mean = float(self.sum) / self.count  # the one sync
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss is {mean} near step {budget.step}: lower the learning rate "
                f"(now {self.config.learning_rate:g}), or use dtype float32"
            )
        rate = learning_rate(self.config, budget.progress)
        images = budget.step * self.config.batch_size
        self.report(Progress(budget.step, budget.elapsed, images, mean, rate))
        self.sum, self.count, self.reported_at = 0.0, 0, budget.elapsed

    def picture_due(self, progress: float) -> bool:
        due = int(progress * self.config.pictures)
        if due <= self.pictures or progress >= 1:
            return False
        self.pictures = due
        return True
