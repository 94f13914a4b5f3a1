"""What a model learns from a few pictures, and what it forgets: the table of docs/adapters.md.

    python benchmarks/adapters.py [--rows dreambooth,lora,…] [--seeds 0,1,2] [--num 200]
        [--factor 1.0] [--png FOLDER]

The model is the shipped `digits-text`. Budgets are in steps. Judges know real pictures alone: the
classifier of real scenes reads digits, colours and backgrounds, and a logistic regression on its
features tells real shapes or striped digits from plain real digits. "subject" is the fraction of
samples with the new shape or style, and "old" the
fraction of usual captions with digit and colours right. Real pictures are judged as well.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiff import shipped
from minidiff.adapters import CustomDiffusion, DreamBooth, LoRA, TextualInversion, examples
from minidiff.data.captioned.captions import CaptionedDigits
from minidiff.data.captioned.scenes import COLOURS, CONTRAST, NONE, QUESTIONS
from minidiff.images import plot
from minidiff.metrics import SceneEvaluator
from minidiff.metrics.scenes import task
from minidiff.pipeline import Pipeline
from minidiff.training.config import TrainConfig
from minidiff.training.diffusion import train

WITH_CONVOLUTIONS = ("attention", "convolution")
HIGH_NOISE = {"noise_levels": "log_normal", "level_mean": 0.7, "level_std": 1.6}
DRAWING = {"guide": "apg", "num_inference_steps": 12, "output_type": "np", "progress": False}


class Row(NamedTuple):
    """One training of the table.

    Attributes:
        data: key of `examples.EXAMPLES`.
        pictures: number of pictures.
        learner: what is learned.
        steps: steps of 16 images.
        options: further options of the TrainConfig.
        scales: scales at which the adapter is judged.
    """

    data: str
    pictures: int
    learner: Any
    steps: int
    options: dict[str, Any]
    scales: tuple[float, ...] = (1.0,)


ROWS = {
    "dreambooth": Row("hearts", 16, DreamBooth(), 400, HIGH_NOISE),
    "dreambooth-alone": Row("hearts", 16, DreamBooth(prior=0), 400, HIGH_NOISE),
    "dreambooth-5": Row("hearts", 5, DreamBooth(), 400, HIGH_NOISE),
    "lora": Row(
        "hearts", 16, LoRA(rank=8, targets=WITH_CONVOLUTIONS), 600,
        {**HIGH_NOISE, "learning_rate": 2e-3},
    ),
    "style": Row("striped", 64, LoRA(rank=8), 350, {}, (0.5, 0.75, 1.0)),
    "colour": Row("brown", 10, TextualInversion(), 500, {}),
    "shape": Row("hearts", 16, TextualInversion(), 350, HIGH_NOISE),
    "custom": Row("hearts", 16, CustomDiffusion(), 450, HIGH_NOISE),
}  # fmt: skip


class Judge:
    """Reads pictures by classifiers of real ones."""

    def __init__(self) -> None:
        self.evaluator = SceneEvaluator()
        self.subjects: dict[str, Callable[[Tensor], Tensor]] = {}

    def subject(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return a function from features (N, D) to whether a picture shows the subject.

        It is a logistic regression between 600 real pictures of the subject and of single digits.
        """
        if name not in self.subjects:
            _, mine = self.evaluator.read(examples.load(name, 600, seed=1001).images)
            _, others = self.evaluator.read(CaptionedDigits().images(task(600, "all").index))
            rows = torch.cat([mine, others]).float()
            mean, std = rows.mean(dim=0), rows.std(dim=0) + 1e-6
            wanted = torch.cat([torch.ones(len(mine)), torch.zeros(len(others))])
            weight = torch.zeros(rows.shape[1] + 1, requires_grad=True)
            optimizer = torch.optim.LBFGS([weight], max_iter=100)

            def score(x: Tensor) -> Tensor:
                return ((x.float() - mean) / std) @ weight[:-1] + weight[-1]

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.binary_cross_entropy_with_logits(score(rows), wanted)
                loss = loss + 1e-3 * weight.square().sum()
                loss.backward()
                return loss

            optimizer.step(closure)
            self.subjects[name] = lambda x: score(x).detach() > 0
        return self.subjects[name]

    def scores(self, name: str, images: Tensor, wanted: Tensor) -> dict[str, float]:
        """Return fractions: the subject, the right digit, and both colours.

        Args:
            name: key of `examples.EXAMPLES`.
            images: uint8 (N, 3, 32, 32).
            wanted: digit, colour and background of each, int64 (N, 3); NONE for any.
        """
        answers, rows = self.evaluator.read(images)
        got = answers[:, [QUESTIONS.index(q) for q in ("digit", "colour", "background")]]
        right = (got == wanted) | (wanted == NONE)
        found = {"digit": right[:, 0], "both colours": right[:, 1:].all(dim=1)}
        if name != "brown":
            found["subject"] = self.subject(name)(rows)
        means = {k: v.double().mean().item() for k, v in found.items()}
        if name == "brown":
            ink = ink_of(images, wanted[:, 2])
            means["distance"] = (ink - torch.tensor(examples.BROWN)).norm(dim=1).mean().item()
        return means


def ink_of(images: Tensor, background: Tensor) -> Tensor:
    """Return the colour of the ink, (N, 3): the mean of the 12 pixels furthest from the ground."""
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    pixels = images.float().flatten(2)
    far = (pixels - palette[background][..., None]).norm(dim=1).topk(12).indices
    return pixels.gather(2, far[:, None].expand(-1, 3, -1)).mean(dim=2)


def captions(name: str, n: int) -> tuple[list[str], Tensor]:
    """Return n captions with the new word, and digit, colour and background of each."""
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    names = list(COLOURS)
    inks = torch.tensor([examples.BROWN]).float() if name == "brown" else palette
    apart = torch.cdist(inks, palette) >= CONTRAST
    pairs = [(i, j) for i, j in product(range(len(inks)), range(len(names))) if apart[i, j]]
    texts, wanted = [], []
    for k in range(n):
        colour, ground = pairs[7 * k % len(pairs)]
        digit = 3 * k % 10
        what = {"striped": f"striped {names[colour]} {digit}", "brown": f"brown {digit}"}.get(
            name, f"{names[colour]} {examples.SHAPES.get(name, ('',))[0]}"
        )
        texts.append(f"a {what} on a {names[ground]} background".replace("a orange", "an orange"))
        plain = name in examples.SHAPES
        wanted.append((NONE if plain else digit, NONE if name == "brown" else colour, ground))
    return texts, torch.tensor(wanted)


def draw(pipe: Pipeline, texts: list[str], seed: int) -> Tensor:
    """Return pictures, uint8 (N, 3, 32, 32)."""
    images = pipe(texts, seed=seed, batch_size=50, **DRAWING).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def figures(judge: Judge, row: Row, pipe: Pipeline, n: int, seed: int) -> Iterator[tuple]:
    """Yield scale, new and old scores, and the pictures, for each scale of a row."""
    texts, wanted = captions(row.data, n)
    old = task(n, "all")
    questions = [QUESTIONS.index(q) for q in ("digit", "colour", "background")]
    for scale in row.scales:
        pipe.set_adapter(row.learner.name, scale)
        new, usual = draw(pipe, texts, seed), draw(pipe, old.prompts, seed)
        scores = judge.scores(row.data, new, wanted)
        answers, rows = judge.evaluator.read(usual)
        right = (answers == old.wanted)[:, questions].all(dim=1).double().mean().item()
        scores["old"] = right
        if row.data in examples.SHAPES:
            scores["subject in old"] = judge.subject(row.data)(rows).double().mean().item()
        yield scale, scores, new, usual


def listed(scores: dict[str, float]) -> str:
    """Return scores as text: per cent, and distances in grey levels."""
    return ", ".join(
        f"{name} {value:.0f}" if name == "distance" else f"{name} {value:.1%}"
        for name, value in scores.items()
    )


def ceiling(judge: Judge, name: str, n: int) -> str:
    """Return the scores of real pictures."""
    data = examples.load(name, n, seed=2002)
    words = [text.split() for text in data.texts]
    names = list(COLOURS)
    mentions = [[names.index(w) for w in text if w in names] for text in words]
    wanted = []
    for text, found in zip(data.texts, mentions, strict=True):
        first = " background with" in text or name == "brown"
        ink, ground = (NONE, found[0]) if name == "brown" else found[:: -1 if first else 1]
        wanted.append((NONE, ink, ground))
    return listed(judge.scores(name, data.images, torch.tensor(wanted)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help="rows, with commas")
    parser.add_argument("--seeds", default="0", help="seeds of training and noise, with commas")
    parser.add_argument("--num", type=int, default=200, help="samples per figure")
    parser.add_argument("--factor", type=float, default=1.0, help="factor on all budgets")
    parser.add_argument("--png", help="folder for pictures")
    options = parser.parse_args()
    judge, base, known = Judge(), shipped.load("digits-text"), set()
    for name, seed in product(options.rows.split(","), map(int, options.seeds.split(","))):
        row = ROWS[name]
        if row.data not in known:
            print(f"real {row.data}: {ceiling(judge, row.data, options.num)}", flush=True)
            known.add(row.data)
        began, steps = time.process_time(), max(1, round(options.factor * row.steps))
        config = TrainConfig(
            steps=steps, batch_size=16, pictures=0, seed=seed,
            **{**row.learner.defaults, **row.options},
        )  # fmt: skip
        data = examples.load(row.data, row.pictures)
        pipe = train(config, data, start=base, learner=row.learner, progress=False)
        spent = time.process_time() - began
        adapter = pipe.stack.adapters[row.learner.name][0]
        count = sum(p.numel() for p in adapter.change.parameters())
        count += sum(rows.numel() for rows in adapter.words.values())
        title = f"{name}, {row.pictures} pictures, seed {seed}, {steps} steps, {spent:.0f} CPU-s"
        print(f"{title}, {count:,} numbers", flush=True)
        for scale, scores, new, usual in figures(judge, row, pipe, options.num, seed):
            print(f"  scale {scale:g}: {listed(scores)}", flush=True)
            if options.png:
                both = torch.cat([new[:20], usual[:20]]).permute(0, 2, 3, 1).numpy()
                Path(options.png).mkdir(parents=True, exist_ok=True)
                plot.save(
                    plot.picture(both, 10, 2, None),
                    Path(options.png) / f"{name}-{seed}-{scale:g}.png",
                )


if __name__ == "__main__":
    main()
