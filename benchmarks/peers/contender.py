"""The interface of contenders, and the training loop of the peers.

The steps of the loop are those of the peers' trainers: batch → loss → backward → clip → step →
average. It is written here so that a clock can stop it, and with all images in memory, so that no
contender waits for a loader.
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

# Called after every step with the budget, the images so far, a source of the averaged network.
Keep = Callable[[Budget, int, Callable[[], nn.Module]], None]

MNIST = 28  # pixels along a side
_PLAIN = torch.contiguous_format


class Contender(Protocol):
    """The interface that `time_to_quality.py` needs.

    Attributes:
        learning_rate: default learning rate.
        fixed_rate: True if the form allows no other learning rate.
        dtype: default number type of matrix products, "float32", "bfloat16" or "auto".
        counted: names of sub-networks that return a tensor, one for each network to count.
        steps: default number of steps of the sampler.
    """

    learning_rate: float
    fixed_rate: bool
    dtype: str
    counted: tuple[str, ...]
    steps: int

    def train(self, loop: LoopConfig, data: ImageData, device: torch.device, keep: Keep) -> None:
        """Train until the budget is spent, on images without labels."""

    def network(self, loop: LoopConfig, data: ImageData) -> nn.Module:
        """Return a fresh network that saved weights fit into."""

    def sample(self, network: nn.Module, n: int, steps: int, seed: int) -> Tensor:
        """Return n unconditional images (n, C, H, W) in [−1, 1] on the network's device."""


class Average(Protocol):
    """A running average of a network's weights."""

    def update(self, model: nn.Module) -> None:
        """Add the current weights to the average."""

    @property
    def model(self) -> nn.Module:
        """A network with the averaged weights."""


class Latest:
    """The latest weights, for a recipe without an average."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def update(self, model: nn.Module) -> None:
        """Do nothing, as the weights are those of the network."""


class Copied:
    """An average that a peer's class keeps apart, copied into a network for use.

    Args:
        model: network in training.
        average: object with `copy_to(parameters)`.
        step: function that adds the current weights of a network to the average.
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
    """Return the optimizer of minidiff's runs."""
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


@dataclass(frozen=True)
class Peer:
    """A peer in one form. The defaults are those of minidiff's runs, for the tuned form.

    Attributes:
        build: constructor of the network, with the parts of the peer that its loss needs.
        loss: function of that network and clean images (B, 1, side, side) in [−1, 1].
        draw: function (network, n, steps, device) → images (n, 1, side, side) in [−1, 1].
        steps, counted: sampler's steps and counted networks, see `Contender`.
        side: side of the network's input, where images are padded with black.
        batch_size: images per backward pass.
        passes: backward passes per step.
        flip: True to mirror half of the images.
        rate: learning rate relative to its peak, by the number of steps so far; None for a rise
            over 2 % of the budget and a linear fall to zero at its end.
        average: constructor of the average of weights; by default half of its weight lies in the
            last 5 % of the run.
        tuned: True for the faster memory format, False for torch's default.
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
        layout = (
            self._faster_layout(model, images[: self.batch_size], dtype) if self.tuned else _PLAIN
        )
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
        """Return the loss of a batch of bytes, and add its gradient to that of the parameters."""
        x = to_float(images)
        if self.flip:
            mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
            x = torch.where(mirrored, x.flip(-1), x)
        x = x.contiguous(memory_format=layout)
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            loss = self.loss(model, x) / self.passes
        loss.backward()
        return loss.detach()

    def _faster_layout(
        self, model: nn.Module, images: Tensor, dtype: torch.dtype
    ) -> torch.memory_format:
        """Return the memory format with the faster pass, measured before the clock starts."""
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
        times = ", ".join(f"{layout} {spent:.3f} s" for layout, spent in seconds.items())
        print(f"a pass of {len(images)} images takes {times}: {best}", flush=True)
        return best

    def _rate_now(self, loop: LoopConfig, budget: Budget) -> float:
        if self.rate is None:
            return learning_rate(loop, budget.fraction_done)
        return loop.learning_rate * self.rate(budget.step)


def padded(images: Tensor, side: int) -> Tensor:
    """Return bytes (N, C, H, W) padded with black on all four sides to a side."""
    margin = (side - images.shape[-1]) // 2
    return F.pad(images, (margin,) * 4)
