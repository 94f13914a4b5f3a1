"""Toys: the distribution of points, their reproducibility, and a small network that learns them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiff import data, names, target, trajectory
from minidiff.data import ImageData, PointData, protocol, toys
from minidiff.errors import InvalidArgument
from minidiff.guidance import classifier_free
from minidiff.nn import MLP
from minidiff.schedule import add_noise
from minidiff.schedulers import DPMSolverMultistepScheduler


@pytest.mark.parametrize("name", toys.NAMES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_toy_is_centred_and_of_unit_size_and_its_classes_are_equally_frequent(name, split):
    held = data.load(name, split)
    assert held.name == name
    assert held.shape == (2,)
    n = len(held)
    assert n == toys.COUNTS[split]
    points = held.points.double()
    assert points.mean(0).abs().max() < 5 * 1.5 / math.sqrt(n)
    assert points.square().mean() == pytest.approx(1, abs=5 * 2 / math.sqrt(n))
    if held.labels is not None:
        counts = held.labels.bincount(minlength=held.num_classes).double()
        assert (counts * held.num_classes / n - 1).abs().max() < 0.15


@pytest.mark.parametrize("name", toys.NAMES)
def test_a_point_depends_on_seed_and_index_alone_without_limit(name):
    whole = toys.load(name, count=50, seed=3)
    part = toys.load(name, count=20, seed=3, start=30)
    assert torch.equal(whole.points[30:], part.points)
    assert whole.labels is None or torch.equal(whole.labels[30:], part.labels)
    others = [
        toys.load(name, count=50, seed=4),
        toys.load(name, count=50, seed=3, start=10**15),
        toys.load(name, "test", count=50, seed=3),
    ]
    for other in others:
        assert (whole.points[:, None] - other.points).abs().amax(2).min() > 0  # no point shared


def test_the_shapes_differ():
    def raw(name):  # in the units of the shape
        held, toy = toys.load(name, count=20_000), toys._TOYS[name]
        return held.points.numpy() * math.sqrt(toy.square) + toy.centre, held.labels

    points, lower = raw("moons")
    centres = np.where(lower[:, None] == 1, [1, 0.5], [0, 0])
    assert np.abs(np.linalg.norm(points - centres, axis=1) - 1).mean() < 0.1
    assert ((points[:, 1] > 0.25) == (lower.numpy() == 0)).mean() > 0.6

    points, _ = raw("swissroll")
    angle, radius = np.arctan2(points[:, 1], points[:, 0]), np.linalg.norm(points, axis=1)
    off = (radius - angle + math.pi) % (2 * math.pi) - math.pi  # r = t, and t = angle + 2πk
    assert np.abs(off).mean() < 0.5

    points, _ = raw("checkerboard")
    assert points.min() >= -1e-6
    assert points.max() <= 4 + 1e-6
    inside = points[(points % 1 > 1e-5).all(1) & (points % 1 < 1 - 1e-5).all(1)]
    assert (np.floor(inside).sum(1) % 2 == 0).all()

    points, arm = raw("pinwheel")
    turned = points @ np.array([[math.cos(0.4 * math.pi), math.sin(0.4 * math.pi)],
                                [-math.sin(0.4 * math.pi), math.cos(0.4 * math.pi)]])  # fmt: skip
    means = np.stack([points[arm == k].mean(0) for k in range(5)])
    again = np.stack([turned[arm == k].mean(0) for k in range(5)])
    assert np.abs(np.roll(means, -1, 0) - again).max() < 0.03  # a fifth of a turn: the next arm


@pytest.mark.parametrize("name", ["ring", "grid"])
def test_mixtures_have_the_exact_distribution(name):
    held, exact = toys.load(name, count=40_000), toys.mixture(name)
    assert torch.allclose(
        (exact.weights @ exact.means.square()).mean() + 0.01, torch.ones(1).double()
    )
    for label in range(held.num_classes):
        mine = held.points[held.labels == label].double()
        n = len(mine)
        assert (mine.mean(0) - exact.means[label]).abs().max() < 5 * 0.1 / math.sqrt(n)
        assert mine.std(0).mean() == pytest.approx(0.1, rel=5 / math.sqrt(n))
    entropy = exact.log_prob(exact.sample(40_000, torch.Generator().manual_seed(0))).mean()
    assert exact.log_prob(held.points).mean() == pytest.approx(entropy.item(), abs=0.03)
    assert held.class_names[1] == "Gaussian 1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "helix"}, "toy must be one of moons, swissroll"),
        ({"name": "moons", "split": "valid"}, "split must be one of"),
        ({"name": "moons", "count": 0}, "count must be in 1"),
        ({"name": "moons", "seed": -1}, "seed must be in 0"),
        ({"name": "moons", "start": 1.5}, "start must be a whole number"),
    ],
)
def test_arguments_of_toys_are_checked(arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        toys.load(**arguments)


def test_options_that_toys_do_not_take_are_refused():
    with pytest.raises(InvalidArgument, match="mixture must be one of ring, grid"):
        toys.mixture("moons")
    with pytest.raises(InvalidArgument, match="data_dir is for"):
        data.load("moons", data_dir=".")
    with pytest.raises(InvalidArgument, match="image_size is for"):
        data.load("moons", image_size=2)


@pytest.mark.parametrize(
    ("points", "labels", "names"),
    [
        (torch.zeros(2, 2).double(), None, ()),
        (torch.zeros(2), None, ()),
        (torch.tensor([[0.0, math.nan]]), None, ()),
        (torch.zeros(2, 2), torch.tensor([0, 1]), ("a",)),
        (torch.zeros(2, 2), None, ("a",)),
    ],
)
def test_points_and_labels_that_do_not_fit_are_refused(points, labels, names):
    with pytest.raises(InvalidArgument):
        PointData("wrong", points, labels, names)


def test_points_are_data_like_images():
    held = PointData("two", torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([0, 1]), ("a", "b"))
    x, labels = held.to("cpu").batch(torch.tensor([1, 1, 0]), 7)
    assert x.tolist() == [[3, 4], [3, 4], [1, 2]]
    assert labels.tolist() == [1, 1, 0]
    assert PointData("bare", held.points, None, ()).batch(torch.tensor([0]))[1] is None
    shared = {name for name in vars(protocol.Data) if not name.startswith("_")} | {"__len__"}
    for kind in (PointData, ImageData):
        assert all(hasattr(kind, name) or name in kind.__annotations__ for name in shared)


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**63), st.integers(0, 40), st.integers(1, 40))
def test_random_words_depend_on_the_position_alone(seed, position, skip, count):
    purpose = protocol.Purpose.ITEM
    longer = protocol.random_words(seed, purpose, position, skip + count)
    assert np.array_equal(
        longer[skip:], protocol.random_words(seed, purpose, position + skip, count)
    )
    other = protocol.random_words(seed, protocol.Purpose.AUGMENTATION, position, skip + count)
    assert not (longer == other).any()


# --- a network for points ---------------------------------------------------------------------

SCHEDULER = DPMSolverMultistepScheduler(
    beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", compat="exact"
)


def excess_loss(network, name: str) -> float:
    """Return the excess loss over the best possible network f*: E‖f − f*‖²."""
    held, exact = toys.load(name, "test", count=2_000), toys.mixture(name)
    generator, total = torch.Generator().manual_seed(0), 0.0
    for t in range(50, 1000, 100):
        level = SCHEDULER.schedule[t]
        x = add_noise(held.points, torch.randn(held.points.shape, generator=generator), level)
        best = target(exact.denoise(x, level), exact.noise(x, level), level, "v_prediction")
        with torch.no_grad():
            total += (network(x, t) - best).square().mean().item() / 10
    return total


def trained(name: str, labelled: bool, steps: int = 300) -> MLP:
    held = toys.load(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        labels = held.num_classes + 1 if labelled else None
        network = MLP(hidden_channels=64, num_class_embeds=labels)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    generator = torch.Generator().manual_seed(0)
    for index in data.batches(len(held), 256, 0):
        x0, labels = held.batch(index)
        if labelled:
            hidden = torch.rand(len(labels), generator=generator) < 0.1
            labels = labels.masked_fill(hidden, held.num_classes)
        t = torch.randint(1000, (len(x0),), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        level = SCHEDULER.schedule.at(t, x0)
        out = network(add_noise(x0, eps, level), t, labels if labelled else None)
        loss = (out - target(x0, eps, level, "v_prediction")).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if decay.last_epoch == steps:
            return network.eval()


def sampled(denoise, count: int) -> torch.Tensor:
    SCHEDULER.set_timesteps(20)
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [step.next_x for step in trajectory(denoise, SCHEDULER, x)][-1]


def test_a_small_network_learns_a_mixture_almost_exactly():
    network = trained("ring", labelled=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = MLP()
    assert excess_loss(network, "ring") < 0.03 < 0.3 < excess_loss(fresh, "ring")
    points, exact = sampled(network, 4_000).double(), toys.mixture("ring")
    assert points.mean(0).abs().max() < 0.1
    assert (points.T @ points / len(points) - torch.eye(2)).abs().max() < 0.1
    distance, nearest = (points[:, None] - exact.means).norm(dim=2).min(1)
    assert (distance < 0.4).double().mean() > 0.85  # P(r > 4σ) of a Gaussian is 0.0003
    assert (nearest.bincount(minlength=8) / 500 - 1).abs().max() < 0.35


def test_a_small_network_learns_classes_and_takes_guidance():
    network = trained("ring", labelled=True)
    label = torch.arange(8).repeat_interleave(100)
    conditions = {"class_labels": label}, {"class_labels": torch.full_like(label, 8)}
    points = sampled(classifier_free(network, *conditions, 1.5), 800).double()
    nearest = (points[:, None] - toys.mixture("ring").means).norm(dim=2).argmin(1)
    assert (nearest == label).double().mean() > 0.95


def test_a_network_of_points_is_saved_and_read_like_others(tmp_path):
    network = MLP(in_channels=3, hidden_channels=16, num_layers=1, num_class_embeds=4).eval()
    network.save_pretrained(tmp_path / "mlp")
    again = MLP.from_pretrained(tmp_path / "mlp")
    x, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    assert again.config == network.config
    assert torch.equal(again(x, 3, labels), network(x, torch.full((5,), 3), labels))
    alone = again(x[:1], torch.tensor(3), labels[:1])
    assert torch.allclose(again(x, 3, labels)[:1], alone, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MLP(width=3), "'width' is not an option of MLP, which has in_channels"),
        (lambda: MLP(num_layers=0), "num_layers must be in"),
        (lambda: MLP(hidden_channels=2.5), "hidden_channels must be a whole number"),
        (lambda: MLP()(torch.zeros(2, 3), 0), r"sample must have shape \(B, 2\), got \(2, 3\)"),
        (lambda: MLP()(torch.zeros(2, 2, 2), 0), "sample must have shape"),
        (lambda: MLP()(torch.zeros(2, 2).long(), 0), "sample must be floating point"),
        (lambda: MLP()([0.0, 1.0], 0), "sample must be a tensor"),
        (lambda: MLP()(torch.zeros(2, 2), torch.zeros(3)), r"timestep must have shape \(\) or"),
        (lambda: MLP()(torch.zeros(2, 2), "now"), "timestep must be a number"),
        (lambda: MLP()(torch.zeros(2, 2), 0, torch.zeros(2).long()), "class_labels must be None"),
        (lambda: MLP(num_class_embeds=2)(torch.zeros(2, 2), 0), "class_labels must be a tensor"),
    ],
)
def test_bad_input_of_a_network_of_points_is_refused(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call()


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.zeros(3), r"points must be float32 \(N, D\), finite; got torch.float32 \(3,\)"),
        (
            torch.zeros(3, 2, 1),
            r"points must be float32 \(N, D\), finite; got torch.float32 \(3, 2, 1\)",
        ),
        (torch.zeros(3, 0), r"points must be float32 \(N, D\), finite; got torch.float32 \(3, 0\)"),
        (
            torch.zeros(3, 2).double(),
            r"points must be float32 \(N, D\), finite; got torch.float64 \(3, 2\)",
        ),
        (torch.tensor([[0, 1], [0, torch.nan]]), "with 1 values of NaN or infinity"),
        (torch.tensor([[torch.inf, 0], [-torch.inf, 1]]), "with 2 values of NaN or infinity"),
    ],
)
def test_points_with_other_axes_or_nan_are_refused(points, message):
    with pytest.raises(InvalidArgument, match=message):
        PointData("mine", points, None, ())


def test_every_toy_is_named_where_the_command_line_reads_its_names():
    assert toys.NAMES == names.TOYS
    assert not set(toys.NAMES) & set(data.NAMES)


def test_the_arms_of_the_spiral_are_each_other_turned_by_half_a_turn():
    held = toys.load("spiral", count=40_000)
    radius = held.points.norm(dim=1).double()
    for arm in (0, 1):
        mine = held.points[held.labels == arm].double()
        turn = radius[held.labels == arm] * toys._TOYS["spiral"].square ** 0.5 + math.pi * arm
        curve = torch.stack([turn.cos(), turn.sin()], dim=1)
        aligned = (mine * curve).sum(1) / mine.norm(dim=1)
        assert aligned.mean() > 0.9  # the cosine between a point and the curve at its radius
