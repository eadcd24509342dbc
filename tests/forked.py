"""Processes that start without a wait for imports: PyTorch and MLflow take longer than a test.

They are forked from a server that has imported both. A process has one such server, so that it
is asked for the imports of all tests, and before any of them starts it.
"""

import multiprocessing
from collections.abc import Callable
from contextlib import chdir
from typing import Any

import torch.multiprocessing

from pipelines.registry import mlflow_store
from tests.trained import ROOT

mlflow_store.set_environment()
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",  # which an optimizer imports at its first step
        "pytest",
        "pipelines.train",
        "pipelines.registry.decisions",
        "alembic.script",
        "mlflow.store.db.utils",
        "mlflow.store.model_registry.sqlalchemy_store",
        "mlflow.store.tracking.sqlalchemy_store",
    ]
)


def on_ranks(worker: Callable[..., None], *arguments: Any, world_size: int) -> None:
    """Calls `worker(rank, *arguments)` in a process for each rank, and waits for them."""
    with chdir(ROOT):  # where the server finds our modules
        torch.multiprocessing.start_processes(
            worker, arguments, nprocs=world_size, start_method="forkserver"
        )
