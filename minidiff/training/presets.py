"""Presets: recipes by name, each with its data set, its `TrainConfig` and the reasons.

    minidiff train --preset mnist --data-dir DIR --out runs/mnist
    minidiff train --preset mnist --minutes 3 --config mine.toml --out runs/mine

A file given with --config overrides the preset, flags override both.
"""

from dataclasses import dataclass, replace

from minidiff.names import AUGMENTATIONS, CLASSIFIERS, MAX_SEED, TOYS
from minidiff.runtime.checks import check_fields, choice, option, real, whole
from minidiff.training.config import MAX_BATCH, TrainConfig

MAX_SIDE = 64  # pixels, or blocks of them, that a small network can see as a whole


@dataclass(frozen=True)
class Preset:
    """A recipe.

    Attributes:
        why: purpose and reasons, for `--help`.
        data: name of the data set that it was made for.
        train: options of the run.
    """

    why: str
    data: str
    train: TrainConfig


PRESETS = {
    "digits": Preset(
        "a minute on a laptop. The smallest network with good samples, at full resolution, where "
        "it learns strokes sooner than on blocks of pixels. Small batches, since many small steps "
        "teach more than few large ones; Muon; stable targets, which have less noise",
        "digits",
        TrainConfig(
            minutes=1.25, optimizer="muon", learning_rate=3e-3, stable_target=1024, batch_size=16,
            block=1, channels=(16, 48), guidance_scale=2.0,
        ),
    ),
    "mnist": Preset(
        "ten minutes on two cores. v-prediction at full resolution, with few channels there; small "
        "batches; Muon; stable targets, which have less noise. A stochastic sampler, whose new "
        "noise corrects earlier errors, and guidance only at middle noise levels",
        "mnist",
        TrainConfig(
            minutes=10, optimizer="muon", batch_size=32, final_batch_size=64, block=1,
            channels=(16, 32, 64), learning_rate=3e-3, stable_target=2048, sampler="sde-dpm++",
            num_inference_steps=15, guidance_scale=1.45, guidance_interval=(0.4, 6.0),
        ),
    ),
    "cifar10": Preset(
        "25 minutes on one GPU. Full resolution and three levels of 64 to 192 channels: a small "
        "network of 16 MB in 16 bits, so that it trains on many images. Muon; stable targets, "
        "which have less noise; mirrored images",
        "cifar10",
        TrainConfig(
            minutes=25, prediction_type="edm", optimizer="muon", batch_size=128,
            final_batch_size=256, flip=True, learning_rate=1.5e-3, stable_target=2048, block=1,
            channels=(64, 128, 192), num_inference_steps=18,
        ),
    ),
    "captions": Preset(
        "eight minutes on one GPU (with --cuda-graph). Text to image at full resolution. The text "
        "encoder is trained with the network. High noise levels, which decide the content of an "
        "image, are drawn more often",
        "captions",
        TrainConfig(
            minutes=8, optimizer="muon", noise_levels="log_normal", level_mean=0.6, level_std=1.6,
            batch_size=128, final_batch_size=256, block=1, channels=(32, 48, 80),
            guidance_scale=3.0, guide="apg", num_inference_steps=20,
        ),
    ),
    "points": Preset(
        "20 seconds on one core, for learning and for trying out ideas. AdamW at a high learning "
        "rate; for so small a network, its steps take half the time of Muon's",
        "ring",
        TrainConfig(
            minutes=0.3, batch_size=512, learning_rate=1e-2, channels=(128,), layers=3, block=1,
            guidance_scale=1.0, num_inference_steps=20,
        ),
    ),
    "research": Preset(
        "a textbook baseline: noise prediction on the linear schedule (Ho et al. 2020), a constant "
        "batch size and nothing else; use flags for the options under study",
        "mnist",
        TrainConfig(
            steps=100_000, prediction_type="epsilon", beta_schedule="linear", batch_size=128,
            learning_rate=2e-4, weight_decay=0.0, block=1, channels=(64, 128, 128), layers=2,
            guidance_scale=1.0, num_inference_steps=50,
        ),
    ),
}  # fmt: skip


def fitting(data: str, gpu: bool) -> str:
    """Return the name of the preset for a data set; any other name is a folder of images.

    Args:
        data: name of the data.
        gpu: whether the training runs on a GPU, which the preset cifar10 is for.
    """
    if data in TOYS:
        return "points"
    if data in PRESETS and (gpu or data != "cifar10"):
        return data
    return "cifar10" if gpu else "mnist"


def preset_for(data: str, shape: tuple[int, ...], gpu: bool) -> TrainConfig:
    """Return the options of the fitting preset, with blocks for large images.

    Args:
        data: name of the data; only the CIFAR-10 of the preset is mirrored.
        shape: (C, H, W) of the images, or (D,) of points. The network of images works on at most
            64 × 64 blocks, if a block of up to 8 × 8 pixels divides the images.
        gpu: whether the training runs on a GPU.
    """
    name = "points" if len(shape) == 1 else fitting(data, gpu)
    config, sides = PRESETS[name].train, shape[1:]
    fits = (b for b in (1, 2, 4, 8) if all(s <= MAX_SIDE * b and s % b == 0 for s in sides))
    return replace(config, block=next(fits, 1), flip=config.flip and data == "cifar10")


@dataclass(frozen=True)
class Recipe:
    """Options of a classifier's training. Raises InvalidArgument naming the field.

    The learning rate rises to its peak in the first 30 % of the steps and then falls to 0. Weights
    are rounded to the type of the file before they are measured.
    """

    epochs: int = option(16, "passes over the images", whole(1))
    # batch norm cannot learn from one image
    batch_size: int = option(128, "images per step", whole(2, MAX_BATCH))
    learning_rate: float = option(4e-3, "peak learning rate", real(1e-8, 1.0))
    weight_decay: float = option(
        0.02, "weight decay, decoupled for adamw but not for sgd", real(0, 1.0)
    )
    optimizer: str = option(
        "adamw", "optimizer: adamw, or sgd with Nesterov momentum", choice("adamw", "sgd")
    )
    augment: str = option(
        "warp",
        "augmentation: warp for digits, photo for photographs, or none",
        choice(*AUGMENTATIONS),
    )
    network: str = option("plain", f"network: {', '.join(CLASSIFIERS)}", choice(*CLASSIFIERS))
    precision: str = option("fp32", "number type of the matrix work", choice("fp32", "bf16"))
    stored: str = option("fp32", "number type of the weights in the file", choice("fp32", "fp16"))
    seed: int = option(0, "seed of weights, order of the images and augmentation",
                       whole(0, MAX_SEED))  # fmt: skip

    def __post_init__(self) -> None:
        check_fields(self)


RECIPES = {
    "digits": Recipe(),
    "mnist": Recipe(),
    "cifar10": Recipe(
        epochs=200, batch_size=512, learning_rate=0.4, weight_decay=5e-4, optimizer="sgd",
        augment="photo", network="residual", precision="bf16", stored="fp16",
    ),
    "captions": Recipe(batch_size=256, augment="none", network="scene"),
}  # fmt: skip
