"""Runs a function on several gloo ranks, each a process of this machine."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

# A fork of this process would take along the threads of Ray, autograd and others as they are at that moment.
_CONTEXT = multiprocessing.get_context("forkserver")
_SLOW_TO_IMPORT = ["pytest", "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "torch.export._trace"]
_CONTEXT.set_forkserver_preload([*_SLOW_TO_IMPORT, "tests.contracts.training"])


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(rank, world, *args)` on every rank; its results, which must be picklable, by rank."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(world, mp_context=_CONTEXT) as pool,
    ):
        futures = [pool.submit(_work, rank, world, f"{folder}/store", function, args) for rank in range(world)]
        return [future.result() for future in futures]


def _work(rank: int, world: int, store: str, function: Callable[..., Any], args: Any) -> Any:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in workers of Ray's
    timeout = timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    try:
        dist.barrier()  # a rank that is done must not leave while another still connects
        return function(rank, world, *args)
    finally:
        dist.destroy_process_group()


def gradients_of(model: nn.Module) -> list[Any]:
    """A NumPy array for each parameter that has a gradient."""
    return [parameter.grad.numpy().copy() for parameter in model.parameters() if parameter.grad is not None]
