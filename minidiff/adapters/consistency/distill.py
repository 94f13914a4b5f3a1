"""Distillation to a few steps: a consistency model from a trained diffusion model.

A consistency function f maps every point of a trajectory of the probability-flow ODE to its clean
end, so one evaluation draws an image and a few refine it (`schedulers/lcm.py`). Two points of one
trajectory have the same end, which is all that training needs. With x at a level (α, σ) and x'
on the next lower one,

    L = ‖ f(x, t) − f⁻(x', t') ‖ in the pseudo-Huber metric √(‖·‖² + c²) − c,  c = 0.00054·√D

where f⁻ is the target network, a running average of f, and no gradient flows through it. At t' = 0
f⁻ is x' itself. There x' is

    distillation   a DDIM step of the teacher from x, with the teacher's guidance inside
                   (Luo et al. 2023, "Latent Consistency Models", arXiv:2310.04378, eq. 17)
    training       α'·x0 + σ'·ε with the image and the noise of x, which needs no teacher
                   (Song et al. 2023, arXiv:2303.01469, theorem 2; starting from a trained network:
                   Geng et al. 2024, "Consistency Models Made Easy", arXiv:2406.14548)

The steps 0 … T are divided into few intervals first, then into more of them. With 4 intervals the
clean end is 4 targets away, with 50 it is 50 away, and the target network of a fine grid from the
start follows its own errors: the run diverges. Metric: Song & Dhariwal 2023, arXiv:2310.14189.

A run of `minidiff distill` is an ordinary run; the target network is one of its `extras`.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import device as Device

from minidiff.adapters.consistency.config import DistillConfig
from minidiff.data.protocol import Data
from minidiff.errors import InvalidArgument
from minidiff.guidance import METHODS, Meaning
from minidiff.names import PRESERVING
from minidiff.objective import Levels, Network, Objective
from minidiff.pipeline import Pipeline
from minidiff.pipeline.parts import check_guidance_scale
from minidiff.prediction import combine
from minidiff.runs import diffusion
from minidiff.runs.autosave import Saving
from minidiff.runs.folder import KINDS, read_settings
from minidiff.runtime.checks import instance
from minidiff.runtime.shapes import append_dims
from minidiff.schedule import Level, add_noise
from minidiff.schedulers import LCMScheduler
from minidiff.schedulers.lcm import boundary
from minidiff.training.diffusion import DiffusionTraining, train
from minidiff.training.learner import Learner
from minidiff.training.start import prediction_type_of

COMMAND = "distill"
KINDS[COMMAND] = DistillConfig
HUBER = 0.00054  # c/√D, Song & Dhariwal 2023, section 3.3
SCALING = 10.0  # of the step in c_skip, the default of `LCMScheduler`
SCHEDULE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "rescale_betas_zero_snr", "prediction_type", "compat",
)  # fmt: skip


class Student(Learner):
    """The network that is distilled, a copy of the teacher's; a text encoder stays as it is."""

    points = 1

    @classmethod
    def on(cls, points: int, pipe: Pipeline) -> "Student":
        """Return the student of a pipeline, sampled on this many of the training steps."""
        student = cls.of(pipe)
        student.condition.requires_grad_(False)
        student.points = points
        return student

    def pipeline(self, like: Pipeline) -> Pipeline:
        """Return a copy of a pipeline with this network, sampled as a consistency model."""
        other, config = super().pipeline(like), like.scheduler.config
        given = {name: config[name] for name in SCHEDULE if name in config}
        other.scheduler = LCMScheduler(**given, original_inference_steps=self.points)
        other.weaker, other.autoguidance_scale = None, 1.0
        other.guidance_interval, other.guide = None, "cfg"
        return other


class BatchMeaning(Meaning):
    """The meaning of outputs whose levels are tensors (B, 1, …)."""

    def moved(self, out: Tensor, change: Tensor) -> Tensor:
        (alpha, sigma), (p, q) = self.level, self.row
        return out + (p - q * alpha / sigma) * change


class Teacher(nn.Module):
    """A trained network under its guidance, as a module (x, t, labels) → output.

    Args:
        learner: network and condition; a copy is kept, in evaluation mode.
        config: way and interval of guidance.
        scale: guidance scale.
        meaning: from steps (B,) and a tensor like x to the meaning of the outputs.
    """

    def __init__(
        self,
        learner: Learner,
        config: DistillConfig,
        scale: float,
        meaning: Callable[[Tensor, Tensor], BatchMeaning],
    ) -> None:
        super().__init__()
        self.learner = copy.deepcopy(learner).eval().requires_grad_(False)
        self.guide, self.scale, self.meaning = METHODS[config.guide], scale, meaning
        self.interval = config.guidance_interval or (0.0, math.inf)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """Return the guided output for noisy images (B, C, *space), steps (B,) and labels."""
        if self.scale == 1 or labels is None:
            return self.learner(x, t, labels)
        null = self.learner.hide(labels, torch.ones(len(x), dtype=torch.bool))
        twice = (torch.cat([part, part]) for part in (x, t))
        c, u = self.learner(*twice, torch.cat([labels, null])).float().chunk(2)
        here = self.meaning(t, x)
        guided = self.guide(lambda x, t: (c, u), self.scale, lambda t: here)(x, 0.0)
        ratio, (low, high) = here.level.sigma / here.level.alpha, self.interval
        return torch.where((ratio > low) & (ratio <= high), guided, c)


class Consistency(Objective):
    """Equal ends of two neighbouring points of a trajectory; owns a teacher and a target network.

    `begin` gives it the training that it belongs to, before the first step.
    """

    name = "target"  # in `extras`
    training: DiffusionTraining
    config: DistillConfig
    teacher: Teacher | None
    target_network: nn.Module

    def begin(self, training: DiffusionTraining, pipe: Pipeline) -> None:
        """Begin from the training's network, which is still that of the teacher."""
        self.training, self.config, self.teacher = training, training.config, None
        if self.config.method == "distillation":
            given = self.config.teacher_guidance
            scale = pipe.guidance_scale if given is None else given
            self.teacher = Teacher(training.learner, self.config, scale, self._meaning)
        self.followed = 0
        training.planned += (self,)
        training.keep(self, self.make())

    # --- an extra of the training --------------------------------------------------------------

    def is_due(self, fraction_done: float) -> bool:
        return True

    def make(self) -> nn.Module:
        return copy.deepcopy(self.training.learner).eval().requires_grad_(False)

    def attach(self, network: nn.Module) -> None:
        self.target_network = network

    def _follow(self) -> None:
        """Move the target network towards the network, once a step."""
        if (step := self.training.budget.step) == self.followed:
            return
        self.followed = step
        pairs = zip(
            self.target_network.parameters(), self.training.learner.parameters(), strict=True
        )
        for mine, new in pairs:
            mine.data.lerp_(new.detach(), 1 - self.config.target_average)

    # --- the loss -------------------------------------------------------------------------------

    @property
    def intervals(self) -> int:
        """Number of intervals by now."""
        stages = self.config.intervals
        done = self.training.budget.fraction_done
        return stages[min(int(done * len(stages)), len(stages) - 1)]

    def _levels(self, u: np.ndarray) -> tuple[Level, np.ndarray]:
        """Return one of the ends of the intervals for each image, but not the clean one."""
        steps, n = len(self.scheduler.schedule), self.intervals
        t = np.rint((np.floor(u * n) + 1) * steps / n) - 1
        alpha, sigma = self._level_table[t.astype(int)].T
        return Level(alpha, sigma), t

    def loss(self, network: Network, x0: Tensor, eps: Tensor, levels: Levels) -> Tensor:
        self._follow()
        steps, n = len(self.scheduler.schedule), self.intervals
        x, t = add_noise(x0, eps, levels.level), levels.t
        before = torch.round((torch.round((t + 1) * n / steps) - 1) * steps / n) - 1  # −1 is clean
        with torch.no_grad():
            if self.teacher is not None:
                x0, eps = self._meaning(t, x).split(network(x, t, self.teacher).float(), x)
            clean = append_dims(before < 0, x.ndim)
            before = before.clamp(min=0)
            nxt = add_noise(x0, eps, self.scheduler.schedule.at(before.long(), x))  # DDIM eq. 12
            target = self._end(network(nxt, before, self.target_network), nxt, before)
            target = torch.where(clean, x0, target)
        error = (self._end(network(x, t), x, t) - target).flatten(1)
        c = HUBER * math.sqrt(error.shape[1])
        return (error.square().sum(1) + c**2).sqrt() - c

    def _end(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return f, the clean end of the trajectory through x."""
        x0, _ = self._meaning(t, x).split(out.float(), x)
        c_skip, c_out = (append_dims(c, x.ndim) for c in boundary(SCALING * t))
        return combine(c_skip, x, c_out, x0)  # Consistency Models eq. 5

    def _meaning(self, t: Tensor, like: Tensor) -> BatchMeaning:
        level = self.scheduler.schedule.at(t.long(), like)
        return BatchMeaning(level, self.row(level))


EXTENSION = diffusion.Extension(
    COMMAND, Consistency, lambda training, start: training.objective.begin(training, start)
)


def distill(
    config: DistillConfig, data: Data, teacher: Pipeline, device: Device | str = "cpu"
) -> Pipeline:
    """Distill a trained pipeline to a consistency model, and return it.

        fast = distill(DistillConfig(minutes=4), load("mnist"), shipped.load("mnist"))
        fast(class_labels=7, num_inference_steps=2)

    Args:
        config: options of the run.
        data: images of the kind that the teacher was trained on, with its classes.
        teacher: a diffusion model of epsilon, sample or v, which is not changed.
        device: device to train on.
    Raises:
        InvalidArgument: config, data and teacher do not fit together, see `checked`.
        TrainingError: the loss or the gradient is not finite.
    """
    config = checked(config, teacher)
    return train(
        config, data, device, objective=Consistency, start=teacher, learner=_student(config),
        resume=lambda training: EXTENSION.begin(training, teacher),
    )  # fmt: skip


def distill_into(
    out: str | Path,
    config: DistillConfig,
    data: Data,
    teacher: Pipeline,
    device: Device | str = "cpu",
    *,
    saving: Saving | None = None,
    load: Mapping[str, Any] | None = None,
) -> Pipeline:
    """Distill with a progress bar and keep everything in the folder `out`.

    Args:
        out, saving, load: the arguments of `minidiff.runs.diffusion.train_into`.
        config, data, teacher, device: the arguments of `distill`.
    Raises:
        MinidiffError: as `distill` and `train_into`.
    """
    config = checked(config, teacher)
    return diffusion.train_into(
        out, config, data, device,
        saving=saving, load=load, start=teacher, learner=_student(config), extension=EXTENSION,
    )  # fmt: skip


def resume(
    out: str | Path, data: Data, teacher: Pipeline, device: Device | str | None = None, **more: Any
) -> Pipeline:
    """Resume a run of `distill_into`, bit for bit on the CPU.

    Args:
        out, data, device: the arguments of `minidiff.runs.diffusion.resume`.
        teacher: the pipeline that the run began with.
        more: its further arguments.
    Raises:
        MinidiffError: as that function.
    """
    config = read_settings(out, COMMAND).config
    learner = _student(config)
    return diffusion.resume(
        out, data, device, start=teacher, learner=learner, extension=EXTENSION, **more
    )


def checked(config: DistillConfig, teacher: Pipeline) -> DistillConfig:
    """Return the config with the teacher's prediction type and number of training steps.

    Raises:
        InvalidArgument: as `check_teacher`; or the teacher is to be guided and cannot be, or the
            result would have fewer points than sampling steps.
    """
    instance(DistillConfig)("config", config)
    check_teacher(teacher)
    if config.teacher_guidance is not None:
        if config.method != "distillation":
            raise InvalidArgument(
                f"teacher_guidance is for method 'distillation', got {config.teacher_guidance:g}"
            )
        check_guidance_scale(config.teacher_guidance, teacher.is_guidable)
    kind, steps = prediction_type_of(teacher.scheduler), teacher.scheduler.config
    return replace(config, prediction_type=kind, num_train_timesteps=steps.num_train_timesteps)


def check_teacher(teacher: Pipeline) -> None:
    """Refuse a pipeline that cannot be distilled.

    Raises:
        InvalidArgument: it is distilled already, is a model of flow matching or EDM, learns
            variances, or is autoguided.
    """
    instance(Pipeline)("teacher", teacher)
    scheduler = teacher.scheduler
    if isinstance(scheduler, LCMScheduler) or teacher.takes_guidance_scale:
        raise InvalidArgument("teacher must be a diffusion model, but it is distilled already")
    if (kind := prediction_type_of(scheduler)) not in PRESERVING:
        raise InvalidArgument(
            f"teacher must predict one of {', '.join(PRESERVING)}, as LCMScheduler samples, but "
            f"it is a model of {kind}"
        )
    if str(scheduler.config.get("variance_type")).startswith("learned"):
        raise InvalidArgument("teacher must not learn variances, which consistency has no use for")
    if teacher.autoguidance_scale != 1:
        raise InvalidArgument(
            "teacher must have autoguidance_scale 1, because its guidance network is not "
            f"distilled; got {teacher.autoguidance_scale:g}"
        )


def _student(config: DistillConfig) -> Callable[[Pipeline], Student]:
    return partial(Student.on, config.points)
