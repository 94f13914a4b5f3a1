"""What changes or steers a trained model; see `minidiff.adapters.learners`."""

from minidiff.adapters.personal import CustomDiffusion, DreamBooth, LoRA, TextualInversion

__all__ = ["CustomDiffusion", "DreamBooth", "LoRA", "TextualInversion"]
