"""Muon: torch's implementation, the exact decomposition, and AdamW for other parameters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minidiff.data import load
from minidiff.errors import InvalidArgument
from minidiff.runs import snapshot
from minidiff.training.config import TrainConfig
from minidiff.training.diffusion import DiffusionTraining
from minidiff.training.optim import MATCH, Muon, as_matrix, orthogonalized, split_groups

TINY = {"channels": (16, 16), "batch_size": 8, "pictures": 0, "dropout": 0.1, "optimizer": "muon"}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 90), st.integers(2, 90)), min_size=1, max_size=5),
    st.integers(0, 99),
    st.floats(-4, 4),
)
def test_every_direction_counts_about_the_same(shapes, seed, exponent):
    """Singular vectors stay, singular values come near 1; of each matrix as if it were alone."""
    matrices = [10**exponent * normal(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    for before, after in zip(matrices, orthogonalized(*matrices), strict=True):
        size = MATCH * max(before.shape) ** 0.5
        u, s, v = torch.linalg.svd(before.double(), full_matrices=False)
        inside = u.T @ (after.double() / size) @ v.T
        torch.testing.assert_close(inside, torch.diag(inside.diagonal()), atol=2e-3, rtol=0)
        values = inside.diagonal()
        large = s > 0.02 * s.norm()  # five iterations do not lift the others all the way
        assert values[large].min() > 0.6
        assert values.max() < 1.25
        (alone,) = orthogonalized(before)
        torch.testing.assert_close(after, alone, rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_matrices_are_updated_as_by_torchs_muon(shape):
    """torch's iterates in bfloat16, which has eight bits."""
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    mine, theirs = (nn.Parameter(normal(*shape)) for _ in range(2))
    ours = Muon([{"params": [mine], "muon": True}], **options)
    torchs = torch.optim.Muon([theirs], **options, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        before = mine.detach().clone()
        for parameter, optimizer in ((mine, ours), (theirs, torchs)):
            parameter.grad = normal(*shape, seed=step + 1)
            optimizer.step()
        moved = (mine - before).norm()
        assert (mine - theirs).norm() < 0.03 * (step + 1) * moved
    assert (mine - normal(*shape)).norm() > 2 * moved


def test_other_parameters_are_updated_as_by_adamw():
    options = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
    mine, theirs = (nn.Parameter(normal(7)) for _ in range(2))
    matrix = nn.Parameter(normal(20, 20))
    ours = Muon([{"params": [matrix], "muon": True}, {"params": [mine]}], **options)
    torchs = torch.optim.AdamW([theirs], **options, fused=True)
    for step in range(4):
        matrix.grad = normal(20, 20, seed=step)
        for parameter, optimizer in ((mine, ours), (theirs, torchs)):
            parameter.grad = normal(7, seed=step)
            optimizer.step()
    assert torch.equal(mine, theirs)


def test_a_step_is_the_same_in_any_memory_format_and_in_memory():
    steps = []
    for form in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(normal(32, 16, 3, 3).to(memory_format=form))
        weight.grad = normal(32, 16, 3, 3, seed=1)
        assert as_matrix(weight.detach(), weight).data_ptr() == weight.data_ptr()
        Muon([{"params": [weight], "muon": True}], lr=0.1).step()
        steps.append(weight.detach() - normal(32, 16, 3, 3))
    torch.testing.assert_close(*steps, rtol=1e-3, atol=1e-5)
    assert steps[0].abs().mean() > 1e-3


def test_a_parameter_without_a_gradient_does_not_change():
    still, moved = (nn.Parameter(normal(20, 20, seed=seed)) for seed in (0, 1))
    moved.grad = normal(20, 20)
    before = still.detach().clone()
    Muon([{"params": [still, moved], "muon": True}], lr=0.1).step()
    assert torch.equal(still, before)
    assert not torch.equal(moved, normal(20, 20, seed=1))


def test_groups_separate_weights_of_layers_from_tables_norms_and_biases():
    net = nn.Sequential(
        nn.Conv2d(4, 32, 3), nn.GroupNorm(2, 32), nn.Linear(32, 8), nn.Linear(32, 48),
        nn.Embedding(50, 32), nn.ModuleDict({"time_emb_proj": nn.Linear(32, 32)}),
    )  # fmt: skip
    groups = [{"params": list(net.parameters()), "lr": 0.5}]
    muon, other = split_groups(groups, net)
    assert muon["muon"]
    assert not other["muon"]
    assert muon["lr"] == other["lr"] == 0.5
    assert {id(p) for p in muon["params"]} == {id(net[0].weight), id(net[3].weight)}
    assert len(muon["params"]) + len(other["params"]) == len(list(net.parameters()))


def test_a_run_resumes_bit_for_bit(tmp_path):
    data, config = load("digits"), TrainConfig(steps=8, **TINY)
    first, second = (DiffusionTraining(config, data, torch.device("cpu")) for _ in range(2))
    assert isinstance(first.optimizer, Muon)
    for _ in range(3):
        first.step()
    snapshot.restore(snapshot.write(tmp_path, snapshot.content(first), 0), second)
    for training in (first, second):
        for _ in range(2):
            training.step()
    assert all(map(torch.equal, first.learner.parameters(), second.learner.parameters()))


def test_it_learns_directions_of_small_gradients_that_adamw_hardly_learns():
    """A linear map of mixed features of size 1 to 1/100; each optimizer has its best rate."""
    basis, _ = torch.linalg.qr(normal(32, 32))
    features, goal = basis * torch.logspace(0, -2, 32), normal(32, 32, seed=1) / 6

    def left(muon: bool, rate: float) -> float:
        weight = nn.Parameter(torch.zeros(32, 32))
        optimizer = Muon([{"params": [weight], "muon": muon}], weight_decay=0.0)
        for step in range(200):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / 200)
            optimizer.zero_grad()
            ((weight - goal) @ features).square().sum().backward()
            optimizer.step()
        return float((weight.detach() - goal).norm() / goal.norm())

    with_muon, with_adamw = (
        min(left(muon, rate) for rate in (0.01, 0.03, 0.1)) for muon in (True, False)
    )
    assert with_muon < 0.2 * with_adamw


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(InvalidArgument, match="optimizer must be one of adamw, muon; got 'sgd'"):
        TrainConfig(steps=1, optimizer="sgd")
