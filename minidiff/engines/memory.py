"""Less memory: layers in parts, and weights on the device only while they are needed.

    pipe.optimize(memory="low")     one image, and a part of the positions, at a time
    pipe.offload("cuda")            one group of layers on the GPU at a time

The largest tensors of a U-Net are those inside its layers: eight times the channels in a
feed-forward layer, queries, keys and values in attention. No image depends on the others of its
batch, and in a feed-forward layer no position on the others, so neither split changes a number
but by rounding. torch's attention kernels never hold the table of all pairs of positions.
"""

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from minidiff.errors import InvalidArgument
from minidiff.guidance import Denoiser
from minidiff.nn import AutoencoderKL
from minidiff.nn.blocks.attention import Attention
from minidiff.nn.blocks.layers import ResnetBlock
from minidiff.nn.blocks.transformer import FeedForward, Transformer
from minidiff.runtime.device import pick_device

if TYPE_CHECKING:
    from minidiff.pipeline import Pipeline

IMAGES, POSITIONS = 0, 1
AXES = {ResnetBlock: IMAGES, Attention: IMAGES, Transformer: IMAGES, FeedForward: POSITIONS}
PARTS = 8  # of the positions


class InParts(nn.Module):
    """A layer that is evaluated on parts of its input, one after the other.

    Args:
        layer: layer from tensors to a tensor.
        axis: `IMAGES` for one image at a time, `POSITIONS` for an eighth of the positions.
    """

    def __init__(self, layer: nn.Module, axis: int) -> None:
        super().__init__()
        self.layer, self.axis = layer, axis

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        """Evaluate the layer; tensors of `others` with an entry per image are split as x is."""
        n = x.shape[self.axis]
        step = 1 if self.axis == IMAGES else -(-n // PARTS)
        out = None
        for i in range(0, n, step):
            part = slice(i, i + step)
            more = others
            if self.axis == IMAGES:
                more = tree_map_only(Tensor, lambda y, p=part: y[p] if len(y) == n else y, others)
            y = self.layer(x.narrow(self.axis, i, min(step, n - i)), *more)
            if out is None:
                out = _empty_like(y, self.axis, n)
            out.narrow(self.axis, i, y.shape[self.axis]).copy_(y)
        return out


def _empty_like(y: Tensor, axis: int, n: int) -> Tensor:
    """Return memory for n entries along an axis, in the memory format of y."""
    shape = (*y.shape[:axis], n, *y.shape[axis + 1 :])
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(y.dim(), torch.contiguous_format)
    kept = last if y.is_contiguous(memory_format=last) else torch.contiguous_format
    return torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=kept)


def in_parts(network: nn.Module) -> nn.Module:
    """Return a network with the same weights, in the same memory, whose layers work in parts."""
    shared: dict[int, Any] = {id(x): x for x in (*network.parameters(), *network.buffers())}
    result = copy.deepcopy(network, shared)
    for module in list(result.modules()):
        for name, child in module.named_children():
            axis = next((axis for kind, axis in AXES.items() if isinstance(child, kind)), None)
            if axis is not None:
                setattr(module, name, InParts(child, axis))
    return result


# --- offloading -----------------------------------------------------------------------------------

_HOOKS: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()  # of networks


class OnDevice:
    """A wrap of denoisers: x is moved to a device, and the output back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, denoise: Denoiser) -> Denoiser:
        """Return the denoiser whose input is on the device."""
        return lambda x, t: denoise(x.to(self.device), t).to(x.device)


def is_offloaded(pipe: "Pipeline") -> bool:
    """Return True after `offload`."""
    return any(isinstance(wrap, OnDevice) for wrap in pipe.wraps)


def offload(pipe: "Pipeline", device: str | torch.device) -> "Pipeline":
    """Keep weights on the CPU and move them to a device for evaluations; see `Pipeline.offload`."""
    place = pick_device(device)
    if pipe.engines:
        raise InvalidArgument("offload must be called before optimize, which has evaluated by now")
    pipe.to("cpu")
    pipe.wraps[:] = [wrap for wrap in pipe.wraps if not isinstance(wrap, OnDevice)]
    pipe.wraps.insert(0, OnDevice(place))
    encoders = () if pipe.prompts is None else pipe.prompts.encoders
    for network in filter(None, (*pipe.unets, pipe.vae, *encoders)):
        for hook in _HOOKS.pop(network, ()):
            hook.remove()
        _HOOKS[network] = list(_hooked(network, place, whole=network in encoders))
    return pipe


def _hooked(network: nn.Module, device: torch.device, *, whole: bool) -> Iterator[Any]:
    """Install the hooks of a network, and yield their handles."""
    groups = [network] if whole else list(_groups(network))
    # The methods of an autoencoder call its parts; a U-Net's parts share tensors on the device.
    entries = groups if isinstance(network, AutoencoderKL) else [network]
    for entry in entries:
        yield from _around(entry, *_moving(device))
    for group in groups:
        yield from _around(group, *_loading(device))


def _groups(network: nn.Module) -> Iterator[nn.Module]:
    """Return the groups of layers of a network: its children, and those of lists of blocks."""
    for child in network.children():
        yield from child if isinstance(child, nn.ModuleList) else (child,)


def _around(module: nn.Module, before: Callable, after: Callable) -> tuple[Any, Any]:
    """Call functions before a module is evaluated, and after it, even where it fails."""
    return (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    )


def _moving(device: torch.device) -> tuple[Callable, Callable]:
    """Return hooks that move inputs to a device, and the output back to that of the first input."""
    homes: list[torch.device] = []

    def before(module: nn.Module, arguments: tuple, named: dict) -> tuple:
        homes.append(next(x.device for x in tree_leaves(arguments + tuple(named.values()))
                          if isinstance(x, Tensor)))  # fmt: skip
        return tree_map_only(Tensor, lambda x: x.to(device), (arguments, named))

    def after(module: nn.Module, arguments: tuple, output: Any) -> Any:
        home = homes.pop()
        return tree_map_only(Tensor, lambda x: x.to(home), output)

    return before, after


def _loading(device: torch.device) -> tuple[Callable, Callable]:
    """Return hooks that move the weights of a module to a device, and let them go afterwards."""

    def before(module: nn.Module, arguments: tuple, named: dict) -> None:
        for x in (*module.parameters(), *module.buffers()):
            vars(x).setdefault("home", x.data)
            x.data = x.data.to(device, copy=True)

    def after(module: nn.Module, arguments: tuple, output: Any) -> None:
        for x in (*module.parameters(), *module.buffers()):
            x.data = vars(x).pop("home", x.data)

    return before, after
