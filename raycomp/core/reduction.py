"""Statistics over all workers: one flat all-reduce per dtype and operation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Operation = Literal["sum", "min", "max"]

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass(frozen=True, eq=False)
class Statistic:
    """A tensor that every rank holds, and how the ranks' tensors merge.

    Args:
        tensor: of the same shape and dtype on every rank; `reduce_` overwrites it.
        operation: how two ranks' values become one.
    """

    tensor: Tensor
    operation: Operation


def is_distributed() -> bool:
    """Whether a process group of more than one rank is initialised (by Ray Train, torchrun or the user)."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """The number of ranks, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def reduce_(statistics: Iterable[Statistic]) -> None:
    """Merges each statistic over all ranks, in place; afterwards every rank holds bitwise the same.

    All statistics of one dtype and operation travel in one flat buffer. Minima travel negated with the maxima. Without
    a process group nothing changes. A collective: every rank must call it with the same statistics in the same order.
    """
    if not is_distributed():
        return
    groups: dict[tuple[torch.dtype, str], list[Statistic]] = defaultdict(list)
    for statistic in statistics:
        operation = "sum" if statistic.operation == "sum" else "max"
        groups[statistic.tensor.dtype, operation].append(statistic)
    for (_, operation), members in groups.items():
        _reduce_group(members, operation)


def _reduce_group(members: list[Statistic], operation: str) -> None:
    device = communication_device(members[0].tensor.device)
    flat = torch.cat([_signed(member).detach().reshape(-1).to(device) for member in members])
    dist.all_reduce(flat, op=_OPERATIONS[operation])
    offset = 0
    for member in members:
        count = member.tensor.numel()
        merged = flat[offset : offset + count].view(member.tensor.shape)
        member.tensor.copy_(-merged if member.operation == "min" else merged)
        offset += count


def _signed(member: Statistic) -> Tensor:
    return -member.tensor if member.operation == "min" else member.tensor


def communication_device(device: torch.device) -> torch.device:
    """Where a tensor of `device` must lie for the process group: NCCL reduces GPU tensors alone, gloo CPU ones."""
    backend = dist.get_backend()
    if backend == "nccl":
        return device if device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    if backend == "gloo":
        return torch.device("cpu")
    return device
