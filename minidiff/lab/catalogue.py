"""The catalogue of `minidiff list`: names that flags take, each with a line.

It imports no torch, like every file that the command line reads before it knows what to do.
"""

from collections.abc import Mapping

from minidiff import shipped
from minidiff.names import SAMPLERS
from minidiff.training.presets import PRESETS

DATA = {
    "digits": "16×16 grey digits, embedded in the package",
    "mnist": "28×28 grey digits, read from the published files",
    "cifar10": "32×32 colour photographs, read from the published files",
    "captions": "32×32 coloured digits with captions, drawn on the fly",
    "moons": "points of two half circles",
    "swissroll": "points of a spiral",
    "spiral": "points of two spirals",
    "pinwheel": "points of five bent arms",
    "checkerboard": "points of the black squares of a board",
    "ring": "points of eight Gaussians on a circle",
    "grid": "points of 5×5 Gaussians",
    "FOLDER": "any folder of images; its sub-folders are the classes",
}
OBJECTIVES = {
    "epsilon": "predict the noise (Ho et al. 2020)",
    "sample": "predict the clean image",
    "v_prediction": "predict v = α·ε − σ·x0 (Salimans & Ho 2022)",
    "flow": "predict ε − x0 on straight lines (Lipman et al. 2023)",
    "edm": "preconditioned network (Karras et al. 2022)",
}
METRICS = {
    "samples": "accuracy, Fréchet and kernel distance, density, coverage",
    "classifier": "accuracy of a classifier that is trained on samples",
    "copying": "distance of samples to the nearest training images",
    "likelihood": "bits per dimension of real images",
}
TABLES = {
    "models": {name: f"trained on {data}" for name, data in shipped.MODELS.items()},
    "data": DATA,
    "presets": {name: preset.why for name, preset in PRESETS.items()},
    "samplers": {name: f"{row.title} ({row.scheduler})" for name, row in SAMPLERS.items()},
    "objectives": OBJECTIVES,
    "metrics": METRICS,
}
WIDTH = 100
FLAGS = {
    "models": "sample --model", "data": "train --data", "presets": "train --preset",
    "samplers": "sample --sampler", "objectives": "train --prediction-type",
    "metrics": "evaluate --parts",
}  # fmt: skip


def as_text(tables: Mapping[str, Mapping[str, str]], width: int | None = WIDTH) -> str:
    """Return some of the `TABLES` as lines, cut at `width` characters if it is given."""
    lines = []
    for kind, rows in tables.items():
        lines.append(f"{kind} ({FLAGS[kind]})")
        lines += [f"  {name:<13} {about}" for name, about in rows.items()]
    if width is not None:
        lines = [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines]
    return "\n".join(lines)
