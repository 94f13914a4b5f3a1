"""Every method of guidance on two classes for which all densities are known in closed form.

    python benchmarks/guidance.py [--scale W] [--png FILE]

The networks are optimal for two overlapping mixtures of Gaussians in the plane and for their union,
so samples differ by the method alone. Guidance of scale w aims at p(x|y)·p(y|x)^(w−1). For 4,000
samples of each method, the table has

    from target     energy distance from that target
    from p(x|y)     energy distance from the conditional distribution
    shift           shift of their mean from that of p(x|y) along the first axis
    spread          their standard deviation, relative to that of p(x|y)
    ln p(y|x)       its mean, which a classifier would score

The first two rows are samples of the two distributions themselves: the smallest measurable
distance, and the distance between the two. Two methods are made for images and mean little here:
the standard deviation of an "image" of two numbers is mostly chance, and a threshold at 1 has an
effect only where x̂0 leaves the range.
"""

import argparse
import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from minidiff import DDIMScheduler, NoiseSchedule, trajectory
from minidiff.exact import GaussianMixture
from minidiff.guidance import (
    Denoiser,
    autoguidance,
    classifier_guided,
    extrapolated,
    pair_of,
    projected,
    reading,
    rescaled,
    thresholded,
    within,
)
from minidiff.lab.mixtures import LabelledMixture, energy_distance
from minidiff.runtime.files import atomic_file

SAMPLES = 4000
STEPS = 100
SCHEDULE = NoiseSchedule.named()
DATA = LabelledMixture(
    [
        GaussianMixture([0.6, 0.4], [[-0.5, 0.3], [0.1, -0.4]], [0.2, 0.15]),
        GaussianMixture([0.5, 0.5], [[0.5, 0.3], [-0.1, -0.6]], [0.2, 0.2]),
    ]
)
WEAK = GaussianMixture([0.6, 0.4], [[-0.45, 0.25], [0.05, -0.35]], [0.32, 0.28])  # class 0


def optimal(data: GaussianMixture) -> Denoiser:
    """Return the optimal denoiser of a distribution."""
    return lambda x, t: data.noise(x, SCHEDULE[t])


def methods(w: float) -> dict[str, Denoiser]:
    """Return the denoiser of each method at guidance scale w."""
    conditional, free = optimal(DATA.classes[0]), optimal(DATA.union)
    pair, meaning = pair_of(conditional, free), reading(SCHEDULE.__getitem__, "epsilon")
    guided = extrapolated(pair, w)

    def log_prob(x: Tensor, t: float) -> Tensor:
        return DATA.log_posterior(x, 0, SCHEDULE[t])

    return {
        "conditional, w = 1": conditional,
        "classifier-free": guided,
        "perfect classifier": classifier_guided(free, log_prob, meaning, w),
        "interval 0.2 < σ/α ≤ 1": within(guided, conditional, meaning, 0.2, 1.0),
        "rescaled, φ = 0.7": rescaled(pair, w, 0.7),
        "thresholded": thresholded(guided, meaning),
        "projected, η = 0": projected(pair, w, meaning, momentum=0.0),
        "… with β = −0.5": projected(pair, w, meaning),
        "… and r = 0.2": projected(pair, w, meaning, threshold=0.2),
        "autoguided": autoguidance(conditional, optimal(WEAK), w),
    }


def samples(denoise: Denoiser) -> Tensor:
    """Return samples (N, 2) of a denoiser."""
    scheduler = DDIMScheduler(clip_sample=False, compat="exact", timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    source = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 2, generator=source, dtype=torch.float64)
    *_, last = trajectory(denoise, scheduler, x)
    return last.next_x


def draw(results: dict[str, Tensor], w: float, path: str) -> None:
    """Draw a panel per method, over contours of p(x|y) and of the target of w."""
    axis = torch.linspace(-1.5, 1.5, 160, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack([x, y], -1).reshape(-1, 2)
    plain = DATA.classes[0].log_prob(grid).exp().view_as(x)
    tilted = DATA.classes[0].log_prob(grid) + (w - 1) * DATA.log_posterior(grid, 0)
    tilted = tilted.exp().view_as(x)
    figure = Figure(figsize=(13, 10), layout="constrained")
    panels = figure.subplots(3, 4, sharex=True, sharey=True).flat
    for panel, (name, points) in zip(panels, results.items(), strict=True):
        panel.scatter(*points[:2000].T, s=1.5, color="tab:blue", alpha=0.5, linewidths=0)
        for density, colour in ((plain, "0.55"), (tilted, "tab:red")):
            levels = [density.max().item() * fraction for fraction in (0.05, 0.5)]
            panel.contour(axis, axis, density, levels=levels, colors=colour, linewidths=0.8)
        panel.set(title=name, xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal")
    figure.suptitle(
        f"w = {w:g}; grey: p(x|y), red: p(x|y)·p(y|x)^{w - 1:g} (5 % and 50 % of the maximum)"
    )
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=3.0, help="guidance scale w")
    parser.add_argument("--png", default="guidance.png", help="file for the picture")
    options = parser.parse_args()
    source = torch.Generator().manual_seed(1)
    target = DATA.tilted(0, options.scale, SAMPLES, source)
    data = DATA.classes[0].sample(SAMPLES, source)
    results = {
        "p(x|y) itself": DATA.classes[0].sample(SAMPLES, source),
        "the target itself": DATA.tilted(0, options.scale, SAMPLES, source),
    } | {name: samples(denoise) for name, denoise in methods(options.scale).items()}
    print(f"w = {options.scale:g}, {SAMPLES} samples, DDIM with {STEPS} steps")
    print(
        f"{'':26}{'from target':>12}{'from p(x|y)':>12}{'shift':>8}{'spread':>8}{'ln p(y|x)':>11}"
    )
    for name, x in results.items():
        shift = (x.mean(0) - data.mean(0))[0].item()
        spread = math.sqrt(x.var(0).sum().item() / data.var(0).sum().item())
        score = DATA.log_posterior(x, 0).mean().item()
        far = energy_distance(x, target), energy_distance(x, data)
        print(f"{name:26}{far[0]:12.3f}{far[1]:12.3f}{shift:+8.3f}{spread:8.2f}{score:11.3f}")
    draw(results, options.scale, options.png)
    print(f"wrote {options.png}")


if __name__ == "__main__":
    main()
