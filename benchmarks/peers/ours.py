"""minidiff: the preset mnist without classes.

Preset: `minidiff train --preset mnist` on images without labels, so without guidance. Autoguided:
with `--autoguidance 1.5` as well, so that samples are guided away from the output of the averaged
weights after a sixteenth of the run, at the preset's levels.
"""

import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from minidiff.data import ImageData
from minidiff.pipeline import Pipeline
from minidiff.training.build import build
from minidiff.training.config import LoopConfig, TrainConfig
from minidiff.training.diffusion import DiffusionTraining, train
from minidiff.training.presets import PRESETS
from peers.contender import Keep

_PRESET = PRESETS["mnist"].train
AUTOGUIDANCE = 1.5


@dataclass(frozen=True)
class Minidiff:
    """minidiff as a `peers.contender.Contender`.

    Attributes:
        autoguidance: scale of autoguidance; 1 for none.
    """

    autoguidance: float = 1.0
    learning_rate: float = _PRESET.learning_rate
    fixed_rate: bool = False
    dtype: str = "auto"
    counted: tuple[str, ...] = ("unet",)
    steps: int = _PRESET.num_inference_steps

    def train(self, loop: LoopConfig, data: ImageData, device: torch.device, keep: Keep) -> None:
        def after(training: DiffusionTraining) -> bool:
            position = training.batches.stream.position
            keep(training.budget, position, lambda: self._sampled(training.result))
            return False

        train(self._config(loop), data, device, after_step=after)

    def network(self, loop: LoopConfig, data: ImageData) -> nn.Module:
        return self._sampled(build(self._config(loop), data))

    def sample(self, network: nn.Module, n: int, steps: int, seed: int) -> Tensor:
        return network.draw(n, steps, seed)

    def _sampled(self, pipe: Pipeline) -> "_Sampled":
        return _Sampled(pipe, self.autoguidance)

    def _config(self, loop: LoopConfig) -> TrainConfig:
        """Return the preset with the budget, seed, learning rate and dtype of a run."""
        return replace(
            _PRESET,
            minutes=loop.minutes,
            seed=loop.seed,
            learning_rate=loop.learning_rate,
            dtype=loop.dtype,
            pictures=0,
            autoguidance_scale=self.autoguidance,
        )


class _Sampled(nn.Module):
    """The networks of a pipeline as one module that can draw samples.

    A snapshot from before the guidance network was set aside has a copy of the network instead,
    which does not change samples.
    """

    def __init__(self, pipe: Pipeline, autoguidance: float) -> None:
        super().__init__()
        self._pipe, self.unet = copy.copy(pipe), pipe.unet
        if autoguidance != 1:
            self._pipe.weaker = self.weaker = pipe.weaker or copy.deepcopy(pipe.unet)
            self._pipe.autoguidance_scale = autoguidance
            self._pipe.guidance_interval = _PRESET.guidance_interval

    def draw(self, n: int, steps: int, seed: int) -> Tensor:
        """Return n images (n, C, H, W) in [−1, 1]."""
        pipe = self._pipe.to(next(self.unet.parameters()).device)
        return pipe(
            num_images=n, num_inference_steps=steps, seed=seed, batch_size=n, output_type="pt"
        ).images


FORMS = {
    "preset": Minidiff,
    "autoguided": partial(Minidiff, autoguidance=AUTOGUIDANCE, counted=("unet", "weaker")),
}
