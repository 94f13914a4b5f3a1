"""A sampler's equation, and its numbers in every step.

    print(explain(choose("dpm++", like_schedule("squaredcos_cap_v2")), 6))

Every sampler without clipping moves x along

    x' = kept·x + new·x̂0 + older·x̂0₋₁ + … + fresh·z,

whatever its network predicts. The weights are derived from the sampler's code
(`Scheduler.coefficients`), with every output expressed by the x̂0 that it implies. If x̂0 is right,
x' must have the signal and the noise of the next level, α' and σ': a step for which this does not
hold has a wrong coefficient, or is one of diffusers' departures.
"""

import inspect
import math
import re
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument, whole_number
from minidiff.lab.choose import Chosen
from minidiff.pipeline import Pipeline
from minidiff.pipeline.request import Request
from minidiff.sample import trajectory
from minidiff.schedule import Level
from minidiff.schedulers import Scheduler
from minidiff.schedulers.core.table import Coefficients

RIGHT = 1e-5  # deviation from a level up to which signal and noise count as its own
ROUNDING = 1e-14  # largest weight that is but the rounding of 0
HEADER = "x′ = kept·x + new·x̂₀ + fresh·z"
LINEAR = 1e-9  # relative deviation of a row from `step` up to which the step is linear


class Row(NamedTuple):
    """A step with its numbers.

    Attributes:
        t, next_t: timesteps of the network; None after the last step.
        now, nxt: levels of x and x'.
        x: weights of x, x₋₁, …: the samples before the step, the newest first.
        x0: weights of x̂0, x̂0₋₁, …
        z: weight of the noise that the step draws.
        signal, noise: α and σ of x' if x, the earlier samples and x̂0 are right.
        off: largest deviation of the row from `step` on random samples, relative to max(1, |x|).
        moved: root mean square change of the network's x̂0 since the step before; None without a
            model, and in the first step.
    """

    t: float
    next_t: float | None
    now: Level
    nxt: Level
    x: tuple[float, ...]
    x0: tuple[float, ...]
    z: float
    signal: float
    noise: float
    off: float
    moved: float | None = None

    @property
    def is_right(self) -> bool:
        """Whether x' has the signal and the noise of the next level, by a linear step."""
        pairs = ((self.signal, self.nxt.alpha), (self.noise, self.nxt.sigma))
        near = all(abs(a - float(b)) <= RIGHT * max(1, float(b)) for a, b in pairs)
        return near and self.is_linear

    @property
    def is_linear(self) -> bool:
        """Whether the weights are the whole step."""
        return self.off <= LINEAR

    @property
    def equation(self) -> str:
        """The right side of x' = …, without terms of weight 0."""
        names = [("x" + _lag(k), w) for k, w in enumerate(self.x)]
        names += [("x̂₀" + _lag(k), w) for k, w in enumerate(self.x0)]
        names.append(("z", self.z))
        terms = [(n, w) for n, w in names if n == "x̂₀" or abs(w) > ROUNDING]
        text = " ".join(f"{'−' if w < 0 else '+'} {_number(abs(w))}·{n}" for n, w in terms)
        return text.removeprefix("+ ").replace("− ", "−", 1) if text[0] == "−" else text[2:]


def _lag(k: int) -> str:
    return f"₋{str(k).translate(str.maketrans('0123456789', '₀₁₂₃₄₅₆₇₈₉'))}" if k else ""


def _number(value: float) -> str:
    """Return a number with three decimals, or three digits where it is small or large."""
    return f"{value:.3f}" if value < ROUNDING or 0.0095 <= value < 999.5 else f"{value:.2e}"


def _width(text: str) -> int:
    return len(text) - text.count("\u0302")  # the hat of x̂ takes no room


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


@dataclass(frozen=True)
class Explanation:
    """What `explain` found.

    Attributes:
        title: name of the sampler.
        idea: first sentence of the paper's module.
        equations: equations of the module, as they are written there; the code of `update` if a
            plug-in has none.
        source: the paper; "" if the module names none.
        code: file:line of the code that implements the equation.
        steps: number of steps.
        rows: one row per evaluation of the network.
    """

    title: str
    idea: str
    equations: str
    source: str
    code: str
    steps: int
    rows: list[Row]

    @property
    def wrong(self) -> list[int]:
        """The numbers of the rows that are not right, counted from 1."""
        return [i for i, row in enumerate(self.rows, 1) if not row.is_right]

    def as_json(self) -> dict[str, Any]:
        """Return everything that is printed, in full precision."""
        rows = [
            {"step": i, "right": row.is_right, "equation": row.equation, **row._asdict()}
            | {"now": _level(row.now), "nxt": _level(row.nxt)}
            for i, row in enumerate(self.rows, 1)
        ]
        names = ("title", "idea", "equations", "source", "code", "steps", "wrong")
        return {name: getattr(self, name) for name in names} | {"rows": rows}

    def __str__(self) -> str:
        n = len(self.rows)
        lines = [f"{self.title}, {self.steps} steps, {n} evaluations of the network", self.idea, ""]
        lines += [self.equations, "", *filter(None, [self.source]), f"Code: {self.code}", ""]
        width = max(_width(HEADER), *(_width(row.equation) for row in self.rows))
        moved = any(row.moved is not None for row in self.rows)
        lines.append(
            f"step{'t':>7} → {'t′':>6}{'λ':>9} → {'λ′':>6} │ "
            f"{_padded(HEADER, width)} │ signal  noise" + (" │ x̂₀ moves" if moved else "")
        )
        for i, row in enumerate(self.rows, 1):
            lines.append(_line(i, row, width, moved).rstrip(" │"))
        if self.wrong:
            lines += ["", "≠ marks a step that does not end at the signal and noise of its level."]
        if not all(row.is_linear for row in self.rows):
            lines.append("A step that is not linear, such as one that clips, is more than its row.")
        return "\n".join(lines)


def _level(level: Level) -> dict[str, float]:
    return {"alpha": float(level.alpha), "sigma": float(level.sigma)}


def _line(i: int, row: Row, width: int, moved: bool) -> str:
    """Return a row of the printed table."""
    end = "" if row.next_t is None else f"{row.next_t:.5g}"
    text = (
        f"{i:>4}{row.t:>7.5g} → {end:>6}{_lambda(row.now):>9} → {_lambda(row.nxt):>6} │ "
        f"{_padded(row.equation, width)} │ {_number(row.signal):>6}  {_number(row.noise):>5}"
    )
    if moved:
        text += f" │ {'' if row.moved is None else f'{row.moved:.3f}':>8}"
    if not row.is_right:
        digits = 3 if abs(row.signal - row.nxt.alpha) + abs(row.noise - row.nxt.sigma) > 2e-3 else 6
        text += f"  ≠ {row.nxt.alpha:.{digits}f}, {row.nxt.sigma:.{digits}f}"
    return text if row.is_linear else f"{text}, not linear (off by {row.off:.1e})"


def _lambda(level: Level) -> str:
    """Return ln(α/σ)."""
    if level.sigma == 0 or level.alpha == 0:
        return "∞" if level.sigma == 0 else "−∞"
    return f"{math.log(level.alpha / level.sigma):.2f}"


def explain(chosen: Chosen, steps: int, moves: list[float | None] | None = None) -> Explanation:
    """Return a sampler's equation, and its numbers in every step.

    Args:
        chosen: sampler from `choose`.
        steps: number of steps.
        moves: change of x̂0 in every step, from `moves_of`.
    Raises:
        InvalidArgument: the sampler clips, learns variances or starts from data, so that it has no
            such table, or the number of steps is outside its range.
    """
    scheduler = chosen.scheduler
    whole_number("steps", steps, 1)
    table = scheduler.coefficients(steps, **chosen.step_options)
    if any(level.sigma == 0 for level in table.levels[:-1]):
        raise InvalidArgument(
            f"sampler {chosen.title} begins at the data, where x̂0 says nothing: explain reads "
            "samplers from noise to data"
        )
    x, x0 = in_clean_samples(scheduler, table)
    ends = levels_after(table, x, x0)
    off = deviations(chosen, steps, table)
    rows = []
    for i, t in enumerate(table.timesteps):
        following = table.timesteps[i + 1] if i + 1 < len(table.timesteps) else None
        rows.append(Row(
            t, following, table.levels[i], table.levels[i + 1], tuple(x[i].tolist()),
            tuple(x0[i].tolist()), table.C[i].item(), *ends[i], off[i],
            moves[i] if moves else None,
        ))  # fmt: skip
    return Explanation(chosen.title, *described(type(scheduler)), steps, rows)


def in_clean_samples(scheduler: Scheduler, table: Coefficients) -> tuple[Tensor, Tensor]:
    """Return the weights (n, m) of the samples and of the x̂0, instead of the network's outputs.

    With x = α·x̂0 + σ·ε̂ an output p·x̂0 + q·ε̂ is (p − q·α/σ)·x̂0 + (q/σ)·x.
    """
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    x, x0 = table.A.clone(), torch.zeros_like(table.B)
    for i in range(len(table.timesteps)):
        for k in range(min(i + 1, table.B.shape[1])):
            if (weight := table.B[i, k].item()) != 0:
                level = Level(*map(float, table.levels[i - k]))
                p = scheduler.target(one, zero, level).item()
                q = scheduler.target(zero, one, level).item()
                x[i, k] += weight * q / level.sigma
                x0[i, k] = weight * (p - q * level.alpha / level.sigma)
    return x, x0


def levels_after(table: Coefficients, x: Tensor, x0: Tensor) -> list[tuple[float, float]]:
    """Return signal and noise after every step, from samples that were right before it.

    The noise of a sample is a vector over the independent normals that it consists of: the start's
    and that of every step. Its direction is carried along, and its length set to the level's, so
    that an error in one step does not spread to the next.
    """
    n = len(table.timesteps)
    e = torch.eye(n + 1, dtype=torch.float64)
    directions, ends = [e[0]], []
    for i in range(n):
        signal, noise = x0[i].sum().item(), table.C[i].item() * e[i + 1]
        for k in range(min(i + 1, x.shape[1])):
            alpha, sigma = map(float, table.levels[i - k])
            signal += x[i, k].item() * alpha
            noise = noise + x[i, k].item() * sigma * directions[i - k]
        length = noise.norm().item()
        ends.append((signal, length))
        directions.append(noise / length if length else e[i + 1])
    return ends


def deviations(chosen: Chosen, steps: int, table: Coefficients) -> list[float]:
    """Return how far every row of the table is from `step` on random samples and outputs."""
    scheduler, g = chosen.scheduler, torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    source, result = scheduler.noise_source, []
    xs = [torch.randn(64, generator=g, dtype=torch.float64) * float(scheduler.init_noise_sigma)]
    outs: list[Tensor] = []
    for i, t in enumerate(table.timesteps):
        out, z = torch.randn(2, 64, generator=g, dtype=torch.float64)
        scheduler.noise_source = lambda like, z=z: z
        outs.append(out)
        new = scheduler.step(out, t, xs[i], return_dict=False, **chosen.step_options)[0]
        row = table.C[i] * z
        for k in range(min(i + 1, table.A.shape[1])):
            row = row + table.A[i, k] * xs[i - k] + table.B[i, k] * outs[i - k]
        result.append(((row - new).abs().max() / new.abs().max().clamp(min=1)).item())
        xs.append(new)
    scheduler.noise_source = source
    return result


def moves_of(
    pipe: Pipeline, chosen: Chosen, steps: int, seed: int = 0, **call: Any
) -> list[float | None]:
    """Return how far x̂0 of one sample moves from step to step, in units of its space.

    Args:
        pipe: model; its scheduler is replaced by the sampler.
        chosen, steps: sampler, and number of steps.
        seed: seed of the noise.
        call: further arguments of the pipeline, such as class_labels and guidance_scale.
    Raises:
        InvalidArgument: as a call of the pipeline.
    """
    pipe.scheduler = chosen.scheduler
    call |= {"num_images": 1, "num_inference_steps": steps, "seed": seed, "output_type": "pt"}
    request = Request.of(pipe, **call)
    (batch,) = request.batches
    denoise = pipe.denoiser(request.conditioning, request.guidance)
    source = request.source_of(batch)
    x = request.noise_of(batch, source) * pipe.scheduler.init_noise_sigma
    options = request.step_options | chosen.step_options
    with torch.no_grad():
        seen = [step.x0 for step in trajectory(denoise, pipe.scheduler, x, source, **options)]
    return [None, *((b - a).square().mean().sqrt().item() for a, b in pairwise(seen))]


def described(cls: type[Scheduler]) -> tuple[str, str, str, str]:
    """Return idea, equations, source and file:line of a scheduler's class.

    They are those of the module that implements `update`.
    """
    update = inspect.unwrap(cls.update)
    module = sys.modules[update.__module__]
    lines, first = inspect.getsourcelines(update)
    name = update.__module__.replace(".", "/") + ".py"
    path = name if name.startswith("minidiff/") else Path(inspect.getfile(update)).name
    doc = inspect.cleandoc(module.__doc__ or "")
    equations = equations_of(doc)
    idea = doc.split("\n\n")[0].replace("\n", " ")
    if not equations:
        equations, idea = "".join(lines).rstrip(), idea or (inspect.getdoc(cls) or "")
    found = re.search(r"^Sources?: .*", doc, re.M | re.S)
    source = found[0].split("\n\n")[0] if found else ""
    return idea, equations, source, f"{path}:{first}"


def equations_of(doc: str) -> str:
    """Return the indented blocks of a module's docstring, "" if there are none."""
    blocks = re.findall(r"(?:^ {4}\S.*\n?(?:^ {4,}\S.*\n?)*)", doc, re.M)
    return "\n\n".join(block.rstrip() for block in blocks)
