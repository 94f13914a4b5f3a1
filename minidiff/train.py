"""Training: batch → level → target → loss → step → average.

What the network sees, is told and should say is the objective's business (`minidiff.objective`);
which images and how long, the config's. What is sampled from later is a running average of the
weights. The budget, minutes or steps, decides the whole learning-rate schedule.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from minidiff.average import EMA
from minidiff.batches import DROPOUT, Batch, Batches
from minidiff.data import Data
from minidiff.device import DTYPES, pick_device, training_layout
from minidiff.distributed import World
from minidiff.errors import InvalidArgument
from minidiff.learner import Learner, build, check, resolve, seen
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
        world: the processes that train together.
    Attributes:
        learner: all that is trained, with the raw weights.
        average: of its weights.
        optimizer, budget, batches, meter: what else a snapshot keeps.
        asks: says which signal asks this process to stop, 0 for none.
        asked: the same, as all processes agree on it at the end of a step.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        device: torch.device,
        make_optimizer: MakeOptimizer | None = None,
        world: World | None = None,
    ) -> None:
        self.config, self.device, self.world = config, device, world or World()
        _check_parts(config, self.world)
        if config.compile:
            _check_compiler(device)
        pipe, self.objective = build(config, data), config.objective()
        layout = training_layout(device)
        self.learner = Learner.of(pipe).to(device, memory_format=layout).train()
        self.average = EMA(self.learner, config.ema_half_life)
        splits = self.world.splits
        self._whole = copy.deepcopy(self.average.model) if splits else self.average.model
        self._result = self._whole.pipeline(pipe).to(dtype=DTYPES[config.dtype])
        for module in (self.learner, self.average.model):
            self.world.share(module)
        self.optimizer = (make_optimizer or _adamw(config))(self.learner.trained())
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        encode = SpaceToDepth(config.block).to_latents  # the identity for a block of 1
        self.batches = Batches(
            config,
            seen(config, data).to(device),
            self.learner,
            self.objective,
            encode,
            self.world.part,
            device,
        )
        self.synced = self.world.wrap(self.learner)
        if config.compile:
            self.learner.compile()
        self.asks: Callable[[], int] = lambda: 0
        self.asked = 0
        self.budget, self.guard = Budget(config), Guard(config, device)
        self.meter = Meter(config, self.guard)

    def step(self) -> None:
        """Batch → level → target → loss → step → average. Raises TrainingError."""
        config, progress = self.config, self.budget.progress
        batch = self.batches.take(self.budget.step, batch_size(config, progress))
        self._seed_dropout()
        total = torch.zeros((), device=self.device)
        for last, part in _marking_the_last(batch.parts(config.accumulate)):
            with nullcontext() if last else self.world.without_sync(self.synced):
                loss = self._loss(part)
                (loss * self.world.size).backward()  # gradients are averaged over processes
            total += loss.detach()
        total = self.world.total(total)
        norm = self.world.clip(self.learner.trained(), config.clip or math.inf)
        if self.guard.passes(self.budget.step, total, norm):
            share = learning_rate(config, progress) / (config.learning_rate or 1)
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * share
            self.optimizer.step()
            self.average.update(self.learner)
            self.meter.add(total)
        self.optimizer.zero_grad(set_to_none=True)
        now, asked = self.world.largest(self.budget.now(), self.asks())
        self.budget.tick(now)
        self.asked = int(asked)

    def _loss(self, part: Batch) -> Tensor:
        """What a part of the batch adds to the mean loss of all of it."""
        _, z, told, eps, levels = part
        losses = self.objective.loss(self._network(told), z, eps, levels.on(z))
        return losses.sum() / part.size

    def _network(self, told: Tensor | None) -> Network:
        """The network under what it is told, its matrix work in the config's dtype."""
        dtype = DTYPES[self.config.dtype]

        def network(x: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                return self.synced(x, t, told)

        return network

    def _seed_dropout(self) -> None:
        """Nothing but dropout reads torch's global generators."""
        if self.config.dropout:
            stream = DROPOUT + self.world.rank
            seed = stream_seed(self.config.seed, stream, self.budget.step)
            torch.default_generator.manual_seed(seed)
            if self.device.type == "cuda":
                torch.cuda.manual_seed(seed)

    @property
    def result(self) -> Pipeline:
        """A pipeline of the averaged weights; where they are shared out, all processes ask."""
        if self.world.splits:
            self._whole.load_state_dict(self.world.whole(self.average.model.state_dict()))
        return self._result

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
    world: World | None = None,
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
        world: the processes that train together, each of which calls this; report, picture and
            after are called on all of them.
    Raises:
        InvalidArgument: config and data do not fit together, or the device is not there.
        TrainingError: the loss or the gradient is not finite, or a process is lost.
    """
    device = pick_device(device)
    training = Training(resolve(config, data), data, device, optimizer, world)
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
    result = training.result
    result.unet.to(memory_format=torch.channels_last)  # the quicker one to sample with
    return result


def _check_parts(config: TrainConfig, world: World) -> None:
    if config.batch_size < (least := world.size * config.accumulate):
        raise InvalidArgument(
            f"batch_size must be at least {least}, an image for each of {config.accumulate} parts "
            f"on each of {world.size} processes; got {config.batch_size}"
        )


def _check_compiler(device: torch.device) -> None:
    """Compile next to nothing, so that a machine that cannot is known before a run begins."""
    try:
        torch.compile(torch.exp)(torch.zeros(2, device=device))
    except Exception as error:  # whatever torch, Triton or the compiler have to say
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise InvalidArgument(f"compile must be False on this machine: {why}") from error


def _marking_the_last(parts: Iterator[Batch]) -> Iterator[tuple[bool, Batch]]:
    *others, last = parts
    yield from ((False, part) for part in others)
    yield True, last


def _adamw(config: TrainConfig) -> MakeOptimizer:
    return lambda parameters: torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=config.weight_decay,
        fused=True,
    )


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """The caller finds torch's global random state as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
