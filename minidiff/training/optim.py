"""Muon: steps of weight matrices in which all directions have the same length; and the EMA.

Adam scales every number of a gradient by itself. A weight matrix is a linear map, and its gradient
G is dominated by the few directions in which the loss falls steeply. Muon keeps the directions and
drops the steepness of each: with M the momentum of G = U·S·Vᵀ,

    M ← β·M + (1 − β)·G,    W ← (1 − η·λ)·W − η·0.2·√max(rows, columns) · U·Vᵀ of (1 − β)·G + β·M

The factor gives the step the size of one of AdamW's, so one learning rate and weight decay fit
both. U·Vᵀ is computed without a decomposition, by five iterations of X ← (a + b·XXᵀ + c·(XXᵀ)²)·X,
after which the singular values are between 0.7 and 1.2. The iterations run on the smaller of XXᵀ
and XᵀX, for all matrices of one size at once: polynomials in it commute, so X is needed only at the
start and at the end. Rounding matters more in directions where G is small: after 20 steps two
processes agree with one within 3e-6, with AdamW within 1e-6.

Sources: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks",
https://kellerjordan.github.io/posts/muon/ (the iteration and its coefficients); Liu et al. 2025,
"Muon is Scalable for LLM Training", https://arxiv.org/abs/2502.16982, section 2.2 (the factor).
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.runtime.distributed import local

A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
MATCH = 0.2  # root mean square of AdamW's steps, relative to its learning rate
MIN_SIDE = 16  # rows and columns of a matrix; smaller ones are tables of a few vectors
MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Muon(torch.optim.AdamW):
    """Muon for the weights of layers, AdamW for all other parameters.

    Args:
        params: parameters or groups, as for AdamW. Groups with `"muon": True` hold only weights
            (rows, columns, *kernel), whose kernel counts as columns; `split_groups` makes them.
        lr, weight_decay: learning rate and decay, as for AdamW.
        betas: β₁ and β₂ of AdamW, which groups of Muon ignore.
        momentum: β.
        orthogonalize: `orthogonalized`, or a function that calls it in another way.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        orthogonalize: Callable[..., Sequence[Tensor]] | None = None,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        self.orthogonalize = orthogonalize or orthogonalized
        for group in self.param_groups:
            group.setdefault("muon", False)
            group.setdefault("momentum", momentum)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step. A parameter without a gradient is not changed."""
        every = self.param_groups
        self.param_groups = [group for group in every if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if group["muon"]:
                self._muon_step(group)
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        """Take a step of one of Muon's groups."""
        weights = [weight for weight in group["params"] if weight.grad is not None]
        if not weights:
            return
        for weight in weights:
            if "momentum_buffer" not in (state := self.state[weight]):
                state["step"] = torch.zeros(())  # AdamW looks for it when a state is loaded
                state["momentum_buffer"] = torch.zeros_like(weight)
        gradients = [as_matrix(weight.grad, like=weight) for weight in weights]
        momenta = [as_matrix(self.state[w]["momentum_buffer"], like=w) for w in weights]
        matrices = [as_matrix(weight, like=weight) for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, self.orthogonalize(*ahead), alpha=-group["lr"])


def as_matrix(x: Tensor, like: Tensor) -> Tensor:
    """View a weight (rows, columns, *kernel) as a matrix that shares its memory.

    The columns are ordered as in the memory of `like`. Their order does not change U·Vᵀ, and a copy
    would take as long as the rest.
    """
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.flatten(1)


def orthogonalized(*matrices: Tensor) -> list[Tensor]:
    """Return approximately 0.2·√max(rows, columns)·U·Vᵀ for every matrix U·S·Vᵀ."""
    by_side: dict[int, list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        by_side[min(matrix.shape)].append(i)
    out = list(matrices)
    norms = torch._foreach_norm(matrices)
    for chosen in by_side.values():
        # XXᵀ is the smaller of the two Gram matrices.
        wide = [m if m.shape[0] <= m.shape[1] else m.mT for m in (matrices[i] for i in chosen)]
        scale = torch.stack([norms[i] for i in chosen]).add_(1e-7).reciprocal_()[:, None, None]
        gram = torch.stack([x @ x.mT for x in wide]).mul_(scale.square())
        maps = _iterated(gram).mul_(scale)
        for i, x, to in zip(chosen, wide, maps, strict=True):
            found = (to @ x).mul_(MATCH * max(x.shape) ** 0.5)
            out[i] = found if matrices[i].shape[0] <= matrices[i].shape[1] else found.mT
    return out


def _iterated(gram: Tensor) -> Tensor:
    """Return the polynomial in XXᵀ, (N, n, n), by which the iterations multiply X."""
    product = None
    for last in [*[False] * (ITERATIONS - 1), True]:
        factor = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        factor.diagonal(dim1=1, dim2=2).add_(A)
        product = factor if product is None else factor @ product
        if not last:
            gram = factor @ gram @ factor
    return product


def split_groups(groups: Iterable[dict[str, Any]], module: nn.Module) -> list[dict[str, Any]]:
    """Split each group of a module's parameters in two: weights of layers for Muon, and the rest.

    Layers within embeddings (of time, class, a text's summary) belong to the rest: their input is
    one vector per image, and with Muon they take a third of its time for no measured gain.

    Args:
        groups: groups of parameters, with their options.
        module: module that has the parameters.
    """
    maps = {
        layer.weight
        for name, layer in module.named_modules()
        if isinstance(layer, MAPS) and "emb" not in name
        if min(layer.weight.flatten(1).shape) >= MIN_SIDE
    }
    return [
        {**group, "params": parameters, "muon": muon}
        for group in groups
        for muon in (True, False)
        if (parameters := [p for p in group["params"] if (p in maps) == muon])
    ]


class EMA:
    """Average of the weights whose memory grows with the run, so that it needs no warm-up.

    After update n the average is θ̂ ← β_n·θ̂ + (1 − β_n)·θ with β_n = (1 − 1/n)^k (Karras et al.
    2024, arXiv:2312.02696, eq. 3, k = γ + 1). In closed form θ_s has the weight
    (s/N)^k − ((s−1)/N)^k after N updates: the first weights vanish, and the last fraction h of the
    run always has the weight 1 − (1 − h)^k.

    Args:
        model: module to average; it is copied.
        half_life: fraction h of the run that has half the weight, in (0, 1); 0 keeps only the
            latest weights.
    Attributes:
        model: copy of the module with the averaged parameters and the latest buffers.
        updates: number of updates n.
    """

    def __init__(self, model: nn.Module, half_life: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.exponent = math.log(0.5) / math.log1p(-half_life) if half_life else math.inf
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the current weights of `model` to the average."""
        self.updates += 1
        new = 1 - (1 - 1 / self.updates) ** self.exponent
        torch._foreach_lerp_(local(self.model.parameters()), local(model.parameters()), new)
        for averaged, latest in zip(self.model.buffers(), model.buffers(), strict=True):
            averaged.copy_(latest)
