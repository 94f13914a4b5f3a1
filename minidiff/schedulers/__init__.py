"""Samplers, one file per paper; `base.py` is shared, `core/quirks.py` has diffusers' departures."""

from minidiff.schedulers.adams_bashforth import DEISMultistepScheduler, LMSDiscreteScheduler
from minidiff.schedulers.base import Scheduler, SchedulerOutput
from minidiff.schedulers.ddim import DDIMScheduler
from minidiff.schedulers.ddim_inverse import DDIMInverseScheduler
from minidiff.schedulers.ddpm import DDPMScheduler
from minidiff.schedulers.dpm_singlestep import DPMSolverSinglestepScheduler
from minidiff.schedulers.dpm_solver import DPMSolverMultistepScheduler
from minidiff.schedulers.edm import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from minidiff.schedulers.euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from minidiff.schedulers.flow_match import FlowMatchEulerDiscreteScheduler
from minidiff.schedulers.heun import HeunDiscreteScheduler, KDPM2DiscreteScheduler
from minidiff.schedulers.lcm import LCMScheduler
from minidiff.schedulers.pndm import PNDMScheduler
from minidiff.schedulers.unipc import UniPCMultistepScheduler

SCHEDULERS: dict[str, type[Scheduler]] = {
    cls.__name__: cls
    for cls in (
        DDPMScheduler,
        DDIMScheduler,
        DDIMInverseScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverSinglestepScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        HeunDiscreteScheduler,
        KDPM2DiscreteScheduler,
        LMSDiscreteScheduler,
        DEISMultistepScheduler,
        EDMEulerScheduler,
        EDMDPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        PNDMScheduler,
        LCMScheduler,
        FlowMatchEulerDiscreteScheduler,
    )
}

# These need another kind of network, or go in another direction. Every other class takes the config
# of any other, and a pipeline with the one runs with the other.
_ALONE = (
    DDIMInverseScheduler,
    EDMEulerScheduler,
    EDMDPMSolverMultistepScheduler,
    LCMScheduler,
    FlowMatchEulerDiscreteScheduler,
)
for _cls in SCHEDULERS.values():
    _others = [cls for cls in SCHEDULERS.values() if cls not in _ALONE]
    _cls.compatibles = [_cls] if _cls in _ALONE else _others

__all__ = [
    "SCHEDULERS",
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "Scheduler",
    "SchedulerOutput",
    "UniPCMultistepScheduler",
]
