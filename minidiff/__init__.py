"""minidiff: diffusion models from scratch.

A reader who opens `Pipeline.__call__` and follows one image passes pipeline.py → sample.py →
schedulers/base.py → one paper → prediction.py → schedule.py, and has then read all that matters.
"""

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
