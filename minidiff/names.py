"""Names and limits of options. This file imports nothing, least of all torch.

So the command line prints its help, and refuses a misspelt flag, without waiting for torch. What a
name stands for is defined where it is implemented.
"""

from typing import Any, NamedTuple

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPE_NAMES = ("float32", "bfloat16")
ENGINES = ("auto", "torch", "openvino", "onnxruntime", "compile", "cuda-graph")
GRAPH_FORMATS = ("onnx", "openvino", "pt2")
MAX_SEED = 2**32 - 1

# Data sets, see `minidiff.data`
PUBLISHED = {"mnist": "IDX files", "cifar10": "binary files"}
DATA_NAMES = ("digits", *PUBLISHED, "captions")
# Small captioned sets to adapt a model to, see `minidiff.adapters.examples`
EXAMPLES = ("hearts", "stars", "diamonds", "crosses", "striped", "brown")
# Points, see `minidiff.data.toys`
TOYS = ("moons", "swissroll", "spiral", "pinwheel", "checkerboard", "ring", "grid")
SPLITS = ("train", "test")
DATA_VARIABLE = "MINIDIFF_DATA"
DEMO_SAMPLES = (192, 10_000)  # the Fréchet distance of the demo needs two per feature
LOGS = ("tensorboard",)  # beside log.jsonl, see `minidiff.runs.tensorboard`

# Noise schedules and objectives, see `minidiff.schedule` and `minidiff.objective`
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "exp", "laplace")
MAX_TRAIN_TIMESTEPS = 1_000_000  # tables are kept in memory; more is probably a typing error
PRESERVING = ("epsilon", "sample", "v_prediction")
PREDICTION_TYPES = (*PRESERVING, "flow", "edm")
SPREADS = {  # distributions of the levels by prediction type; the first is the default
    **dict.fromkeys(PRESERVING, ("uniform", "log_normal")),
    "flow": ("logit_normal", "uniform"),
    "edm": ("log_normal", "uniform"),
}
NOISE_LEVELS = ("uniform", "log_normal", "logit_normal")
LOSS_WEIGHTS = ("none", "min_snr", "edm")
GUIDES = ("cfg", "rescale", "apg")  # ways of guidance, see `minidiff.guidance.METHODS`

# Classifiers and parts of the evaluation table, see `minidiff.metrics`
CLASSIFIERS = ("plain", "residual", "scene")
AUGMENTATIONS = ("warp", "photo", "none")
PARTS = ("samples", "classifier", "copying", "likelihood")


class Sampler(NamedTuple):
    """The scheduler and its options behind a short name."""

    title: str
    scheduler: str
    options: dict[str, Any]


_MULTISTEP = "DPMSolverMultistepScheduler"

SAMPLERS = {
    "ddpm": Sampler("DDPM", "DDPMScheduler", {"clip_sample": False}),
    "ddim": Sampler("DDIM", "DDIMScheduler", {"clip_sample": False}),
    "euler": Sampler("Euler", "EulerDiscreteScheduler", {}),
    "euler-a": Sampler("Euler ancestral", "EulerAncestralDiscreteScheduler", {}),
    # Heun's trapezoid cannot span the first even step of a cosine schedule, from σ of 20,000 to 6.
    "heun": Sampler("Heun", "HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    "kdpm2": Sampler("KDPM2", "KDPM2DiscreteScheduler", {"use_karras_sigmas": True}),
    "lms": Sampler("LMS (4)", "LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    "deis": Sampler("DEIS (2)", "DEISMultistepScheduler", {}),
    "dpm++": Sampler("DPM-Solver++ (2M)", _MULTISTEP, {}),
    "dpm++3": Sampler("DPM-Solver++ (3M)", _MULTISTEP, {"solver_order": 3}),
    "dpm++2s": Sampler("DPM-Solver++ (2S)", "DPMSolverSinglestepScheduler", {}),
    "sde-dpm++": Sampler(
        "SDE-DPM-Solver++ (2M)", _MULTISTEP, {"algorithm_type": "sde-dpmsolver++"}
    ),
    "unipc": Sampler("UniPC (2)", "UniPCMultistepScheduler", {}),
}
# Images that steer a ControlNet, see `minidiff.adapters.controls`.
CONTROLS = ("edges", "scribble", "mask")
