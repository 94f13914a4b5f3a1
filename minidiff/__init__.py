"""minidiff: diffusion models from scratch.

A reader who opens `Pipeline.__call__` and follows one image passes pipeline.py → sample.py →
schedulers/base.py → one paper → prediction.py → schedule.py, and has then read all that matters.

`import minidiff` loads nothing else: a public name imports its module where it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minidiff.errors import MinidiffError
    from minidiff.guidance import classifier_free
    from minidiff.nn import UNet
    from minidiff.pipeline import Pipeline
    from minidiff.prediction import split, target
    from minidiff.sample import trajectory
    from minidiff.schedule import Level, NoiseSchedule, add_noise
    from minidiff.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
    from minidiff.training.config import TrainConfig
    from minidiff.training.diffusion import train
    from minidiff.training.presets import PRESETS

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "Level",
    "MinidiffError",
    "NoiseSchedule",
    "Pipeline",
    "TrainConfig",
    "UNet",
    "add_noise",
    "classifier_free",
    "split",
    "target",
    "train",
    "trajectory",
]

_MODULES = {
    "PRESETS": "training.presets",
    "DDIMScheduler": "schedulers",
    "DDPMScheduler": "schedulers",
    "DPMSolverMultistepScheduler": "schedulers",
    "Level": "schedule",
    "MinidiffError": "errors",
    "NoiseSchedule": "schedule",
    "Pipeline": "pipeline",
    "TrainConfig": "training.config",
    "UNet": "nn",
    "add_noise": "schedule",
    "classifier_free": "guidance",
    "split": "prediction",
    "target": "prediction",
    "train": "training.diffusion",
    "trajectory": "sample",
}


def __getattr__(name: str) -> object:
    """Import a public name from its module (PEP 562); the next use finds it without this call."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the names of the module, public ones that are not imported yet included."""
    return sorted({*globals(), *__all__})
