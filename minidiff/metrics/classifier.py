"""Classifiers whose features the metrics use: shipped with minidiff, or read from a file.

`minidiff train-classifier` trains them, on real images only. A shipped file is checked by its
SHA-256, since figures measured with other weights cannot be compared.
"""

from pathlib import Path

import torch
from torch import Tensor

from minidiff import data
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.nn.classifier import Classifier, build_classifier
from minidiff.runtime.files import parse_json, sha256
from minidiff.runtime.tensors import load_weights, read_headers, read_metadata

WEIGHTS = Path(__file__).parent.with_name("weights")
SUMS = "SHA256SUMS"


def shipped() -> list[str]:
    """Return the names of the data sets with a shipped classifier. Raises CheckpointError."""
    return [Path(file).stem for file in read_digests(WEIGHTS / SUMS)]


def load_classifier(name: str, folder: str | Path = WEIGHTS) -> Classifier:
    """Return the shipped classifier of a data set, on the CPU and in eval mode.

    Raises:
        InvalidArgument: the data set has no shipped classifier.
        CheckpointError: the weights are missing or have another SHA-256.
    """
    if name not in (names := shipped()):
        raise InvalidArgument(
            f"a classifier is shipped for {' and '.join(names)}, not for {str(name)!r}; "
            "train one with minidiff train-classifier"
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
    return read_classifier(path)


def read_classifier(path: str | Path) -> Classifier:
    """Return the classifier of a file of `minidiff train-classifier`, in eval mode.

    Raises:
        CheckpointError: the file is missing, damaged, or holds no classifier.
    """
    path = Path(path)
    try:
        architecture = parse_json(read_metadata(path)["architecture"])
        with torch.device("meta"):  # no memory for tensors that the file may lack
            net = build_classifier(architecture)
    except (KeyError, ValueError) as error:  # an InvalidArgument is a ValueError
        raise CheckpointError(
            f"{path}: has no valid architecture of a classifier ({error}); "
            "minidiff train-classifier writes such files"
        ) from error
    load_weights(net, read_headers([path]))
    return net.to(memory_format=torch.channels_last).eval()


def read_digests(path: Path) -> dict[str, str]:
    """Return SHA-256 by file name, from a file in the form of `sha256sum`.

    Raises:
        CheckpointError: the file cannot be read, or has another form.
    """
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a readable list of SHA-256 sums ({error})") from error
    pairs = [line.split() for line in lines if line.strip()]
    if any(len(pair) != 2 or len(pair[0]) != 64 for pair in pairs):
        raise CheckpointError(f"{path}: every line must be a SHA-256 sum and a file name")
    return {name: digest for digest, name in pairs}


@torch.inference_mode()
def features(net: Classifier, images: Tensor, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Return the classifier's predictions and features of images.

    Args:
        net: classifier in eval mode, on the device to compute on.
        images: uint8 (N, C, H, W), on any device.
        batch_size: images in memory at once; no influence on the result.

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
    """Return the fraction, 0..1, of predicted labels (N,) that equal the intended ones (N,)."""
    if predicted.shape != intended.shape:
        raise InvalidArgument(
            f"predicted and intended labels must have the same shape, got {tuple(predicted.shape)} "
            f"and {tuple(intended.shape)}"
        )
    return (predicted == intended.to(predicted.device)).double().mean().item()
