"""Statistics over all workers: one flat all-reduce per dtype and operation."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from raycomp.errors import CompressionError

Operation = Literal["sum", "min", "max", "mean"]


@dataclass(frozen=True, eq=False)
class Statistic:
    """A tensor that every rank holds, and how the ranks' tensors merge.

    Args:
        tensor: of the same shape and dtype on every rank; `reduce_` overwrites it.
        operation: how the ranks' values become one: their sum, least, greatest, or mean (of what each rank holds whole,
            such as gradients that are all-reduced already).
        name: what it is of, for errors.
    """

    tensor: Tensor
    operation: Operation
    name: str = ""

    @property
    def described(self) -> str:
        """What must be alike on every rank."""
        return f"{self.name or 'a statistic'}: {self.operation} of {self.tensor.dtype} {tuple(self.tensor.shape)}"


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

    All statistics of one dtype and operation travel in one flat buffer, means with the sums, minima negated with the
    maxima. Without a process group nothing changes. A collective: every rank must call it.

    Raises:
        CompressionError: ranks hold different statistics; on all ranks alike.
    """
    if not is_distributed():
        return
    merged = list(statistics)
    _check_agreement(merged)
    groups: dict[tuple[torch.dtype, str], list[Statistic]] = defaultdict(list)
    for statistic in merged:
        operation = "sum" if statistic.operation in ("sum", "mean") else "max"
        groups[statistic.tensor.dtype, operation].append(statistic)
    for (_, operation), members in groups.items():
        _reduce_group(members, operation)


def sum_over_ranks_(tensor: Tensor) -> None:
    """Adds up a tensor whose shape is the same on every rank by construction, in place. A collective."""
    if is_distributed():
        _reduce_group([Statistic(tensor, "sum")], "sum")


def gathered(value: Any) -> list[Any]:
    """Every rank's picklable `value`, by rank. A collective."""
    if not is_distributed():
        return [value]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def settle_(statistics: Iterable[Statistic]) -> None:
    """Merges statistics that are still being gathered, in place, so that rank 0's are all that a checkpoint must hold.

    A sum stays on rank 0 alone, the others go on from zero: merging again later counts nothing twice. A collective.
    """
    settled = list(statistics)
    reduce_(settled)
    if rank() != 0:
        for statistic in settled:
            if statistic.operation == "sum":
                statistic.tensor.zero_()


def statistics_state(statistics: Mapping[str, Statistic]) -> dict[str, Any]:
    """Settled statistics as plain values and tensors."""
    return {key: {**vars(statistic), "tensor": statistic.tensor.clone()} for key, statistic in statistics.items()}


def restored_statistics(state: Mapping[str, Any], device: torch.device) -> dict[str, Statistic]:
    """The statistics of `statistics_state()`, on any number of ranks: what adds up is on rank 0 alone."""
    found = {}
    for key, values in state.items():
        elsewhere = values["operation"] == "sum" and rank() != 0
        tensor = torch.zeros_like(values["tensor"]) if elsewhere else values["tensor"].clone()
        found[key] = Statistic(tensor.to(device), values["operation"], values["name"])
    return found


def _check_agreement(statistics: Sequence[Statistic]) -> None:
    """Ranks that reduced different things would be aborted by gloo, or hang."""
    described = [statistic.described for statistic in statistics]
    digest = int.from_bytes(hashlib.blake2b("\n".join(described).encode(), digest_size=7).digest())
    device = communication_device(statistics[0].tensor.device if statistics else torch.device("cpu"))
    extremes = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if int(extremes[0]) == -int(extremes[1]):
        return
    everyone = gathered(described)
    for other, theirs in enumerate(everyone):
        for ours, their in zip_longest(everyone[0], theirs, fillvalue="nothing"):
            if ours != their:
                message = f"the workers gathered different statistics: rank 0 has {ours}, rank {other} has {their}"
                raise CompressionError(message, remedy="let every worker run the same modules in each training step")


def _reduce_group(members: list[Statistic], operation: str) -> None:
    device = communication_device(members[0].tensor.device)
    flat = torch.cat([_signed(member).detach().reshape(-1).to(device) for member in members])
    if operation == "max" and flat.is_floating_point():
        # gloo's maximum of a number and no number is either of them.
        flat.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    dist.all_reduce(flat, op=dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX)
    offset = 0
    for member in members:
        count = member.tensor.numel()
        merged = flat[offset : offset + count].view(member.tensor.shape)
        member.tensor.copy_(_unsigned(member, merged))
        offset += count


def _signed(member: Statistic) -> Tensor:
    return -member.tensor if member.operation == "min" else member.tensor


def _unsigned(member: Statistic, merged: Tensor) -> Tensor:
    if member.operation == "mean":
        return merged / world_size()
    return -merged if member.operation == "min" else merged


def communication_device(device: torch.device) -> torch.device:
    """Where a tensor of `device` must lie for the process group: NCCL reduces GPU tensors alone, gloo CPU ones."""
    backend = dist.get_backend()
    if backend == "nccl":
        return device if device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    if backend == "gloo":
        return torch.device("cpu")
    return device
