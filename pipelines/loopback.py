"""A process group that never leaves this machine, for training without a cluster.

PyTorch's TCP store listens on every interface; here the workers meet in a file instead and talk
over the loopback interface.
"""

import os
import sys
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray.train
import torch.distributed as dist
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # the others wait while rank 0 judges a checkpoint


@dataclass
class LoopbackTorchConfig(TorchConfig):  # type: ignore[misc]
    """For TorchTrainer(torch_config=...)."""

    folder: str = ""  # where the workers meet

    @property
    def backend_cls(self) -> type[Backend]:
        return _LoopbackBackend


class _LoopbackBackend(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True  # NCCL talks between GPUs that each worker must see

    def on_start(self, worker_group: Any, backend_config: LoopbackTorchConfig) -> None:
        uses_gpu = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        rendezvous = f"file://{backend_config.folder}/rendezvous-{uuid.uuid4().hex}"
        worker_group.execute(
            _join_process_group, backend="nccl" if uses_gpu else "gloo", rendezvous=rendezvous
        )


def _join_process_group(*, backend: str, rendezvous: str) -> None:
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
    context = ray.train.get_context()
    dist.init_process_group(
        backend,
        init_method=rendezvous,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        timeout=COLLECTIVE_TIMEOUT,
    )
