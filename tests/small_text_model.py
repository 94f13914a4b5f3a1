"""A small model of the captioned digits with random weights, for tests that adapt one."""

from minidiff.data.captioned.captions import CaptionedDigits
from minidiff.pipeline import Pipeline
from minidiff.training.build import build
from minidiff.training.config import TrainConfig

SIZES = {"channels": (8, 8), "block": 4, "text_width": 8, "text_layers": 1}


def small_text_model() -> Pipeline:
    """Return the model, frozen; its branches do not end in zeros as fresh ones do."""
    pipe = build(TrainConfig(steps=1, **SIZES), CaptionedDigits())
    pipe.num_inference_steps = 2
    for network in (pipe.unet, pipe.prompts.text_encoder):
        network.eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.data += 0.05
    return pipe
