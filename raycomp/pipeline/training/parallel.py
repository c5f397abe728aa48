"""Keeping ranks in step: gradients that are added in one order whatever happened before, and buffers of rank 0."""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from raycomp.core.reduction import communication_device, is_distributed, world_size


def data_parallel(
    model: nn.Module, device: torch.device, *, broadcast_buffers: bool, find_unused_parameters: bool
) -> nn.Module:
    """The model in DDP; itself where this process is alone or nothing trains.

    DDP lays gradients out anew after its first step, so a resumed run's first step has them at other places than an
    undisturbed run's, and a ring adds the ranks in an order that depends on the place. Two terms have but one sum; for
    more ranks on CPUs, gradients are added in the order of the ranks.
    """
    if not is_distributed() or not any(parameter.requires_grad for parameter in model.parameters()):
        return model
    parallel = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=broadcast_buffers,
        find_unused_parameters=find_unused_parameters,
    )
    if world_size() > 2 and device.type == "cpu":
        # DDP takes the hook's annotations for types, and here they are text.
        parallel.register_comm_hook(None, lambda _, bucket: _mean_in_rank_order(bucket.buffer()))
    return parallel


def _mean_in_rank_order(gradients: Tensor) -> Future[Tensor]:
    """Every rank adds up one part for all: as many bytes as an all-reduce sends."""
    world = world_size()
    sent = F.pad(gradients, (0, -len(gradients) % world))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    first, *others = received.chunk(world)
    for part in others:
        first += part
    dist.all_gather_into_tensor(sent, first / world)
    done: Future[Tensor] = Future()
    done.set_result(sent[: len(gradients)])
    return done


@torch.no_grad()
def take_buffers_of_rank_0_(model: nn.Module) -> None:
    """Gives every rank rank 0's buffers, as DDP does before each forward pass: the running statistics that are saved.

    One broadcast per dtype. A collective; without a process group nothing changes.
    """
    if not is_distributed():
        return
    groups: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for buffer in model.buffers():
        groups[buffer.dtype].append(buffer)
    for buffers in groups.values():
        device = communication_device(buffers[0].device)
        flat = torch.cat([buffer.reshape(-1).to(device) for buffer in buffers])
        dist.broadcast(flat, src=0)
        for buffer, part in zip(buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view(buffer.shape))
