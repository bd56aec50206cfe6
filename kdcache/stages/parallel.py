"""One training run over the processes that torchrun starts: gradients are summed, not averaged, and by hand.

DistributedDataParallel averages gradients over ranks, wants a forward pass on each of them, and cannot
know a denominator that spans ranks and accumulation pieces. Here every rank adds up its own rows,
however few, and one all-reduce sums gradients, numerators and denominators; a rank without a row in a
short last batch adds zeros. The price: communication starts after the backward pass instead of during
it (students are small).

Buffers (BatchNorm's running statistics) are rank 0's on every rank, as in DistributedDataParallel, and
BatchNorm normalises by the rows of one forward pass: models with it give the results of another batch
size when the world size changes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdcache.stages.devices import pick_device
from kdcache.train.ranks import Ranks, discover


@dataclass(frozen=True, eq=False)
class Team:
    """The processes of a run; a world of one needs no torch.distributed and its methods do nothing.

    Args:
        device: where this rank computes.
        control: a gloo group for small messages between hosts' memories, None in a world of one.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    control: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag whether some rank raised it; never waits for a GPU."""
        if self.world_size == 1:
            return list(flags)
        raised = torch.tensor([int(flag) for flag in flags], dtype=torch.uint8)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self.control)
        return [bool(flag) for flag in raised.tolist()]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's CPU tensor (equal shapes), in the order of ranks."""
        if self.world_size == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor, group=self.control)
        return gathered

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sums the gradients over the ranks; a parameter that no rank used keeps None."""
        if self.world_size == 1:
            return
        used = self.any([parameter.grad is not None for parameter in parameters])
        by_type: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter, is_used in zip(parameters, used, strict=True):
            if is_used:
                by_type.setdefault(parameter.dtype, []).append(parameter)
        for group in by_type.values():
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat)
            pieces = torch.split(flat, [grad.numel() for grad in grads])
            for parameter, grad, piece in zip(group, grads, pieces, strict=True):
                parameter.grad = piece.view_as(grad)

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites tensors with rank 0's."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


@contextmanager
def team(device: str) -> Iterator[Team]:
    """The processes that torchrun started, or this one alone.

    Joins torch.distributed if the environment says that there are several processes and nobody has done so
    (nccl on CUDA, gloo on CPU), and leaves it again. An initialised default group is used as it is.

    Args:
        device: `auto` (CUDA if there is one, else CPU), `cpu`, `cuda`, `cuda:1`, `mps` ...
    """
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # nccl takes the current one
    joined = not dist.is_initialized() and _torchrun().world_size > 1
    if joined:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        if dist.is_initialized() and dist.get_world_size() > 1:
            control = dist.new_group(backend="gloo")
            yield Team(chosen, dist.get_rank(), dist.get_world_size(), control)
        else:
            yield Team(chosen)
    finally:
        if joined:
            dist.destroy_process_group()


def _torchrun() -> Ranks:
    """The ranks of torchrun alone: a batch script of SLURM's has ranks in its environment and is one process."""
    return discover({name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ})
