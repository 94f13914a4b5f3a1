"""Exercises on measuring, and on when a digit is decided (notebooks 00 and 13)."""

import torch

from minidiff import shipped
from minidiff.metrics.classifier import accuracy, features, load_classifier
from minidiff.metrics.distances import frechet_distance
from minidiff.metrics.neighbours import copying, coverage
from minidiff.pipeline import Pipeline
from minidiff.schedulers import DDIMScheduler
from minidiff.teach.exercise import Exercise, Wrong, given, noise

LAST = 19


def decided():
    """Return the first of 20 steps from which x̂0 is a seven to the classifier, for seed 1."""
    pipe = Pipeline.from_pretrained(shipped.folder("mnist"))
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, timestep_spacing="trailing"
    )
    guesses = []

    def keep(step):
        guesses.append(pipe.decode(step.x0))

    pipe(7, num_inference_steps=LAST + 1, seed=1, guidance_scale=1.0, callback=keep, progress=False)
    pixels = torch.cat(guesses).clamp(-1, 1)
    seen, _ = features(load_classifier("mnist"), ((pixels + 1) * 127.5).round().to(torch.uint8))
    others = (seen != 7).nonzero().flatten().tolist()
    return others[-1] + 1 if others else 0


DECIDED = Exercise(
    "decided",
    0,
    "At which of 20 steps (0…19) is the digit decided? The shipped MNIST model, class 7, seed 1, "
    "DDIM without guidance: from which step on does a classifier read x̂0 as a seven? Within 1.",
    decided,
    lambda: [()],
    3,
    "Watch x̂0, not x.",
    (
        Wrong(LAST, "That is when x is clean. x̂0 shows the digit long before."),
        Wrong(10, "Half-way x still looks like noise; x̂0 was a digit before."),
        Wrong(0, "The first x̂0 is the mean of all sevens, and so blurred that it is read as an 8."),
    ),
    close=1.0,
    measure=given,
)


def frechet(real, fake):
    means = (real.mean(0) - fake.mean(0)).square().sum()
    a, b = torch.cov(real.T), torch.cov(fake.T)
    cross = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    return 1000 * (means + a.trace() + b.trace() - 2 * cross) / a.trace()


def _frechet_with(cross):
    def answer(real, fake):
        means = (real.mean(0) - fake.mean(0)).square().sum()
        a, b = torch.cov(real.T), torch.cov(fake.T)
        return 1000 * (means + a.trace() + b.trace() - 2 * cross(a, b)) / a.trace()

    return answer


def _over_images(real, fake):
    means = (real.mean(0) - fake.mean(0)).square().sum()
    a, b = torch.cov(real), torch.cov(fake)
    cross = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    return 1000 * (means + a.trace() + b.trace() - 2 * cross) / a.trace()


def _clouds():
    mix = torch.tensor([[1.0, 0.4, 0.0], [0.0, 0.7, 0.3], [0.0, 0.0, 0.5]], dtype=torch.float64)
    yield noise(60, 3), noise(60, 3, seed=1) @ mix + 0.5
    yield noise(60, 3, seed=2) @ mix, noise(60, 3, seed=3)


FRECHET = Exercise(
    "frechet",
    13,
    "Write frechet(real, fake): the Fréchet distance in ‰ of the spread of the real features, "
    "1000·(|μ − μ'|² + tr(C + C' − 2·(C·C')^½))/tr(C), for features (N, D).",
    frechet_distance,
    _clouds,
    frechet,
    "The trace of a matrix root is the sum of the roots of the eigenvalues.",
    (
        Wrong(
            _over_images,
            "The covariance is between images, not between features: torch.cov wants features in "
            "rows.",
            "denoising-diffusion-pytorch#213",
        ),
        Wrong(
            _frechet_with(lambda a, b: (a * b).clamp(min=0).sqrt().trace()),
            "C·C' is a product of matrices, and so is its root; element by element is right only "
            "without correlations.",
            "TTUR#12",
        ),
        Wrong(
            _frechet_with(lambda a, b: (a @ b).trace()),
            "The root is missing: tr (C·C')^½.",
            "k-diffusion PR 78",
        ),
        Wrong(
            lambda real, fake: frechet(real, fake) * torch.cov(real.T).trace() / 1000,
            "Not yet in ‰ of the spread: divide by tr(C) and multiply by 1000.",
        ),
        Wrong(
            lambda real, fake: frechet(real - real.mean(0), fake - fake.mean(0)),
            "The difference of the means is missing.",
        ),
    ),
    close=1e-5,
)


def covered(real, fake, k):
    to_real = torch.cdist(real, real).fill_diagonal_(float("inf"))
    radius = to_real.sort(dim=1).values[:, k - 1 : k]
    return (torch.cdist(real, fake) <= radius).any(dim=1).double().mean()


def _radius(points, k):
    """Return the distance to the k-th point, itself included."""
    return torch.cdist(points, points).sort(dim=1).values[:, k - 1 : k]


COVERED = Exercise(
    "coverage",
    13,
    "Write covered(real, fake, k): the fraction of real points with a fake one within the distance "
    "to their k-th nearest other real point (Naeem et al. 2020).",
    coverage,
    lambda: [(noise(80, 2), noise(50, 2, seed=1) + shift, 3) for shift in (0.0, 1.0)],
    covered,
    "A ball around every real point. Is it its own nearest neighbour?",
    (
        Wrong(
            lambda real, fake, k: covered(fake, real, k),
            "Real and fake are exchanged: that measures whether samples lie near data.",
            "torch-fidelity#58",
        ),
        Wrong(
            lambda real, fake, k: (
                (torch.cdist(real, fake) <= _radius(real, k)).any(dim=1).double().mean()
            ),
            "Every point counts itself as its nearest neighbour: the balls are too small.",
        ),
        Wrong(
            lambda real, fake, k: (
                (torch.cdist(real, fake) <= _radius(real, k + 1)).any(dim=0).double().mean()
            ),
            "That is the fraction of fake points in some ball, which copies of one image satisfy. "
            "Count the balls.",
        ),
    ),
)


def _distances():
    generator = torch.Generator().manual_seed(0)
    for n in (21, 41):
        samples, training, held_out = (
            torch.randint(0, 256, (n, 1, 3, 3), generator=generator, dtype=torch.uint8)
            for _ in range(3)
        )
        yield samples, training, held_out


def copying_ratio(samples, training, held_out):
    near = [
        torch.cdist(samples.flatten(1).double(), images.flatten(1).double()).min(dim=1).values
        for images in (training, held_out)
    ]
    return (near[0] / near[1]).median()


def _near(samples, images):
    return torch.cdist(samples.flatten(1).double(), images.flatten(1).double()).min(dim=1).values


COPYING = Exercise(
    "copying",
    13,
    "Write copying_ratio(samples, training, held_out): the median over samples of the distance to "
    "the nearest training image, divided by that to the nearest held-out image. Images are bytes.",
    copying,
    _distances,
    copying_ratio,
    "Bytes do not know negative numbers: convert before you subtract.",
    (
        Wrong(
            lambda samples, training, held_out: (
                _near(samples, held_out) / _near(samples, training)
            ).median(),
            "Upside down: copies of training images should give 0.",
        ),
        Wrong(
            lambda samples, training, held_out: (
                _near(samples, training) / _near(samples, held_out)
            ).mean(),
            "The mean: one sample near a held-out image decides. Take the median.",
        ),
        Wrong(
            lambda samples, training, held_out: (
                _near(samples, training).median() / _near(samples, held_out).median()
            ),
            "A ratio of medians: take the ratio sample by sample first.",
        ),
    ),
)


def right(predicted, intended):
    return (predicted == intended).double().mean()


ACCURACY = Exercise(
    "accuracy",
    13,
    "Write right(predicted, intended): the fraction of samples that a classifier reads as the "
    "class that was requested.",
    accuracy,
    lambda: [(torch.arange(30) % 10, torch.arange(30) % 7)],
    right,
    "Compare sample by sample.",
    (
        Wrong(
            lambda predicted, intended: torch.isin(intended, predicted).double().mean(),
            "That counts classes that occur anywhere: compare each sample with its own label.",
        ),
        Wrong(
            lambda predicted, intended: (predicted == intended).sum().double(),
            "A number, not a fraction: divide by the number of samples.",
        ),
        Wrong(
            lambda predicted, intended: (predicted != intended).double().mean(),
            "That is the fraction that is wrong.",
        ),
    ),
)

BUGS = ()
EXERCISES = (DECIDED, FRECHET, COVERED, COPYING, ACCURACY)
