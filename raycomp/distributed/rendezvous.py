"""How the workers of a Ray that a job has started find each other: through a file, where torch would open a port."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend

from raycomp.distributed.local_ray import local_folder


def torch_config(backend: str) -> TorchConfig:
    """The process group of a stage's workers.

    Args:
        backend: torch's: gloo or nccl.
    """
    folder = local_folder()
    return TorchConfig(backend=backend) if folder is None else _FileConfig(backend=backend, folder=str(folder))


@dataclass
class _FileConfig(TorchConfig):
    """Workers of one machine, which meet in a folder of their user alone; torch's TCPStore listens on all addresses."""

    folder: str = ""

    @property
    def backend_cls(self) -> type[_FileBackend]:
        return _FileBackend


class _FileBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: _FileConfig) -> None:
        """Each start of the workers has a file of its own: an earlier one's may hold the addresses of the dead."""
        worker_group.execute(_set_torch_distributed_env_vars)
        place = f"file://{backend_config.folder}/workers-{uuid4().hex}"
        world = len(worker_group)
        setups = [
            worker_group.execute_single_async(
                rank,
                _setup_torch_process_group,
                backend=backend_config.backend,
                world_rank=rank,
                world_size=world,
                init_method=place,
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(world)
        ]
        ray.get(setups)
