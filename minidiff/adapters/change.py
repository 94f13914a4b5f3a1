"""A change of weights: name of a weight → low-rank or dense difference, applied from outside.

    W' = W + s·Δ,    Δ = (alpha/r)·B·A  (low rank)    or a tensor of W's shape  (dense)

No layer of the network is replaced. In training `torch.func.functional_call` evaluates the network
with W + Δ, through which gradients reach Δ. For sampling the sums are made once, in a copy of the
network that shares all other weights. Several changes add up.

Sources: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models",
https://arxiv.org/abs/2106.09685, section 4.1; for convolutions the factors are those of peft: A has
the kernel and B is 1×1.
"""

import copy
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from minidiff.errors import InvalidArgument, whole_number

Shape = tuple[int, ...]


class LowRank(nn.Module):
    """A difference (alpha/r)·B·A of the shape of a weight (out, in, *kernel).

    Args:
        shape: shape of the weight.
        rank: r, at most the smaller of out and in·kernel.
        alpha: numerator of the scale; None for r.
        name: name of the weight, for messages.
    Attributes:
        lora_A, lora_B: layers whose weights are A, (r, in, *kernel), and B, (out, r, 1, …). They
            are never evaluated; their names are those in files. B begins at zero.
    Raises:
        InvalidArgument: the rank is not in that range.
    """

    def __init__(
        self, shape: Shape, rank: int, alpha: float | None = None, name: str = "a weight"
    ) -> None:
        super().__init__()
        out, into, *kernel = shape
        self.shape, self.alpha = tuple(shape), float(rank if alpha is None else alpha)
        self.rank = whole_number(f"rank for {name}", rank, 1, min(out, into * math.prod(kernel)))
        self.lora_A, self.lora_B = nn.Module(), nn.Module()
        self.lora_A.weight = nn.Parameter(torch.empty(rank, into, *kernel))
        self.lora_B.weight = nn.Parameter(torch.zeros(out, rank, *(1 for _ in kernel)))
        if not self.lora_A.weight.is_meta:
            # As in the paper's code; by the name alone, so that a run that is resumed before its
            # first snapshot begins at the same weights.
            random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5), generator=random)

    def forward(self) -> Tensor:
        """Return the difference."""
        product = self.lora_B.weight.flatten(1) @ self.lora_A.weight.flatten(1)
        return (self.alpha / self.rank) * product.view(self.shape)


class Dense(nn.Module):
    """A difference as a tensor, which begins at zero."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.difference = nn.Parameter(torch.zeros(shape))

    def forward(self) -> Tensor:
        """Return the difference."""
        return self.difference


class Change(nn.Module):
    """Differences of weights by name, such as "unet.conv_in.weight".

    The modules of low-rank differences are nested as the layers are, so that the state dict has the
    names of diffusers' files, "unet.….to_q.lora_A.weight"; those of dense ones have the names of
    the weights and the suffix ".difference".

    Args:
        parts: differences by the names of weights.
    """

    def __init__(self, parts: Mapping[str, LowRank | Dense]) -> None:
        super().__init__()
        self.parts = dict(parts)
        for name, part in parts.items():
            nested(self, name.removesuffix(".weight") if isinstance(part, LowRank) else name, part)

    def sums(self, scale: float = 1.0) -> dict[str, Tensor]:
        """Return scale·Δ by the names of weights."""
        return {name: part() if scale == 1 else scale * part() for name, part in self.parts.items()}


def nested(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register a module at a path with dots, with empty modules on the way."""
    *above, last = path.split(".")
    for name in above:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]
    root.add_module(last, module)


def with_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a network with other weights, which shares the rest with it.

    Args:
        network: the network, which is not changed.
        weights: tensors by the names of parameters.
    """
    shared = [*network.parameters(), *network.buffers()]
    other = copy.deepcopy(network, {id(tensor): tensor for tensor in shared})
    for name, tensor in weights.items():
        path, _, last = name.rpartition(".")
        setattr(other.get_submodule(path), last, nn.Parameter(tensor, requires_grad=False))
    return other


# --- which weights -------------------------------------------------------------------------------


def matching(network: nn.Module, targets: Iterable[str]) -> list[str]:
    """Return the names of the weights that targets choose, in order.

    Args:
        network: U-Net or text encoder.
        targets: "attention" (its four linear maps), "cross-attention" (keys and values of the text,
            and the map of the text's summary to the time embedding), "convolution" (those inside
            the blocks), "linear" (linear layers outside attention), or ends of module names, such
            as "to_q".
    Raises:
        InvalidArgument: a target chooses no weight.
    """
    layers = [name for name, module in network.named_modules() if _is_layer(module)]
    found: set[str] = set()
    for target in targets:
        test = _TESTS.get(target)
        chosen = {
            name for name in layers
            if (test(name, network.get_submodule(name)) if test else _ends(name, target))
        }  # fmt: skip
        if not chosen:
            raise InvalidArgument(f"targets must choose layers; no layer is {target!r}")
        found |= chosen
    return [f"{name}.weight" for name in layers if name in found]


def _is_layer(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim > 1 and not isinstance(module, nn.Embedding)


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


def _is_attention(name: str, module: nn.Module) -> bool:
    return any(_ends(name, last) for last in _ATTENTION)


def _reads_text(name: str, module: nn.Module) -> bool:
    """Return whether a layer reads the text: its tokens, or their pooled vector."""
    return name.endswith(("attn2.to_k", "attn2.to_v")) or name.startswith("class_embedding.")


_TESTS = {
    "attention": _is_attention,
    "cross-attention": _reads_text,
    "convolution": lambda name, module: module.weight.ndim > 2 and "_block" in name,
    "linear": lambda name, module: module.weight.ndim == 2 and not _is_attention(name, module),
}


def trained_weights(network: nn.Module) -> Iterator[str]:
    """Yield the names of all parameters that a training of the whole network changes."""
    for name, parameter in network.named_parameters():
        # A key's bias adds one number to all scores of a query, which softmax ignores.
        if not name.endswith(("to_k.bias", "k_proj.bias")) and parameter.is_floating_point():
            yield name
