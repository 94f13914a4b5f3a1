"""Numbers do not depend on torch.set_default_dtype, which programs set for other models.

Every dtype has a separate process, because a cache could keep a wrong number for the rest of it.
The dtype is set before minidiff is imported, everything is computed, and computed again under
float32 in the same process. Both must be the same bits, and within rounding of diffusers.
"""

import subprocess
import sys

import pytest

PROGRAM = """
import inspect, sys, warnings
import torch
dtype = getattr(torch, sys.argv[1])
torch.set_default_dtype(dtype)
warnings.simplefilter("ignore")
from minidiff import Pipeline, TrainConfig, shipped, train
from minidiff.data import load
from minidiff.schedulers import SCHEDULERS

MODEL = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
CASES = [
    ("DDPMScheduler", {}, {}), ("DDPMScheduler", {"variance_type": "fixed_large"}, {}),
    ("DDIMScheduler", {}, {"eta": 1.0}), ("DDIMInverseScheduler", {}, {}),
    ("PNDMScheduler", {"skip_prk_steps": True}, {}), ("PNDMScheduler", {}, {}),
    ("LCMScheduler", {}, {}), ("HeunDiscreteScheduler", {}, {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, {}),
    ("EulerAncestralDiscreteScheduler", {}, {}), ("UniPCMultistepScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("DPMSolverSinglestepScheduler", {}, {}), ("EDMDPMSolverMultistepScheduler", {}, {}),
    ("EDMEulerScheduler", {"sigma_schedule": "exponential"}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}),
]

def walk(cls, options, step, **reading):
    has = inspect.signature(cls.__init__).parameters
    scheduler = cls(**{k: v for k, v in MODEL.items() if k in has}, **options, **reading)
    scheduler.set_timesteps(8)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    for t in scheduler.timesteps:
        more = dict(step)
        if "generator" in cls.step.__code__.co_varnames:
            more["generator"] = torch.Generator().manual_seed(1)
        scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)(x, t)
        x = scheduler.step(torch.tanh(scaled), t, x, **more).prev_sample
    return x

def every():
    found = {}
    for name, options, step in CASES:
        for compat in ("diffusers", "exact"):
            found[name, str(options), compat] = walk(SCHEDULERS[name], options, step, compat=compat)
    pipe = Pipeline.from_pretrained(shipped.folder("mnist"))
    drawn = pipe(class_labels=[3, 5], seed=0, num_inference_steps=6, output_type="pt")
    found["shipped model"] = drawn.images
    found["captions"], _ = load("captions").batch(torch.arange(4))
    found["toy"], _ = load("moons").batch(torch.arange(4))
    rows = []
    config = TrainConfig(steps=2, batch_size=4, channels=(8, 16), pictures=0)
    trained = train(config, load("digits"), on_log_row=rows.append)
    found["loss"] = torch.tensor([row.loss for row in rows], dtype=torch.float64)
    found |= {f"weight {k}": v for k, v in trained.unet.state_dict().items()}
    assert torch.get_default_dtype() == wanted
    return found

wanted = dtype
first = every()
torch.set_default_dtype(torch.float32)
wanted = torch.float32
second = every()
for key, value in first.items():
    assert value.dtype == second[key].dtype, (key, value.dtype)
    assert torch.equal(value, second[key]), key
import diffusers
diffusers.logging.set_verbosity_error()
for name, options, step in CASES:
    theirs = walk(getattr(diffusers, name), options, step)
    difference = (first[name, str(options), "diffusers"] - theirs).abs().max() / theirs.abs().max()
    assert difference < 2e-5, (name, options, difference)
print(len(first), "the same")
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_numbers_are_the_same_under_every_default_dtype_and_after_it(dtype: str) -> None:
    pytest.importorskip("diffusers")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, dtype], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the same" in done.stdout
