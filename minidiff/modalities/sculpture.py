"""Score distillation: a volume that an image model likes from every side.

No network is trained, and none has seen three dimensions. The volume is seen from two sides; noise
is added to both views, the model denoises them, and the volume is moved so that its views come
closer to what the model makes of them (Poole et al. 2022, DreamFusion, arXiv:2209.14988).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, real_number, whole_number
from minidiff.noise import randn
from minidiff.pipeline import Pipeline
from minidiff.pipeline.edit import ddim_of
from minidiff.pipeline.request import list_of_labels
from minidiff.pipeline.space import require_images
from minidiff.prediction import split
from minidiff.runtime.progress import progress_bar

EMPTY = -7.0  # logit of a voxel's opacity at the start
HIGHEST, THEN, LOWEST = 0.98, 0.48, 0.05  # bounds of t / T: the upper one falls during the descent


@dataclass(frozen=True)
class Sculpture:
    """A volume of opacity that is lit from the front.

    Attributes:
        opacity: (n, n, n) in [0, 1], indexed by row, column and depth.
    """

    opacity: Tensor

    def views(self) -> Tensor:
        """Return the front and the side view, (2, 1, n, n) in [−1, 1], by parallel rays."""
        return _views(self.opacity)

    def turned(self, degrees: float) -> Tensor:
        """Return the view (1, 1, n, n) in [−1, 1] after a turn about the vertical axis.

        0 is the front and 90 the side.
        """
        angle, n = math.radians(degrees), len(self.opacity)
        axis = (torch.arange(n, dtype=torch.float32) + 0.5) * 2 / n - 1
        right, away = torch.meshgrid(axis, axis, indexing="ij")
        column = right * math.cos(angle) - away * math.sin(angle)
        depth = right * math.sin(angle) + away * math.cos(angle)
        places = torch.stack([depth, column], -1).expand(n, n, n, 2)
        slices = self.opacity.float().cpu()[:, None]  # one horizontal slice per row
        seen = torch.nn.functional.grid_sample(slices, places, align_corners=False)
        return _project(seen[:, 0], dim=2)[None, None]


def _project(opacity: Tensor, dim: int) -> Tensor:
    """Return brightness in [−1, 1]: 1 − Π (1 − opacity) along rays, from black to white."""
    clear = torch.log1p(-opacity.clamp(max=1 - 1e-4)).sum(dim).exp()
    return 1 - 2 * clear


def _views(opacity: Tensor) -> Tensor:
    return torch.stack([_project(opacity, 2), _project(opacity, 1)])[:, None]


class Likeness:
    """The gradient of score distillation, by which an image model changes views.

    Args:
        pipe: the model.
        labels: class of each view, int64 (B,).
        guidance_scale: w.
    Raises:
        InvalidArgument: a model whose sampler has no times t of a noise schedule.
    """

    def __init__(self, pipe: Pipeline, labels: Tensor, guidance_scale: float) -> None:
        self.pipe, self.scheduler = pipe, ddim_of(pipe.scheduler)
        self.denoise = pipe.denoiser(labels, guidance_scale)

    def pull(self, views: Tensor, fraction: float, noise: torch.Generator) -> Tensor:
        """Return a number whose gradient by the views is α·σ·(x − x̂0).

        Args:
            views: (B, C, H, W) in [−1, 1].
            fraction: the time as a part of T.
            noise: source of ε.
        """
        t = round(fraction * (self.scheduler.config.num_train_timesteps - 1))
        level = self.scheduler.schedule[t]
        x0 = self.pipe.space.mode(views.to(self.pipe.device))
        with torch.no_grad():
            eps = randn(x0.shape, noise, x0.device)
            x = level.alpha * x0 + level.sigma * eps
            out = self.denoise(x, torch.tensor(float(t), device=x.device))
            clean, _ = split(out, x, level, self.scheduler.config.prediction_type)
            gradient = level.alpha * level.sigma * (x0 - clean)
        return (gradient * x0).sum()


def sculpt(
    pipe: Pipeline,
    front: int | str,
    side: int | str,
    *,
    steps: int = 150,
    guidance_scale: float = 6.0,
    learning_rate: float = 0.2,
    opacity_cost: float = 1.0,
    seed: int = 0,
    progress: bool | None = None,
) -> Sculpture:
    """Return a volume whose front view is of one class and whose side view of another.

    The gradient of a view x is α·σ·(x − x̂0) (Poole et al. 2022, equation 3, in terms of x̂0), with
    the time drawn evenly below a bound that falls from 0.98·T to 0.48·T.

    Args:
        pipe: model of square grey images with classes.
        front, side: class of each view, by number or name.
        steps: gradient steps of Adam; each evaluates the network on both views.
        guidance_scale: w of classifier-free guidance, which must be strong here.
        learning_rate: learning rate of the volume's logits.
        opacity_cost: weight of the mean opacity, which keeps empty space empty.
        seed: seed of the noise and the times.
        progress: True for a bar, False for none; None for one where someone watches.
    Raises:
        InvalidArgument: a model of other images or without classes, a class that it does not
            have, or an argument out of range.
    """
    require_images(pipe, "sculpt is")
    channels, n, width = pipe.image_shape
    if channels != 1 or n != width or not pipe.class_names:
        raise InvalidArgument(
            "pipe must be a model of square grey images with classes, got one of shape "
            f"{tuple(pipe.image_shape)} and {len(pipe.class_names)} classes"
        )
    whole_number("steps", steps, 1)
    real_number("learning_rate", learning_rate, 1e-6, 10)
    real_number("opacity_cost", opacity_cost, 0)
    whole_number("seed", seed, 0)
    real_number("guidance_scale", guidance_scale, 0)
    labels = list_of_labels([front, side], 2, 0, pipe.class_names).to(pipe.device)
    like = Likeness(pipe, labels, guidance_scale)
    noise = torch.Generator().manual_seed(seed)
    logits = randn((n, n, n), noise) * 0.1 + EMPTY
    logits.requires_grad_(True)
    adam = torch.optim.Adam([logits], lr=learning_rate)
    with progress_bar(steps, progress, unit="step") as bar:
        for step in range(steps):
            highest = HIGHEST + (THEN - HIGHEST) * step / max(steps - 1, 1)
            t = LOWEST + (highest - LOWEST) * float(torch.rand((), generator=noise))
            opacity = logits.sigmoid()
            pull = like.pull(_views(opacity), t, noise)
            adam.zero_grad()
            (pull + opacity_cost * opacity.mean() * n * n).backward()
            adam.step()
            bar.update()
    return Sculpture(logits.detach().sigmoid())
