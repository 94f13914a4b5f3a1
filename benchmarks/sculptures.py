"""Score distillation: how many pairs of digits are read right from both sides of their volume.

    python benchmarks/sculptures.py [--pairs 45] [--seed 0]

A classifier that was trained on real images alone judges the front and the side view. CPU-seconds
are those of one volume.
"""

import argparse
import itertools
import statistics
import time

from minidiff import shipped
from minidiff.images.pixels import to_uint8
from minidiff.metrics.classifier import features, load_classifier
from minidiff.modalities.sculpture import sculpt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=45)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pipe, judge = shipped.load("mnist"), load_classifier("mnist")
    both = sides = 0
    seconds = []
    pairs = list(itertools.combinations(range(10), 2))[: options.pairs]
    for front, side in pairs:
        started = time.process_time()
        views = sculpt(pipe, front, side, seed=options.seed, progress=False).views()
        seconds.append(time.process_time() - started)
        read = features(judge, to_uint8(views))[0].tolist()
        right = [read[0] == front, read[1] == side]
        both, sides = both + all(right), sides + sum(right)
        print(f"front {front}, side {side}: read as {read[0]}, {read[1]}", flush=True)
    n = len(pairs)
    print(f"\nboth views right: {both} of {n} ({both / n:.1%}); views right: {sides} of {2 * n}")
    print(f"{statistics.median(seconds):.1f} CPU-seconds a volume (median)")


if __name__ == "__main__":
    main()
