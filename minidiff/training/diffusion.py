"""Training: batch → level → target → loss → step → average.

The objective (`minidiff.objective`) decides noise levels, model input and target; the config
decides images and duration. Sampling later uses a running average of the weights. The budget, in
minutes or steps, decides the whole learning-rate schedule.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from minidiff.data import Data, Stream
from minidiff.data.protocol import check_data
from minidiff.errors import InvalidArgument
from minidiff.noise import stream_seed
from minidiff.objective import Network, Objective
from minidiff.pipeline import Pipeline
from minidiff.runtime.checks import callback, check_all, flag, instance, optional
from minidiff.runtime.cuda_graph import CudaGraph
from minidiff.runtime.device import DTYPES, float32_by_default, pick_device
from minidiff.runtime.distributed import World
from minidiff.training.autoguidance import GuidanceNetwork
from minidiff.training.batches import DROPOUT, Batch, Batches, LossInputs
from minidiff.training.build import build, check, encoder, resolve, seen
from minidiff.training.config import TrainConfig
from minidiff.training.learner import Learner
from minidiff.training.loop import CALLBACKS, TrainingState, steps
from minidiff.training.optim import EMA, Muon, orthogonalized, split_groups
from minidiff.training.presets import preset_for
from minidiff.training.progress import Progress, batch_size, learning_rate, training_bar
from minidiff.training.start import prepared

__all__ = [
    "EMA",
    "DiffusionTraining",
    "Progress",
    "TrainConfig",
    "batch_size",
    "build",
    "check",
    "learning_rate",
    "resolve",
    "train",
]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
MakeLearner = Callable[[Pipeline], Learner]

ARGUMENTS = CALLBACKS | {
    "picture": callback, "optimizer": optional(callback), "learner": callback,
    "world": optional(instance(World)), "progress": optional(flag),
}  # fmt: skip


class DiffusionTraining(TrainingState):
    """A diffusion training in progress, and its step.

    Args:
        config: options of the run, after `resolve`.
        data: images or latents, all moved to `device`.
        device: device to train on.
        make_optimizer: the argument `optimizer` of `train`.
        world: processes that train together.
        objective, start, learner: the arguments of `train`.
    Attributes:
        learner, average, optimizer, budget, meter: see `TrainingState`.
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
        extras = (GuidanceNetwork(config, lambda: self.result),)
        super().__init__(config, learner, average, make(learner.trained()), device, world, extras)
        encode = encoder(config)
        data = seen(config, data).to(device)
        if config.cuda_graph:
            data = data.captured()
        self.batches = Batches(config, data, learner, self.objective, encode, world.part, device)
        self.synced = world.wrap(learner)
        self.graph = CudaGraph(self._tensors_to_gradients)
        if config.compile:
            learner.compile()

    @property
    def stream(self) -> Stream:
        """Order of the images, and the position in it."""
        return self.batches.stream

    def step(self) -> None:
        """Batch → level → target → loss → step → average. Raises TrainingError."""
        size = batch_size(self.config, self.budget.fraction_done)
        batch = self.batches.take(self.budget.step, size)
        self._seed_dropout()
        total, norm = (self._replay if self.config.cuda_graph else self._gradients)(batch)
        self.update(total, norm, total)

    def _gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the gradients; return the mean loss and the gradients' norm before clipping."""
        total = torch.zeros((), device=self.device)
        for last, part in _marking_the_last(batch.parts(self.config.accumulate)):
            with nullcontext() if last else self.world.without_sync(self.synced):
                loss = self._loss(batch.size, part.loss_inputs())
                (loss * self.world.size).backward()  # gradients are averaged over processes
            total += loss.detach()
        return self.world.total(total), self._clip()

    def _replay(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Do the same by replaying a CUDA graph, whose memory holds the gradients."""
        total, norm, *gradients = self.graph(*batch.loss_inputs().flat())
        for parameter, gradient in zip(self.learner.trained(), gradients, strict=True):
            parameter.grad = gradient
        return total, norm

    def _tensors_to_gradients(self, *tensors: Tensor) -> list[Tensor | None]:
        """Return mean loss, norm and gradients for `LossInputs.flat`; this is what is captured."""
        self.optimizer.zero_grad(set_to_none=True)
        inputs = LossInputs.unflat(tensors)
        loss = self._loss(len(inputs.x0), inputs)
        loss.backward()
        norm = self._clip()
        return [loss.detach(), norm, *(p.grad for p in self.learner.trained())]

    def _clip(self) -> Tensor:
        return self.world.clip(self.learner.trained(), self.config.clip or math.inf)

    def _loss(self, size: int, inputs: LossInputs) -> Tensor:
        """Return what a part contributes to the mean loss of a batch of `size` images."""
        x0, eps, levels, labels = inputs
        return self.objective.loss(self._network(labels), x0, eps, levels).sum() / size

    def _network(self, labels: Tensor | None) -> Network:
        """Return the conditioned network, with matrix products in the config's dtype.

        An objective with further networks, (x, t, labels) → output, passes one as third argument.
        """
        dtype = DTYPES[self.config.dtype]

        def network(x: Tensor, t: Tensor, model: nn.Module = self.synced) -> Tensor:
            with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                return model(x, t, labels)

        return network

    def _seed_dropout(self) -> None:
        """Seed torch's global generators, which nothing but dropout reads."""
        if self.config.dropout:
            stream = DROPOUT + self.world.rank
            seed = stream_seed(self.config.seed, stream, self.budget.step)
            torch.default_generator.manual_seed(seed)
            if self.device.type == "cuda":
                torch.cuda.manual_seed(seed)

    @property
    def result(self) -> Pipeline:
        """Pipeline of the averaged weights; where they are sharded, all processes must read it."""
        if self.world.splits:
            self._whole.load_state_dict(self.world.whole(self.average.model.state_dict()))
        self._whole.refresh(self._result)
        return self._result

    def pictures(self) -> int:
        """Return how many grids of samples should exist by now."""
        return int(min(self.budget.fraction_done, 1) * self.config.pictures)


@float32_by_default()
def train(
    config: TrainConfig | None,
    data: Data,
    device: torch.device | str = "cpu",
    on_log_row: Callable[[Progress], None] = lambda row: None,
    picture: Callable[[Pipeline, int], None] = lambda pipe, step: None,
    optimizer: MakeOptimizer | None = None,
    resume: Callable[[DiffusionTraining], None] = lambda training: None,
    after_step: Callable[[DiffusionTraining], None] = lambda training: None,
    world: World | None = None,
    objective: type[Objective] | None = None,
    *,
    start: Pipeline | None = None,
    learner: MakeLearner = Learner.of,
    progress: bool | None = None,
) -> Pipeline:
    """Train a pipeline until the budget is spent and return it with the averaged weights.

    Args:
        config: all options of the run; None for the preset that fits the data.
        data: images or latents, all moved to `device`.
        device: device to train on.
        on_log_row: called with every row of the log: once per second for a budget in minutes, a
            hundred times in all for a budget in steps.
        picture: called `config.pictures` times, evenly spaced, with a pipeline of the averaged
            weights so far and the number of the step.
        optimizer: function from the parameters to an optimizer, instead of AdamW or Muon; the
            learning rates of its groups follow the config's schedule.
        resume: called before the first step; may restore the state of an earlier training.
        after_step: called after every step; what it raises ends the run.
        world: processes that train together. Each of them calls this function, and the callbacks
            are called on all of them.
        objective: custom class instead of the config's, a subclass of it, see
            `minidiff.training.objectives.class_of`.
        start: pipeline to continue from, which is not changed; None for a fresh network. Its
            network and noise schedule are kept, see `minidiff.training.start`.
        learner: function from the pipeline to the part of it that is trained and saved, such as
            `minidiff.adapters.LoRA()`.
        progress: True for a progress bar, False for none; None for one where someone watches, see
            `minidiff.runtime.progress`.
    Raises:
        InvalidArgument: config, data, objective and start do not fit together, or the device does
            not exist.
        TrainingError: the loss or the gradient is not finite, or a process is lost.
    """
    check_all(locals(), ARGUMENTS)
    device = pick_device(device)
    if config is None:
        check_data(data)
        config = preset_for(data.name, data.shape, device.type != "cpu")
    learner, data = prepared(learner, data, start)
    config = resolve(config, data, start)
    training = DiffusionTraining(config, data, device, optimizer, world, objective, start, learner)
    resume(training)
    pictures = training.pictures()
    shown = progress if training.world.rank == 0 else False
    with _own_random_state(device), training_bar(config, on_log_row, shown) as on_log_row:
        for last in steps(training, on_log_row, after_step):
            if training.pictures() > pictures and not last:
                pictures = training.pictures()
                picture(training.result, training.budget.step)
    return training.result


def check_machine(config: TrainConfig, device: torch.device, size: int, splits: bool) -> None:
    """Raise InvalidArgument for what this device or this number of processes cannot do.

    Args:
        config: the run.
        device: device of the training.
        size: number of processes that train together.
        splits: whether the weights are sharded over them.
    """
    if config.batch_size < (least := size * config.accumulate):
        raise InvalidArgument(
            f"batch_size must be at least {least}, an image for each of {config.accumulate} parts "
            f"on each of {size} processes; got {config.batch_size}"
        )
    if config.optimizer == "muon" and splits:
        raise InvalidArgument("optimizer must be 'adamw' where the weights are sharded (shard)")
    if config.cuda_graph and device.type != "cuda":
        raise InvalidArgument(f"cuda_graph needs an NVIDIA GPU, but the device is {device.type}")
    if config.cuda_graph and (size > 1 or splits):
        raise InvalidArgument(
            f"cuda_graph must be False where several processes train, got {size} of them"
        )


def _check_compiler(device: torch.device) -> None:
    """Raise InvalidArgument before the run begins if this machine cannot compile."""
    try:
        torch.compile(torch.exp)(torch.zeros(2, device=device))
    except Exception as error:  # from torch, Triton or the compiler
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise InvalidArgument(f"compile must be False on this machine: {why}") from error


def _marking_the_last(parts: Iterator[Batch]) -> Iterator[tuple[bool, Batch]]:
    """Yield (is_last, part) for each part."""
    *others, last = parts
    yield from ((False, part) for part in others)
    yield True, last


def _optimizer(
    config: TrainConfig, learner: Learner, trained: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return the config's optimizer, with a separate learning rate for a text encoder."""
    text = learner.text_parameters()
    groups = [
        {"params": parameters, "lr": config.learning_rate * factor}
        for encodes, factor in ((False, 1.0), (True, config.text_learning_rate))
        if (parameters := [p for p in trained if (p in text) == encodes])
    ]
    options = {"betas": (0.9, 0.99), "weight_decay": config.weight_decay}
    if config.optimizer == "muon":
        call = CudaGraph(orthogonalized) if config.cuda_graph else orthogonalized
        return Muon(split_groups(groups, learner), **options, orthogonalize=call)
    return torch.optim.AdamW(groups, **options, fused=True)


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Restore torch's global random state at the end of the block."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
