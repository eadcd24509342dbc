"""What runs on each worker of Ray Train; `pipelines/train.py` starts it."""

import hashlib
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed as dist
from filelock import FileLock

from aegan import files
from aegan.config import ComputeConfig, ConfigError, TrainConfig
from aegan.training.checkpoint import CheckpointError
from aegan.training.loop import DivergedError
from aegan.training.loop import train as training_loop
from aegan.training.run_folder import RunFolder
from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors
from pipelines.bucket.run_store import OUTCOME, RunStore, Uploader
from pipelines.bucket.shard_store import fetch_shards, node_folder
from pipelines.cluster import prometheus
from pipelines.cluster.process_group import stop_requested
from pipelines.cluster.ray_private import preemption
from pipelines.cluster.session import ORPHAN_WAIT_SECONDS, cpus_of_this_node


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What the driver tells every worker."""

    config: TrainConfig
    run_folder: RunFolder  # on a disk that all nodes share, unless there is a run store
    shards: Path  # likewise
    manifest: dict[str, Any]  # of the shards: the driver's word for what they are
    storage: str  # s3://bucket/prefix; empty: the shared disk
    run_store: str  # the run's address there
    driver: str  # token of the driver in the run store
    compute: ComputeConfig


def train_worker(settings: dict[str, Assignment]) -> dict[str, Any]:
    """Train as this rank; returns how it ended. An error no retry can cure is part of that."""
    assignment = settings["assignment"]
    context, compute = ray.train.get_context(), assignment.compute
    rank = context.get_world_rank()
    torch.set_num_threads(
        compute.threads_per_worker or max(cpus_of_this_node() // context.get_local_world_size(), 1)
    )
    workspace: _Workspace | None = None
    try:
        with clear_disk_errors(assignment.run_folder.path):
            workspace = _Workspace(assignment, rank)
        problem = ""
    except UserError as error:
        problem = str(error)
    ray.train.collective.barrier()  # which, unlike PyTorch's, waits for any download
    problems: list[str] = [""] * context.get_world_size()
    dist.all_gather_object(problems, problem)
    if workspace is None or any(problems):
        return {"error": next(filter(None, problems))}
    outcome = train_here(
        assignment.config,
        shards=workspace.shards,
        run_folder=workspace.run_folder.path,
        device=ray.train.torch.get_device(),
        rank=rank,
        world_size=context.get_world_size(),
        micro_batch_size=compute.micro_batch_size,
        report=workspace.report,
        should_stop=workspace.should_stop,
    )
    return workspace.finish(outcome)


def train_here(config: TrainConfig, *, run_folder: Path, **keywords: Any) -> dict[str, Any]:
    """Call the training loop; an error that no retry can cure becomes part of the outcome."""
    try:
        with clear_disk_errors(run_folder):
            return asdict(training_loop(config, run_folder=run_folder, **keywords))
    except (CheckpointError, ConfigError, DivergedError, UserError) as error:
        return {"error": str(error)}


class _Workspace:
    """Where a rank finds the shards and works; rank 0's folder is carried into the run store."""

    def __init__(self, assignment: Assignment, rank: int) -> None:
        self._rank, self._driver = rank, assignment.driver
        self._name = assignment.run_folder.path.name
        self.shards, self.run_folder = assignment.shards, assignment.run_folder
        self._store = RunStore(assignment.run_store) if assignment.run_store else None
        self._uploader: Uploader | None = None
        if self._store is not None:
            self.shards = fetch_shards(assignment.storage, assignment.manifest)
            node = ray.get_runtime_context().get_node_id()
            place = hashlib.sha256(f"{node} {assignment.run_store}".encode()).hexdigest()[:12]
            self.run_folder = RunFolder(node_folder() / "runs" / f"{self._name}-{place}")
        for folder in (self.run_folder.path, self.shards):
            if self._store is None and not folder.exists():
                raise UserError(
                    f"{folder} is not on the node {ray.util.get_node_ip_address()}: link it to a "
                    "disk that all nodes share, or set compute.storage to s3://bucket/prefix"
                )
        if rank != 0:
            return
        self.run_folder.path.mkdir(parents=True, exist_ok=True)
        # Wait for the worker of a killed run, which would write there too.
        self._lock = FileLock(self.run_folder.worker_lock, timeout=ORPHAN_WAIT_SECONDS)
        self._lock.acquire()
        if self._store is not None:
            self._store.exchange(self.run_folder)
            self._uploader = Uploader(self._store, self.run_folder, self._driver)

    def report(self, metrics: dict[str, float]) -> None:
        """Called by every rank when a checkpoint was saved."""
        if self._uploader is not None:
            self._uploader.checkpoint_saved()
        if self._rank == 0:
            prometheus.export(metrics, run=self._name)
        ray.train.report(metrics)

    def should_stop(self) -> bool:
        """Whether someone asked: the driver, the run store, this process's or its node's end."""
        if stop_requested() or preemption() is not None:
            return True
        if self._uploader is not None:
            return self._uploader.should_stop()
        return self.run_folder.stop.exists()

    def finish(self, outcome: dict[str, Any]) -> dict[str, Any]:
        """Upload what is left and record the outcome; returns it."""
        if self._rank != 0:
            return outcome
        if self._uploader is not None and self._store is not None:
            try:
                self._uploader.close()
                self._store.write(OUTCOME, {**outcome, "driver": self._driver})
                shutil.rmtree(self.run_folder.path)  # all of it is in the bucket
            except UserError as error:
                outcome = {"error": str(error)}
        else:
            with suppress(OSError):  # a full disk: the returned value says the same
                files.write_json(self.run_folder.outcome, outcome)
        self._lock.release()
        return outcome
