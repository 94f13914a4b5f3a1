"""minidiff: the preset mnist without classes.

It has one form, which is what `minidiff train --preset mnist` does with images without labels.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from minidiff.data import ImageData
from minidiff.pipeline import Pipeline
from minidiff.presets import PRESETS
from minidiff.train import Training, build, train
from minidiff.train_config import LoopConfig, TrainConfig
from peers.contender import Keep

_PRESET = PRESETS["mnist"].train


@dataclass(frozen=True)
class Minidiff:
    """See `peers.contender.Contender`."""

    learning_rate: float = _PRESET.learning_rate
    fixed_rate: bool = False
    dtype: str = "auto"
    counted: str = "unet"
    steps: int = _PRESET.num_inference_steps

    def train(self, loop: LoopConfig, data: ImageData, device: torch.device, keep: Keep) -> None:
        def after(training: Training) -> bool:
            position = training.batches.stream.position
            keep(training.budget, position, lambda: _Sampled(training.result))
            return False

        train(_config(loop), data, device, after=after)

    def network(self, loop: LoopConfig, data: ImageData) -> nn.Module:
        return _Sampled(build(_config(loop), data))

    def sample(self, network: nn.Module, n: int, steps: int, seed: int) -> Tensor:
        return network.draw(n, steps, seed)


class _Sampled(nn.Module):
    """The network of a pipeline as a module, with the pipeline that samples it."""

    def __init__(self, pipe: Pipeline) -> None:
        super().__init__()
        self.unet, self._pipe = pipe.unet, pipe

    def draw(self, n: int, steps: int, seed: int) -> Tensor:
        pipe = self._pipe.to(next(self.unet.parameters()).device)
        return pipe(
            num_images=n, num_inference_steps=steps, seed=seed, batch_size=n, output_type="pt"
        ).images


def _config(loop: LoopConfig) -> TrainConfig:
    """The preset with the budget, seed, learning rate and dtype of a run."""
    return replace(
        _PRESET,
        minutes=loop.minutes,
        seed=loop.seed,
        learning_rate=loop.learning_rate,
        dtype=loop.dtype,
        pictures=0,
    )


FORMS = {"preset": Minidiff}
