"""How good samples are: label accuracy, Fréchet distance and coverage, on our own features.

A small classifier (`nn/classifier.py`, trained on real images only) maps each image to its
penultimate layer. On these features:

    accuracy   the share of samples that the classifier takes for the class they were asked for
    FD‰        1000·(|μ_r − μ_f|² + tr(C_r + C_f − 2·(C_r·C_f)^½)) / tr(C_r)
    coverage   the share of real images that have a sample among their near neighbours

The first says whether samples are legible and obey, the second whether they are distributed like
the data, the third whether any part of the data is missing. FD‰ uses the formula of the Fréchet
inception distance but neither its network nor its scale, so it must never be called FID: 1000
means as far off as the data are wide, and real held-out images show about 1.

Sources: M. Heusel et al. 2017, arXiv:1706.08500, eq. 6; M. F. Naeem et al. 2020,
arXiv:2002.09797, section 3.2.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from minidiff import data
from minidiff.checkpoint import load_weights, read_tensors
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.nn.classifier import FeatureNet

WEIGHTS = Path(__file__).with_name("weights")
SUMS = "SHA256SUMS"


def load_classifier(name: str, folder: str | Path = WEIGHTS) -> FeatureNet:
    """The shipped classifier of a data set, on the CPU and in eval mode.

    Raises:
        InvalidArgument: for a data set without one.
        CheckpointError: the weights are missing or not the published ones, by SHA-256.
    """
    if name not in data.NAMES:
        raise InvalidArgument(
            f"metrics exist for {' and '.join(data.NAMES)}, not for {str(name)!r}: they need a "
            "classifier of that data set; train one with python -m minidiff.train_classifier"
        )
    path = Path(folder) / f"{name}.safetensors"
    expected = read_digests(path.with_name(SUMS)).get(path.name)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if expected is None:
        raise CheckpointError(f"{path.with_name(SUMS)}: has no entry for {path.name}")
    if (found := sha256(path)) != expected:
        raise CheckpointError(
            f"{path}: SHA-256 is {found[:12]}…, expected {expected[:12]}…; figures measured with "
            "other weights cannot be compared"
        )
    with safe_open(path, framework="pt") as file:
        net = FeatureNet(**json.loads(file.metadata()["architecture"]))
    load_weights(net, read_tensors(path), path)
    return net.to(memory_format=torch.channels_last).eval()


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_digests(path: Path) -> dict[str, str]:
    """File name → SHA-256, from a file as `sha256sum` writes it. Raises CheckpointError."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a readable list of SHA-256 sums ({error})") from error
    pairs = [line.split() for line in lines if line.strip()]
    if any(len(pair) != 2 or len(pair[0]) != 64 for pair in pairs):
        raise CheckpointError(f"{path}: every line must be a SHA-256 sum and a file name")
    return {name: digest for digest, name in pairs}


@torch.inference_mode()
def features(net: FeatureNet, images: Tensor, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """What the classifier makes of images.

    Args:
        net: in eval mode; the work is done on its device.
        images: uint8 (N, C, H, W), on any device.
        batch_size: bounds the memory; in eval mode the result does not depend on it.

    Returns:
        Predicted labels int64 (N,) and features float64 (N, D), both on the device of the net.
    """
    device = next(net.parameters()).device
    labels, rows = [], []
    for chunk in images.split(batch_size):
        logits, feature = net(data.to_float(chunk.to(device)))
        labels.append(logits.argmax(dim=1))
        rows.append(feature.double())
    return torch.cat(labels), torch.cat(rows)


def accuracy(predicted: Tensor, intended: Tensor) -> float:
    """The share of samples, in 0..1, whose predicted label (N,) is the intended one (N,)."""
    if predicted.shape != intended.shape:
        raise InvalidArgument(
            f"predicted and intended labels must have one shape, got {tuple(predicted.shape)} "
            f"and {tuple(intended.shape)}"
        )
    return (predicted == intended.to(predicted.device)).double().mean().item()
