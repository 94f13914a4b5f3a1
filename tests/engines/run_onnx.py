"""Sample an exported model of classes in ONNX Runtime, without minidiff and without torch.

python run_onnx.py DIR/unet.onnx CLASS STEPS NOISE.npy OUT.npy
"""

import sys

import numpy as np
import onnxruntime

path, label, steps, noise, out = sys.argv[1:]
unet = onnxruntime.InferenceSession(path)
x = np.load(noise)
betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
alpha_bar = np.cumprod(1 - betas)
spacing = 1000 // int(steps)
for t in reversed(range(0, 1000, spacing)):
    now, nxt = alpha_bar[t], alpha_bar[t - spacing] if t else alpha_bar[0]
    v = unet.run(None, {
        "sample": x.astype(np.float32),
        "timestep": np.full(len(x), t, np.float32),
        "class_labels": np.full(len(x), int(label)),
    })[0]  # fmt: skip
    x0 = np.sqrt(now) * x - np.sqrt(1 - now) * v
    eps = np.sqrt(now) * v + np.sqrt(1 - now) * x
    x = np.sqrt(nxt) * x0 + np.sqrt(1 - nxt) * eps
np.save(out, x)
