"""How well half a digit is completed: is it the digit asked for, and is there a seam?

    python benchmarks/inpainting.py [MODEL] [--data-dir DIR] [--num 500] [--seed 0] [--device cuda]
        [--png FILE]

The right half of held-out MNIST images is drawn anew, with the image's own class as label and
without one: by replacing the known half at every step, by RePaint too (each step taken several
times), or by reconstruction guidance too (`minidiff/inpaint.py`). For each way:

    right       share that the classifier reads as the image's digit
    as before   the same with the left half alone, the right one black: what the model has to add
    seam        mean |difference| of the pixels on either side of the border, of that in the images
    kept        whether the left half is the image's own, to the bit
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

WAYS = {
    "replaced": {},
    "RePaint, 5 times": {"resamples": 5, "jump_length": 2},
    "guided, w = 5": {"reconstruction_guidance": 5.0},
}

NOTHING = {"guidance_scale": 0.0, "guidance_interval": (0, math.inf)}  # the label has no say


def seam(images: Tensor, border: int) -> float:
    """Mean |difference| across the border, in grey levels of 255, of uint8 (N, 1, H, W)."""
    left, right = images[..., border - 1].float(), images[..., border].float()
    return float((left - right).abs().mean())


def completed(pipe: Pipeline, given: Tensor, hole: Tensor, seed: int, **options: object) -> Tensor:
    """The pictures with the hole (H, W) filled, uint8 like those given (N, 1, H, W)."""
    made = pipe(image=given, mask_image=hole, seed=seed, output_type="np", **options).images
    return torch.from_numpy(made).permute(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", nargs="?", help="a run or a model of MNIST; default: the one that comes along")
    add("--data-dir", help="where MNIST is; default: MINIDIFF_DATA")
    add("--num", type=int, default=500, help="images a figure")
    add("--seed", type=int, default=0, help="of the samples' noise")
    add("--device", default="cpu", help="cpu or cuda")
    add("--png", help="write ten images, halved and completed in each way, a row a way")
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

    def right(pictures: Tensor) -> float:
        predicted, _ = features(net, pictures)
        return accuracy(predicted, labels)

    print(
        f"{len(images)} held-out images, seed {options.seed}, {type(pipe.scheduler).__name__}, "
        f"{pipe.num_inference_steps} steps, guidance {pipe.guidance_scale:g}\n"
        f"the images {right(images):.1%} right, as before {right(halves):.1%}; "
        f"a seam of {natural:.1f} grey levels\n\n"
        f"{'told':8}{'way':20}{'right':>8}{'seam':>8}{'kept':>6}"
    )
    rows = [halves[:10]]
    for told, condition in (
        ("class", {"class_labels": labels}),
        ("nothing", NOTHING | {"class_labels": labels}),
    ):
        for way, how in WAYS.items():
            made = completed(pipe, images, hole, options.seed, **condition, **how)
            kept = torch.equal(made[..., :border], images[..., :border])
            print(
                f"{told:8}{way:20}{right(made):>8.1%}{seam(made, border) / natural:>8.2f}"
                f"{'yes' if kept else 'no':>6}",
                flush=True,
            )
            rows.append(made[:10])
    if options.png:
        plot.save(plot.grid(torch.cat(rows).permute(0, 2, 3, 1).numpy(), 10, scale=2), options.png)


if __name__ == "__main__":
    main()
