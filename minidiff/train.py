"""Training: batch → level → target → loss → step → average.

What the network sees, is told and should say is the objective's business (`minidiff.objective`);
which images and how long, the config's. What is sampled from later is a running average of the
weights. The budget, minutes or steps, decides the whole learning-rate schedule.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minidiff.average import EMA
from minidiff.batches import DROPOUT, Batches
from minidiff.data.protocol import Data
from minidiff.device import DTYPES, pick_device
from minidiff.learner import ClassLabels, Learner, build, check, resolve
from minidiff.nn import SpaceToDepth
from minidiff.noise import stream_seed
from minidiff.objective import Network
from minidiff.pipeline import Pipeline
from minidiff.progress import Budget, Guard, Meter, Progress, batch_size, learning_rate
from minidiff.train_config import TrainConfig

__all__ = [
    "EMA",
    "Progress",
    "TrainConfig",
    "Training",
    "batch_size",
    "build",
    "check",
    "learning_rate",
    "resolve",
    "train",
]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Training:
    """A run under way: all of it that changes from step to step, and the step itself.

    Args:
        config: the run, with σ_data where its objective needs it (`resolve`).
        data: the images, or their latents, moved to `device` whole.
        device: where to train.
        make_optimizer: see `train`.
    Attributes:
        learner: all that is trained, with the raw weights.
        average: of its weights.
        optimizer, budget, batches, meter: what else a checkpoint keeps.
        result: a pipeline of the averaged weights.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        device: torch.device,
        make_optimizer: MakeOptimizer | None = None,
    ) -> None:
        self.config, self.device = config, device
        pipe, self.objective = build(config, data), config.objective()
        self.learner = Learner(pipe.unet, ClassLabels(data.num_classes)).to(device).train()
        self.average = EMA(self.learner, config.ema_half_life)
        self.result = _with_unet(pipe, self.average.model.unet).to(dtype=DTYPES[config.dtype])
        self.optimizer = (make_optimizer or _adamw(config))(self.learner.parameters())
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        encode = SpaceToDepth(config.block).to_latents  # the identity for a block of 1
        self.batches = Batches(
            config, data.to(device), self.learner, self.objective, encode, device
        )
        self.budget, self.guard = Budget(config), Guard(config, device)
        self.meter = Meter(config, self.guard)

    def step(self) -> None:
        """Batch → level → target → loss → step → average. Raises TrainingError."""
        config, progress = self.config, self.budget.progress
        batch = self.batches.take(self.budget.step, batch_size(config, progress))
        self._seed_dropout()
        total = torch.zeros((), device=self.device)
        for z, told, eps, levels in batch.parts(config.accumulate):
            loss = self.objective.loss(self._network(told), z, eps, levels.on(z))
            loss = loss.sum() / len(batch.z)
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.learner.parameters(), config.clip or math.inf)
        if self.guard.passes(self.budget.step, total, norm):
            share = learning_rate(config, progress) / (config.learning_rate or 1)
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * share
            self.optimizer.step()
            self.average.update(self.learner)
            self.meter.add(total)
        self.optimizer.zero_grad(set_to_none=True)
        self.budget.tick()

    def _network(self, told: Tensor | None) -> Network:
        """The network under what it is told, its matrix work in the config's dtype."""
        dtype = DTYPES[self.config.dtype]

        def network(x: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                return self.learner(x, t, told)

        return network

    def _seed_dropout(self) -> None:
        """Nothing but dropout reads torch's global generators."""
        if self.config.dropout:
            seed = stream_seed(self.config.seed, DROPOUT, self.budget.step)
            torch.default_generator.manual_seed(seed)
            if self.device.type == "cuda":
                torch.cuda.manual_seed(seed)

    def row(self, last: bool = False) -> Progress | None:
        """A row for the log, where one is due."""
        return self.meter.row(self.budget, self.batches.stream.position, last)

    def pictures(self) -> int:
        """How many grids of samples should exist by now."""
        return int(min(self.budget.progress, 1) * self.config.pictures)


def train(
    config: TrainConfig,
    data: Data,
    device: torch.device | str = "cpu",
    report: Callable[[Progress], None] = lambda row: None,
    picture: Callable[[Pipeline, int], None] = lambda pipe, step: None,
    optimizer: MakeOptimizer | None = None,
    begin: Callable[[Training], None] = lambda training: None,
    after: Callable[[Training], bool] = lambda training: False,
) -> Pipeline:
    """Train a pipeline until the budget is spent; returns it with the averaged weights.

    Args:
        config: the run.
        data: the images, or their latents, moved to `device` whole.
        device: where to train.
        report: called with every row for the log: every second of a budget in minutes, every
            hundredth of one in steps.
        picture: called `config.pictures` times, evenly spaced, with a pipeline of the averaged
            weights so far.
        optimizer: makes one of the parameters, in place of AdamW; the learning rate of its groups
            then rises and falls as the config's would.
        begin: called before the first step; may put the training where another one was.
        after: called after every step; True ends the run.
    Raises:
        InvalidArgument: config and data do not fit together, or the device is not there.
        TrainingError: the loss or the gradient is not finite.
    """
    device = pick_device(device)
    training = Training(resolve(config, data), data, device, optimizer)
    begin(training)
    stopped, pictures = False, training.pictures()
    training.budget.start()
    with _own_random_state(device):
        while training.budget.progress < 1 and not stopped:
            training.step()
            last = training.budget.progress >= 1
            if row := training.row(last):
                report(row)
            if training.pictures() > pictures and not last:
                pictures = training.pictures()
                picture(training.result, training.budget.step)
            stopped = after(training)
    return training.result


def _adamw(config: TrainConfig) -> MakeOptimizer:
    return lambda parameters: torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=config.weight_decay,
        fused=True,
    )


def _with_unet(pipe: Pipeline, unet: nn.Module) -> Pipeline:
    other = copy.copy(pipe)
    other.unet = unet
    return other


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """The caller finds torch's global random state as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
