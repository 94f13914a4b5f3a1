"""Quality of a distilled model in a few steps, beside its teacher.

    python benchmarks/few_steps.py RUN --data-dir DIR [--teacher mnist] [--num 1000] [--seed 0]
        [--png FILE]

Both draw the same classes from the same noise. The scores are those of `minidiff evaluate`:
accuracy of the classifier of real images, Fréchet distance on its features in ‰ of their spread,
and coverage. An evaluation is one image through the network once; guidance takes two. The last row
scores as many real images, drawn from the training set.
"""

import argparse

import torch

from minidiff.cli.run_options import open_start
from minidiff.images import plot
from minidiff.metrics import Evaluator
from minidiff.pipeline import Pipeline

ROWS = (("distilled", (1, 2, 4)), ("teacher", (1, 2, 10)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", help="run of minidiff distill, folder, or name of a shipped model")
    add("--teacher", default="mnist", help="run, folder or name of the model it was distilled from")
    add("--data", default="mnist", help="data set with a shipped classifier")
    add("--data-dir", help="folder of its files")
    add("--num", type=int, default=1000, help="samples per row")
    add("--seed", type=int, default=0, help="seed of the noise")
    add("--png", help="file for the first ten images of every row")
    options = parser.parse_args()
    pipes = {"distilled": open_start(options.model), "teacher": open_start(options.teacher)}
    evaluator = Evaluator(options.data, options.data_dir)
    print(f"{options.num} samples, seed {options.seed}")
    print("model      steps  evaluations  accuracy    FD ‰  coverage")
    shown = []
    for name, numbers in ROWS:
        for steps in numbers:
            images, labels, used = drawn(pipes[name], options.num, options.seed, steps)
            scores = evaluator.score(images, labels)
            print(f"{name:10}{steps:6}{used:13.1f}{scores.accuracy:10.1%}{scores.fd:8.1f}"
                  f"{scores.coverage:10.3f}", flush=True)  # fmt: skip
            shown.append(images[:10])
    floor = evaluator.floor(options.num)
    print(f"real{floor.accuracy:35.1%}{floor.fd:8.1f}{floor.coverage:10.3f}")
    if options.png:
        plot.save(plot.grid(torch.cat(shown).permute(0, 2, 3, 1).numpy(), 10), options.png)


def drawn(
    pipe: Pipeline, n: int, seed: int, steps: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return n images uint8 (N, C, H, W), their labels, and evaluations per image."""
    used = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, given: used.append(len(given[0])))
    made = pipe(num_images=n, seed=seed, num_inference_steps=steps, output_type="np")
    hook.remove()
    images = torch.from_numpy(made.images).permute(0, 3, 1, 2)
    return images, made.labels, sum(used) / n


if __name__ == "__main__":
    main()
