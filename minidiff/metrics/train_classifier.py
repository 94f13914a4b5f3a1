"""Train the classifiers that `minidiff.metrics` ships and measures with.

    minidiff train-classifier --data mnist --data-dir DIR \\
        --out minidiff/weights/mnist.safetensors
    minidiff train-classifier --data captions --device cuda \\
        --out minidiff/weights/captions.safetensors
    minidiff train-classifier --data cifar10 --data-dir DIR --device cuda \\
        --out minidiff/weights/cifar10.safetensors

A one-cycle learning rate on augmented images, and an exponential moving average of the weights as
the result; the rest is a `Recipe`, one a data set. It sees the training split only; the test split
is read once, after the last step, to write the accuracy into the file. No label smoothing: it
pulls the features of a class to one point, and the spread inside a class is what the Fréchet
distance has to measure.
"""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff import data, metrics
from minidiff.data import ImageData
from minidiff.data.captioned.captions import Questions
from minidiff.data.captioned.scenes import NONE, QUESTIONS
from minidiff.errors import (
    InvalidArgument,
    TrainingError,
    one_of,
    real_number,
    whole_number,
)
from minidiff.nn.classifier import NETWORKS, Classifier, build_classifier
from minidiff.noise import MAX_SEED
from minidiff.runtime.files import atomic_file, ensure_writable
from minidiff.runtime.tensors import write_tensors

_ROTATION = math.radians(12)
_SHEAR = 0.15
_SCALE = 0.1
_SHIFT = 0.12  # of half a side: 1.7 pixels of 28
_PADDING = 8  # a photograph moves by an eighth of its side at most
_EMA_DECAY = 0.998
_MOMENTUM = 0.9
_MAX_BATCH = 65_536  # a batch is held in memory; more than this is a typing error
_STORED = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """What a training run depends on besides its images.

    Attributes:
        epochs, batch_size, seed: of the stream of images.
        learning_rate: at its peak, which it rises to in the first 30 % and falls from to 0.
        weight_decay: of AdamW, where it is decoupled, or of SGD, where it is not.
        optimizer: "adamw", or "sgd" with Nesterov's momentum of 0.9.
        augment: "warp" for digits, "photo" for photographs, "none".
        network: "plain" or "residual", see `nn/classifier.py`.
        precision: of the matrix work, "fp32" or "bf16".
        stored: of the weights in the file, "fp32" or "fp16"; they are rounded before they are
            measured.

    Raises:
        InvalidArgument: a value is out of range.
    """

    epochs: int = 16
    batch_size: int = 128
    learning_rate: float = 4e-3
    weight_decay: float = 0.02
    optimizer: str = "adamw"
    augment: str = "warp"
    network: str = "plain"
    precision: str = "fp32"
    stored: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number("epochs", self.epochs, 1)
        # batch norm cannot learn from one image
        whole_number("batch_size", self.batch_size, 2, _MAX_BATCH)
        real_number("learning_rate", self.learning_rate, 1e-8, 1.0)
        real_number("weight_decay", self.weight_decay, 0, 1.0)
        whole_number("seed", self.seed, 0, MAX_SEED)
        one_of("optimizer", self.optimizer, ("adamw", "sgd"))
        one_of("augment", self.augment, AUGMENTATIONS)
        one_of("network", self.network, NETWORKS)
        one_of("precision", self.precision, ("fp32", "bf16"))
        one_of("stored", self.stored, _STORED)


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
    matrices = torch.stack(rows, dim=1).to(x.device, non_blocking=True)
    grid = F.affine_grid(matrices, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # outside is 0 before the − 1


def flip_and_shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images left to right, and shift each by up to an eighth of its side.

    Args:
        x: (B, C, H, W) in [−1, 1]; what moves in from outside is the image, mirrored at its edge.
        generator: as in `warp`.
    """
    n, _, height, width = x.shape
    high, wide = height // _PADDING, width // _PADDING
    padded = F.pad(x, (wide, wide, high, high), mode="reflect")
    down = torch.randint(2 * high + 1, (n, 1), generator=generator) + torch.arange(height)
    right = torch.randint(2 * wide + 1, (n, 1), generator=generator) + torch.arange(width)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    right = torch.where(mirrored, right.flip(1), right)
    down, right = (index.to(x.device, non_blocking=True) for index in (down, right))
    image = torch.arange(n, device=x.device)[:, None, None]
    # Indices on three axes put the channels last, which is how the network wants them in memory.
    return padded[image, :, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "warp": warp,
    "photo": flip_and_shift,
    "none": lambda x, generator: x,
}
RECIPES = {
    "digits": Recipe(),
    "mnist": Recipe(),
    "cifar10": Recipe(
        epochs=200,
        batch_size=512,
        learning_rate=0.4,
        weight_decay=5e-4,
        optimizer="sgd",
        augment="photo",
        network="residual",
        precision="bf16",
        stored="fp16",
    ),
    "captions": Recipe(batch_size=256, augment="none", network="scene"),
}
_SCENES = {"train": 1 << 17, "test": 20_000}  # of an epoch, which never comes again


def labelled(name: str, split: str, data_dir: str | None = None) -> ImageData | Questions:
    """A split of a data set, captioned digits with the answers to questions as labels.

    Raises:
        InvalidArgument, DataError: see `minidiff.data.load`.
    """
    if name != Questions.name:
        return data.load(name, split, data_dir)
    return Questions(split, length=_SCENES[split])


def architecture(images: ImageData | Questions, network: str = "plain") -> dict[str, int | str]:
    """What `build_classifier` takes for these images. Raises InvalidArgument without labels."""
    if not images.num_classes:
        raise InvalidArgument(f"data {images.name} has no labels to classify by")
    several = {"questions": images.labels_per_item} if images.labels_per_item > 1 else {}
    return {
        "network": network,
        "channels": images.shape[0],
        "num_classes": images.num_classes,
        **several,
    }


def print_epoch(epoch: int, loss: float, seconds: float) -> None:
    """One line an epoch."""
    print(f"epoch {epoch:3d}  loss {loss:.4f}  {seconds:.0f} s", flush=True)


def train(
    images: ImageData | Questions,
    recipe: Recipe,
    report: Callable[[int, float, float], None] = print_epoch,
) -> Classifier:
    """Train a classifier and return the moving average of its weights, in eval mode.

    The average is rounded to what the file will hold. torch's global random state is left as it
    was.

    Args:
        images: with labels; the work is done on their device. A label NONE is ignored.
        report: called after every epoch with its number, the mean loss, and the seconds since the
            start.

    Raises:
        InvalidArgument: the images have no labels.
        TrainingError: the loss is not finite.
    """
    device = images.batch(torch.zeros(1, dtype=torch.int64))[0].device
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)  # weights are drawn on the CPU
        net = build_classifier(architecture(images, recipe.network))
    net = net.to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(net).eval()
    follow = _Follower(average, net)
    per_epoch = math.ceil(len(images) / recipe.batch_size)
    steps = recipe.epochs * per_epoch
    optimizer = _optimizer(net, recipe)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, steps, cycle_momentum=recipe.optimizer == "adamw"
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    stream = data.batches(len(images), recipe.batch_size, recipe.seed)
    augmented = AUGMENTATIONS[recipe.augment]
    started, total = time.monotonic(), torch.zeros((), device=device)
    for step in range(1, steps + 1):
        x, labels = images.batch(next(stream), (step - 1) * recipe.batch_size)
        x = augmented(x, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            logits, _ = net(x)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        follow(min(_EMA_DECAY, step / (step + 10)))  # early weights fade fast
        total += loss.detach()
        if step % per_epoch == 0:
            mean = total.item() / per_epoch  # the only sync point: once an epoch
            if not math.isfinite(mean):
                raise TrainingError(f"loss is {mean} in epoch {step // per_epoch}")
            report(step // per_epoch, mean, time.monotonic() - started)
            total.zero_()
    return average.to(_STORED[recipe.stored]).float()


def _optimizer(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer; the one-cycle schedule sets its learning rate."""
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        net.parameters(), lr=0.0, momentum=_MOMENTUM, nesterov=True,
        weight_decay=recipe.weight_decay,
    )  # fmt: skip


class _Follower:
    """average ← decay·average + (1 − decay)·net, the running statistics of the norms included."""

    def __init__(self, average: nn.Module, net: nn.Module) -> None:
        pairs = list(zip(average.state_dict().values(), net.state_dict().values(), strict=True))
        self.slow = [slow for slow, _ in pairs if slow.is_floating_point()]
        self.fast = [fast for _, fast in pairs if fast.is_floating_point()]
        self.counts = [(slow, fast) for slow, fast in pairs if not slow.is_floating_point()]

    @torch.no_grad()
    def __call__(self, decay: float) -> None:
        torch._foreach_lerp_(self.slow, self.fast, 1 - decay)
        for slow, fast in self.counts:
            slow.copy_(fast)


def write_digest(path: Path) -> None:
    """Enter the SHA-256 of `path` into the SHA256SUMS beside it, in place of an older one."""
    sums = path.with_name(metrics.SUMS)
    digests = metrics.read_digests(sums) if sums.exists() else {}
    digests[path.name] = metrics.sha256(path)
    with atomic_file(sums) as temporary:
        temporary.write_text("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)))


def train_into(
    path: str | Path, name: str, recipe: Recipe, device: torch.device, data_dir: str | None = None
) -> float:
    """Train on a data set, write the weights and return the accuracy on the test split.

    Args:
        path: the safetensors file.
        name, data_dir: see `minidiff.data.load`.
    Raises:
        InvalidArgument, DataError: the data cannot be loaded, or have no labels.
        CheckpointError: the file cannot be written.
        TrainingError: the loss is not finite.
    """
    ensure_writable(path)
    images, held_out = (labelled(name, split, data_dir) for split in ("train", "test"))
    average = train(images.to(device), recipe)
    accuracy, each = _accuracies(average, held_out)
    metadata = {
        "data": images.name,
        "test_accuracy": f"{accuracy:.4f}",
        **each,
        "architecture": json.dumps(architecture(images, recipe.network)),
        **{name: str(value) for name, value in asdict(recipe).items()},
    }
    write_classifier(Path(path), average, recipe.stored, metadata)
    return accuracy


def _accuracies(net: Classifier, held_out: ImageData | Questions) -> tuple[float, dict[str, str]]:
    """The share of right labels, and that of each question."""
    predicted, _ = metrics.features(net, held_out.images)
    labels = held_out.labels
    asked = labels != NONE
    overall = metrics.accuracy(predicted[asked], labels[asked])
    if labels.ndim == 1:
        return overall, {}
    right = (
        (predicted == labels.to(predicted.device))
        .double()
        .where(asked.to(predicted.device), torch.nan)
    )
    shares = right.nanmean(dim=0).tolist()
    return overall, {
        f"test_accuracy of {name}": f"{share:.4f}"
        for name, share in zip(QUESTIONS, shares, strict=True)
    }


def write_classifier(
    path: Path, net: Classifier, stored: str = "fp32", metadata: dict[str, str] | None = None
) -> None:
    """Write the weights, and their SHA-256 into the list beside them.

    Args:
        stored: "fp32" or "fp16".
        metadata: must name the `architecture`, so that `read_classifier` can build the network.
    Raises:
        CheckpointError: the file cannot be written.
    """
    half = {name: value.to(_STORED[stored]) if value.is_floating_point() else value
            for name, value in net.state_dict().items()}  # fmt: skip
    write_tensors(path, half, metadata)
    write_digest(path)
