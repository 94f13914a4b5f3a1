"""Networks with an image beside x: trained to fill a hole, or to enlarge a small image.

    inpainting     x, mask, kept part       → out      (1 + C more channels, as Stable Diffusion's)
    upscaling      x, small image enlarged  → out      (C more channels)

Both are trained from scratch like any other network; only the data and the learner differ:

    data = with_task(load("mnist", data_dir=…), "upscale:4")
    pipe = train(config, data, learner=TaskTraining("upscale:4"))
    upscale(pipe, small)                          of "inpaint": pipe(image=…, mask_image=…)

A small image gets noise of a random strength in training, so that the network does not rely on
every pixel of it (cascades: Ho et al. 2021, https://arxiv.org/abs/2106.15282, section 4).

Sources: Rombach et al. 2022, https://arxiv.org/abs/2112.10752, section 4.5; Saharia et al. 2021,
"Image Super-Resolution via Iterative Refinement", https://arxiv.org/abs/2104.07636.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.adapters.controls import WithControl, joined, split_labels
from minidiff.data.protocol import Data, Purpose, random_words
from minidiff.errors import InvalidArgument, real_number
from minidiff.images.pixels import Original, as_pixels
from minidiff.nn import UNet
from minidiff.noise import image_generators, randn
from minidiff.pipeline import Pipeline, PipelineOutput
from minidiff.pipeline.request import Request
from minidiff.pipeline.space import LatentSpace
from minidiff.sample import trajectory
from minidiff.text.conditioning import ClassLabels, Condition, ConditionConfig
from minidiff.training.build import network_of
from minidiff.training.learner import Learner

NOISE = 0.1  # largest σ of the noise on small images in training
MAX_FACTOR = 64


@dataclass(frozen=True)
class Inpainting:
    """A rectangle of the image is hidden: its mask, and the rest."""

    name: ClassVar[str] = "inpaint"

    def size(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the shape of what is made of an image of this shape."""
        return (1 + shape[0], *shape[1:])

    def make(self, x: Tensor, position: int) -> Tensor:
        """Return mask and kept part, (B, 1 + C, H, W) in [0, 1], of images in [−1, 1]."""
        u = _uniform(position, len(x))
        height, width = x.shape[2:]
        sides = [(side * (0.25 + 0.75 * u[:, i])).ceil() for i, side in enumerate((height, width))]
        begins = [(u[:, 2 + i] * (side - sides[i] + 1)).floor()
                  for i, side in enumerate((height, width))]  # fmt: skip
        inside = []
        for begin, length, side in zip(begins, sides, (height, width), strict=True):
            at = torch.arange(side)
            inside.append((at >= begin[:, None]) & (at < (begin + length)[:, None]))
        hole = (inside[0][:, :, None] & inside[1][:, None]).to(x.device)[:, None].float()
        return torch.cat([hole, (x / 2 + 0.5) * (1 - hole)], dim=1)

    def inputs(self, space: LatentSpace, made: Tensor) -> Tensor:
        """Return the extra channels of the network."""
        return space.masked_conditioning(2 * made[:, 1:] - 1, made[:, :1], None)


@dataclass(frozen=True)
class Upscaling:
    """The image is shrunk, and gets a little noise.

    Args:
        factor: sides of the image divided by those of the small one.
    """

    factor: int

    @property
    def name(self) -> str:
        """Name of the task."""
        return f"upscale:{self.factor}"

    def size(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the shape of a small image. Raises InvalidArgument unless the factor divides."""
        channels, *sides = shape
        if any(side % self.factor for side in sides):
            raise InvalidArgument(
                f"task must divide the images' sides {tuple(sides)}, got {self.name}"
            )
        return (channels, *(side // self.factor for side in sides))

    def make(self, x: Tensor, position: int) -> Tensor:
        """Return small images with noise, (B, C, H/f, W/f) in [0, 1], of images in [−1, 1]."""
        small = shrunk(x, self.factor)
        strength = torch.from_numpy(
            (random_words(0, Purpose.ITEM, position, len(x)) >> 11) / 2.0**53
        )
        strength = NOISE * strength[:, :1, None, None].float().to(x.device)
        noise = randn(
            small.shape, image_generators(0, range(position, position + len(x))), x.device
        )
        return ((small + strength * noise) / 2 + 0.5).clamp(0, 1)

    def inputs(self, space: LatentSpace, made: Tensor) -> Tensor:
        """Return the extra channels of the network."""
        return space.mode(F.interpolate(2 * made - 1, scale_factor=self.factor))


Task = Inpainting | Upscaling


def _uniform(position: int, count: int) -> Tensor:
    """Return four uniform numbers in [0, 1) for each position, float64 (count, 4)."""
    return torch.from_numpy((random_words(0, Purpose.ITEM, position, count) >> 11) / 2.0**53)


def shrunk(x: Tensor, factor: int) -> Tensor:
    """Return images (B, C, H, W) as the means of blocks of factor × factor pixels."""
    return F.avg_pool2d(x, factor)


def task_of(name: str) -> Task:
    """Return a task by its name: "inpaint", or "upscale:4" and the like. Raises InvalidArgument."""
    kind, _, factor = str(name).partition(":")
    if kind == "upscale" and factor.isdecimal() and 2 <= int(factor) <= MAX_FACTOR:
        return Upscaling(int(factor))
    if name != Inpainting.name:
        raise InvalidArgument(
            f"task must be inpaint, or upscale:N with N in 2..{MAX_FACTOR}, got {name!r}"
        )
    return Inpainting()


class Unlabelled(Data):
    """Images of any data, without their classes; captions stay."""

    def __init__(self, data: Data) -> None:
        self.data, self.name = data, data.name
        self.class_names, self.decoder = (), data.decoder

    def __len__(self) -> int:
        return len(self.data)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image: (C, H, W)."""
        return self.data.shape

    def to(self, device: torch.device | str) -> "Unlabelled":
        """Return the data with its batches on `device`."""
        return Unlabelled(self.data.to(device))

    def batch(self, index: Tensor, position: int = 0) -> tuple[Tensor, Tensor | None]:
        """Return the images at `index`, and their captions if they have any."""
        x, labels = self.data.batch(index, position)
        return x, None if self.data.class_names else labels

    def condition(self, config: ConditionConfig) -> Condition:
        return ClassLabels(0) if self.data.class_names else self.data.condition(config)

    def example_prompts(self, n: int) -> list[str] | None:
        return self.data.example_prompts(n)

    def digests(self) -> dict[str, str]:
        return self.data.digests()


class TaskData(WithControl):
    """Data with the inputs of a task behind the caption, and the network that takes them.

    Args:
        data: images; their classes are left out, since a user of such a network has none.
        task: the task.
    """

    fixed_options: ClassVar[Mapping[str, Any]] = {
        **WithControl.fixed_options, "stable_target": 0, "pictures": 0,
    }  # fmt: skip

    def __init__(self, data: Data, task: Task) -> None:
        plain = data if isinstance(data, Unlabelled) else Unlabelled(data)
        super().__init__(plain, task.name, lambda x: x)
        self.task = task

    def to(self, device: torch.device | str) -> "TaskData":
        """Return the data with its batches on `device`."""
        return TaskData(self.data.to(device), self.task)

    def batch(self, index: Tensor, position: int = 0) -> tuple[Tensor, Tensor]:
        """Return the images at `index`, and their captions with what is made of the images."""
        x, labels = self.data.batch(index, position)
        return x, joined(labels, self.task.make(x, position))

    def network(self, config: ConditionConfig) -> UNet:
        """Return a fresh network with the channels of the task."""
        plain = network_of(config, self.data)
        channels = plain.config.in_channels
        more = channels + 1 if isinstance(self.task, Inpainting) else channels
        options = plain.config | {"in_channels": channels + more}
        return UNet(_class_name=plain.class_name, **options)


def with_task(data: Data, name: str) -> TaskData:
    """Return data on which a network of a task is trained, see `task_of`.

    Raises:
        InvalidArgument: another name, data that are no images, or of sides that do not fit.
    """
    task = task_of(name)
    if len(data.shape) != 3 or data.decoder is not None:
        raise InvalidArgument(f"data must be images for task {name}, {data.name} are not")
    task.size(data.shape)
    return TaskData(data, task)


class TaskLearner(Learner):
    """The learner of a network with an image beside x, on labels of `TaskData`.

    Args:
        pipe: pipeline whose network takes the channels of the task.
        task: the task.
    """

    def __init__(self, pipe: Pipeline, task: Task) -> None:
        plain = Learner.of(pipe)
        super().__init__(plain.unet, plain.condition)
        self.task, self.space, self.size = task, pipe.space, task.size(pipe.image_shape)

    def hide(self, labels: Tensor, hidden: Tensor) -> Tensor:
        """Return labels whose caption is hidden; the image beside x stays."""
        own, rest = labels.split([labels.shape[1] - math.prod(self.size), math.prod(self.size)], 1)
        own = super().hide(own, hidden) if own.shape[1] else own
        return torch.cat([own, rest], dim=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Return the network's output for noisy images and what is beside them."""
        own, made = split_labels(labels, self.size)
        beside = self.task.inputs(self.space, made)
        return self.unet(torch.cat([x, beside], dim=1), t, **self.condition(own))


class TaskTraining:
    """The argument `learner` of a training on `with_task(data, name)`.

    Args:
        name: name of the task, see `task_of`.
    Raises:
        InvalidArgument: another name.
    """

    defaults: ClassVar[Mapping[str, Any]] = TaskData.fixed_options

    def __init__(self, name: str) -> None:
        self.task = task_of(name)

    def __call__(self, pipe: Pipeline) -> TaskLearner:
        """Return the learner of a fresh pipeline."""
        return TaskLearner(pipe, self.task)


def is_upscaler(pipe: Pipeline) -> bool:
    """Return whether a pipeline's network takes a small image beside x."""
    config = pipe.unet.config  # a network of points has no out_channels
    return config.in_channels == 2 * config.get("out_channels", 0)


@torch.no_grad()
def upscale(pipe: Pipeline, images: Any, *, noise: float = 0.0, **arguments: Any) -> PipelineOutput:
    """Enlarge small images with a network of the task "upscale:N".

    Args:
        pipe: pipeline of such a network.
        images: small images in a form of `as_pixels`, whose sides divide those of the network's.
        noise: σ of noise that is added to them, in 0..1; 0 is best for sharp images.
        arguments: further arguments of a call, such as `prompt`, `seed` or `num_inference_steps`.
    Raises:
        InvalidArgument: the network is for another task, the images have another size, or an
            argument is not allowed.
    """
    space = pipe.space
    if not is_upscaler(pipe):
        raise InvalidArgument(
            "pipe must be of a network of the task upscale, with twice as many input as output "
            f"channels, got {pipe.unet.config.in_channels} and {pipe.unet.config.out_channels}"
        )
    small, noise = as_pixels(images, space.image_channels), real_number("noise", noise, 0, 1)
    sides = pipe.image_shape[1:]
    factor = sides[0] // small.shape[2]
    if tuple(factor * side for side in small.shape[2:]) != tuple(sides) or factor < 2:
        raise InvalidArgument(
            f"images must be a whole number of times smaller than {tuple(sides)}, "
            f"got {tuple(small.shape[2:])}"
        )
    request, made = Request.of(pipe, **{"num_images": len(small), **arguments}), []
    small = Original(small).repeat(request.batches[-1].stop).pixels
    for batch in request.batches:
        source = request.source_of(batch)
        x = request.noise_of(batch, source) * pipe.scheduler.init_noise_sigma
        part = small[batch].to(pipe.device)
        part = part + noise * randn(part.shape, source, part.device) if noise else part
        beside = space.mode(F.interpolate(part, scale_factor=factor))
        conditioning, negative = request.conditioning, request.negative
        denoise = pipe.denoiser(
            None if conditioning is None else conditioning[batch], request.guidance,
            negative=None if negative is None else negative[batch], extra_channels=beside,
        )  # fmt: skip
        pipe.scheduler.restart()
        *_, last = trajectory(denoise, pipe.scheduler, x, source, **request.step_options)
        made.append(pipe.decode(last.next_x))
    return pipe.output(request, made)
