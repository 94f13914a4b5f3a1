"""Train the classifiers that `minidiff.metrics` ships and measures with.

    minidiff train-classifier --data mnist --data-dir DIR \\
        --out minidiff/weights/mnist.safetensors
    minidiff train-classifier --data captions --device cuda \\
        --out minidiff/weights/captions.safetensors
    minidiff train-classifier --data cifar10 --data-dir DIR --device cuda \\
        --out minidiff/weights/cifar10.safetensors

The loop is that of all trainings, with a one-cycle learning rate, augmented images, and an
exponential moving average of the weights as the result. A `Recipe` per data set decides the rest.
The test split is read once, after the last step, to write the accuracy into the file. There is no
label smoothing: it contracts the features of a class to one point, but the Fréchet distance has to
measure their spread.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff import data, metrics
from minidiff.data import ImageData, Stream
from minidiff.data.captioned.captions import Questions
from minidiff.data.captioned.scenes import NONE, QUESTIONS
from minidiff.errors import InvalidArgument
from minidiff.nn.classifier import Classifier, build_classifier
from minidiff.runtime.checks import instance
from minidiff.runtime.device import float32_by_default
from minidiff.runtime.distributed import World
from minidiff.runtime.files import atomic_file, ensure_writable
from minidiff.runtime.tensors import write_tensors
from minidiff.training.config import LoopConfig
from minidiff.training.loop import TrainingState, steps
from minidiff.training.optim import EMA
from minidiff.training.presets import Recipe
from minidiff.training.progress import Progress

_ROTATION = math.radians(12)
_SHEAR = 0.15
_SCALE = 0.1
_SHIFT = 0.12  # of half a side: 1.7 pixels of 28
_SHIFT_DIVISOR = 8  # a photograph moves by at most an eighth of its side
_EMA_DECAY = 0.998
_MOMENTUM = 0.9
_STORED = {"fp32": torch.float32, "fp16": torch.float16}


def warp(x: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, shear, scale and shift every image of a batch a little; never flip.

    Args:
        x: images (B, C, H, W) in [−1, 1]; outside them all is black, −1.
        generator: generator on the CPU, so that the warps do not depend on the device.
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
        x: images (B, C, H, W) in [−1, 1]; outside them are their mirror images.
        generator: generator on the CPU, so that the shifts do not depend on the device.
    """
    n, _, height, width = x.shape
    high, wide = height // _SHIFT_DIVISOR, width // _SHIFT_DIVISOR
    padded = F.pad(x, (wide, wide, high, high), mode="reflect")
    down = torch.randint(2 * high + 1, (n, 1), generator=generator) + torch.arange(height)
    right = torch.randint(2 * wide + 1, (n, 1), generator=generator) + torch.arange(width)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    right = torch.where(mirrored, right.flip(1), right)
    down, right = (index.to(x.device, non_blocking=True) for index in (down, right))
    image = torch.arange(n, device=x.device)[:, None, None]
    # Indices on three axes put the channels last, which is the fast memory format.
    return padded[image, :, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)


_AUGMENT: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "warp": warp,
    "photo": flip_and_shift,
    "none": lambda x, generator: x,
}
_SCENES_PER_EPOCH = {"train": 1 << 17, "test": 20_000}  # every epoch has others


def labelled(name: str, split: str, data_dir: str | None = None) -> ImageData | Questions:
    """Load a split of a data set, captioned digits with the answers to questions as labels.

    Raises:
        InvalidArgument, DataError: see `minidiff.data.load`.
    """
    if name != Questions.name:
        return instance(ImageData)("data", data.load(name, split, data_dir))
    return Questions(split, length=_SCENES_PER_EPOCH[split])


def architecture(images: ImageData | Questions, network: str = "plain") -> dict[str, int | str]:
    """Return options of `build_classifier` for images. Raises InvalidArgument without labels."""
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
    """Print one line per epoch."""
    print(f"epoch {epoch:3d}  loss {loss:.4f}  {seconds:.0f} s", flush=True)


class RisingEMA(EMA):
    """Average of weights and running statistics, with a decay that rises to a constant.

    Args:
        model: module to average; it is copied.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, half_life=0)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the current weights and statistics of `model` to the average."""
        self.updates += 1
        decay = min(_EMA_DECAY, self.updates / (self.updates + 10))  # early weights fade fast
        averaged, latest = (m.state_dict().values() for m in (self.model, model))
        pairs = list(zip(averaged, latest, strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - decay)
        for slow, fast in pairs:
            if not slow.is_floating_point():
                slow.copy_(fast)


class ClassifierTraining(TrainingState):
    """A training of a classifier under way, and its step.

    Args:
        images: images with labels, on the device of the training.
        recipe: options of the training.
    Raises:
        InvalidArgument: the images have no labels.
    """

    def __init__(self, images: ImageData | Questions, recipe: Recipe) -> None:
        self.images, self.recipe = images, recipe
        device = images.batch(torch.zeros(1, dtype=torch.int64))[0].device
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(recipe.seed)  # weights are drawn on the CPU
            net = build_classifier(architecture(images, recipe.network))
        net = net.to(device, memory_format=torch.channels_last)
        self.steps_per_epoch = math.ceil(len(images) / recipe.batch_size)
        steps = recipe.epochs * self.steps_per_epoch
        optimizer = _optimizer(net, recipe)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, steps, cycle_momentum=recipe.optimizer == "adamw"
        )
        config = LoopConfig(
            steps=steps,
            seed=recipe.seed,
            batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
        )
        super().__init__(config, net, RisingEMA(net), optimizer, device, World())
        self.meter.every = self.steps_per_epoch
        self.stream = Stream(len(images), recipe.seed)
        self.generator = torch.Generator().manual_seed(recipe.seed)

    def step(self) -> None:
        """Batch → augmentation → loss → step → average. Raises TrainingError."""
        position = self.stream.position
        x, labels = self.images.batch(self.stream.take(self.recipe.batch_size), position)
        x = _AUGMENT[self.recipe.augment](x, self.generator)
        x = x.contiguous(memory_format=torch.channels_last)
        bfloat16 = self.recipe.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            logits, _ = self.learner(x)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        self.update(loss.detach(), torch.zeros_like(loss), loss.detach())

    def set_learning_rates(self) -> None:
        """Advance the one-cycle schedule, which starts at the rate of the first step."""
        if self.budget.step:
            self.schedule.step()


@float32_by_default()
def train(
    images: ImageData | Questions,
    recipe: Recipe,
    on_epoch: Callable[[int, float, float], None] = print_epoch,
) -> Classifier:
    """Train a classifier and return the moving average of its weights, in eval mode.

    The average is rounded to what the file will hold. torch's global random state is left as it
    was.

    Args:
        images: images with labels; the work is done on their device. A label NONE is ignored.
        recipe: options of the training.
        on_epoch: called after every epoch with its number, the mean loss, and the seconds since
            the start.

    Raises:
        InvalidArgument: the images have no labels.
        TrainingError: the loss is not finite.
    """
    training = ClassifierTraining(images, recipe)

    def on_log_row(row: Progress) -> None:
        on_epoch(row.step // training.steps_per_epoch, row.loss, row.seconds)

    for _ in steps(training, on_log_row, lambda training: None):
        pass
    return training.average.model.to(_STORED[recipe.stored]).float()


def _optimizer(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimizer; the one-cycle schedule sets its learning rate."""
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        net.parameters(), lr=0.0, momentum=_MOMENTUM, nesterov=True,
        weight_decay=recipe.weight_decay,
    )  # fmt: skip


def write_digest(path: Path) -> None:
    """Write the SHA-256 of `path` into the SHA256SUMS next to it, instead of an older one."""
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
        path: safetensors file to write.
        name: name of the data set, or a folder of images.
        recipe: options of the training.
        device: device of the training.
        data_dir: folder with the files of MNIST or CIFAR-10.
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
    """Return the fraction of right labels, and that of each question."""
    predicted, _ = metrics.features(net, held_out.images)
    labels = held_out.labels
    given = labels != NONE
    overall = metrics.accuracy(predicted[given], labels[given])
    if labels.ndim == 1:
        return overall, {}
    right = (
        (predicted == labels.to(predicted.device))
        .double()
        .where(given.to(predicted.device), torch.nan)
    )
    fractions = right.nanmean(dim=0).tolist()
    return overall, {
        f"test_accuracy of {name}": f"{fraction:.4f}"
        for name, fraction in zip(QUESTIONS, fractions, strict=True)
    }


def write_classifier(
    path: Path, net: Classifier, stored: str = "fp32", metadata: dict[str, str] | None = None
) -> None:
    """Write the weights, and their SHA-256 into the list next to them.

    Args:
        path: safetensors file to write.
        net: the classifier.
        stored: number type of the weights in the file, "fp32" or "fp16".
        metadata: texts of the file; the `architecture` lets `read_classifier` build the network.
    Raises:
        CheckpointError: the file cannot be written.
    """
    half = {name: value.to(_STORED[stored]) if value.is_floating_point() else value
            for name, value in net.state_dict().items()}  # fmt: skip
    write_tensors(path, half, metadata)
    write_digest(path)
