"""Training a ControlNet: the model stays as it is, a copy of its down path learns to steer it.

    train(config, data, start=pipe, learner=ControlNetTraining(control="edges"))

Captions are hidden more often than in other trainings, so that the control image must be read
(Zhang et al. 2023, https://arxiv.org/abs/2302.05543, section 3.3; there in half of the images).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from minidiff.adapters.learners import Adaptation, flag
from minidiff.errors import InvalidArgument, whole_number
from minidiff.names import CONTROLS
from minidiff.runtime.checks import choice

if TYPE_CHECKING:
    from minidiff.data.protocol import Data
    from minidiff.nn import ControlNet
    from minidiff.pipeline import Pipeline
    from minidiff.training.learner import Learner

EXAMPLES = 100  # pictures along a run, of the first captions of the data
FIRST_WIDTH = 16  # channels of the hint's first level; they double where it halves the image


@dataclass(frozen=True)
class ControlNetTraining(Adaptation):
    """A ControlNet for images that are computed from the training images.

    Args:
        control: "edges" (Sobel), "scribble" (coarse edges) or "mask" (all but the background).
    """

    title: ClassVar[str] = "a ControlNet, for sample --controlnet RUN"
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 3e-3, "label_dropout": 0.3, "optimizer": "muon",
        # High noise decides the place: 60 steps do what 300 of AdamW do on uniform levels.
        "noise_levels": "log_normal", "level_mean": 0.6, "level_std": 1.6,
    }  # fmt: skip

    examples: Any = field(default=None, compare=False, repr=False)  # control images of pictures

    control: str = flag("edges", "image that steers, computed from the training images: "
                        f"{', '.join(CONTROLS)}", choice(*CONTROLS))  # fmt: skip

    def prepare(self, start: "Pipeline", data: "Data") -> tuple["ControlNetTraining", "Data"]:
        import torch

        from minidiff.adapters import controls

        if data.decoder is not None or len(data.shape) != 3:
            raise InvalidArgument(f"data must be images for a ControlNet, {data.name} are not")
        fresh(start)  # refuses what cannot be copied
        if start.prompts is not None:
            data = data.tokenized(start.prompts)
        made = controls.WithControl(data, self.control, controls.PICTURES[self.control])
        first = torch.arange(min(len(data), EXAMPLES if start.prompts else 1))
        examples = made.picture(data.batch(first)[0]).cpu()
        return replace(self, examples=examples), made

    def __call__(self, pipe: "Pipeline") -> "Learner":
        from minidiff.adapters.controls import ControlLearner

        return ControlLearner(pipe, fresh(pipe), self.examples)

    def save(self, pipe: "Pipeline", folder: Path) -> None:
        pipe.controlnets[-1].save_pretrained(folder)

    def load(self, start: "Pipeline", folder: Path) -> "Pipeline":
        from minidiff.nn import ControlNet

        return start.with_controls([ControlNet.from_pretrained(folder)])


def fresh(pipe: "Pipeline") -> "ControlNet":
    """Return a ControlNet that begins as a copy of a pipeline's network, for images of one channel.

    Raises:
        InvalidArgument: the network cannot be copied, or its latents are not 1/2ⁿ of an image.
    """
    import torch

    from minidiff.nn import ControlNet, UNet

    if not isinstance(pipe.unet, UNet):
        raise InvalidArgument("a ControlNet needs a U-Net of images, this model draws points")
    divisor = 1 if pipe.vae is None else pipe.vae.divisor
    levels = whole_number("divisor of the vae", divisor, 1).bit_length()
    if 2 ** (levels - 1) != divisor:
        raise InvalidArgument(f"a ControlNet needs a vae that divides by 2ⁿ, got {divisor}")
    widths = [FIRST_WIDTH * 2**level for level in range(levels)]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the hint's first weights, in every run the same
        return ControlNet.from_unet(pipe.unet, 1, widths)
