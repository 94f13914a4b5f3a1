"""The wall of broken digits: the shipped MNIST model with bugs at the strength people write them.

    python -m minidiff.teach --wall wall.png

Every row has the same ten classes and the same seed. The network is the same, and right, in all of
them: only the sampling around it, or the saving after it, has a bug.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minidiff import shipped
from minidiff.images import plot
from minidiff.images.pixels import to_uint8
from minidiff.pipeline import Pipeline
from minidiff.schedule import CLEAN, Level
from minidiff.schedulers import DDIMScheduler, DDPMScheduler, Scheduler
from minidiff.teach import planted

STEPS, SEED, CLASSES = 20, 0, 10


class Row(NamedTuple):
    """A row of the wall.

    Attributes:
        label: what is wrong.
        draw: returns ten images (10, 1, H, W) in [−1, 1], or bytes.
    """

    label: str
    draw: Callable[[Pipeline], Tensor]


class RootMissing(Scheduler):
    """DDIM with the noise of B1, 1 − ᾱ for its root."""

    def update(self, x, x0, eps, now, nxt, noise):
        return planted("B1")(x0, eps, nxt.alpha**2)


class RootsMissing(Scheduler):
    """DDIM with ᾱ and 1 − ᾱ where α and σ belong."""

    def update(self, x, x0, eps, now, nxt, noise):
        return nxt.alpha**2 * x0 + nxt.sigma**2 * eps


def _with(kind: type[Scheduler], **options: Any) -> Callable[[Pipeline], Tensor]:
    """Return a function that draws with a scheduler class on the schedule of the model."""

    def draw(pipe: Pipeline) -> Tensor:
        return sampled(pipe, kind(**_options(pipe) | options))

    return draw


def _options(pipe: Pipeline) -> dict[str, Any]:
    config = pipe.scheduler.config
    return {
        "beta_schedule": config.beta_schedule,
        "prediction_type": config.prediction_type,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "compat": "exact",
    }


def sampled(pipe: Pipeline, scheduler: Scheduler, **call: Any) -> Tensor:
    """Return a digit of each class, (10, 1, H, W), drawn with a scheduler."""
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        call = {"num_inference_steps": STEPS, "seed": SEED, "progress": False} | call
        return pipe(list(range(CLASSES)), output_type="pt", **call).images
    finally:
        pipe.scheduler = before


def _right(pipe: Pipeline, **call: Any) -> Tensor:
    return sampled(pipe, DDIMScheduler(**_options(pipe)), **call)


def _other_step(pipe: Pipeline) -> Tensor:
    """Draw with a network that is conditioned on the step of B8."""

    def change(module: torch.nn.Module, inputs: tuple) -> tuple:
        x, t, *others = inputs
        return (*planted("B8")(lambda x, t: (x, t))(x, t), *others)

    hook = pipe.unet.register_forward_pre_hook(change)
    try:
        return _right(pipe)
    finally:
        hook.remove()


def _forwards(pipe: Pipeline) -> Tensor:
    """Draw with the loop of B10."""
    scheduler = DDIMScheduler(**_options(pipe))
    scheduler.set_timesteps(STEPS)
    times = dict(zip(scheduler.levels, scheduler.grid, strict=False))
    network = pipe.denoiser(torch.arange(CLASSES), pipe.guidance_scale)

    def denoise(x: Tensor, at: Level) -> Tensor:
        return scheduler.split(network(x, times[at]), x, at)[0]

    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(CLASSES, *pipe.space.shape(), generator=generator)
    levels = [at for at in reversed(scheduler.levels) if at != CLEAN]
    with torch.no_grad():
        return pipe.decode(planted("B10")(denoise, levels, x))


def _another_scale(pipe: Pipeline) -> Tensor:
    """Draw with B12 at w = 3, which is 4 in the convention of the pipeline."""

    def rule(pair, w):
        def denoise(x, t):
            c, u = pair(x, t)
            return planted("B12")(c, u, w)

        return denoise

    return _right(pipe, guidance_scale=3.0, guide=rule)


ROWS = (
    Row("right (DDIM)", _right),
    Row("right (DDPM)", _with(DDPMScheduler)),
    Row("B3 noise in the last step", _with(planted("B3"))),
    Row("B10 time reversed", _forwards),
    Row("v read as ε", _with(DDIMScheduler, prediction_type="epsilon")),
    Row("both roots missing", _with(RootsMissing)),
    Row("B1 root missing: (1 − ᾱ)·ε", _with(RootMissing)),
    Row("B14 no noise in DDPM", _with(planted("B14"))),
    Row("B4 x̂₀ clipped, ε̂ kept", _with(planted("B4"))),
    Row("B11 clamp hides a wrong η", _with(planted("B11"))),
    Row("B9 variance for deviation", _with(planted("B9"))),
    Row("B8 conditioned on t − 1", _other_step),
    Row("B12 guidance 3 that is 4", _another_scale),
    Row("B15 saved without (x+1)/2", lambda pipe: planted("B15")(_right(pipe))),
)


def pictures() -> list[tuple[str, np.ndarray]]:
    """Return label and bytes (10, H, W) of every row."""
    pipe = Pipeline.from_pretrained(shipped.folder("mnist"))
    found = []
    for row in ROWS:
        images = row.draw(pipe)
        images = images if images.dtype == torch.uint8 else to_uint8(images)
        found.append((row.label, images[:, 0].numpy()))
    return found


def draw(path: str | Path) -> None:
    """Draw the wall as a PNG.

    Raises:
        CheckpointError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    rows = pictures()
    figure = Figure(figsize=(6.9, 0.52 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, (label, digits) in zip(axes, rows, strict=True):
        axis.imshow(np.hstack(list(digits)), cmap="gray", vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[], anchor="E")
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    rendered = io.BytesIO()
    figure.savefig(rendered, format="png", dpi=100)
    plot.save(Image.open(rendered).convert("L").quantize(16), path)
