"""Agreement of samples with their captions, for a model of captioned digits.

    python benchmarks/text_to_image.py minidiff/models/digits-text [--num 1000] [--seed 0]
        [--device cuda] [--parts captions,guidance,guides,negative,strength] [--png FILE]

Five tables, scored by the classifier of real images (`minidiff.metrics.SceneEvaluator`), with the
model's stored sampler and number of steps. Real images of the same captions are scored as well.

    captions    digit, colour and background of one digit; the same for pairs of digit and colour
                that are not in the training data; and all attributes of any caption
    guidance    scales from 1 to 10: fraction with all attributes right, and coverage of real images
    guides      ways of guidance at 12 and 20 steps: fraction with the right digit where the prompt
                names no colour, and distance of a painted background from the colour of the data
    negative    a colour as negative prompt: its frequency, and the other attributes
    strength    image-to-image from real images to another digit: distance from the image, and
                fractions with the right digit and with the position kept
"""

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidiff.data.captioned.captions import CaptionedDigits
from minidiff.data.captioned.scenes import COLOURS, DIGITS, NONE, QUESTIONS
from minidiff.guidance import METHODS
from minidiff.images import plot
from minidiff.images.pixels import to_float
from minidiff.metrics import SceneEvaluator, coverage
from minidiff.metrics.scenes import compare, task
from minidiff.pipeline import Pipeline
from minidiff.runs.folder import open_pipeline

GUIDANCE = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)
STRENGTHS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
WAYS = [("cfg", 1.0), *((way, scale) for way in METHODS for scale in (2.0, 3.0, 4.0))]
UNWANTED = "blue"
PARTS = ("captions", "guidance", "guides", "negative", "strength")  # methods of Bench


class Bench:
    """The tables of one model.

    Args:
        pipe: model of captioned digits.
        n: samples per figure.
        seed: seed of the noise.
        device: device of the classifier.

    Attributes:
        sweep: the first twelve images of every guidance scale, once `guidance` has run.
    """

    def __init__(self, pipe: Pipeline, n: int, seed: int, device: str) -> None:
        self.pipe, self.n, self.seed = pipe, n, seed
        self.evaluator = SceneEvaluator(device)

    def draw(self, prompts: list[str], **options: Any) -> Tensor:
        """Return images of prompts, uint8 (N, 3, 32, 32)."""
        made = self.pipe(prompts, seed=self.seed, output_type="np", **options).images
        return torch.from_numpy(made).permute(0, 3, 1, 2)

    def captions(self) -> None:
        """Print the scores on three kinds of captions."""
        for line in self.evaluator.table(self.draw, self.n):
            print(line, flush=True)

    def guidance(self) -> None:
        """Print scores and coverage by guidance scale."""
        chosen = task(self.n)
        real = CaptionedDigits("test").images(chosen.index)
        _, reference = self.evaluator.read(real)
        others = task(self.n, seed=1)  # their coverage is the best to expect
        _, again = self.evaluator.read(CaptionedDigits("test", seed=1).images(others.index))
        print(f"\nguidance  all together  coverage    real: {coverage(reference, again):.3f}")
        rows = []
        for scale in GUIDANCE:
            images = self.draw(chosen.prompts, guidance_scale=float(scale))
            answers, features = self.evaluator.read(images)
            together = compare(answers, chosen.wanted).together
            print(f"{scale:8g}{together:14.1%}{coverage(reference, features):10.3f}", flush=True)
            rows.append(images[:12])
        self.sweep = torch.cat(rows).permute(0, 2, 3, 1).numpy()

    def guides(self) -> None:
        """Print what each way of guidance does to digits without a colour, and to colours."""
        names = list(COLOURS)
        digits = torch.arange(self.n) % DIGITS
        grounds = torch.arange(self.n) // DIGITS % len(names)
        plain = [f"a big {d} on a white background" for d in digits.tolist()]
        pairs = zip(digits.tolist(), grounds.tolist(), strict=True)
        grounded = [f"a big {d} on a {names[g]} background" for d, g in pairs]
        wanted = torch.tensor(list(COLOURS.values()))[grounds].float()
        print("\nguide      scale  steps  digit, no colour named  colour error  worst colour")
        for way, scale in WAYS:
            for steps in (12, 20):
                options = {"guide": way, "guidance_scale": scale, "num_inference_steps": steps}
                answers, _ = self.evaluator.read(self.draw(plain, **options))
                right = (answers[:, QUESTIONS.index("digit")] == digits).double().mean()
                images = self.draw(grounded, **options)
                border = torch.cat([images[:, :, 0], images[:, :, -1]], 2).float()
                error = (border.median(2).values - wanted).abs().mean(1)
                worst = torch.stack([error[grounds == g].mean() for g in grounds.unique()]).max()
                print(f"{way:10}{scale:6g}{steps:7}{right:18.1%}{error.mean():19.1f}{worst:14.1f}",
                      flush=True)  # fmt: skip

    def negative(self) -> None:
        """Print the frequency of a colour without and with it as negative prompt."""
        digits = np.arange(self.n) % DIGITS
        prompts = [f"a big {digit} on a white background" for digit in digits]
        wanted = torch.full((self.n, len(QUESTIONS)), NONE)
        wanted[:, QUESTIONS.index("digit")] = torch.from_numpy(digits)
        wanted[:, QUESTIONS.index("background")] = list(COLOURS).index("white")
        print(f"\nnegative prompt    {UNWANTED}    the others")
        for name, negative in (("none", None), (UNWANTED, UNWANTED)):
            answers, _ = self.evaluator.read(self.draw(prompts, negative_prompt=negative))
            named = answers[:, QUESTIONS.index("colour")] == list(COLOURS).index(UNWANTED)
            print(f"{name:15}{named.double().mean():8.1%}    {compare(answers, wanted)}")

    def strength(self) -> None:
        """Print scores of real images changed to the next digit, with all other words kept."""
        data = CaptionedDigits("test")
        index = torch.arange(8 * self.n)
        scenes = data.scenes(index)
        chosen = (scenes.relation == NONE).nonzero()[: self.n, 0]
        given, before = data.images(index[chosen]), data.scenes(index[chosen])
        digit = (before.digit[:, 0] + 1) % DIGITS
        names = list(COLOURS)
        prompts = [
            f"{names[colour]} {number} on {names[background]}"
            for colour, number, background in zip(
                before.colour[:, 0].tolist(),
                digit.tolist(),
                before.background.tolist(),
                strict=True,
            )
        ]
        print("\nstrength  distance   digit  position    distance: root mean square, in 0..2")
        for strength in STRENGTHS:
            made = self.draw(prompts, image=to_float(given), strength=strength)
            answers, _ = self.evaluator.read(made)
            distance = (to_float(made) - to_float(given)).square().mean().sqrt()
            right = (answers[:, QUESTIONS.index("digit")] == digit).double().mean()
            stays = (answers[:, QUESTIONS.index("position")] == before.position).double().mean()
            print(f"{strength:8g}{distance:10.3f}{right:8.1%}{stays:10.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", help="run, or folder of a model")
    add("--num", type=int, default=1000, help="samples per figure")
    add("--seed", type=int, default=0, help="seed of the noise")
    add("--device", default="cpu", help="cpu or cuda")
    add("--parts", default=",".join(PARTS), help="names of tables, with commas")
    add("--png", help="file for the images of `guidance`, a row per scale")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(
            f"--parts must be some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}"
        )
    if options.png and "guidance" not in parts:
        parser.error("--png needs the part guidance, which --parts leaves out")
    pipe = open_pipeline(options.model, options.device)
    bench = Bench(pipe, options.num, options.seed, options.device)
    print(
        f"{options.num} samples, seed {options.seed}: {type(pipe.scheduler).__name__}, "
        f"{pipe.num_inference_steps} steps, guidance {pipe.guidance_scale:g}"
    )
    for part in parts:
        getattr(bench, part)()
    if options.png:
        plot.save(plot.grid(bench.sweep, 12), options.png)


if __name__ == "__main__":
    main()
