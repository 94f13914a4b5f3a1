"""Completion of half a digit: fraction of right digits, and visibility of the seam.

    python benchmarks/inpainting.py [MODEL] [--data-dir DIR] [--num 500] [--seed 0] [--device cuda]
        [--png FILE]

The model draws the right half of held-out MNIST images, with the image's class as label and without
a label. The known half is replaced at every step, optionally with RePaint (repeated steps) or with
reconstruction guidance (`minidiff/pipeline/inpaint.py`). The columns for each method:

    right       fraction that the classifier assigns to the image's digit
    seam        mean |difference| of pixels across the border, relative to that of the images
    kept        "yes" if the left half equals that of the image bit for bit

Above the table stand the values of the images themselves, and the fraction right of left halves
beside a black right half.
"""

import argparse
import math

import torch
from torch import Tensor

from minidiff import shipped
from minidiff.data import load
from minidiff.images import plot
from minidiff.metrics import load_classifier
from minidiff.metrics.classifier import accuracy, features
from minidiff.pipeline import Pipeline
from minidiff.runs.folder import open_pipeline

METHODS = {
    "replaced": {},
    "RePaint, 5 times": {"resamples": 5, "jump_length": 2},
    "guided, w = 5": {"reconstruction_guidance": 5.0},
}

NOTHING = {"guidance_scale": 0.0, "guidance_interval": (0, math.inf)}  # the label has no influence


def seam(images: Tensor, border: int) -> float:
    """Return the mean |difference| across the border of uint8 (N, 1, H, W), in grey levels."""
    left, right = images[..., border - 1].float(), images[..., border].float()
    return float((left - right).abs().mean())


def completed(pipe: Pipeline, given: Tensor, hole: Tensor, seed: int, **options: object) -> Tensor:
    """Return images uint8 (N, 1, H, W) with the hole (H, W) filled by the model."""
    made = pipe(image=given, mask_image=hole, seed=seed, output_type="np", **options).images
    return torch.from_numpy(made).permute(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", nargs="?", help="run or model of MNIST; default: the one that ships with minidiff")
    add("--data-dir", help="folder of MNIST; default: MINIDIFF_DATA")
    add("--num", type=int, default=500, help="number of images")
    add("--seed", type=int, default=0, help="seed of the noise")
    add("--device", default="cpu", help="cpu or cuda")
    add("--png", help="file for ten images, halved and completed, a row per method")
    options = parser.parse_args()
    pipe = open_pipeline(options.model or shipped.folder("mnist"), options.device)
    net = load_classifier("mnist").to(options.device)
    test = load("mnist", "test", data_dir=options.data_dir)
    images, labels = test.images[: options.num], test.labels[: options.num]
    border = images.shape[-1] // 2
    hole = torch.zeros(images.shape[-2:])
    hole[:, border:] = 1
    halves = torch.where(hole.bool(), 0, images).to(torch.uint8)
    natural = seam(images, border)

    def right(digits: Tensor) -> float:
        """Return the fraction of images with the right digit."""
        predicted, _ = features(net, digits)
        return accuracy(predicted, labels)

    print(
        f"{len(images)} held-out images, seed {options.seed}, {type(pipe.scheduler).__name__}, "
        f"{pipe.num_inference_steps} steps, guidance {pipe.guidance_scale:g}\n"
        f"images {right(images):.1%} right, left halves {right(halves):.1%}; "
        f"seam of the images {natural:.1f} grey levels\n\n"
        f"{'label':8}{'method':20}{'right':>8}{'seam':>8}{'kept':>6}"
    )
    rows = [halves[:10]]
    for label, condition in (
        ("class", {"class_labels": labels}),
        ("none", NOTHING | {"class_labels": labels}),
    ):
        for method, chosen in METHODS.items():
            made = completed(pipe, images, hole, options.seed, **condition, **chosen)
            kept = torch.equal(made[..., :border], images[..., :border])
            print(
                f"{label:8}{method:20}{right(made):>8.1%}{seam(made, border) / natural:>8.2f}"
                f"{'yes' if kept else 'no':>6}",
                flush=True,
            )
            rows.append(made[:10])
    if options.png:
        plot.save(plot.grid(torch.cat(rows).permute(0, 2, 3, 1).numpy(), 10, scale=2), options.png)


if __name__ == "__main__":
    main()
