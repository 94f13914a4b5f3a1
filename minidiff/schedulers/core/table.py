"""Every linear sampler is a table: its coefficients, derived from its code.

Without clipping a step is linear in the samples and the network's outputs,

    x_{i+1} = Σ_k A_ik·x_{i−k} + Σ_k B_ik·out_{i−k} + C_i·z_i,

with numbers known before sampling starts. They are not written down a second time: the scheduler
is run once on basis vectors, and the result of a step is its row. The table prints, predicts the
output's variance for Gaussian data without Monte Carlo, and runs as a sampler by itself.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.schedule import Level

if TYPE_CHECKING:
    from minidiff.schedulers.base import Scheduler


class Coefficients(NamedTuple):
    """The steps of a sampler as a linear recurrence; n is the number of steps.

    Attributes:
        timesteps: the n training steps at which the network is evaluated.
        levels: levels of the n + 1 samples.
        input_scale: (n,) float64, factors of `scale_model_input`.
        A: (n, m) float64, weights of x_i, x_{i−1}, …: row i gives x_{i+1}. Mostly m = 1; a method
            that remembers x̂0, or a corrector, needs earlier samples x_{i−k}.
        B: (n, m) float64, weights of the network's outputs out_i, out_{i−1}, …
        C: (n,) float64, weight of the standard normal noise z_i.
    """

    timesteps: list[int] | list[float]
    levels: list[Level]
    input_scale: Tensor
    A: Tensor
    B: Tensor
    C: Tensor

    def __str__(self) -> str:
        """Return the printed table, one line per step."""
        m = self.A.shape[1]
        names = [f"A{k}" for k in range(m)] + [f"B{k}" for k in range(m)] + ["C"]
        rows = torch.cat([self.A, self.B, self.C[:, None]], dim=1)
        printed = [j for j in range(2 * m + 1) if j == 0 or bool((rows[:, j] != 0).any())]
        lines = ["       t" + "".join(f"{names[j]:>11}" for j in printed)]
        for t, row in zip(self.timesteps, rows.tolist(), strict=True):
            lines.append(f"{t:8g}" + "".join(f"{row[j]:11.6f}" for j in printed))
        return "\n".join(lines)

    def variance(self, gains: Sequence[float], start: float) -> list[float]:
        """Return the variance of x after every step for a linear network: out_i = gain_i·input_i.

        For data N(0, s²) the optimal network is linear; see `minidiff.exact`. No Monte Carlo is
        needed: x stays a sum Σ c_j·e_j of independent normals, the start and the noise of every
        step.

        Args:
            gains: (n,) factors of the network from its (scaled) input to its output.
            start: variance of the start.
        """
        n = len(self.timesteps)
        e = torch.eye(n + 1, dtype=torch.float64)
        steps = iter(gains)
        xs = self.run(lambda x, t: next(steps) * x, start**0.5 * e[0], [*e[1:]])
        return [x.square().sum().item() for x in xs]

    def run(
        self, denoise: Callable[[Tensor, float], Tensor], x: Tensor, noise: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """Return the trajectory: x after every step, (n,) tensors of the shape of x.

        Args:
            denoise: (scaled x_t, t) → output.
            x: start, noise times `init_noise_sigma`.
            noise: z_0 … z_{n−1}, for a sampler with C ≠ 0.
        """
        xs, outs = [x], []
        for i, t in enumerate(self.timesteps):
            outs.append(denoise(self.input_scale[i].item() * xs[i], t))
            new = torch.zeros_like(x)
            for k in range(min(i + 1, self.A.shape[1])):
                new = new + self.A[i, k].item() * xs[i - k] + self.B[i, k].item() * outs[i - k]
            if self.C[i] != 0:
                new = new + self.C[i].item() * noise[i]
            xs.append(new)
        return xs[1:]


@torch.no_grad()
def coefficients(
    scheduler: "Scheduler", num_inference_steps: int, **step_options: Any
) -> Coefficients:
    """Derive the table of a scheduler by probing its code with basis vectors in float64.

    Args:
        scheduler: scheduler, unchanged; a copy is run.
        num_inference_steps: number of steps n, as for `set_timesteps`.
        step_options: options of `step`, such as DDIM's `eta`.
    Raises:
        InvalidArgument: an option makes the step nonlinear (clip_sample, thresholding), the
            output holds more than a prediction (a learned variance), or as `set_timesteps`.
    """
    c = scheduler.config
    for name in ("clip_sample", "thresholding"):
        if c.get(name):
            raise InvalidArgument(f"{name}=True makes a step nonlinear: it has no coefficients")
    if c.get("variance_type") in ("learned", "learned_range"):
        raise InvalidArgument(f"variance_type={c.variance_type!r} makes a step nonlinear")
    probe = scheduler.copied()
    probe.set_timesteps(num_inference_steps)
    n = len(probe.grid)
    basis = torch.eye(3 * n, dtype=torch.float64)[:, :, None]
    scales, rows = [], []
    for i, t in enumerate(probe.grid):
        x, out, z = basis[i], basis[n + i], basis[2 * n + i]
        probe.noise_source = lambda like, z=z: z  # each step draws at most once
        scales.append(probe.scale_model_input(torch.ones(1, dtype=torch.float64), t).item())
        rows.append(probe.step(out, t, x, return_dict=False, **step_options)[0].flatten())
    weights = torch.stack(rows).reshape(n, 3, n)
    A, B, C = (_by_lag(weights[:, j]) for j in range(3))
    m = int(((A != 0) | (B != 0)).any(dim=0).nonzero().max()) + 1
    scale = torch.tensor(scales, dtype=torch.float64)
    return Coefficients(probe.grid, probe.levels, scale, A[:, :m], B[:, :m], C[:, 0])


def _by_lag(weights: Tensor) -> Tensor:
    """Turn row i, the weights of entries 0 … i, around, so that column k is entry i − k."""
    n = len(weights)
    turned = torch.zeros_like(weights)
    for i in range(n):
        turned[i, : i + 1] = weights[i, : i + 1].flip(0)
    return turned
