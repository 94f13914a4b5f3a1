"""What all contenders have in common, and how a peer is trained: its own parts, one loop.

The loop is that of the peers' own trainers: batch → loss → backward → clip → step → average. It is
ours so that a clock can stop it, and so that nobody waits for a loader: all images are in memory.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minidiff.data import ImageData, Stream
from minidiff.errors import TrainingError
from minidiff.images.pixels import to_float
from minidiff.runtime.device import DTYPES
from minidiff.training.config import LoopConfig
from minidiff.training.optim import EMA
from minidiff.training.progress import Budget, learning_rate

# Called after every step: the budget, the images seen so far, what gives the averaged network.
Keep = Callable[[Budget, int, Callable[[], nn.Module]], None]

MNIST = 28  # pixels along a side
_PLAIN = torch.contiguous_format


class Contender(Protocol):
    """What `time_to_quality.py` asks of all.

    Attributes:
        learning_rate: the one to use where none is given.
        fixed_rate: whether that is part of the form and no other may be given.
        dtype: of the matrix work, "float32", "bfloat16" or "auto", where none is given.
        counted: names of sub-networks that return a tensor, one for every network that is asked.
        steps: of the sampler, where no other number is given.
    """

    learning_rate: float
    fixed_rate: bool
    dtype: str
    counted: tuple[str, ...]
    steps: int

    def train(self, loop: LoopConfig, data: ImageData, device: torch.device, keep: Keep) -> None:
        """Train until the budget is spent, on images without labels."""

    def network(self, loop: LoopConfig, data: ImageData) -> nn.Module:
        """A fresh network, into which saved weights fit."""

    def sample(self, network: nn.Module, n: int, steps: int, seed: int) -> Tensor:
        """n images (n, C, H, W) in [−1, 1] on the network's device, drawn without a condition."""


class Average(Protocol):
    """A running average of a network's weights."""

    def update(self, model: nn.Module) -> None:
        """Take the current weights into the average."""

    @property
    def model(self) -> nn.Module:
        """A network with the average."""


class Latest:
    """No average at all: what a recipe without one samples from."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def update(self, model: nn.Module) -> None:
        """The weights are the network's own."""


class Copied:
    """An average that a peer's class keeps beside the network: copied into one to be used.

    Args:
        average: has `copy_to(parameters)`.
        step: takes the current weights of a network into it.
    """

    def __init__(self, model: nn.Module, average: Any, step: Callable[[nn.Module], None]) -> None:
        self._model, self._average, self._step = model, average, step

    def update(self, model: nn.Module) -> None:
        self._step(model)

    @property
    def model(self) -> nn.Module:
        copied = copy.deepcopy(self._model)
        self._average.copy_to(copied.parameters())
        return copied


def tuned_optimizer(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """That of minidiff's own runs."""
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


@dataclass(frozen=True)
class Peer:
    """A peer in one form. What is not given is as in minidiff's own runs: the tuned form.

    Attributes:
        build: makes the network with everything of the peer that trains it.
        loss: of that network, and clean images (B, 1, side, side) in [−1, 1].
        draw: (network, n, steps, device) → images (n, 1, side, side) in [−1, 1].
        steps, counted: see `Contender`.
        side: of the images that the network sees, padded with black.
        batch_size: images of a backward pass.
        passes: how many of them before a step.
        flip: whether half of the images are mirrored.
        rate: the learning rate's share of its peak, by the steps that are behind; None for a rise
            over 2 % of the budget and a linear fall to zero at its end.
        average: of the network's weights; half of the weight lies in the last 5 % of the run.
        tuned: whether the memory format is the quicker one, rather than torch's ordinary one.
    """

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor], Tensor]
    draw: Callable[[nn.Module, int, int, torch.device], Tensor]
    steps: int
    counted: tuple[str, ...] = ("",)
    side: int = MNIST
    learning_rate: float = 1e-3
    fixed_rate: bool = False
    dtype: str = "auto"
    batch_size: int = 16
    passes: int = 1
    flip: bool = False
    clip: float | None = 1.0
    optimizer: Callable[[list[nn.Parameter], float], torch.optim.Optimizer] = tuned_optimizer
    rate: Callable[[int], float] | None = None
    average: Callable[[nn.Module], Average] = lambda model: EMA(model, 0.05)
    tuned: bool = True

    def network(self, loop: LoopConfig, data: ImageData) -> nn.Module:
        torch.manual_seed(loop.seed)
        return self.build()

    def train(self, loop: LoopConfig, data: ImageData, device: torch.device, keep: Keep) -> None:
        model, dtype = self.network(loop, data).to(device).train(), DTYPES[loop.dtype]
        images = padded(data.images, self.side).to(device)
        layout = self._quicker(model, images[: self.batch_size], dtype) if self.tuned else _PLAIN
        model = model.to(memory_format=layout)
        parameters = list(model.parameters())
        optimizer, average = self.optimizer(parameters, loop.learning_rate), self.average(model)
        stream, budget = Stream(len(images), loop.seed), Budget(loop)
        while budget.fraction_done < 1:
            for group in optimizer.param_groups:
                group["lr"] = self._rate_now(loop, budget)
            for _ in range(self.passes):
                batch = images[stream.take(self.batch_size).to(device)]
                loss = self._pass(model, batch, dtype, layout)
                if not torch.isfinite(loss):
                    raise TrainingError(f"the loss is {loss:g} at step {budget.step}")
            if self.clip is not None:
                nn.utils.clip_grad_norm_(parameters, self.clip)
            optimizer.step()
            optimizer.zero_grad()
            average.update(model)
            budget.tick(budget.now())
            keep(budget, stream.position, lambda: average.model)

    def sample(self, network: nn.Module, n: int, steps: int, seed: int) -> Tensor:
        torch.manual_seed(seed)
        images = self.draw(network.eval(), n, steps, next(network.parameters()).device)
        margin = (self.side - MNIST) // 2
        return images[..., margin : self.side - margin, margin : self.side - margin]

    def _pass(
        self, model: nn.Module, images: Tensor, dtype: torch.dtype, layout: torch.memory_format
    ) -> Tensor:
        """The loss of a batch of bytes, with its gradient added to the parameters'."""
        x = to_float(images)
        if self.flip:
            mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
            x = torch.where(mirrored, x.flip(-1), x)
        x = x.contiguous(memory_format=layout)
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            loss = self.loss(model, x) / self.passes
        loss.backward()
        return loss.detach()

    def _quicker(self, model: nn.Module, images: Tensor, dtype: torch.dtype) -> torch.memory_format:
        """The memory format in which a pass takes less time; measured before the clock starts."""
        seconds = {}
        for layout in (_PLAIN, torch.channels_last):
            model.to(memory_format=layout)
            for _ in range(4):
                start = time.perf_counter()
                self._pass(model, images, dtype, layout)
                spent = time.perf_counter() - start
                seconds[layout] = min(spent, seconds.get(layout, spent))
        model.zero_grad()
        best = min(seconds, key=seconds.get)
        took = ", ".join(f"{layout} {spent:.3f} s" for layout, spent in seconds.items())
        print(f"a pass of {len(images)} images takes {took}: {best}", flush=True)
        return best

    def _rate_now(self, loop: LoopConfig, budget: Budget) -> float:
        if self.rate is None:
            return learning_rate(loop, budget.fraction_done)
        return loop.learning_rate * self.rate(budget.step)


def padded(images: Tensor, side: int) -> Tensor:
    """Bytes (N, C, H, W) with as much black on all four sides as makes them `side` wide."""
    margin = (side - images.shape[-1]) // 2
    return F.pad(images, (margin,) * 4)
