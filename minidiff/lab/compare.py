"""Samplers side by side on one model: their order, their error, their samples.

    result = compare(pipe, ["ddim", "dpm++", "mine.py:Mine"], [4, 10, 20])
    print(result)
    plot.save(result.picture(), "compare.png")

All start from the same noise, so a deterministic sampler has one right answer: the solution of the
probability-flow equation, to which all of them converge. Its error is the distance to that
solution, in grey levels of 255. That needs no data and few images. The order is measured on a
mixture whose solution is known, see `minidiff.lab.order`. With data, samples are also scored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minidiff.errors import InvalidArgument, listed, whole_number
from minidiff.images import plot
from minidiff.lab.choose import Chosen, choose
from minidiff.lab.explain import explain
from minidiff.lab.order import FINE, METHODS, flow_error, order, variance_error
from minidiff.metrics import Evaluator, Scores
from minidiff.pipeline import Pipeline
from minidiff.pipeline.space import require_images
from minidiff.schedulers import SCHEDULERS, Scheduler

REFERENCE, CONVERGED = "dpm++", 60  # sampler and steps of the solution; half as many check it
PICTURED = 10  # images of each row of the picture
ORDERS = {
    "ddpm": "DDPM", "ddim": "DDIM", "euler": "Euler", "euler-a": "Euler ancestral", "heun": "Heun",
    "dpm++": "DPM-Solver++ 2M", "dpm++3": "DPM-Solver++ 3M", "dpm++2s": "DPM-Solver++ 2S",
    "sde-dpm++": "SDE-DPM-Solver++ 2M", "unipc": "UniPC-2",
}  # fmt: skip


class Cell(NamedTuple):
    """A sampler with a number of steps.

    Attributes:
        steps, evaluations: number of steps, and evaluations of the network.
        distance: root mean square difference to the converged solution, in grey levels; None for a
            sampler that adds noise.
        scores: figures against data; None without data.
        images: (N, C, H, W) in [−1, 1].
    """

    steps: int
    evaluations: int
    distance: float | None
    scores: Scores | None
    images: Tensor


class Line(NamedTuple):
    """A sampler.

    Attributes:
        name: as given; FILE.CLASS for a plug-in.
        order: measured order of convergence (weak if it adds noise); None if none can be measured.
        cells: one per number of steps.
        wrong: steps of the first cell, counted from 1, in which a plug-in does not end at the
            signal and noise of its level.
    """

    name: str
    order: float | None
    cells: list[Cell]
    wrong: Sequence[int] = ()


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        lines: a line per sampler.
        steps: numbers of steps.
        images: number of images of every cell.
        reference: the converged solution, (N, C, H, W).
        uncertainty: distance of the reference to the solution, estimated from half its steps, in
            grey levels.
        real: scores of held-out images; None without data.
    """

    lines: list[Line]
    steps: list[int]
    images: int
    reference: Tensor
    uncertainty: float
    real: Scores | None

    def as_json(self) -> dict[str, Any]:
        """Return everything that is printed, in full precision."""
        return {
            "steps": self.steps,
            "images": self.images,
            "reference": {"sampler": REFERENCE, "steps": CONVERGED,
                          "uncertainty": self.uncertainty},
            "samplers": {line.name: {"order": line.order, "cells": [
                {"steps": c.steps, "evaluations": c.evaluations, "distance": c.distance,
                 "scores": c.scores and c.scores._asdict()} for c in line.cells
            ]} for line in self.lines},
            "real": self.real and self.real._asdict(),
        }  # fmt: skip

    def __str__(self) -> str:
        text = [
            f"{self.images} images from the same noise. Distance to {REFERENCE} in {CONVERGED} "
            f"steps (itself converged to {self.uncertainty:.1f}), in grey levels of 255:",
            "",
            *self._table([[_cell(c.distance, ".1f") for c in line.cells] for line in self.lines]),
        ]
        if self.real is not None:
            for title, name, form in FIGURES:
                cells = [
                    [_cell(getattr(c.scores, name), form) for c in line.cells]
                    for line in self.lines
                ]
                held_out = _cell(getattr(self.real, name), form)
                text += ["", f"{title} (held-out images: {held_out}):", "", *self._table(cells)]
        return "\n".join([*text, *self._notes()])

    def _table(self, cells: list[list[str]]) -> list[str]:
        """Return a table of one figure, a line per sampler and a column per number of steps."""
        width = max(8, *(len(line.name) for line in self.lines)) + 2
        head = f"{'sampler':<{width}}{'order':>6} │" + "".join(f"{n:>9}" for n in self.steps)
        lines = [head + "  steps"]
        for line, row in zip(self.lines, cells, strict=True):
            start = f"{line.name:<{width}}{_cell(line.order, '.2f'):>6} │"
            lines.append(start + "".join(f"{cell:>9}" for cell in row))
        return lines

    def _notes(self) -> list[str]:
        """Return what a reader must know about some of the samplers."""
        notes = [""]
        if random := [line.name for line in self.lines if line.cells[0].distance is None]:
            notes.append(f"{', '.join(random)}: adds noise, and follows no path; its order is weak")
        for line in self.lines:
            if line.wrong:
                notes.append(
                    f"{line.name}: {len(line.wrong)} of its {line.cells[0].evaluations} steps do "
                    "not end at the signal and noise of their level, so its update is wrong (or "
                    "not linear): see minidiff explain --sampler FILE:CLASS"
                )
            if any(cell.evaluations != cell.steps for cell in line.cells):
                counts = ", ".join(str(cell.evaluations) for cell in line.cells)
                notes.append(f"{line.name}: {counts} evaluations of the network")
        return notes if len(notes) > 1 else []

    def picture(self) -> Image.Image:
        """Return the first images of every cell, a row each, with the converged solution below."""
        cells = [(f"{line.name}, {c.steps}", c.images) for line in self.lines for c in line.cells]
        rows = [*cells, (f"converged: {REFERENCE}, {CONVERGED}", self.reference)]
        sheet = torch.cat([images[:PICTURED] for _, images in rows])
        width = min(PICTURED, self.images)
        scale = max(1, 56 // sheet.shape[-1])
        grid = plot.grid(plot.as_array(sheet), width, scale)
        font = ImageFont.load_default(12)
        left = 8 + max(int(font.getlength(name)) for name, _ in rows)
        picture = Image.new("RGB", (left + grid.width, grid.height), "white")
        picture.paste(grid, (left, 0))
        for i, (name, _) in enumerate(rows):
            at = left - 4, (i + 0.5) * grid.height / len(rows)
            ImageDraw.Draw(picture).text(at, name, "black", font, anchor="rm")
        return picture


FIGURES = (("accuracy", "accuracy", ".1%"), ("FD ‰", "fd", ".1f"), ("coverage", "coverage", ".3f"))


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def compare(
    pipe: Pipeline,
    samplers: Sequence[str],
    steps: Sequence[int],
    *,
    num_images: int | None = None,
    seed: int = 0,
    evaluator: Evaluator | None = None,
    **call: Any,
) -> Comparison:
    """Sample a model with several samplers, from the same noise, and measure the results.

    Args:
        pipe: model; its scheduler is the same afterwards.
        samplers: names as for `choose`: "ddim", a class such as "PNDM", or FILE:CLASS.
        steps: numbers of steps.
        num_images: number of images of every sampler and number of steps, each class in turn; by
            default 30, with an evaluator 500.
        seed: seed of the noise.
        evaluator: scores against data; needs at least `evaluator.min_images` images.
        call: further arguments of the pipeline, such as guidance_scale.
    Raises:
        InvalidArgument: a model of points, an unknown sampler, a number outside its range, or a
            plug-in that fails a conformance test; before anything is sampled.
    """
    require_images(pipe, "compare is")
    like = pipe.scheduler
    steps = [whole_number("steps", n, 1) for n in listed("steps", steps)]
    num_images = (500 if evaluator else 30) if num_images is None else num_images
    whole_number("num_images", num_images, evaluator.min_images if evaluator else 1)
    if evaluator is not None and evaluator.image_shape != tuple(pipe.image_shape):
        raise InvalidArgument(
            f"the model draws images of shape {tuple(pipe.image_shape)}, but the data have "
            f"{evaluator.image_shape}"
        )
    if not (steps and samplers):
        raise InvalidArgument(f"give samplers and steps, got {list(samplers)} and {steps}")
    chosen = {name: choose(name, like) for name in dict.fromkeys(samplers)}
    for sampler in chosen.values():
        for n in steps:
            sampler.scheduler.set_timesteps(n)  # refuses what the sampler cannot take

    def draw(scheduler: Scheduler, n: int) -> tuple[Tensor, Tensor | None]:
        pipe.scheduler = scheduler
        result = pipe(
            **call, num_images=num_images, num_inference_steps=n, seed=seed, output_type="pt"
        )
        return result.images.float().cpu(), result.labels

    try:
        solution = choose(REFERENCE, like).scheduler
        coarse, (reference, labels) = draw(solution, CONVERGED // 2)[0], draw(solution, CONVERGED)
        lines = []
        for name, sampler in chosen.items():
            is_random = adds_noise(sampler.scheduler)
            cells = []
            for n in steps:
                images, _ = draw(sampler.scheduler, n)
                scores = evaluator and evaluator.score(_bytes(images), labels)
                far = None if is_random else distance(images, reference)
                cells.append(Cell(n, len(sampler.scheduler.grid), far, scores, images))
            wrong = wrong_steps(sampler, steps[0]) if ":" in name else ()
            lines.append(Line(title_of(name), order_of(name, sampler), cells, wrong))
    finally:
        pipe.scheduler = like
    # Second order: half the steps have four times the error.
    error = distance(coarse, reference) / 3
    real = evaluator and evaluator.ceiling(num_images)
    return Comparison(lines, steps, num_images, reference, error, real)


def distance(images: Tensor, reference: Tensor) -> float:
    """Return the root mean square difference of images in [−1, 1], in grey levels of 255."""
    return 127.5 * (images - reference).square().mean().sqrt().item()


def _bytes(images: Tensor) -> Tensor:
    return torch.from_numpy(plot.as_array(images)).permute(0, 3, 1, 2)


def title_of(name: str) -> str:
    """Return the name of a sampler in tables: mine.Mine for some/mine.py:Mine."""
    path, colon, cls = name.rpartition(":")
    return f"{path.rpartition('/')[2].removesuffix('.py')}.{cls}" if colon else name


def wrong_steps(chosen: Chosen, steps: int) -> Sequence[int]:
    """Return the steps that `explain` marks as wrong; none for a sampler without a table."""
    try:
        return explain(chosen, steps).wrong
    except InvalidArgument:  # it clips, or begins at the data
        return ()


def adds_noise(scheduler: Scheduler) -> bool:
    """Return whether steps of a sampler draw noise."""
    return bool(scheduler.coefficients(max(4, scheduler.num_inference_steps or 4)).C.any())


def order_of(name: str, chosen: Chosen) -> float | None:
    """Return the measured order of convergence of a sampler, None if it has none.

    A plug-in is measured with its default options, on a fine schedule.
    """
    cls = type(chosen.scheduler)
    if name in ORDERS:
        return METHODS[ORDERS[name]].measured_order()
    if cls.__name__ in SCHEDULERS and cls is SCHEDULERS[cls.__name__]:
        known = [m for m in METHODS.values() if m.scheduler == cls.__name__]
        return known[0].measured_order() if known else None
    options = {**FINE, "clip_sample": False, "compat": "exact"}
    fresh = cls(**{key: value for key, value in options.items() if cls.has_option(key)})
    error = variance_error if adds_noise(fresh) else flow_error
    try:
        measured = order(lambda n: error(fresh, n), 240)
    except (ZeroDivisionError, ValueError):  # an error of 0
        return None
    return measured if math.isfinite(measured) else None
