"""A pipeline in the page: its network as operators, or pictures of its predictions."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from minidiff.errors import InvalidArgument
from minidiff.images import plot
from minidiff.lab.explore.tables import Plugins, Table, tables
from minidiff.lab.explore.trace import MAX_WEIGHTS, Untraceable, packed, trace
from minidiff.pipeline import Pipeline
from minidiff.pipeline.denoiser import network_inputs, null_inputs
from minidiff.schedule import Level
from minidiff.schedulers import Scheduler
from minidiff.text.prompts import WordPrompts
from minidiff.text.words import words_of

PROMPTS = ("a green 5 on a white background", "a red 3 on a black background", "a blue 7", "a 2")
PHOTOS = ("a photograph of a cat", "a red house in the snow")
MAX_CONDITIONS = 12
PICTURES, SIDE, MAX_STEPS = 6, 64, 20  # of the pictures that stand in for a network
Samplers = dict[str, dict[int, Table]]


class Model(NamedTuple):
    """What the page holds of a model.

    Attributes:
        data: its part of the page's data.
        tables: samplers for its noise levels, where they are none of the page's own.
        notes: lines for the user.
    """

    data: dict[str, Any]
    tables: Samplers
    notes: list[str]


def model_data(
    pipe: Pipeline,
    name: str,
    known: dict[str, Samplers],
    plugins: Plugins,
    prompts: Sequence[str] = (),
) -> Model:
    """Return the network of a pipeline for the page, or pictures where it cannot run there.

    Args:
        pipe: model.
        name: how the page calls it.
        known: tables of the page's noise schedules.
        plugins: further samplers by name.
        prompts: prompts of a model that was trained on captions; by default of coloured digits.
    Raises:
        InvalidArgument: a prompt that the model cannot take, or prompts for a model without text.
    """
    names, conditions = _conditions(pipe, prompts)
    data: dict[str, Any] = {"name": name, "conditions": names, "reason": ""}
    try:
        own = tables(pipe.scheduler, plugins)
        if not own:
            raise Untraceable("no sampler has a table for its noise levels and its output")
        kind = next((kind for kind, samplers in known.items() if _same(samplers, own)), "model")
        return Model(
            data | _network(pipe, conditions) | {"schedule": kind, "levels": _levels(pipe, own)},
            own if kind == "model" else {},
            [],
        )
    except Untraceable as error:
        data["reason"] = str(error)
        note = f"the network cannot run in the page, which has pictures instead: {error}"
        return Model(data | {"pictures": _pictures(pipe, names)}, {}, [note])


def _conditions(pipe: Pipeline, prompts: Sequence[str]) -> tuple[list[str], list[Any]]:
    """Return names of classes or prompts, and what the pipeline takes for each."""
    if prompts and pipe.prompts is None:
        raise InvalidArgument(
            "--text is for models that were trained on captions; this one has none"
        )
    if pipe.prompts is not None:
        texts = list(prompts) or _usual_prompts(pipe)
        for text in texts:
            network_inputs(pipe, [text], _size(pipe))
        return texts, [[text] for text in texts]
    names = list(pipe.class_names)[:MAX_CONDITIONS]
    return names or [""], [torch.tensor([i]) for i in range(len(names))] or [None]


def _usual_prompts(pipe: Pipeline) -> list[str]:
    """Return the prompts of `PROMPTS` whose words the model knows, or the empty one."""
    if not isinstance(pipe.prompts, WordPrompts):
        return list(PHOTOS)
    known = pipe.prompts.tokenizer.numbers
    return [text for text in PROMPTS if all(word in known for word in words_of(text))] or [""]


def _size(pipe: Pipeline) -> tuple[int, int]:
    return pipe.space.image_size(pipe.space.shape())


class _Conditioned(nn.Module):
    """A U-Net whose conditioning inputs have places instead of names."""

    def __init__(self, unet: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.unet, self.names = unet, list(names)

    def forward(self, x: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        return self.unet(x, t, **dict(zip(self.names, condition, strict=True)))


class _Decoder(nn.Module):
    """The map from a pipeline's samples to images, nominally in [−1, 1]."""

    def __init__(self, pipe: Pipeline) -> None:
        super().__init__()
        self.vae, self.decode = pipe.vae, pipe.space.decode

    def forward(self, z: Tensor) -> Tensor:
        return self.decode(z)


@torch.no_grad()
def _network(pipe: Pipeline, conditions: list[Any]) -> dict[str, Any]:
    """Return operators, weights and inputs of the network. Raises Untraceable."""
    if pipe.takes_guidance_scale or pipe.space.takes_mask or pipe.weaker is not None:
        raise Untraceable("it needs inputs or a second network that the page does not have")
    number = sum(p.numel() for net in (pipe.unet, pipe.vae) if net for p in net.parameters())
    if number > MAX_WEIGHTS:  # before the work of tracing it
        raise Untraceable(f"its {number:,} weights are more than the page's {MAX_WEIGHTS:,}")
    pipe.to("cpu")
    inputs = [network_inputs(pipe, c, _size(pipe)) for c in conditions]
    nothing = null_inputs(pipe, conditions[0], None, _size(pipe)) if pipe.is_guidable else None
    for one in (*inputs, nothing or {}):
        if not all(isinstance(value, Tensor) for value in one.values()):
            raise Untraceable("its conditioning is nested")
    x, t = torch.zeros(1, *pipe.space.shape()), torch.tensor([1.0])
    names = list(inputs[0])
    network = _Conditioned(pipe.unet.float().eval(), names)
    graph = packed(trace(network, (x, t, *inputs[0].values())))
    decoder = None if pipe.vae is None else packed(trace(_Decoder(pipe).eval(), (x,)))
    return {
        "graph": graph,
        "decoder": decoder,
        "shape": list(x.shape[1:]),
        "channels": pipe.space.image_channels,
        "inputs": [_listed(one) for one in inputs],
        "nothing": None if nothing is None else _listed(nothing),
        "guidance": pipe.guidance_scale,
        "interval": _finite(pipe.guidance_interval),
        "steps": pipe.num_inference_steps,
    }


def _listed(condition: Any) -> list[list[Any]]:
    """Return the tensors of a condition as [numbers, shape]."""
    return [
        [[round(v, 7) for v in value.double().flatten().tolist()], list(value.shape)]
        for value in condition.values()
    ]


def _finite(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else [interval[0], min(interval[1], 1e300)]


def _same(samplers: Samplers, own: Samplers) -> bool:
    """Return whether two sets of tables are those of the same noise levels."""
    if samplers.keys() != own.keys():
        return False
    pairs = [(samplers[name].get(10), own[name].get(10)) for name in own]
    return all(
        a is not None and b is not None and np.allclose(a.lam, b.lam, rtol=1e-9, atol=1e-9)
        for a, b in pairs
    )


def _levels(pipe: Pipeline, own: Samplers) -> list[list[float]]:
    """Return angle arctan(σ/α), input scale, and x̂0 = cx·x + co·out at every level of the tables.

    x has unit variance; the network's input is the scale times x.
    """
    found = (lam for rows in own.values() for table in rows.values() for lam in table.lam[:-1])
    angles = {math.atan2(1, math.exp(lam)) for lam in found}
    rows, last = [], -1.0
    for angle in sorted(angles):
        if angle - last > 1e-9:
            rows.append([angle, *_reading(pipe.scheduler, angle)])
            last = angle
    return rows


def _reading(scheduler: Scheduler, angle: float) -> tuple[float, float, float]:
    """Return input scale, cx and co for x of unit variance."""
    level = Level(math.cos(angle), math.sin(angle))
    if level.alpha > 1e-15 and not math.isclose(_spread(scheduler), 1):  # x = x0 + σ·ε
        level = Level(1.0, level.sigma / level.alpha)
    elif _is_flow(scheduler):
        total = level.alpha + level.sigma
        level = Level(level.alpha / total, level.sigma / total)
    size = math.hypot(*level)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    scale = float(scheduler.scaled_input(one, level)) * size
    cx, co = (float(scheduler.split(out, x, level)[0]) for out, x in ((zero, one), (one, zero)))
    return scale, cx * size, co


def _spread(scheduler: Scheduler) -> float:
    """Return √(α² + σ²) in the middle of the grid: 1 for variance-preserving levels."""
    scheduler.set_timesteps(4)
    return math.hypot(*map(float, scheduler.levels[2]))


def _is_flow(scheduler: Scheduler) -> bool:
    scheduler.set_timesteps(4)
    return math.isclose(sum(map(float, scheduler.levels[2])), 1)


@torch.no_grad()
def _pictures(pipe: Pipeline, names: list[str]) -> dict[str, Any]:
    """Return x̂0 of every step for a few images, as one picture: a row a step."""
    n = min(PICTURES, max(len(names), 4))
    chosen = [names[i % len(names)] for i in range(n)]
    steps = min(pipe.num_inference_steps, MAX_STEPS)
    rows: list[np.ndarray] = []
    given = {"prompt": chosen} if pipe.prompts is not None else {}
    if pipe.class_names:
        given = {"class_labels": [i % len(pipe.class_names) for i in range(n)]}
    number = {} if given else {"num_images": n}
    pipe(
        **given, **number, num_inference_steps=steps, seed=0, output_type="np", batch_size=n,
        callback=lambda step: rows.append(_small(pipe.decode(step.x0))),
    )  # fmt: skip
    sheet = plot.grid(np.concatenate(rows), n, scale=1, gap=0)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    height, width = rows[0].shape[1:3]
    return {
        "png": base64.b64encode(buffer.getvalue()).decode(),
        "columns": n, "rows": len(rows), "height": height, "width": width, "names": chosen,
    }  # fmt: skip


def _small(images: Tensor) -> np.ndarray:
    """Return images as uint8 (N, H, W, C), at most `SIDE` pixels wide and high."""
    array = plot.as_array(images.float())
    factor = max(array.shape[1:3]) / SIDE
    if factor <= 1:
        return array
    size = (round(array.shape[2] / factor), round(array.shape[1] / factor))
    small = [Image.fromarray(a.squeeze(-1) if a.shape[-1] == 1 else a).resize(size) for a in array]
    return np.stack([np.asarray(image).reshape(*size[::-1], -1) for image in small])
