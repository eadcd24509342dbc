"""How the workers of Ray Train form a process group, and hear that they are to end.

Without a cluster the group never leaves this machine: PyTorch's TCP store listens on every
interface; here the workers meet in a file instead and talk over the loopback interface.
"""

import os
import signal
import sys
import threading
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray.train
import torch.distributed as dist
from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from aegan.training.run_folder import RENDEZVOUS

COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # the others wait while rank 0 judges a checkpoint

_stop_requested = threading.Event()


def stop_requested() -> bool:
    """Whether this worker was sent SIGTERM: it saves a checkpoint, then its run goes on without."""
    return _stop_requested.is_set()


def _listen_for_end() -> None:
    """In a worker's main thread, where alone Python handles signals; training is in another."""
    signal.signal(signal.SIGTERM, lambda *_: _stop_requested.set())


@dataclass
class ClusterTorchConfig(TorchConfig):  # type: ignore[misc]
    """For TorchTrainer(torch_config=...) with workers on any node."""

    timeout_s: int = int(COLLECTIVE_TIMEOUT.total_seconds())

    @property
    def backend_cls(self) -> type[Backend]:
        return _ClusterBackend


class _ClusterBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: ClusterTorchConfig) -> None:
        worker_group.execute(_listen_for_end)
        super().on_start(worker_group, backend_config)


@dataclass
class LoopbackTorchConfig(TorchConfig):  # type: ignore[misc]
    """For TorchTrainer(torch_config=...) with all workers on this machine."""

    folder: str = ""  # where the workers meet

    @property
    def backend_cls(self) -> type[Backend]:
        return _LoopbackBackend


class _LoopbackBackend(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True  # NCCL talks between GPUs that each worker must see

    def on_start(self, worker_group: Any, backend_config: LoopbackTorchConfig) -> None:
        worker_group.execute(_listen_for_end)
        uses_gpu = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        rendezvous = f"file://{backend_config.folder}/{RENDEZVOUS.format(uuid.uuid4().hex)}"
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
