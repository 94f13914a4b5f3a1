"""Options of a distillation. This file imports no torch, like all that the command line reads."""

from dataclasses import dataclass

from minidiff.errors import InvalidArgument, whole_number
from minidiff.runtime.checks import choice, optional, real
from minidiff.training.config import (
    COUNT,
    FRACTION,
    OPTIONS,
    WIDTHS,
    TrainConfig,
    declared,
    fields_of,
)

METHODS = ("distillation", "training")  # see `minidiff.adapters.consistency.distill`
# Options that a distillation has no use for, because its loss or its scheduler is another.
UNUSED = (
    "cuda_graph", "noise_levels", "loss_weight", "stable_target", "learn_variance", "sampler",
    "autoguidance_scale",
)  # fmt: skip


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """A run of distill. Checked when built; raises InvalidArgument naming the field.

    `guide` and `guidance_interval` are those of the teacher; the result needs no guidance.
    """

    learning_rate: float = declared(
        "optimisation", 2e-4, real(0), "peak learning rate of the optimizer"
    )
    label_dropout: float = 0.0
    guidance_scale: float = 1.0
    num_inference_steps: int = declared(
        "sampling", 2, COUNT, "number of sampling steps stored with the model",
        flag="sampling-steps",
    )  # fmt: skip

    # The consistency loss, see `minidiff.adapters.consistency.distill`
    method: str = declared(
        "objective", "distillation", choice(*METHODS), "how a point's neighbour on its "
        f"trajectory is found: {', '.join(METHODS)}; a teacher's step, or none but the "
        "image itself",
    )  # fmt: skip
    teacher_guidance: float | None = declared(
        "objective", None, optional(real()), "guidance scale of the teacher, which the result "
        "has without guidance (default: the teacher's)", float,
    )  # fmt: skip
    intervals: tuple[int, ...] = declared(
        "objective", (4, 8, 16, 32), WIDTHS, "intervals that the steps are divided into, each "
        "number for an equal part of the budget",
    )  # fmt: skip
    target_average: float = declared(
        "objective", 0.9, FRACTION, "part of the target network that a step keeps; 0 for the "
        "network itself as target",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in UNUSED:
            if (given := getattr(self, name)) != (usual := OPTIONS[name].default):
                raise InvalidArgument(f"{name} must be {usual!r} for a distillation, got {given!r}")
        for n in self.intervals:
            whole_number("intervals", n, 1, self.num_train_timesteps)
        if list(self.intervals) != sorted(self.intervals):
            raise InvalidArgument(f"intervals must be in rising order, got {self.intervals}")
        whole_number("num_inference_steps", self.num_inference_steps, 1, self.points)

    @property
    def points(self) -> int:
        """Number of evenly spaced training steps that the result can be sampled at.

        It divides the number of training steps, so that the first one is the last training step.
        """
        steps = self.num_train_timesteps
        return next(n for n in range(self.intervals[-1], steps + 1) if steps % n == 0)


DISTILL_OPTIONS = fields_of(DistillConfig)
