"""The concept filter on samples of the shipped models: precision and recall per concept.

    python benchmarks/concept_filter.py [--num 1000] [--seed 0] [--models mnist,digits-text]
        --data-dir DIR

The filters learn from training images. Samples are judged by what the model was
conditioned on, so errors of the model count against the filter. "real" is the filter on
test images of the data. CPU-seconds are those of the filter, without the sampling.
"""

import argparse
import time

import torch
from torch import Tensor

from minidiff import shipped
from minidiff.adapters.concept_filter import ConceptFilter
from minidiff.data import load
from minidiff.data.captioned.captions import CaptionedDigits
from minidiff.data.captioned.scenes import COLOURS, QUESTIONS
from minidiff.images.pixels import to_float
from minidiff.metrics.scenes import task

EXAMPLES = 4000  # training images that a filter learns from


def of_classes(labels: Tensor, names: dict[str, int]) -> Tensor:
    """Return which images show each concept, bool (N, K)."""
    return torch.stack([labels == value for value in names.values()], 1)


def learned(classifier: str, images: Tensor, with_it: Tensor, names: list[str]) -> ConceptFilter:
    """Return a filter for concepts of training images."""
    examples = {name: images[with_it[:, k]] for k, name in enumerate(names)}
    return ConceptFilter.learn(classifier, examples, images[~with_it.any(1)])


def report(title: str, filter_: ConceptFilter, images: Tensor, with_it: Tensor) -> None:
    """Print precision and recall of a filter on images in [−1, 1]."""
    started = time.process_time()
    found = filter_.margins(images) > 0
    spent = time.process_time() - started
    for k, name in enumerate(filter_.names):
        hits = (found[:, k] & with_it[:, k]).sum().item()
        count = with_it[:, k].sum().item()
        precision, recall = hits / max(1, int(found[:, k].sum())), hits / max(1, count)
        row = f"{title:22}{name:14}{len(images):7}{count:6}{precision:11.1%}{recall:9.1%}"
        print(f"{row}{1000 * spent / len(images):12.2f}", flush=True)


def mnist(n: int, seed: int, folder: str | None) -> None:
    """Report on digits by class."""
    names = {f"digit {digit}": digit for digit in (1, 4, 7)}
    train, test = load("mnist", "train", folder), load("mnist", "test", folder)
    part = slice(0, EXAMPLES)
    with_it = of_classes(train.labels[part], names)
    filter_ = learned("mnist", train.images[part], with_it, list(names))
    report("mnist, real", filter_, to_float(test.images), of_classes(test.labels, names))
    made = shipped.load("mnist")(num_images=n, seed=seed, output_type="pt", progress=False)
    report("mnist, samples", filter_, made.images, of_classes(made.labels, names))


def captions(n: int, seed: int) -> None:
    """Report on digits and colours by prompt."""
    columns = {"digit 7": ("digit", 7), "red": ("colour", list(COLOURS).index("red"))}

    def wanted_of(wanted: Tensor) -> Tensor:
        return torch.stack([wanted[:, QUESTIONS.index(q)] == v for q, v in columns.values()], 1)

    chosen, data = task(EXAMPLES), CaptionedDigits("train")
    index = torch.arange(8 * EXAMPLES)
    wanted = data.caption_answers(index)
    fits = (wanted[:, :1] == 0)[:, 0] & (wanted[:, [QUESTIONS.index("digit")]] >= 0)[:, 0]
    fits &= wanted[:, QUESTIONS.index("colour")] >= 0
    index = index[fits][:EXAMPLES]
    filter_ = learned(
        "captions",
        data.images(index),
        wanted_of(data.caption_answers(index)),
        list(columns),
    )
    real = to_float(CaptionedDigits("test").images(chosen.index))
    report("digits-text, real", filter_, real, wanted_of(chosen.wanted))
    few = task(n)
    pipe = shipped.load("digits-text")
    made = pipe(few.prompts, seed=seed, output_type="pt", progress=False)
    report("digits-text, samples", filter_, made.images, wanted_of(few.wanted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--num", type=int, default=1000, help="samples per model")
    add("--seed", type=int, default=0, help="seed of the noise")
    add(
        "--models",
        default="mnist,digits-text",
        help="names of shipped models, with commas",
    )
    add("--data-dir", help="folder of MNIST's files")
    options = parser.parse_args()
    print("images                concept         number  with  precision   recall  ms an image")
    if "mnist" in options.models.split(","):
        mnist(options.num, options.seed, options.data_dir)
    if "digits-text" in options.models.split(","):
        captions(options.num, options.seed)


if __name__ == "__main__":
    main()
