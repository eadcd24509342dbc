"""What is used of Ray that it does not promise to keep; a test holds that all of it is there."""

import importlib
from types import ModuleType
from typing import Any


def services() -> ModuleType:
    """Which cluster was started on this machine last; which of its nodes this machine is."""
    return importlib.import_module("ray._private.services")


def ask_gcs(address: str, *, timeout: float) -> None:
    """Ask the control service at host:port whether it lives; raises grpc.RpcError."""
    from ray._private.gcs_utils import create_gcs_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    channel = create_gcs_channel(address)
    try:
        service = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        service.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=timeout)
    finally:
        channel.close()


def preemption() -> Any:
    """In a worker of Ray Train: what is known of its nodes' end; None without a notice."""
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info


def local_trainer() -> Any:
    """Ray Train's TorchTrainer where Ray ends with the driver, with two processes less.

    One would free what a dead controller holds, one would deal out Ray's own data sets, which we do
    not have. Workers wait for the first, and each takes seconds of a core to start.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )

    class LocalTrainer(TorchTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            unused = (DatasetsCallback, PlacementGroupCleanerCallback)
            made = super()._create_default_callbacks()
            return [callback for callback in made if not isinstance(callback, unused)]

    return LocalTrainer
