"""The tables of the page are the schedulers."""

import base64

import numpy as np
import pytest
import torch

from minidiff.errors import InvalidArgument
from minidiff.exact import GaussianMixture
from minidiff.lab.explore.tables import STEPS, check_linear, schedules, table_of, tables
from minidiff.schedule import Level
from minidiff.schedulers import DDIMScheduler, Scheduler
from minidiff.schedulers.core.names import SAMPLERS, sampler

DATA = GaussianMixture([0.2, 0.3, 0.5], [[-1.0, 0.5], [0.7, -0.9], [1.2, 0.8]], [0.12] * 3)
PAIRS = [(kind, name) for kind in schedules() for name in tables(schedules()[kind], {})]


def run_packed(packed: dict, z: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return the end of a packed table, by the arithmetic of the page."""
    numbers = iter(np.frombuffer(base64.b64decode(packed["v"]), "<f8").tolist())
    n = len(packed["t"])
    A, B = (
        [[next(numbers) for _ in range(min(i + 1, packed[key]))] for i in range(n)] for key in "ab"
    )
    C = [next(numbers) for _ in range(n)] if packed["c"] else [0.0] * n
    lam = torch.tensor([next(numbers) for _ in range(n + 1)], dtype=torch.float64)
    assert next(numbers, None) is None
    alpha, sigma = torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()
    xs, x0s = [packed["s"] * z], []
    for i in range(n):
        x0s.append(DATA.denoise(xs[i], Level(alpha[i].item(), sigma[i].item())))
        new = sum(a * xs[i - k] for k, a in enumerate(A[i]))
        xs.append(new + sum(b * x0s[i - k] for k, b in enumerate(B[i])) + C[i] * noise[i])
    return xs[-1]


def run_scheduler(scheduler: Scheduler, n: int, z: torch.Tensor, noise: torch.Tensor):
    """Return the end of a scheduler with the perfect network for its prediction type."""
    scheduler.set_timesteps(n)
    x = z * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.grid):
        scheduler.noise_source = lambda like, z=noise[i]: z
        level = scheduler.levels[i]
        x0 = DATA.denoise(x, level)
        out = scheduler.target(x0, (x - level.alpha * x0) / level.sigma, level)
        x = scheduler.step(out, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_every_table_gives_the_samples_of_its_scheduler(kind: str, name: str) -> None:
    like = schedules()[kind]
    generator = torch.Generator().manual_seed(0)
    for n, table in tables(like, {})[name].items():
        z = torch.randn(20, 2, generator=generator, dtype=torch.float64)
        noise = torch.randn(len(table.timesteps), 20, 2, generator=generator, dtype=torch.float64)
        end = run_scheduler(sampler(name, like), n, z, noise)
        mine = run_packed(table.packed(), z, noise)
        assert (mine - end).norm() <= 1e-7 * end.norm(), n


def test_every_sampler_has_every_number_of_steps_on_beta_schedules() -> None:
    found = tables(schedules()["cosine"], {})
    assert set(found) == set(SAMPLERS)
    assert all(tuple(rows) == STEPS for rows in found.values())


def test_on_samples_of_unit_variance_euler_is_ddim() -> None:
    like = schedules()["cosine"]
    one, other = (table_of(sampler(name, like), 10) for name in ("ddim", "euler"))
    np.testing.assert_allclose(one.A, other.A, atol=1e-9)
    np.testing.assert_allclose(one.B, other.B, atol=1e-9)


class Wrong(DDIMScheduler):
    """A step that is not linear in x̂0."""

    def update(self, x, x0, eps, now, nxt, noise, **options):
        return nxt.alpha * torch.tanh(x0) + nxt.sigma * eps


def test_a_plugin_that_is_not_linear_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="plugin Wrong: its steps are not linear in x"):
        tables(schedules()["cosine"], {"Wrong": Wrong})
    check_linear(DDIMScheduler(clip_sample=False, compat="exact"), "DDIM")
