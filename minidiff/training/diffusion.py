"""Training: batch → level → target → loss → step → average.

What the network sees, is told and should say is the objective's business (`minidiff.objective`);
which images and how long, the config's. What is sampled from later is a running average of the
weights. The budget, minutes or steps, decides the whole learning-rate schedule.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from minidiff.data import Data, Stream
from minidiff.errors import InvalidArgument
from minidiff.nn import SpaceToDepth, UNet
from minidiff.noise import stream_seed
from minidiff.objective import Levels, Network, Objective
from minidiff.pipeline import Pipeline
from minidiff.runtime.cuda_graph import Recorded
from minidiff.runtime.device import DTYPES, pick_device
from minidiff.runtime.distributed import World
from minidiff.training.batches import DROPOUT, Batch, Batches
from minidiff.training.build import build, check, resolve, seen
from minidiff.training.config import TrainConfig
from minidiff.training.learner import Learner
from minidiff.training.loop import Loop, steps
from minidiff.training.optim import EMA, Muon, orthogonalized, split_groups
from minidiff.training.progress import Progress, batch_size, learning_rate

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
MakeLearner = Callable[[Pipeline], Learner]


class Training(Loop):
    """A run under way, and its step.

    Args:
        config: the run, with σ_data where its objective needs it (`resolve`).
        data: the images, or their latents, moved to `device` whole.
        device: where to train.
        make_optimizer: see `train`.
        world: the processes that train together.
        objective, start, learner: see `train`.
    Attributes:
        learner, average, optimizer, budget, meter: see `Loop`.
        batches: images, levels and noise of every step.
    """

    config: TrainConfig
    learner: Learner

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        device: torch.device,
        make_optimizer: MakeOptimizer | None = None,
        world: World | None = None,
        objective: type[Objective] | None = None,
        start: Pipeline | None = None,
        learner: MakeLearner = Learner.of,
    ) -> None:
        world = world or World()
        check(config, data, start)
        self.objective = config.objective(objective, start and start.scheduler)
        check_machine(config, device, world.size, world.splits)
        if config.compile:
            _check_compiler(device)
        pipe = build(config, data, start)
        learner = learner(pipe).to(device).train()
        average = EMA(learner, config.ema_half_life)
        self._whole = copy.deepcopy(average.model) if world.splits else average.model
        self._result = self._whole.pipeline(pipe).to(device, DTYPES[config.dtype])
        for module in (learner, average.model):
            world.share(module)
        make = make_optimizer or partial(_optimizer, config, learner)
        optimizer = make(learner.trained())
        super().__init__(config, learner, average, optimizer, device, world)
        encode = SpaceToDepth(config.block).to_latents  # the identity for a block of 1
        data = seen(config, data).to(device)
        if config.cuda_graph:
            data = data.captured()
        self.batches = Batches(
            config,
            data,
            learner,
            self.objective,
            encode,
            world.part,
            device,
        )
        self.synced = world.wrap(learner)
        self.recorded = Recorded(self._backward)
        if config.compile:
            learner.compile()

    @property
    def stream(self) -> Stream:
        return self.batches.stream

    def step(self) -> None:
        """Batch → level → target → loss → step → average. Raises TrainingError."""
        config = self.config
        batch = self.batches.take(self.budget.step, batch_size(config, self.budget.progress))
        self._seed_dropout()
        total, norm = (self._replay if config.cuda_graph else self._gradients)(batch)
        self.update(total, norm, total)
        if self.weaker_is_due:
            self.set_aside(copy.deepcopy(self.result.unet))

    @property
    def weaker_is_due(self) -> bool:
        """See `Loop`."""
        wanted = self.config.autoguidance_scale != 1 and self.weaker is None
        return wanted and self.budget.progress >= self.config.weaker_at

    def set_aside(self, weaker: UNet) -> None:
        """Keep a network of the averaged weights so far, for autoguidance to lead away from."""
        self.weaker = self._result.weaker = weaker
        self._result.autoguidance_scale = self.config.autoguidance_scale
        # A pipeline that nothing can guide is built without it.
        self._result.guidance_interval = self.config.guidance_interval

    def _gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Leave them at the parameters; returns the mean loss and their norm before the cut."""
        total = torch.zeros((), device=self.device)
        for last, part in _marking_the_last(batch.parts(self.config.accumulate)):
            with nullcontext() if last else self.world.without_sync(self.synced):
                loss = self._loss(batch.size, *part.tensors())
                (loss * self.world.size).backward()  # gradients are averaged over processes
            total += loss.detach()
        return self.world.total(total), self._clip()

    def _replay(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same by a recording, whose gradients lie where the recording has them."""
        total, norm, *gradients = self.recorded(*batch.tensors())
        for parameter, gradient in zip(self.learner.trained(), gradients, strict=True):
            parameter.grad = gradient
        return total, norm

    def _backward(self, x0: Tensor, *others: Tensor) -> list[Tensor | None]:
        """What is recorded: from `Batch.tensors` to mean loss, norm and gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(len(x0), x0, *others)
        loss.backward()
        norm = self._clip()
        return [loss.detach(), norm, *(p.grad for p in self.learner.trained())]

    def _clip(self) -> Tensor:
        return self.world.clip(self.learner.trained(), self.config.clip or math.inf)

    def _loss(self, size: int, x0: Tensor, eps: Tensor, *others: Tensor) -> Tensor:
        """What `Batch.tensors` of a part add to the mean loss of a batch of that size."""
        levels, told = Levels(*others[:4]), others[4] if others[4:] else None
        return self.objective.loss(self._network(told), x0, eps, levels).sum() / size

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
    after: Callable[[Training], None] = lambda training: None,
    world: World | None = None,
    objective: type[Objective] | None = None,
    *,
    start: Pipeline | None = None,
    learner: MakeLearner = Learner.of,
) -> Pipeline:
    """Train a pipeline until the budget is spent and return it with the averaged weights.

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
        after: called after every step; what it raises ends the run.
        world: the processes that train together, each of which calls this; report, picture and
            after are called on all of them.
        objective: custom class instead of the config's; a subclass of that, see
            `minidiff.training.objectives.class_of`.
        start: pipeline to go on from, which stays as it is; None for a fresh network. Its network
            and noise schedule are kept, see `minidiff.training.start`.
        learner: function from the pipeline to what of it is trained and saved.
    Raises:
        InvalidArgument: config, data, objective and start do not fit together, or the device is
            not there.
        TrainingError: the loss or the gradient is not finite, or a process is lost.
    """
    device = pick_device(device)
    config = resolve(config, data, start)
    training = Training(config, data, device, optimizer, world, objective, start, learner)
    begin(training)
    pictures = training.pictures()
    with _own_random_state(device):
        for last in steps(training, report, after):
            if training.pictures() > pictures and not last:
                pictures = training.pictures()
                picture(training.result, training.budget.step)
    return training.result


def check_machine(config: TrainConfig, device: torch.device, size: int, splits: bool) -> None:
    """Refuse what this device, or so many processes, cannot do. Raises InvalidArgument.

    Args:
        size: how many processes train.
        splits: whether they share the weights.
    """
    if config.batch_size < (least := size * config.accumulate):
        raise InvalidArgument(
            f"batch_size must be at least {least}, an image for each of {config.accumulate} parts "
            f"on each of {size} processes; got {config.batch_size}"
        )
    if config.optimizer == "muon" and splits:
        raise InvalidArgument("optimizer must be 'adamw' where processes share the weights (shard)")
    if config.cuda_graph and device.type != "cuda":
        raise InvalidArgument(f"cuda_graph must be False on {device.type}: it is of NVIDIA's GPUs")
    if config.cuda_graph and (size > 1 or splits):
        raise InvalidArgument(
            f"cuda_graph must be False where several processes train, got {size} of them"
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


def _optimizer(
    config: TrainConfig, learner: Learner, trained: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """The config's optimizer, where a text encoder has its own learning rate."""
    text = set(learner.condition.parameters())
    groups = [
        {"params": parameters, "lr": config.learning_rate * share}
        for encodes, share in ((False, 1.0), (True, config.text_learning_rate))
        if (parameters := [p for p in trained if (p in text) == encodes])
    ]
    options = {"betas": (0.9, 0.99), "weight_decay": config.weight_decay}
    if config.optimizer == "muon":
        call = Recorded(orthogonalized) if config.cuda_graph else orthogonalized
        return Muon(split_groups(groups, learner), **options, orthogonalize=call)
    return torch.optim.AdamW(groups, **options, fused=True)


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """The caller finds torch's global random state as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
