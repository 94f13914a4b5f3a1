"""One run on several processes, as torchrun starts them.

    torchrun --nproc_per_node K -m minidiff train …

Every process draws the random numbers of the whole batch and trains on its part of it. A batch is
thus the same for any K, and nothing that is saved depends on a process. Gradients are averaged by
torch's DistributedDataParallel, or weights, gradients and optimizer are sharded by its
`fully_shard` (FSDP2). Only the process of rank 0 writes and prints.
"""

import contextlib
import datetime
import os
import re
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minidiff.errors import InvalidArgument, TrainingError

VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # of torchrun, and WORLD_SIZE
TIMEOUT = datetime.timedelta(minutes=10)  # for a process that writes a snapshot, or is lost


class World:
    """The processes of a run, as one of them sees them; in this class, it is the only one.

    Attributes:
        rank: number of this process.
        size: number of processes.
        splits: each process holds only its shard of the weights.
    """

    rank, size, splits = 0, 1, False

    def part(self, n: int) -> slice:
        """Return this process' part of n images."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def share(self, module: nn.Module) -> None:
        """Leave this process with its shard of the weights."""

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return sharded tensors as whole ones; all processes call this."""
        return dict(tensors)

    def wrap(self, learner: nn.Module) -> nn.Module:
        """Return the module to call, whose gradients are those of all processes together."""
        return learner

    def without_sync(self, network: nn.Module) -> contextlib.AbstractContextManager:
        """Accumulate gradients inside; the next backward pass outside exchanges them."""
        return contextlib.nullcontext()

    def total(self, value: Tensor) -> Tensor:
        """Return the sum over the processes, on each of them. The host does not wait."""
        return value

    def largest(self, *numbers: float) -> list[float]:
        """Return the maximum of every number over the processes; never waits for a GPU."""
        return list(numbers)

    def clip(self, parameters: Iterable[nn.Parameter], norm: float) -> Tensor:
        """Clip the gradient to a norm and return the norm it had."""
        return nn.utils.clip_grad_norm_(parameters, norm)


class Processes(World):
    """Several processes, each with the whole network.

    Args:
        device: device of this process.
    Attributes:
        hosts: group for numbers of the hosts, which does not wait for a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = device
        self.hosts = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def wrap(self, learner: nn.Module) -> nn.Module:
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(learner, device_ids=devices)

    def without_sync(self, network: nn.Module) -> contextlib.AbstractContextManager:
        return network.no_sync()

    def total(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value

    def largest(self, *numbers: float) -> list[float]:
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.hosts)
        return values.tolist()


class Shards(Processes):
    """Several processes over which the weights are sharded by torch's `fully_shard` (FSDP2)."""

    splits = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        from torch.distributed.device_mesh import init_device_mesh

        self._mesh = init_device_mesh(device.type, (self.size,))

    def share(self, module: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        module.to(memory_format=torch.contiguous_format)  # fully_shard takes no other
        for name, layers in module.named_modules():
            # Units that are gathered for their work and resharded after it. Not whole blocks of
            # the U-Net: these share a list of skips, and `fully_shard` would copy it for each.
            for layer in layers if name.endswith((".resnets", ".attentions")) else ():
                if any(True for _ in layer.parameters()):
                    fully_shard(layer, mesh=self._mesh)
        fully_shard(module, mesh=self._mesh)

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: value.full_tensor() if _is_sharded(value) else value
            for name, value in tensors.items()
        }

    def wrap(self, learner: nn.Module) -> nn.Module:
        return learner

    @contextlib.contextmanager
    def without_sync(self, network: nn.Module) -> Iterator[None]:
        network.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            network.set_requires_gradient_sync(True)

    def clip(self, parameters: Iterable[nn.Parameter], norm: float) -> Tensor:
        return super().clip(parameters, norm).full_tensor()


def _is_sharded(value: Tensor) -> bool:
    """Return whether it is a DTensor, whose module is slow to import and rarely needed."""
    return hasattr(value, "full_tensor")


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the shards of these tensors that this process holds."""
    return [value.to_local() if _is_sharded(value) else value for value in tensors]


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor with dtype, device, sharding and memory layout of `like`."""
    value = value.to(like.device, like.dtype)
    if _is_sharded(like):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, like.device_mesh, like.placements)
    return torch.empty_like(like).copy_(value)


def _is_of_the_network(error: RuntimeError) -> bool:
    """Return whether an error comes from the network; gloo raises plain RuntimeErrors."""
    words = ("gloo", "Connection", "connection", "NCCL", "Timed out", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _number(variable: str, default: int) -> int:
    """Return a whole number of the environment, where empty is not set. Raises InvalidArgument."""
    value = os.environ.get(variable, "").strip() or str(default)
    if not value.isdecimal():
        raise InvalidArgument(f"{variable} must be a whole number, as torchrun sets it: {value!r}")
    return int(value)


def processes() -> int:
    """Return the number of processes that torchrun started; 1 without torchrun."""
    return _number("WORLD_SIZE", 1)


def launched() -> bool:
    """Return whether torchrun started this process as one of several."""
    return processes() > 1


def rank() -> int:
    """Return the number of this process before it joins the others; 0 if it is alone."""
    return _number("RANK", 0) if launched() else 0


def own_device(device: torch.device) -> torch.device:
    """Return the GPU of this process, where there are several.

    Raises:
        InvalidArgument: a variable of torchrun is missing, there are more processes than GPUs, or
            a GPU is given by number.
    """
    if not launched():
        return device
    if missing := [name for name in VARIABLES if not os.environ.get(name)]:
        raise InvalidArgument(f"WORLD_SIZE is set without {', '.join(missing)}: use torchrun")
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise InvalidArgument(f"device must be cuda for several processes, got {device}")
    local = _number("LOCAL_RANK", 0)
    if local >= torch.cuda.device_count():
        raise InvalidArgument(
            f"nproc_per_node must be at most the number of GPUs, {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextlib.contextmanager
def world(device: torch.device, shard: bool = False) -> Iterator[World]:
    """Join the other processes of the run, if there are any, and leave them at the end.

    Args:
        device: device of this process.
        shard: the weights are sharded, see `Shards`.
    Raises:
        TrainingError: one of them was killed, or lost its connection.
    """
    if not launched():
        yield World()
        return
    try:
        joined = (Shards if shard else Processes)(device)
        yield joined
        dist.barrier(group=joined.hosts)  # no process leaves while another still needs it
    except RuntimeError as error:
        if not _is_of_the_network(error):
            raise
        reason = re.sub(r"^\[[^]]*\] ", "", str(error).strip()).partition(". ")[0][:200]
        raise TrainingError(
            f"a process of the run was lost ({reason}); resume from the newest snapshot, with any "
            "number of processes: minidiff train --resume RUN"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
