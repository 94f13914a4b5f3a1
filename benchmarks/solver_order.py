"""Measured order of convergence of every solver, and its error by the number of steps.

    python benchmarks/solver_order.py [--compat diffusers] [--png FILE]

Errors are those of `minidiff.lab`: deviation from the exact probability flow of a mixture of
Gaussians, and for stochastic samplers the error of the variance on Gaussian data. The picture has
logarithmic axes; colours give the declared order, and dotted lines have its slope. A step is one
evaluation of the network, two for Heun.
"""

import argparse
from collections import Counter

from matplotlib.figure import Figure

from minidiff.lab.order import METHODS
from minidiff.runtime.files import atomic_file

COLOURS = {1: "tab:blue", 2: "tab:green", 3: "tab:red", 4: "tab:purple"}  # by declared order
MARKERS = "osDv^<>PhX*d8p"
STEPS = (12, 24, 48, 96, 192, 384)


def draw(errors: dict[str, list[float]], path: str) -> None:
    """Draw two panels: errors of the flow, and errors of the variance."""
    figure = Figure(figsize=(13, 8.8), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    titles = ("probability flow of a mixture", "variance on Gaussian data")
    for weak, axes, title in zip((False, True), panels, titles, strict=True):
        names = [name for name in errors if METHODS[name].weak == weak]
        drawn = Counter()
        for name in names:
            p = METHODS[name].order
            colour, marker = COLOURS[p], MARKERS[drawn[p] % len(MARKERS)]
            drawn[p] += 1
            axes.loglog(STEPS, errors[name], marker=marker, ms=5, lw=1, color=colour,
                        label=f"{name} ({p})")  # fmt: skip
            ends = (STEPS[-3], STEPS[-1])
            axes.loglog(ends, [errors[name][-1] * (STEPS[-1] / n) ** p for n in ends], ":",
                        lw=0.8, color=colour)  # fmt: skip
        axes.set(title=f"Error: {title}", xlabel="steps")
        axes.set_xticks(STEPS, [str(n) for n in STEPS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=3, title="solver (declared order)", loc="upper center",
                    bbox_to_anchor=(0.5, -0.08))  # fmt: skip
    panels[0].set_ylabel("largest error")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compat", default="exact", help="exact or diffusers")
    parser.add_argument("--png", default="solver_order.png", help="file for the picture")
    options = parser.parse_args()
    columns = "".join(f"{n:>10}" for n in STEPS)
    print(f"{'error after n =':26}{columns}{'order':>8}{'declared':>10}")
    errors = {}
    for name, method in METHODS.items():
        errors[name] = [method.error(n, options.compat) for n in STEPS]
        measured = method.measured_order(options.compat)
        row = "".join(f"{e:10.1e}" for e in errors[name])
        kind = " weak" if method.weak else ""
        print(f"{name:26}{row}{measured:8.2f}{method.order:>10}{kind}", flush=True)
    draw(errors, options.png)
    print(f"wrote {options.png}")


if __name__ == "__main__":
    main()
