"""What changes or steers a trained model; see `minidiff.adapters.learners`."""

from minidiff.adapters.controlnet import ControlNetTraining
from minidiff.adapters.personal import CustomDiffusion, DreamBooth, LoRA, TextualInversion

__all__ = ["ControlNetTraining", "CustomDiffusion", "DreamBooth", "LoRA", "TextualInversion"]
