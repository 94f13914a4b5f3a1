"""A ControlNet on edges for the shipped model of captioned digits: trained, and scored.

    python benchmarks/control.py [--steps 300] [--num 200] [--seeds 0] [--learned FOLDER]
        [--png FILE]

Prints the CPU-seconds of the training on one thread, whether the first picture equals the base bit
for bit, and for every scale of the control: F1 of the edges (within one pixel), and fractions of
samples with the digit, colour and background of their caption and the position of the drawing. The
rows "base" and "real" are samples without control, and the images that the edges are from. With
--learned, the ControlNet in that folder is scored.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff import TrainConfig, shipped, train
from minidiff.adapters import ControlNetTraining
from minidiff.adapters.controls import edges
from minidiff.data import load
from minidiff.data.captioned.captions import CaptionedDigits
from minidiff.data.captioned.scenes import QUESTIONS, answers
from minidiff.images import plot
from minidiff.images.pixels import to_float
from minidiff.metrics import SceneEvaluator
from minidiff.metrics.scenes import compare, task
from minidiff.nn import ControlNet
from minidiff.pipeline import Pipeline

SCALES = (1.0, 0.5, 0.0)
BATCH = 16


def edge_f1(found: Tensor, wanted: Tensor) -> float:
    """Return F1 of edges (N, 1, H, W) within one pixel, the mean over images."""

    def near(one: Tensor, other: Tensor) -> Tensor:
        close = one * F.max_pool2d(other, 3, stride=1, padding=1)
        return close.sum((1, 2, 3)) / one.sum((1, 2, 3)).clamp(min=1)

    precision, recall = near(found, wanted), near(wanted, found)
    return (2 * precision * recall / (precision + recall).clamp(min=1e-9)).mean().item()


def trained(pipe: Pipeline, steps: int, seed: int) -> Pipeline:
    """Return the pipeline with a ControlNet, and print what its training cost."""
    defaults = ControlNetTraining.defaults
    config = TrainConfig(steps=steps, batch_size=BATCH, seed=seed, pictures=0, **defaults)
    began = time.process_time()
    result = train(config, load("captions"), start=pipe, learner=ControlNetTraining())
    cost = time.process_time() - began
    print(f"seed {seed}: {steps * BATCH} images, {cost:.0f} CPU-seconds", flush=True)
    return result


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--learned")
    parser.add_argument("--png")
    given = parser.parse_args()
    torch.set_num_threads(1)
    base, chosen, judge = shipped.load("digits-text"), task(given.num), SceneEvaluator()
    data = CaptionedDigits("test")
    real, truth = data.images(chosen.index), answers(data.scenes(chosen.index))
    place = QUESTIONS.index("position")
    drawn = edges(to_float(real))

    def row(name: str, images: Tensor) -> None:
        read, _ = judge.read(images)
        right = compare(read, chosen.wanted).right
        position = (read[:, place] == truth[:, place]).double().mean().item()
        attributes = ", ".join(f"{k} {right[k]:.1%}" for k in ("digit", "colour", "background"))
        found = edge_f1(edges(to_float(images)), drawn)
        print(
            f"  {name:<10} edge F1 {found:.3f}, {attributes}, position {position:.1%}", flush=True
        )

    fresh = base.with_controls([ControlNet.from_unet(base.unet, 1, (16,))])
    call = {"seed": 0, "output_type": "np", "progress": False}
    pair = [
        base(chosen.prompts[:2], **call),
        fresh(chosen.prompts[:2], control_image=drawn[:2], **call),
    ]
    print("before training, equal to the base:", bool((pair[0].images == pair[1].images).all()))
    row("real", real)
    for seed in given.seeds:
        if given.learned:
            pipe = base.with_controls([ControlNet.from_pretrained(given.learned)])
        else:
            pipe = trained(base, given.steps, seed)
        rows = [real, (255 * drawn).to(torch.uint8).expand(-1, 3, -1, -1)]
        for scale in SCALES:
            images = pipe(
                chosen.prompts, control_image=drawn, control_scale=scale, seed=seed,
                output_type="np", progress=False,
            ).images  # fmt: skip
            images = torch.from_numpy(images).permute(0, 3, 1, 2)
            row(f"scale {scale:g}" if scale else "base", images)
            rows.append(images)
        if given.png:
            grid = torch.cat([part[:16] for part in rows]).permute(0, 2, 3, 1).numpy()
            plot.save(plot.picture(grid, 16, 3, None), given.png)


if __name__ == "__main__":
    main()
