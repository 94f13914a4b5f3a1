"""Samplers, one file a paper; `base.py` is what they share, `quirks.py` where diffusers departs."""

from minidiff.schedulers.base import Scheduler, SchedulerOutput
from minidiff.schedulers.ddim import DDIMScheduler
from minidiff.schedulers.ddpm import DDPMScheduler
from minidiff.schedulers.dpm_singlestep import DPMSolverSinglestepScheduler
from minidiff.schedulers.dpm_solver import DPMSolverMultistepScheduler
from minidiff.schedulers.edm import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from minidiff.schedulers.euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from minidiff.schedulers.heun import HeunDiscreteScheduler
from minidiff.schedulers.unipc import UniPCMultistepScheduler

SCHEDULERS: dict[str, type[Scheduler]] = {
    cls.__name__: cls
    for cls in (
        DDPMScheduler,
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverSinglestepScheduler,
        UniPCMultistepScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        HeunDiscreteScheduler,
        EDMEulerScheduler,
        EDMDPMSolverMultistepScheduler,
    )
}

__all__ = [
    "SCHEDULERS",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "Scheduler",
    "SchedulerOutput",
    "UniPCMultistepScheduler",
]
