"""The loop, guidance, the noise of an image, and the formulas of training."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minidiff.errors import InvalidArgument
from minidiff.guidance import autocast, classifier_free, conditional
from minidiff.noise import MAX_SEED, _mix, image_generators, randn
from minidiff.objective import quantiles
from minidiff.prediction import split
from minidiff.sample import Step, trajectory
from minidiff.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, Scheduler
from minidiff.training.config import TrainConfig
from minidiff.training.objectives import make
from minidiff.training.optim import EMA
from minidiff.training.progress import learning_rate

SHAPE = (3, 2, 4, 4)
LABELS, NULL = torch.tensor([0, 1, 2]), torch.full((3,), 3)
OF, NONE = {"class_labels": LABELS}, {"class_labels": NULL}
QUICK = settings(deadline=None, derandomize=True, max_examples=50)


def network(x: Tensor, t: int, class_labels: Tensor | None = None) -> Tensor:
    """Return the output of a smooth network of (x, t, label), every image by itself."""
    shift = 0.0 if class_labels is None else class_labels.to(x.dtype)[:, None, None, None]
    return torch.tanh(x * (1 + shift) + t / 1000) + 0.1 * shift


def noise(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


# --- guidance -----------------------------------------------------------------------------------


def test_guidance_at_scale_1_is_one_evaluation_of_the_conditional_network() -> None:
    sizes = []

    def counted(x: Tensor, t: int, class_labels: Tensor) -> Tensor:
        sizes.append(len(x))
        return network(x, t, class_labels)

    x = noise()
    guided = classifier_free(counted, OF, NONE, 1.0)(x, 500)
    assert torch.equal(guided, conditional(network, OF)(x, 500))
    assert sizes == [3]


def test_guidance_at_scale_0_is_the_unconditional_network() -> None:
    x = noise()
    guided = classifier_free(network, OF, NONE, 0.0)(x, 500)
    assert torch.equal(guided, network(x, 500, NULL))


@QUICK
@given(st.floats(-5, 20), st.floats(-5, 20), st.floats(0, 1))
def test_guidance_is_linear_in_its_scale(a: float, b: float, fraction: float) -> None:
    x = noise().double()

    def at(scale: float) -> Tensor:
        return classifier_free(network, OF, NONE, scale)(x, 300)

    between = fraction * at(a) + (1 - fraction) * at(b)
    torch.testing.assert_close(at(fraction * a + (1 - fraction) * b), between, rtol=0, atol=1e-12)


def test_guidance_gives_every_image_its_own_label() -> None:
    x = noise()
    together = classifier_free(network, OF, NONE, 3.0)(x, 300)
    for i in range(3):
        alone = classifier_free(
            network, {"class_labels": LABELS[i : i + 1]}, {"class_labels": NULL[:1]}, 3.0
        )(x[i : i + 1], 300)
        torch.testing.assert_close(together[i : i + 1], alone)


def test_guidance_that_cannot_work_is_refused() -> None:
    for scale in (math.nan, math.inf):
        with pytest.raises(InvalidArgument, match="guidance_scale"):
            classifier_free(network, OF, NONE, scale)
    with pytest.raises(InvalidArgument, match="class_labels must have the same shape"):
        classifier_free(network, OF, {"class_labels": NULL[:1]}, 2.0)
    with pytest.raises(InvalidArgument, match="null must have the names of condition"):
        classifier_free(network, OF, {}, 2.0)


def test_autocast_gives_float32_back_from_work_in_bfloat16() -> None:
    layer, seen = nn.Linear(4, 4), []

    def denoise(x: Tensor, t: int) -> Tensor:
        out = layer(x)
        seen.append(out.dtype)
        return out

    x = noise()
    out = autocast(denoise, torch.bfloat16)(x, 3)
    assert (out.dtype, seen) == (torch.float32, [torch.bfloat16])
    torch.testing.assert_close(out, layer(x), rtol=0.02, atol=0.02)


# --- the loop -----------------------------------------------------------------------------------

SAMPLERS = [
    DDPMScheduler(compat="exact", clip_sample=False),
    DDIMScheduler(compat="exact", clip_sample=False),
    DPMSolverMultistepScheduler(compat="exact", solver_order=3),
    DPMSolverMultistepScheduler(compat="exact", algorithm_type="sde-dpmsolver++"),
]


def walk(scheduler: Scheduler, n: int = 6, **options: object) -> list[Step]:
    scheduler.set_timesteps(n)
    generators = image_generators(5, range(len(LABELS)))
    return list(trajectory(conditional(network, OF), scheduler, noise(), generators, **options))


@pytest.mark.parametrize("scheduler", SAMPLERS, ids=repr)
def test_a_trajectory_chains_steps_that_hold_the_outputs_of_the_network(
    scheduler: Scheduler,
) -> None:
    steps = walk(scheduler)
    assert [s.index for s in steps] == list(range(6))
    assert [s.t for s in steps] == scheduler.timesteps.tolist()
    assert torch.equal(steps[0].x, noise())
    for step, following in pairwise(steps):
        assert following.x is step.next_x
    for i, step in enumerate(steps):
        assert torch.equal(step.output, network(step.x, step.t, LABELS))
        x0, _ = split(step.output, step.x, scheduler.levels[i], "epsilon")
        assert torch.equal(step.x0, x0)
    torch.testing.assert_close(steps[-1].next_x, steps[-1].x0)


@pytest.mark.parametrize("scheduler", SAMPLERS, ids=repr)
def test_the_loop_is_the_scheduler_called_by_hand(scheduler: Scheduler) -> None:
    expected = [step.next_x for step in walk(scheduler)]
    scheduler.set_timesteps(6)
    generators, x = image_generators(5, range(3)), noise()
    for t, after in zip(scheduler.timesteps, expected, strict=True):
        x = scheduler.step(network(x, int(t), LABELS), t, x, generator=generators).prev_sample
        assert torch.equal(x, after)


def test_the_loop_advances_only_when_the_next_step_is_requested() -> None:
    evaluated = []

    def denoise(x: Tensor, t: int) -> Tensor:
        evaluated.append(t)
        return network(x, t, LABELS)

    scheduler = SAMPLERS[1]
    scheduler.set_timesteps(6)
    steps = trajectory(denoise, scheduler, noise())
    assert evaluated == []
    next(steps)
    next(steps)
    assert evaluated == scheduler.grid[:2]


@pytest.mark.parametrize("scheduler", SAMPLERS[1:3], ids=repr)
def test_a_loop_that_begins_later_takes_the_rest_of_the_grid(scheduler: Scheduler) -> None:
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(4)
    steps = list(trajectory(conditional(network, OF), scheduler, noise()))
    assert [s.t for s in steps] == scheduler.grid[4:]
    torch.testing.assert_close(steps[-1].next_x, steps[-1].x0)


def test_a_loop_without_timesteps_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="set_timesteps"):
        next(trajectory(conditional(network, OF), DDIMScheduler(), noise()))


@pytest.mark.parametrize("scheduler", SAMPLERS, ids=repr)
@pytest.mark.parametrize("parts", [[3], [1, 2], [1, 1, 1]])
def test_an_image_is_the_same_in_every_split_of_the_batch(
    scheduler: Scheduler, parts: list[int]
) -> None:
    images, begin = [], 0
    for size in parts:
        mine = slice(begin, begin + size)
        generators = image_generators(9, range(begin, begin + size))
        x = randn((size, *SHAPE[1:]), generators)
        scheduler.set_timesteps(5)
        *_, last = trajectory(
            conditional(network, {"class_labels": LABELS[mine]}), scheduler, x, generators
        )
        images.append(last.next_x)
        begin += size
    together = randn(SHAPE, generators := image_generators(9, range(3)))
    scheduler.set_timesteps(5)
    *_, last = trajectory(conditional(network, OF), scheduler, together, generators)
    assert torch.equal(torch.cat(images), last.next_x)


# --- the noise of an image ----------------------------------------------------------------------


@QUICK
@given(st.integers(0, MAX_SEED), st.integers(0, 1000), st.integers(1, 5))
def test_the_noise_of_an_image_depends_on_seed_and_index_alone(
    seed: int, first: int, size: int
) -> None:
    whole = randn((size, 2, 3), image_generators(seed, range(first, first + size)))
    for i in range(size):
        alone = randn((1, 2, 3), image_generators(seed, [first + i]))
        assert torch.equal(whole[i : i + 1], alone)


@pytest.mark.parametrize("seed", [0, 1, MAX_SEED])
def test_a_hundred_thousand_images_of_a_seed_have_different_seeds(seed: int) -> None:
    assert len({_mix(seed, i) for i in range(100_000)}) == 100_000


def test_neighbouring_images_and_seeds_are_uncorrelated() -> None:
    """Correlations within 5 standard errors, 1/√n each."""
    n = 4096
    x = randn((40, n), image_generators(0, range(20)) + image_generators(1, range(20)))
    correlation = x @ x.T / n - torch.eye(40)
    assert correlation.fill_diagonal_(0).abs().max() < 5 / math.sqrt(n)


def test_noise_that_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="list 3 generators, got 2"):
        randn((3, 1), image_generators(0, range(2)))
    for seed, indices, named in (
        (-1, [0], "seed"),
        (2**32, [0], "seed"),
        (0, [-1], "image index"),
        (1.5, [0], "seed"),
    ):
        with pytest.raises(InvalidArgument, match=named):
            image_generators(seed, indices)


# --- the formulas of training -------------------------------------------------------------------


def averaged(half_life: float, weights: Tensor) -> float:
    """The average after a run in which the one weight took these values."""
    model = nn.Linear(1, 1, bias=False).double()
    average = EMA(model, half_life)
    for value in weights:
        nn.init.constant_(model.weight, value.item())
        average.update(model)
    return average.model.weight.item()


@pytest.mark.parametrize("half_life", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("updates", [1, 2, 50])
def test_the_average_of_weights_is_its_closed_form(half_life: float, updates: int) -> None:
    theta = torch.randn(updates, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k = math.log(0.5) / math.log(1 - half_life)
    edges = (torch.arange(updates + 1, dtype=torch.float64) / updates) ** k
    assert averaged(half_life, theta) == pytest.approx(
        (edges.diff() * theta).sum().item(), abs=1e-6
    )


@pytest.mark.parametrize("half_life", [0.05, 0.2, 0.5])
def test_the_half_life_at_the_end_of_a_run_holds_half_the_weight(half_life: float) -> None:
    late = torch.zeros(100)
    late[round(100 * (1 - half_life)) :] = 1
    assert averaged(half_life, late) == pytest.approx(0.5, abs=1e-5)


def test_a_half_life_of_zero_keeps_the_latest_weights() -> None:
    assert averaged(0.0, torch.tensor([3.0, 1.0, 7.0])) == 7.0


@pytest.mark.parametrize("warmup", [0.0, 0.02, 0.5])
def test_the_learning_rate_rises_to_its_peak_and_ends_at_zero(warmup: float) -> None:
    config = TrainConfig(steps=10, learning_rate=3e-3, warmup=warmup)
    rates = [learning_rate(config, i / 1000) for i in range(1001)]
    assert max(rates) == rates[round(1000 * warmup)] == pytest.approx(3e-3)
    assert rates[-1] == learning_rate(config, 1.2) == 0
    assert (rates[0] == 0) == (warmup > 0)
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


@QUICK
@given(st.sampled_from([1, 10, 50, 100, 1000]), st.integers(0, 2**31))
def test_a_batch_of_levels_has_one_from_each_stratum(n: int, seed: int) -> None:
    t = make("epsilon").levels(quantiles(n, torch.Generator().manual_seed(seed))).t
    assert sorted((t * n // 1000).astype(int).tolist()) == list(range(n))
