"""Train the classifiers that metrics.py ships and measures with.

    python -m minidiff.train_classifier --data mnist --data-dir DIR \\
        --out minidiff/weights/mnist.safetensors --epochs E --seed S

AdamW with a one-cycle learning rate on lightly warped images, and an exponential moving average
of the weights as the result. It sees the training split only; the test split is read once, after
the last step, to write the accuracy into the file. No label smoothing: it pulls the features of a
class to one point, and the spread inside a class is what the Fréchet distance has to measure.
"""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff import data, metrics
from minidiff.checkpoint import atomic_file
from minidiff.data import ImageData
from minidiff.errors import (
    InvalidArgument,
    MinidiffError,
    TrainingError,
    one_of,
    real_number,
    whole_number,
)
from minidiff.nn.classifier import FeatureNet
from minidiff.weights import write_tensors

_ROTATION = math.radians(12)
_SHEAR = 0.15
_SCALE = 0.1
_SHIFT = 0.12  # of half a side: 1.7 pixels of 28
_EMA_DECAY = 0.998
_WEIGHT_DECAY = 0.02


@dataclass(frozen=True)
class Recipe:
    """What a training run depends on besides its images.

    Raises:
        InvalidArgument: a value is out of range.
    """

    epochs: int = 16
    batch_size: int = 128
    learning_rate: float = 4e-3
    seed: int = 0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        whole_number("epochs", self.epochs, 1)
        whole_number("batch_size", self.batch_size, 2)  # batch norm cannot learn from one image
        real_number("learning_rate", self.learning_rate, 1e-8, 1.0)
        whole_number("seed", self.seed, 0)
        one_of("precision", self.precision, ("fp32", "bf16"))


def warp(x: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, shear, scale and shift every image of a batch a little; never flip.

    Args:
        x: (B, C, H, W) in [−1, 1]; what moves in from outside is black, −1.
        generator: on the CPU, so that the warps do not depend on the device.
    """

    def uniform(size: float) -> Tensor:
        return (torch.rand(len(x), generator=generator) * 2 - 1) * size

    angle, shear = uniform(_ROTATION), uniform(_SHEAR)
    wide, high = 1 + uniform(_SCALE), 1 + uniform(_SCALE)
    cos, sin = angle.cos(), angle.sin()
    rows = [  # rotation · shear · scale, then the shift
        torch.stack([cos * wide, (cos * shear - sin) * high, uniform(_SHIFT)], dim=1),
        torch.stack([sin * wide, (sin * shear + cos) * high, uniform(_SHIFT)], dim=1),
    ]
    matrices = torch.stack(rows, dim=1).to(x.device)
    grid = F.affine_grid(matrices, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # outside is 0 before the − 1


def architecture(images: ImageData) -> dict[str, int]:
    """The arguments of a FeatureNet for these images. Raises InvalidArgument without labels."""
    if images.labels is None:
        raise InvalidArgument(f"data {images.name} has no labels to classify by")
    return {"channels": images.images.shape[1], "num_classes": images.num_classes}


def train(images: ImageData, recipe: Recipe) -> FeatureNet:
    """Train a classifier and return the moving average of its weights, in eval mode.

    Args:
        images: with labels; the work is done on their device.

    Raises:
        InvalidArgument: the images have no labels.
        TrainingError: the loss is not finite.
    """
    device = images.images.device
    torch.manual_seed(recipe.seed)
    net = FeatureNet(**architecture(images)).to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(net).eval()
    per_epoch = math.ceil(len(images) / recipe.batch_size)
    steps = recipe.epochs * per_epoch
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, steps)
    generator = torch.Generator().manual_seed(recipe.seed)
    stream = data.batches(len(images), recipe.batch_size, recipe.seed)
    started, total = time.monotonic(), torch.zeros((), device=device)
    for step in range(1, steps + 1):
        x, labels = images.batch(next(stream))
        x = warp(x, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            logits, _ = net(x)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        _follow(average, net, min(_EMA_DECAY, step / (step + 10)))  # early weights fade fast
        total += loss.detach()
        if step % per_epoch == 0:
            mean = total.item() / per_epoch  # the only sync point: once an epoch
            if not math.isfinite(mean):
                raise TrainingError(f"loss is {mean} in epoch {step // per_epoch}")
            took = time.monotonic() - started
            print(f"epoch {step // per_epoch:3d}  loss {mean:.4f}  {took:.0f} s", flush=True)
            total.zero_()
    return average


@torch.no_grad()
def _follow(average: nn.Module, net: nn.Module, decay: float) -> None:
    """average ← decay·average + (1 − decay)·net, the running statistics of the norms included."""
    for slow, fast in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
        if slow.is_floating_point():
            slow.lerp_(fast, 1 - decay)
        else:
            slow.copy_(fast)


def write_digest(path: Path) -> None:
    """Enter the SHA-256 of `path` into the SHA256SUMS beside it, in place of an older one."""
    sums = path.with_name(metrics.SUMS)
    digests = metrics.read_digests(sums) if sums.exists() else {}
    digests[path.name] = metrics.sha256(path)
    with atomic_file(sums) as temporary:
        temporary.write_text("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train on a named data set or a folder of labelled images, and write the weights."""
    parser = argparse.ArgumentParser(description="Train the classifier behind the metrics.")
    parser.add_argument("--data", required=True, help="digits, mnist, or a folder of images")
    parser.add_argument("--data-dir", help="where the IDX files of mnist are")
    parser.add_argument("--out", required=True, type=Path, help="the safetensors file to write")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--batch-size", type=int, default=Recipe.batch_size)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--precision", default=Recipe.precision, help="fp32 or bf16")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    try:
        recipe = Recipe(
            given.epochs, given.batch_size, given.learning_rate, given.seed, given.precision
        )
        images = data.load(given.data, "train", given.data_dir).to(given.device)
        average = train(images, recipe)
        held_out = data.load(given.data, "test", given.data_dir)
        predicted, _ = metrics.features(average, held_out.images)
        accuracy = metrics.accuracy(predicted, held_out.labels)
        metadata = {
            "data": images.name,
            "test_accuracy": f"{accuracy:.4f}",
            "architecture": json.dumps(architecture(images)),
            **{name: str(value) for name, value in vars(recipe).items()},
        }
        write_tensors(given.out, average.state_dict(), metadata)
        write_digest(given.out)
        print(f"{given.out}: test accuracy {accuracy:.2%}")
    except MinidiffError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
